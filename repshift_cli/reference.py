"""What accuracy a model is known to have: timm's table of results, of which the user has a copy.

The table (`results-imagenet.csv` of timm's repository, and its like for other test sets) is not in timm's package.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from repshift_cli.errors import DataError

__all__ = ["Known", "known_results", "most_alike"]

_LARGEST = 1 << 24
_NEEDED = ("model", "top1")


@dataclass(frozen=True)
class Known:
    """A row of the table.

    Attributes:
        model: architecture and tag of the weights, `vit_base_patch16_224.augreg2_in21k_ft_in1k`.
        top1: percent.
        img_size: side of the pictures that it was measured with; None where the table does not tell.
        crop_pct: share of the resized side that was cut out; None where the table does not tell.
    """

    model: str
    top1: float
    img_size: int | None
    crop_pct: float | None


def known_results(path: Path) -> tuple[Known, ...]:
    """Read a table of results, CSV with the columns of timm's.

    Raises:
        DataError: it cannot be read, or is no such table.
    """
    hint = "Take results-imagenet.csv from the folder results of timm's repository."
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path} is too large for a table of results", hint)
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if not set(_NEEDED) <= set(rows.fieldnames or ()):
                raise DataError(f"{path} has no columns {' and '.join(_NEEDED)}", hint)
            return tuple(_known(row) for row in rows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}", hint) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} has a row that is none of results: {error}", hint) from error


def most_alike(table: Sequence[Known], model: str, img_size: int, crop_pct: float) -> Known | None:
    """The row of exactly these weights that was measured most as they are now (size, then crop); None without any."""
    rows = [row for row in table if row.model == model]
    return min(rows, key=lambda row: (row.img_size != img_size, row.crop_pct != crop_pct), default=None)


def _known(row: dict[str, str]) -> Known:
    size, crop = row.get("img_size"), row.get("crop_pct")
    top1 = float(row["top1"])
    if not 0 <= top1 <= 100:  # noqa: PLR2004 (percent)
        raise ValueError(f"{row['model']} has a top1 of {top1}")
    return Known(row["model"], top1, int(size) if size else None, float(crop) if crop else None)
