"""One HTML page about a compressed checkpoint."""
