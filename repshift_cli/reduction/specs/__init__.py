"""Specs of transformers, one file per library."""
