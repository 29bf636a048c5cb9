"""Trains a recurrent network on real text, without clipping and with two methods.

Run it as ``python -m optclip.demo``; it needs the extra ``optclip[demo]``. Nothing here
is imported by the library itself.
"""
