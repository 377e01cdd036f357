"""Compare scores and reducers: quality over MACs for a grid of combinations."""
