"""Drop and merge tokens in a running model."""
