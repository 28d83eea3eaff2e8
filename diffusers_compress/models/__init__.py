"""Networks with weights."""
