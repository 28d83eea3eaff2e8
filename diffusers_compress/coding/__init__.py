"""Bits: shared randomness, range coder, probability models, channels."""
