"""Checking and writing output files."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from repshift_cli.errors import OutputError, UsageError
from repshift_cli.utils.figures import write_figure
from repshift_cli.utils.files import DeferredErrors, atomic_folder, atomic_output, check_output, write_text


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
    with pytest.raises(UsageError, match="is not a regular file"):
        check_output(tmp_path, force=True)


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(OutputError, match="cannot"):
        write_text(Path("/proc/repshift.txt"), "x", force=False)


def test_a_name_too_long() -> None:
    with pytest.raises(OutputError, match="cannot"):
        check_output(Path("x" * 5000), force=False)


def output_of(kind: str, path: Path, force: bool = False) -> AbstractContextManager[Path]:
    return atomic_folder(path, ["a.txt", "b.txt"], force) if kind == "folder" else atomic_output(path, force)


def write(kind: str, temporary: Path) -> None:
    for path in [temporary / "a.txt", temporary / "b.txt"] if kind == "folder" else [temporary]:
        path.unlink(missing_ok=True)  # safetensors makes a new file, for the user alone
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))


@pytest.fixture(params=["hard links", "no hard links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", fail)


@pytest.mark.usefixtures("links")
class TestAtomicOutputs:
    @pytest.mark.parametrize("kind", ["file", "folder"])
    @pytest.mark.parametrize("force", [False, True])
    def test_permissions(self, kind: str, force: bool, tmp_path: Path) -> None:
        path = tmp_path / "output"
        for mask in (0o022, 0o077):
            before = os.umask(mask)
            try:
                with output_of(kind, path, force) as temporary:
                    write(kind, temporary)
            finally:
                os.umask(before)
            files = sorted(path.iterdir()) if kind == "folder" else [path]
            assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o666 & ~mask] * len(files)
            assert list(tmp_path.iterdir()) == [path]
            if not force:
                return

    @pytest.mark.parametrize("kind", ["file", "folder"])
    @pytest.mark.parametrize("appears", ["file", "folder", "empty folder", "link"])
    def test_an_output_that_appears_meanwhile_is_kept(self, kind: str, appears: str, tmp_path: Path) -> None:
        path = tmp_path / "output"
        with pytest.raises(UsageError, match="already exists"), output_of(kind, path) as temporary:
            write(kind, temporary)
            if appears == "file":
                path.write_text("mine")
            elif appears == "link":
                path.symlink_to("missing")
            else:
                path.mkdir()
                if appears == "folder":
                    (path / "a.txt").write_text("mine")
        assert list(tmp_path.iterdir()) == [path]
        assert path.is_symlink() == (appears == "link")
        if appears == "file":
            assert path.read_text() == "mine"
        elif appears != "link":
            assert [file.read_text() for file in path.iterdir()] == ["mine"] * (appears == "folder")

    @pytest.mark.parametrize("problem", [KeyboardInterrupt(), SystemExit(143)])
    def test_an_interruption_while_the_output_gets_its_name(
        self, problem: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def stop(*arguments: Any) -> None:
            raise problem

        monkeypatch.setattr(Path, "rename", stop)
        monkeypatch.setattr(Path, "replace", stop)
        if os.link.__name__ == "link":
            monkeypatch.setattr(os, "link", stop)
        for kind in ("file", "folder"):
            with pytest.raises(type(problem)), output_of(kind, tmp_path / "output") as temporary:
                write(kind, temporary)
            assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_dangling_link_needs_force(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.symlink_to("missing")
    with (
        pytest.raises(UsageError, match="already exists" if kind == "file" else "is not a folder"),
        output_of(kind, path),
    ):
        raise AssertionError
    assert path.is_symlink()
    if kind == "file":
        with output_of(kind, path, force=True) as temporary:
            write(kind, temporary)
        assert path.is_file()
        assert not path.is_symlink()


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_changes_no_folder(problem: BaseException, existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "output"
    if existing:
        path.mkdir()
        for name in ("a.txt", "b.txt", "mine"):
            (path / name).write_text("old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((OutputError, KeyboardInterrupt, SystemExit)), output_of("folder", path, force=True) as made:
        (made / "a.txt").write_text("half")
        raise problem
    assert sorted(tmp_path.rglob("*")) == before
    assert all(file.read_text() == "old" for file in path.glob("*"))


def test_a_missing_file_of_a_folder_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "a.txt").write_text("old")
    with pytest.raises(OutputError), output_of("folder", tmp_path / "output", force=True) as made:
        (made / "a.txt").write_text("new")
    assert (tmp_path / "output" / "a.txt").read_text() == "old"


def test_errors_are_deferred(tmp_path: Path) -> None:
    file = DeferredErrors(Path("/dev/full"))
    assert [file.write(b"abc"), file.write(b"de")] == [3, 2]
    with pytest.raises(OSError, match="No space left on device"):
        file.close()
    file.close()
    with DeferredErrors(tmp_path / "a.pt2") as file:
        assert [file.write(b"abc"), file.write(b"de")] == [3, 2]
    assert (tmp_path / "a.pt2").read_bytes() == b"abcde"


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_figure_on_a_full_disk(kind: str) -> None:
    from matplotlib.figure import Figure

    with pytest.raises(OSError, match="No space left on device"):
        write_figure(Figure(), Path("/dev/full"), kind)
