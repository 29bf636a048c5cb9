"""The published methods, one per file, each with its state, rule and transformation."""
