"""Compares optclip with Optax's clip and no clip, on a network that reads real text.

Run it with ``python -m optclip.demo``. It requires the extra ``optclip[demo]``. The
library itself does not import this package.
"""
