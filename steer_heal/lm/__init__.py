"""Everything that runs a transformer."""
