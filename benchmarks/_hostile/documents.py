"""Documents with one thing changed: metadata, recipes, annotations, states, predictions, configurations."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import changed_bytes, changed_tree, to_json
from safetensors.torch import save

from _hostile.archives import write_zip
from _hostile.attempt import Attempt, Result, all_counted, same_number
from _hostile.good import BUILTIN, IMAGES, SMALL, VIDEO, Good

REFUSED_MODEL = frozenset({0, 2, 3})


def changed_text(rng: random.Random, document: Any) -> str:
    """A JSON document with a changed value, or rarely with changed bytes."""
    if rng.random() < 0.85:
        return to_json(changed_tree(rng, document))
    return changed_bytes(rng, json.dumps(document).encode()).decode("utf-8", "replace")


def model_commands(rng: random.Random, good: Good, model: str) -> tuple[list[list[str]], tuple[str, ...]]:
    """One or two commands that read a compressed model, and the files that they write."""
    read = [["inspect", model, "--json"], good.evaluate(model)]
    commands, outputs = rng.choice(
        [
            ([["visualize", model, "--data", str(good.data), "--count", "1", "-o", "k.png"]], ("k.png",)),
            ([["report", model, "-o", "k.html"]], ("k.html",)),
            ([["export", model, "--to", "hub", "-o", "out"]], ("out", "out/*")),
            ([["bench", model, "--seconds", "0", "--min-runs", "1", "-b", "1"]], ()),
            ([["recipes", "show", model, *rng.choice([[], ["--calibrated"]])]], ()),
            ([["inspect", model], ["diff", model, str(good.artifact)]], ()),
            ([["dense", model, "-o", "d.safetensors"]], ("d.safetensors",)),
            *[(read, ())] * 3,
        ]
    )
    return commands, outputs


def consistent(results: Sequence[Result]) -> str | None:
    """`inspect` refuses what `eval` cannot run."""
    codes = [result.code for result in results]
    if len(codes) == 2 and codes[0] == 0 and codes[1] == 3:
        return f"accepted: inspect takes what eval refuses: {results[1].stderr.strip()[:200]}"
    return None


def metadata(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """The document in a compressed checkpoint."""
    text = changed_text(rng, good.document).encode("utf-8", "replace").decode()
    (folder / "m.safetensors").write_bytes(save(good.tiny_tensors, {**good.metadata, good.key: text}))
    commands, outputs = model_commands(rng, good, "m.safetensors")
    return Attempt(commands, codes=REFUSED_MODEL | {4, 5}, outputs=outputs, check=consistent)


def plan(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """The plan, the model or the preprocessing in a compressed checkpoint, with one number changed."""
    document = json.loads(json.dumps(good.document))
    part = rng.choice(["plan", "plan", "model"])
    document[part] = changed_number(rng, document[part])
    (folder / "m.safetensors").write_bytes(save(good.tiny_tensors, {**good.metadata, good.key: json.dumps(document)}))
    commands, outputs = model_commands(rng, good, "m.safetensors")
    return Attempt(commands, codes=REFUSED_MODEL | {4, 5}, outputs=outputs, check=consistent)


def changed_number(rng: random.Random, tree: Any) -> Any:
    """The tree with one number replaced by another one."""
    places: list[tuple[Any, Any]] = []
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            if isinstance(node[key], dict | list):
                nodes.append(node[key])
            elif isinstance(node[key], int | float) and not isinstance(node[key], bool):
                places.append((node, key))
    holder, key = rng.choice(places)
    old = holder[key]
    holder[key] = rng.choice(
        [0, 1, -1, -old, old + 1, old - 1, 2 * old, old * 1e-3, 1e-300, 1e300, 2**31, 2**63 - 1, 10**400, old + 0.5]
    )
    return tree


def exported(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """The document in an exported file."""
    document = json.loads(good.members[good.exported_name])
    text = changed_text(rng, document) if rng.random() < 0.6 else json.dumps(changed_number(rng, document))
    if rng.random() < 0.5:
        import onnx

        graph = onnx.load(good.onnx)
        graph.metadata_props[0].value = text.encode("utf-8", "replace")
        onnx.save(graph, folder / "m.onnx")
        command = good.evaluate("m.onnx")
    else:
        write_zip(folder / "m.pt2", {**good.members, good.exported_name: text.encode("utf-8", "replace")})
        command = trusting(rng, good.evaluate("m.pt2"))
    return Attempt([command], codes=REFUSED_MODEL | {4})


def trusting(rng: random.Random, command: list[str]) -> list[str]:
    """With or without `--trust`, where this version has it."""
    return [*command, "--trust"] if _has_trust() and rng.random() < 0.7 else command


def _has_trust() -> bool:
    import typer.main

    from repshift_cli.cli.app import app

    group: Any = typer.main.get_command(app)
    return any("--trust" in option.opts for option in group.commands["eval"].params)


def recipe(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A recipe: changed values, changed bytes, or YAML that is legal and odd."""
    import yaml

    text = good.recipe.read_bytes()
    choice = rng.randrange(4)
    if choice == 0:
        content = changed_bytes(rng, text)
    elif choice == 1:
        content = to_json(changed_tree(rng, yaml.safe_load(text)), 200).encode("utf-8", "replace")
    elif choice == 2:
        content = json.dumps(changed_number(rng, yaml.safe_load(text))).encode()
    else:
        content = text + rng.choice(_ODD_YAML) + b"\n"
    (folder / "r.yaml").write_bytes(content)
    commands = [["recipes", "check", "r.yaml"], ["compress", SMALL, "-r", "r.yaml", "--dry-run"]]
    return Attempt([rng.choice(commands)], codes=REFUSED_MODEL)


