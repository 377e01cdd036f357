"""Export a model to a file that runs without repshift. Each file in `formats/` is one format."""
