"""A recurrent network on real text, without a clip and with two: what clipping does.

Run it as ``python -m optclip.demo``; it needs the extra ``optclip[demo]``. Nothing here
is imported by the library itself.
"""
