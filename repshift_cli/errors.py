"""Every error that a user can cause or meet, each with the exit code that the command line ends with."""

from __future__ import annotations

__all__ = [
    "CheckFailed",
    "CheckpointError",
    "DataError",
    "ModelError",
    "OutputError",
    "RecipeError",
    "RepshiftError",
    "UsageError",
    "first_line",
    "last_line",
]


INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class RepshiftError(Exception):
    """An error that is explained to the user without a traceback.

    Args:
        message: what is wrong, and where.
        hint: what is allowed, or what to do.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(RepshiftError):
    """An option, an argument or a combination of them that cannot be."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that does not parse, or that the model cannot follow."""


class ModelError(RepshiftError):
    """A kind of model, or of module in it, that is not supported."""

    exit_code = 3


class CheckpointError(ModelError):
    """A file that cannot be read as weights, or weights that fit no model."""


class DataError(RepshiftError):
    """A dataset that is unknown, missing, empty, unreadable or unfit for the model."""

    exit_code = 4


class CheckFailed(RepshiftError):
    """A check that the command made of its own result has failed."""

    exit_code = 5


class OutputError(RepshiftError):
    """A result that could not be written."""


def first_line(error: BaseException) -> str:
    """The first line of what a library says, which may go on for pages; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """The last line of an error message; compilers print their summary there."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
