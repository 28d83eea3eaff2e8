"""Relic."""
