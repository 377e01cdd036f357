"""The processes of one `torchrun` job: gathering, stopping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from repshift_cli.cli.torchrun import is_first, own_device, refuse_torchrun
from repshift_cli.errors import UsageError
from repshift_cli.utils.distributed import Processes, together
from repshift_cli.utils.launch import launch

WORKER = """
import json, os, sys, time
from pathlib import Path
from repshift_cli.cli.torchrun import is_first, own_device, refuse_torchrun
from repshift_cli.errors import UsageError
from repshift_cli.utils.distributed import Processes, together
from repshift_cli.utils.launch import launch

with together() as group:
    found = {
        "rank": group.rank,
        "first": group.is_first,
        "count": group.count,
        "nearby": group.nearby,
        "collected": group.collect({"of": group.rank}),
        "before": group.stopped(),
    }
    group.collect(None)
    if group.rank == 1:
        group.stop()
    group.collect(None)
    found["after"] = group.stopped()
    again = Processes()
    found["next"] = again.stopped()
    group.collect(None)
Path(sys.argv[1] + os.environ["RANK"]).write_text(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("rank", "world", "together"), [(None, None, False), ("1", None, False), ("1", "1", False), ("1", "2", True)]
)
def test_launched_together_reads_the_variables_of_torchrun(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str | None, together: bool
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert launch().together == together


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "garbage"),
        ("WORLD_SIZE", "-2"),
        ("WORLD_SIZE", "9" * 5000),
        ("RANK", "two"),
        ("RANK", "2"),
        ("LOCAL_RANK", "0x1"),
        ("LOCAL_WORLD_SIZE", "0"),
    ],
)
def test_invalid_variables_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for variable, usual in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(variable, value if variable == name else usual)
    for read in (launch, lambda: refuse_torchrun("search"), lambda: own_device("cuda"), is_first):
        with pytest.raises(UsageError, match=f"{name}={value[:20]}"):
            read()


def test_one_process_without_a_group() -> None:
    with together() as group:
        assert (group.rank, group.count, group.nearby, group.is_first) == (0, 1, 1, True)
        assert group.collect("a") == ["a"]
        group.stop()
        assert not group.stopped()
    assert Processes().count == 1


def test_values_that_differ_between_processes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    group, others = Processes(), [{"data": "a", "batch size": 4}]
    monkeypatch.setattr(group, "collect", lambda mine: [mine, *others])
    group.check_equal({"data": "a", "batch size": 4})
    others += [{"data": "b", "batch size": 4, "--strict": True}]
    with pytest.raises(UsageError, match="rank 2 differs from rank 0 in --strict, data"):
        group.check_equal({"data": "a", "batch size": 4})


@pytest.mark.slow
def test_gathering_and_stopping(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    root = str(ROOT)
    done = subprocess.run(
        [*launch, str(tmp_path / "rank")],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        found = json.loads((tmp_path / f"rank{rank}").read_text())
        assert found == {
            "rank": rank,
            "first": rank == 0,
            "count": 3,
            "nearby": 3,
            "collected": [{"of": 0}, {"of": 1}, {"of": 2}],
            "before": False,
            "after": True,
            "next": False,
        }
