"""Importance scores of tokens, one per file."""
