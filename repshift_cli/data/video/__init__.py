"""Video files, annotations and texts."""