_ODD_YAML = (
    *(b"? null\n: 1", b"~: x", b"description: !!timestamp bad", b"version: !!int " + b"1:" * 4000 + b"1"),
    *(b"- a\n" * 500_000, b"&a [*a]", b"a: &a [1]\nb: [*a, *a]", b"!!python/object/apply:os.getcwd []"),
    *(
        b"description: !!binary x",
        b"<<: [1]",
        b"version: 1",
        b"layers: !!set {a}",
        b"%TAG ! tag:x,2000:",
        b"x: 2001-99-99",
    ),
)


def annotations(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """Captions or questions of videos, or one of the videos."""
    name, model = rng.choice([("retrieval.json", VIDEO), ("qa.json", f"{VIDEO}-qa")])
    rows = json.loads((good.shapes / name).read_text())
    videos = good.shapes / "videos"
    if rng.random() < 0.3:
        shutil.copytree(videos, folder / "videos")
        videos = folder / "videos"
        damaged = rng.choice(sorted(videos.iterdir()))
        damaged.write_bytes(changed_bytes(rng, damaged.read_bytes()))
        text = json.dumps(rows)
    else:
        text = changed_text(rng, rows)
    (folder / "a.json").write_text(text, encoding="utf-8", errors="replace")
    command = ["eval", model, "--annotations", "a.json", "--videos", str(videos), "--limit", "2", "--json"]
    return Attempt([command], codes=frozenset({0, 2, 4}))


def predictions(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """Saved predictions: one array of another type, shape or content."""
    with np.load(good.predictions) as found:
        arrays = dict(found)
    key = rng.choice(sorted(arrays))
    old = np.atleast_1d(arrays[key])
    odd = [
        *(old[:-1], old[..., None], old.astype("S8"), np.zeros((0,)), np.array("x"), np.array(json.dumps({"a": 1}))),
        *(np.full(old.shape, "\ud800[/red]\n", dtype=np.str_), np.array([None, 1], dtype=object), old[::-1]),
    ]
    if old.dtype.kind in "if":
        odd += [old * 0 - 1, old + 10**6, old.astype(np.float64) * np.nan, np.asfortranarray(old), old.astype(">f8")]
    if rng.random() < 0.2:
        del arrays[key]
    else:
        arrays[key] = rng.choice(odd)
    np.savez(folder / "p.npz", **arrays)
    pair = [str(good.predictions), "p.npz"]
    rng.shuffle(pair)
    return Attempt([["compare", *pair]], codes=frozenset({0, 2, 4}))


def resume_state(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """The state of an interrupted evaluation; files of the user's in its folder stay."""
    shutil.copytree(good.state, folder / "state")
    path = rng.choice(sorted((folder / "state").iterdir()))
    document = json.loads(path.read_text())
    text = json.dumps(changed_number(rng, document)) if rng.random() < 0.4 else changed_text(rng, document)
    path.write_text(text, encoding="utf-8", errors="replace")
    mine = rng.choice(["2024-my-results.json", "000099.json.bak", ".mine.json.part", "7.json"])
    (folder / "state" / mine).write_text('{"my": "results"}')
    shards = tuple(f"state/{each.name}" for each in good.state.iterdir())
    command = good.evaluate(BUILTIN, "--resume", "state")
    return Attempt([command], codes=frozenset({0, 2, 4, 5}), replaced=("state", *shards), check=all_counted(IMAGES))


def search_state(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """The state of an interrupted search."""
    shutil.copy(good.folder / "search.json", folder / "s.json")
    document = json.loads((folder / "s.json").read_text())
    (folder / "s.json").write_text(changed_text(rng, document), encoding="utf-8", errors="replace")
    command = [*good.search(), "--state", "s.json", "-o", "r.yaml"]
    return Attempt([command], codes=frozenset({0, 2, 3, 5}), outputs=("r.yaml",), replaced=("s.json",))


def hub_configuration(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """`config.json` of a hub folder."""
    shutil.copytree(good.hub, folder / "hub")
    path = folder / "hub" / "config.json"
    document = json.loads(path.read_text())
    text = json.dumps(changed_number(rng, document)) if rng.random() < 0.3 else changed_text(rng, document)
    path.write_text(text, encoding="utf-8", errors="replace")
    commands, outputs = model_commands(rng, good, "hub")
    return Attempt(commands, codes=REFUSED_MODEL | {4, 5}, outputs=outputs, check=consistent)


def index_of_shards(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """`model.safetensors.index.json` beside weights in shards."""
    from safetensors.torch import save_file

    names = sorted(good.tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    for file, keys in zip(files, parts, strict=True):
        save_file({key: good.tensors[key] for key in keys}, folder / file)
    places = {key: file for file, keys in zip(files, parts, strict=True) for key in keys}
    document = {"metadata": {"total_size": 1}, "weight_map": places}
    changed = document if rng.random() < 0.1 else changed_tree(rng, document)
    name = "model.safetensors.index.json"
    (folder / name).write_text(to_json(changed), encoding="utf-8", errors="replace")
    command = good.evaluate(rng.choice([name, name, "."]), *good.heads)
    return Attempt([command], codes=REFUSED_MODEL | {4}, check=same_number(good.numbers[str(good.pth)]))


KINDS = {
    "metadata of checkpoints": (metadata, 6),
    "numbers in checkpoints": (plan, 6),
    "documents of exports": (exported, 4),
    "recipes": (recipe, 5),
    "videos and annotations": (annotations, 3),
    "predictions": (predictions, 4),
    "states of evaluations": (resume_state, 4),
    "states of searches": (search_state, 2),
    "hub configurations": (hub_configuration, 4),
    "indexes of shards": (index_of_shards, 2),
}
