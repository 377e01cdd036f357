"""Measure the speed and memory of models and baselines."""
