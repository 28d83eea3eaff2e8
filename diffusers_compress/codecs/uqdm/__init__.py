"""UQDM's own parts."""
