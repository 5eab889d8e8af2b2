"""Code that runs a transformer."""
