"""Errors that are shown to the user, with the exit code of each kind."""

from __future__ import annotations

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

TERMINATED = 143
"""Exit code after SIGTERM."""


class RepshiftError(Exception):
    """An error that is shown without a traceback.

    Args:
        message: what is wrong, and where.
        hint: what is allowed, or what to do.
        document: what is known of the result, for `--json`.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None, document: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.document = document or {}

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(RepshiftError):
    """An invalid option or argument, or an invalid combination."""

    exit_code = 2


class RecipeError(UsageError):
    """An invalid recipe, or one that does not fit the model."""


class ModelError(RepshiftError):
    """An unsupported model, or an unsupported module in it."""

    exit_code = 3


class CheckpointError(ModelError):
    """A file that cannot be read as weights, or weights that fit no model."""


class DataError(RepshiftError):
    """A dataset that is unknown, missing, empty, unreadable or does not fit the model."""

    exit_code = 4


class CheckFailed(RepshiftError):
    """A check of the command's own result failed."""

    exit_code = 5


class OutputError(RepshiftError):
    """A result could not be written."""


def first_line(error: BaseException) -> str:
    """The first line of the message of an error, or the name of its class if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """The last line of an error message; compilers print their summary there."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
