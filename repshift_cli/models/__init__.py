"""Model definitions that no well-kept library ships."""
