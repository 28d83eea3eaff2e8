"""The container of a file, with the standard library alone."""
