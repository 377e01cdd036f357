"""`repshift sweep` on small models with few images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from outcome import Command, explained
from paths import ROOT

QUICK = ("--images", "8", "--calibration-images", "8", "--threads", "1")
NAMES = ["sweep.csv", "sweep.jsonl", "sweep.md", "sweep.svg", "sweep.tex"]


def test_everything_that_it_writes(cli: Command, dense: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ("sweep", dense, "--data", photos, "--ratios", "0.25", "--macs", "0.7", "--layers", "0,2", *QUICK)
    outcome = cli(*arguments, "--metrics", "shift,random", "--reducers", "prune,vid_tldr", "--seeds", "0,1")
    assert outcome.rc == 0, outcome.stderr
    assert all(len(line.rstrip()) <= 80 for line in outcome.stdout.splitlines())
    assert sorted(path.name for path in (tmp_path / "dense_sweep").iterdir()) == NAMES
    assert outcome.stdout.count("representation_shift") >= 2
    assert "not supported: representation_shift, vid_tldr at 0.25, 0.7: vid_tldr acts" in outcome.stdout.replace(
        "\n", " "
    )
    svg = (tmp_path / "dense_sweep" / "sweep.svg").read_text()
    assert "random, prune" in svg
    assert "class_attention" not in svg
    again = cli(*arguments, "--metrics", "shift,random", "--seeds", "0,1", "--json")
    document = json.loads(again.stdout)
    assert [row["seed"] for row in document["rows"]] == ["-", *["mean of 2", "0", "1"] * 4]
    assert document["rows"][1]["layers"] == [0, 2]


def test_calibration_images_are_not_evaluated(cli: Command, dense: Path, photos: Path) -> None:
    """Of 20 images 8 are evaluated, so 12 are left."""
    explained(
        cli("sweep", dense, "--data", photos, "--ratios", "0.2", *QUICK[2:], "--images", "20"),
        4,
        "are used already",
    )
    explained(
        cli("sweep", dense, "--data", photos, "--ratios", "0.2", *QUICK[2:], "--images", "13"),
        4,
        "at least 8 images, there are 7",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no drop ratio is given"),
        (("--ratios", "0.2,x"), "invalid --ratios '0.2,x'"),
        (("--ratios", "0.2,"), "invalid --ratios"),
        (("--ratios", "1.5"), "invalid ratio 1.5"),
        (("--macs", "nan"), "invalid macs nan"),
        (("--ratios", "0.2", "--seeds", "-1"), "invalid seed -1"),
        (("--ratios", "0.2", "--metrics", "shfit"), "unknown metric 'shfit'"),
        (("--ratios", "0.2", "--reducers", "x"), "unknown reducer 'x'"),
        (("--ratios", "0.2", "--layers", "9"), "the model has no layer 9"),
        (("--ratios", "0.2", "--layers", "b 0"), "should be the index of one block"),
        (("--ratios", "0.2", "-o", "."), "has files and no sweep"),
    ],
)
def test_invalid_options(cli: Command, dense: Path, photos: Path, arguments: tuple[str, ...], words: str) -> None:
    explained(cli("sweep", dense, "--data", photos, *QUICK, *arguments), 2, words)


def test_images_are_required(cli: Command, dense: Path) -> None:
    explained(cli("sweep", dense, "--ratios", "0.2"), 2, "no images are given")


@pytest.mark.slow
def test_processes_share_the_combinations(cli: Command, dense: Path, photos: Path, tmp_path: Path) -> None:
    arguments = [str(dense), "--data", str(photos), "--ratios", "0.25,0.5", "--metrics", "fitted,random", *QUICK]
    alone = cli("sweep", *arguments, "-o", "alone", "--json")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "repshift_cli", "sweep"]
    done = subprocess.run(
        [sys.executable, *launch, *arguments, "-o", "both", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == json.loads(alone.stdout)["rows"]
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == NAMES
