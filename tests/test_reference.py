"""timm's table of results, as a user gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from repshift_cli.errors import DataError
from repshift_cli.reference import known_results, most_alike

HEADER = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation\n"


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_row_that_was_measured_alike(tmp_path: Path) -> None:
    rows = (
        'vit.a,86.1,13.9,97.0,3.0,"1,014.45",384,1.000,bicubic\n'
        "vit.a,85.2,14.8,97.0,3.0,86.5,224,0.900,bicubic\n"
        "vit.b,70,30,90,10,86.5,224,0.900,bicubic\n"
    )
    found = known_results(table(tmp_path / "r.csv", HEADER + rows))
    assert len(found) == 3
    alike = most_alike(found, "vit.a", 224, 0.9)
    assert alike is not None
    assert (alike.top1, alike.img_size, alike.crop_pct) == (85.2, 224, 0.9)
    other = most_alike(found, "vit.a", 512, 1.0)
    assert other is not None
    assert other.img_size == 384
    assert most_alike(found, "vit", 224, 0.9) is None


def test_a_table_without_sizes(tmp_path: Path) -> None:
    (row,) = known_results(table(tmp_path / "r.csv", "model,top1\nvit.a,80.5\n"))
    assert (row.top1, row.img_size, row.crop_pct) == (80.5, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no columns"),
        ("name,accuracy\nvit,80\n", "no columns model and top1"),
        (HEADER + "vit.a,high,1,2,3,4,224,0.9,bicubic\n", "a row that is none"),
        (HEADER + "vit.a,101,1,2,3,4,224,0.9,bicubic\n", "a top1 of 101"),
        (HEADER + "vit.a\n", "a row that is none"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        known_results(table(tmp_path / "r.csv", text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        known_results(tmp_path / "r.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        known_results(tmp_path / "b.csv")
