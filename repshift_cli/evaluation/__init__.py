"""Quality of models on labelled data."""
