"""Wrappers for optimizers, clips and loss functions."""
