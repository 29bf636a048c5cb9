"""Clipping methods compared by training: tasks x methods x learning rates x seeds."""
