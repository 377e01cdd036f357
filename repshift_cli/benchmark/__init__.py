"""Speed and memory of models, and of baselines beside them."""
