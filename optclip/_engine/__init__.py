"""The stages of one update, one module per stage."""
