"""Trains a recurrent network on real text without clipping and with two clips.

Run it with ``python -m optclip.demo``. It requires the extra ``optclip[demo]``. The
library itself does not import this package.
"""
