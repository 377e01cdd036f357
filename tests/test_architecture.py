"""The dependencies between the folders of the package, and the limits on its files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import repshift_cli
from repshift_cli.planning.registry import members

ROOT = Path(repshift_cli.__file__).parent

ORDER = (
    "cli -> export, report, sweep -> compression -> search, evaluation, benchmark, visualize -> checkpoints, "
    "calibration -> reduction -> data, planning, measure -> models, utils -> ops -> errors, version"
)
"""A folder imports only from folders to its right. Folders of one group do not import each other."""

RANKS = {name: rank for rank, group in enumerate(ORDER.split(" -> ")) for name in group.split(", ")}

FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

ENTRY_POINTS = {"__init__.py", "__main__.py"}
"""They import the public API and the command line, and no other file imports them."""

STARTUP = ("cli", "search/__init__", "search/target", "data/__init__", "data/catalog", "export/__init__")
"""What `--help` and an invalid option need. Importing it must not import torch."""

MAX_MODULE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 600, 300, 80


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def file_of(module: str) -> str | None:
    """The file of a dotted module of the package."""
    path = module.removeprefix("repshift_cli").lstrip(".").replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if file in FILES), None)


def imports_in(file: str, nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """The files of the package that `file` imports in `nodes`, with the line."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} has a relative import"
            names = [
                f"{node.module}.{name.name}" if file_of(f"{node.module}.{name.name}") else str(node.module)
                for name in node.names
            ]
        else:
            continue
        for name in names:
            found = file_of(name) if name.split(".")[0] == "repshift_cli" else None
            if found is not None and found != file:
                yield found, node.lineno


def all_imports(file: str) -> list[tuple[str, int]]:
    """Imports anywhere in a file, also in functions and under TYPE_CHECKING."""
    return list(imports_in(file, ast.walk(tree_of(file))))


def unit_of(file: str) -> str:
    """The folder or root module that a file belongs to."""
    return file.partition("/")[0].removesuffix(".py")


def libraries(file: str, top_level: bool) -> set[str]:
    """Libraries that a file imports; with `top_level`, those that importing the file imports."""
    nodes = tree_of(file).body if top_level else ast.walk(tree_of(file))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("file", [file for file in FILES if file not in ENTRY_POINTS])
def test_imports_follow_the_order_of_folders(file: str) -> None:
    own = unit_of(file)
    for other, line in all_imports(file):
        unit = unit_of(other)
        assert other not in ENTRY_POINTS, f"{file}:{line} imports {other}"
        assert unit == own or RANKS[unit] > RANKS[own], f"{file}:{line} imports {unit}, which is not right of {own}"


def test_every_folder_has_a_place_in_the_order() -> None:
    assert {unit_of(file) for file in FILES} - {"__init__", "__main__"} == set(RANKS)


def test_no_cycle_between_files() -> None:
    """Also for imports in functions and under TYPE_CHECKING."""
    graph = {file: {other for other, _ in all_imports(file)} for file in FILES}
    done: set[str] = set()

    def visit(file: str, above: tuple[str, ...]) -> None:
        assert file not in above, " -> ".join((*above[above.index(file) :], file))
        if file not in done:
            for other in sorted(graph[file]):
                visit(other, (*above, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


def test_the_package_has_few_units_and_levels() -> None:
    units = {unit_of(file) for file in FILES}
    assert len(units) <= 24
    assert len(set(RANKS.values())) <= 10


@pytest.mark.parametrize("file", FILES)
def test_sizes(file: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_MODULE_LINES, f"{file} has {lines} lines"
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ClassDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_CLASS_LINES, f"class {node.name} has {length} lines"
        elif isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.body[0].lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"the body of {node.name} has {length} lines"


def test_metrics_reducers_and_families_are_independent() -> None:
    """They meet in the files of `reduction/` itself."""
    for file in FILES:
        kinds = {f"reduction/{kind}/" for kind in ("metrics", "reducers", "families")}
        own = {kind for kind in kinds if file.startswith(kind)}
        for other, line in all_imports(file):
            if own and any(other.startswith(kind) for kind in kinds - own):
                raise AssertionError(f"{file}:{line} imports {other}")


def test_only_reduction_hooks_a_model() -> None:
    hooking = {unit_of(file) for file in FILES if "register_forward" in (ROOT / file).read_text(encoding="utf-8")}
    assert hooking == {"reduction"}


def test_startup_does_not_import_torch() -> None:
    """Follows the top-level imports of the start-up files."""
    todo = [
        file for file in FILES if file.removesuffix(".py") in STARTUP or file.startswith(("cli/", "export/formats/"))
    ]
    seen: set[str] = set()
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        heavy = libraries(file, top_level=True) & {"torch", "timm", "safetensors", "matplotlib", "transformers"}
        assert not heavy, f"{file} imports {heavy}"
        todo += [other for other, _ in imports_in(file, tree_of(file).body)]


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("cli/")])
def test_commands_hold_no_tensor_code(file: str) -> None:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr in {"__version__", "device", "float32", "nn"}, f"{file}:{node.lineno}"


def test_ops_are_pure_tensor_functions() -> None:
    using = {name for file in FILES if unit_of(file) == "ops" for name in libraries(file, top_level=False)}
    assert not using & {"timm", "transformers", "typer", "rich"}


def test_timm_is_used_by_families_and_loading_only() -> None:
    using = {unit_of(file) for file in FILES if "timm" in libraries(file, top_level=False)}
    assert using == {"reduction", "models", "data", "visualize", "checkpoints", "export"}


@pytest.mark.parametrize("kind", ["metrics", "reducers", "families"])
def test_one_file_is_one_member(kind: str) -> None:
    package = f"repshift_cli.reduction.{kind}"
    base = getattr(import_module(f"{package}.base"), {"families": "Family"}.get(kind, kind[:-1].title()))
    homes = [member.__module__.rsplit(".", 1)[1] for member in members(package, base)]
    stems = {Path(file).stem for file in FILES if file.startswith(f"reduction/{kind}/")}
    assert sorted(homes) == sorted(stems - {"__init__", "base"})


MODEL_KINDS = {"umt", "vim", "cnn"}

KINDS_KNOWN_IN = (
    *("reduction/families/", "models/", "checkpoints/identify/", "evaluation/video_text/", "data/video/"),
    "checkpoints/builtin.py",  # the table with the names of the built-in models
    "checkpoints/create.py",  # calls the builder of each kind
)


def words_of(name: str) -> set[str]:
    """Lower-case words of an identifier or a key: `UmtModel` has `umt` and `model`."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def names_and_keys(file: str) -> Iterator[tuple[str, int]]:
    """Identifiers of a file, and strings that it compares or uses as keys, with the line."""
    for node in ast.walk(tree_of(file)):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value, line
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            keys = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            keys = list(node.keys)
        elif isinstance(node, ast.Subscript):
            keys = [node.slice]
        elif isinstance(node, ast.MatchValue):
            keys = [node.value]
        for key in keys:
            for part in getattr(key, "elts", [key]):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value, line


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(KINDS_KNOWN_IN)])
def test_families_own_what_is_special_to_a_kind_of_model(file: str) -> None:
    found = [f"{file}:{line} {name}" for name, line in names_and_keys(file) if words_of(name) & MODEL_KINDS]
    assert not found, f"{found}: ask the family instead"
