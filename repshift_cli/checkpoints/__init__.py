"""Load, identify and save models."""
