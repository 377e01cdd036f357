"""Checking and writing output files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from repshift_cli.errors import OutputError, UsageError
from repshift_cli.utils.files import atomic_output, check_output, write_text


def test_write_text_leaves_no_other_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "grüße", force=False)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "grüße"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a.txt", "x", force=False)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UsageError, match="already exists") as caught:
        write_text(path, "new", force=False)
    assert "--force" in str(caught.value)
    assert caught.value.exit_code == 2
    assert path.read_text() == "old"
    write_text(path, "new", force=True)
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    "problem", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_changes_nothing(problem: BaseException, existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    if existing:
        path.write_text("old")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((OutputError, KeyboardInterrupt, ValueError)), atomic_output(path, force=True) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("half")
        raise problem
    assert sorted(tmp_path.iterdir()) == before
    assert not existing or path.read_text() == "old"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="No space left on device") as caught,
        atomic_output(tmp_path / "a.txt", force=False),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.exit_code == 1


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "missing" / "a.txt", force=False)


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "file" / "a.txt", force=False)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path, force=True)


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(OutputError, match="cannot"):
        write_text(Path("/proc/repshift.txt"), "x", force=False)


def test_a_name_too_long() -> None:
    with pytest.raises(OutputError, match="cannot"):
        check_output(Path("x" * 5000), force=False)
