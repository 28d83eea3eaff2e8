"""DiffC."""
