"""Small utilities: files, progress, processes, statistics."""
