"""What to do with a model on this machine: fewer tokens beside what a user would pick instead."""
