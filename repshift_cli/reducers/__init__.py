"""What becomes of the tokens, one way per file."""

from repshift_cli.reducers.base import Reducer, build_reducer, reducer_kinds

__all__ = ["Reducer", "build_reducer", "reducer_kinds"]
