"""What becomes of the tokens, one way per file."""

from repshift_cli.reduction.reducers.base import Chooser, Dims, Merged, Merger, Reducer, build_reducer, reducer_kinds

__all__ = ["Chooser", "Dims", "Merged", "Merger", "Reducer", "build_reducer", "reducer_kinds"]
