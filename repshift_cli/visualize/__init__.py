"""Draw the kept tokens over the images."""
