"""The environment variables that `torchrun` sets for each process. No torch: this is read at start-up."""

from __future__ import annotations

import os
from dataclasses import dataclass

from repshift_cli.errors import UsageError


@dataclass(frozen=True)
class Launch:
    """The place of this process.

    Attributes:
        rank, count: of all processes.
        gpu: number of its card, from LOCAL_RANK; None without `torchrun`.
        nearby: processes on this machine; None if it is not known.
    """

    rank: int
    count: int
    gpu: int | None
    nearby: int | None

    @property
    def together(self) -> bool:
        """Whether there are several processes."""
        return self.count > 1


def launch() -> Launch:
    """Read the variables.

    Raises:
        UsageError: one of them is not a number, or they contradict each other.
    """
    rank, count = _number("RANK", 0), _number("WORLD_SIZE", 1)
    gpu, nearby = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    if count is not None and count > 1 and rank is not None and rank >= count:
        raise _invalid("RANK", rank, f"below WORLD_SIZE={count}")
    count = 1 if rank is None else count or 1
    return Launch(rank or 0, count, gpu, nearby)


def _number(name: str, smallest: int) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= smallest):  # noqa: PLR2004
        raise _invalid(name, text, f"a number of {smallest} or more")
    return int(text)


def _invalid(name: str, value: object, allowed: str) -> UsageError:
    return UsageError(
        f"the environment variable {name}={value} is not {allowed}", "Start the command with torchrun, or unset it."
    )
