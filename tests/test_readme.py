"""The commands of the README and of the guides are valid, and the README's Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from paths import ROOT

from repshift_cli.cli.app import app

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
GUIDES = [ROOT / "docs" / "index.md", ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]


def commands_in(text: str) -> list[str]:
    """The commands in the blocks of a document."""
    return [
        line.removeprefix("$ ").partition("#")[0].strip()
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for line in block.replace("\\\n", "").splitlines()
        if line.removeprefix("$ ").startswith("repshift ")
    ]


COMMANDS = commands_in(README)
OF_GUIDES = [line for guide in GUIDES for line in commands_in(guide.read_text(encoding="utf-8"))]


def test_the_readme_shows_each_command() -> None:
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"compress", "bench", "eval", "visualize"}


@pytest.mark.parametrize("line", dict.fromkeys([*COMMANDS, *OF_GUIDES]))
def test_a_command_is_valid(line: str) -> None:
    command: Any = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    found = command.commands[name]
    context = found.make_context(name, arguments)
    assert context.command is found


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = [text for language, text in BLOCKS if language == "python"]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["fast"].shape == names["slow"].shape == (2, 10)
    assert not names["fast"].equal(names["slow"])


def test_links_of_the_readme_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links if not link.startswith("https://"))


def test_the_recipe_of_the_readme_is_valid() -> None:
    from repshift_cli.planning.recipe import Recipe
    from repshift_cli.reduction.checks import check_components

    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    check_components(Recipe.parse(text))


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    assert "python -m pytest" in README
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").endswith("\npython -m pytest\npython -m pytest -m slow\n")
