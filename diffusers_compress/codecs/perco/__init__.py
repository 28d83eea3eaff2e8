"""PerCo."""
