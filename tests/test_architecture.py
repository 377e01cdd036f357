"""Modules depend on each other in one direction only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import repshift_cli

ROOT = Path(repshift_cli.__file__).parent

LAYERS = (
    {"errors"},
    {"progress", "files", "garbage"},
    {"recipe"},
    {"registry", "plan"},
    {"document"},
    {
        *("tokens", "attention", "energy"),
        *("processes", "digests", "intervals", "tally", "predictions"),
    },
    {"models", "merging"},
    {"backends"},
    {"metrics", "reducers", "families"},
    {"preprocessing", "measure"},
    {"identify", "attach", "data", "bench_report", "compiled"},
    {"checkpoint", "end_to_end", "bench_budget", "bench_plot"},
    {"artifact"},
    {"runtimes"},
    {"fitting", "resuming"},
    {"calibrate", "evaluate", "benchmark", "comparison", "reference"},
    {"search", "peers"},
    {"compression", "visualize", "retrieval", "answering"},
    {"exporting"},
    {"video_evaluation"},
    {"ui"},
    {"cli"},
    {"__main__"},
)
"""Lowest first. A module may import those of lower layers, and files of its own package."""

ALONE = {"metrics", "reducers", "families"}
"""They meet in `attach` and in no other of them."""

WITHOUT_TORCH = {
    *("errors", "progress", "files", "recipe", "registry", "plan", "document", "bench_budget", "ui", "cli"),
    *("garbage", "intervals", "tally", "predictions", "comparison", "reference"),
}
"""What `--help` and a wrong recipe need: importing it must not import torch."""

LIGHT_FILES = {f"search/{name}.py" for name in ("__init__", "target", "additive", "schedule", "plot")}

FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def part_of(file: str) -> str:
    """The package or module of the first level that a file belongs to."""
    return file.partition("/")[0].removesuffix(".py")


def layer_of(part: str) -> int:
    found = [index for index, layer in enumerate(LAYERS) if part in layer]
    assert len(found) == 1, f"{part} stands {len(found)} times in LAYERS"
    return found[0]


def imports(file: str) -> Iterator[tuple[str, int]]:
    """Modules of the project that a file imports, in functions too, with the line; names of the API are left out."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("repshift_cli."):
                    yield name.name.split(".")[1], node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            if node.module == "repshift_cli":
                for name in node.names:
                    if (ROOT / name.name).is_dir() or (ROOT / f"{name.name}.py").is_file():
                        yield name.name, node.lineno
            elif node.module and node.module.startswith("repshift_cli."):
                yield node.module.split(".")[1], node.lineno


def outside(file: str, top_level: bool) -> set[str]:
    """Libraries that a file imports; on `top_level`, those that importing the file imports."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_point_down(file: str) -> None:
    own = part_of(file)
    for other, line in imports(file):
        if other == own:
            continue
        assert layer_of(other) < layer_of(own), f"{file}:{line} imports {other}, which does not lie below {own}"
        assert not ({own, other} <= ALONE), f"{file}:{line}: {own} and {other} are to meet in attach only"


def test_every_part_has_a_layer() -> None:
    assert {part_of(file) for file in FILES} - {"__init__"} == set().union(*LAYERS)


def test_only_attach_sees_metrics_reducers_and_families_together() -> None:
    seeing = {
        part_of(file) for file in FILES if {"metrics", "reducers", "families"} <= {other for other, _ in imports(file)}
    }
    assert seeing == {"attach"}


def test_only_attach_hooks_a_model() -> None:
    hooking = {file for file in FILES if "register_forward" in (ROOT / file).read_text(encoding="utf-8")}
    assert hooking == {"attach.py"}


@pytest.mark.parametrize("file", [file for file in FILES if part_of(file) in WITHOUT_TORCH or file in LIGHT_FILES])
def test_the_light_part_does_not_import_torch(file: str) -> None:
    assert not outside(file, top_level=True) & {"torch", "timm", "safetensors", "matplotlib"}


@pytest.mark.parametrize("file", [file for file in FILES if part_of(file) == "cli"])
def test_commands_hold_no_tensor_code(file: str) -> None:
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr in {"__version__", "device", "float32", "nn"}, f"{file}:{node.lineno}"


def test_timm_is_known_to_families_and_loading_only() -> None:
    using = {part_of(file) for file in FILES if "timm" in outside(file, top_level=False)}
    loading = {"identify", "checkpoint", "preprocessing", "artifact", "exporting"}
    assert using == {"families", "models", "data", "visualize"} | loading


@pytest.mark.parametrize("package", ["metrics", "reducers", "families"])
def test_one_file_is_one_member(package: str) -> None:
    from importlib import import_module

    from repshift_cli.registry import members

    base = getattr(
        import_module(f"repshift_cli.{package}.base"), {"families": "Family"}.get(package, package[:-1].title())
    )
    homes = [member.__module__.rsplit(".", 1)[1] for member in members(f"repshift_cli.{package}", base)]
    stems = {file.split("/")[1].removesuffix(".py") for file in FILES if part_of(file) == package}
    assert sorted(homes) == sorted(stems - {"__init__", "base"})
