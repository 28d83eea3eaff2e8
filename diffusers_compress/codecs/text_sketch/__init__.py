"""Text+Sketch."""
