"""Find out which model a set of weights belongs to: one file per kind of model, and `match` to choose."""
