"""One file for each published method: its paper, state, rule and clip."""
