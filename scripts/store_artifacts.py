"""Write a tiny compressed checkpoint of each format version to `tests/data`, with an input and what it gives.

Run once for each version, when it comes: the files are committed, and the tests hold later readers to them. A version
that is there already is left alone.

    python scripts/store_artifacts.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.create import create
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.recovered import recovered_part
from repshift_cli.checkpoints.weights import Source
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import match
from repshift_cli.reduction.plans import resolve_for, with_defaults

DATA = Path(__file__).resolve().parents[1] / "tests" / "vectors"
LAYERS = "[{layer: 0, drop_ratio: 0.3}]"
EXPECTED = DATA / "artifacts_expected.safetensors"
VIT = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
VIM = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 4}
VISION = {"img_size": 16, "frames": 2, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "hidden": 32}
TEXT = {"vocabulary": 20, "width": 16, "depth": 2, "heads": 2, "hidden": 32, "positions": 16, "fusion_layer": 1}
UMT = {"vision": VISION, "text": TEXT, "embed_dim": 8}

VERSIONS: dict[int, tuple[str | None, dict[str, Any], str, str]] = {
    1: (None, VIT, "token_norm", "prune"),
    2: ("vim", VIM, "token_norm", "prune"),
    3: ("umt", UMT, "token_norm", "vid_tldr"),
    4: (None, VIT, "token_norm", "merge"),
    6: (None, {**VIT, "global_pool": "avg"}, "token_norm", "prune"),  # 5 is of a library, written by `compress`
    7: (None, VIT, "token_norm", "prune"),
    8: (None, VIT, "token_norm", "prune"),
}


EXTRA = {6: "restore: true\n", 7: "last_block: exact\n"}
"""Of the recipes; before 7 the last block was full."""

RECOVERED = ("norm.weight", "head.weight")
"""Parameters with other values, of version 8."""

NUMBERS = {"images": 8, "distance": 0.5, "agreement": 0.5}
FOUND = {"images": 16, "data": {}, "passes": 1, "before": NUMBERS, "after": NUMBERS, "sigmas": 4.0}


def main() -> None:
    expected = load_file(EXPECTED) if EXPECTED.exists() else {}
    for version, (architecture, args, score, reducer) in VERSIONS.items():
        path = DATA / f"artifact_v{version}.safetensors"
        if path.exists():
            continue
        inputs, output = write(
            path,
            architecture,
            args,
            f"version: 1\nmetric: {{kind: {score}}}\nreducer: {{kind: {reducer}}}\nlayers: {LAYERS}\n"
            + EXTRA.get(version, "last_block: full\n"),
            RECOVERED if version == 8 else (),
        )
        expected |= {f"v{version}/input": inputs, f"v{version}/output": output}
        sys.stdout.write(f"{path}: {path.stat().st_size} bytes\n")
    save_file(expected, EXPECTED)


@torch.no_grad()
def write(
    path: Path, architecture: str | None, args: dict[str, Any], text: str, recovered: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = create(architecture, args, path.name).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    preprocessing = Preprocessing.of_model(model)
    description = ModelDescription(path.stem, architecture, args, preprocessing)
    loaded = LoadedModel(model, description, Source("object", None, None), dict(model.state_dict()))
    recipe = Recipe.parse(text)
    plan = with_defaults(resolve_for(model, recipe), {site.name: site for site in match(model).sites(model)})
    values = {name: model.get_parameter(name) + 0.5 for name in recovered}
    part = recovered_part(FOUND, values) if values else None
    artifact.save(path, loaded, artifact.make_document(loaded, plan, recipe, None, {}, recovered=part))
    inputs = torch.randn(2, *preprocessing.shape)
    compressed = attach(model, plan)
    compressed.replace_parameters(values)
    return inputs, compressed(inputs)


if __name__ == "__main__":
    main()
