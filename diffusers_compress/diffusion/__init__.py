"""Noise levels, equations, solvers, families of models."""
