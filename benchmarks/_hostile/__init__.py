"""Hostile attempts on the command line: kinds of inputs, options and circumstances that are valid but for one thing."""
