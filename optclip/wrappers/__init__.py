"""Wrappers of optimizers, clips and loss functions."""
