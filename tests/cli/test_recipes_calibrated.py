"""The calibrated metrics of a checkpoint can be printed and used as a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from outcome import Command


@pytest.mark.slow
def test_the_calibrated_recipe_gives_the_same_plan(cli: Command, tmp_path: Path) -> None:
    first = cli("compress", "builtin:vit-digits-small", "--seconds", "0", "-o", "one.safetensors", "--json")
    assert first.rc == 0, first.stderr
    shown = cli("recipes", "show", "one.safetensors", "--calibrated")
    assert shown.rc == 0, shown.stderr
    (tmp_path / "found.yaml").write_text(shown.stdout, encoding="utf-8")
    again = cli("compress", "builtin:vit-digits-small", "--recipe", "found.yaml", "--dry-run", "--json")
    assert again.rc == 0, again.stderr
    assert json.loads(again.stdout)["plan"] == json.loads(first.stdout)["plan"]
