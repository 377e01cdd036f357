"""What becomes of the tokens, one way per file."""

from repshift_cli.reduction.reducers.base import Dims, Merged, Merger, Pruner, Reducer, build_reducer, reducer_kinds

__all__ = ["Dims", "Merged", "Merger", "Pruner", "Reducer", "build_reducer", "reducer_kinds"]
