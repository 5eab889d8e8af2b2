"""Our Hydra plugins, in the package `hydra_plugins`, the only place where Hydra looks for them."""
