"""Ways to reduce tokens, one per file."""
