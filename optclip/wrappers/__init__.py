"""Wrappers around an optimizer, or around a function of gradients."""
