"""Image datasets, one kind per file."""
