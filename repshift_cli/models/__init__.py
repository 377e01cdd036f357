"""Model definitions that no maintained library provides."""
