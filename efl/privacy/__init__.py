"""Differential privacy: optimizers, noise, accounting."""
