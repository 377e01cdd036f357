"""Export a model to a file that runs without repshift. One file per format."""
