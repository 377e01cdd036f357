"""A folder as the hub and timm read it: weights, configuration and a model card. Nothing is uploaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.schema import ExportDocument
from repshift_cli.checkpoints.weights import METADATA_KEY
from repshift_cli.errors import CheckFailed, OutputError
from repshift_cli.export.request import Request, Subject
from repshift_cli.planning.plan import Plan

__all__ = [
    "CONFIG",
    "check_timm",
    "is_ours",
    "known_to_timm",
    "reload",
    "write_card",
    "write_config",
    "write_weights",
]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

_NAMELESS = "vit_base_patch16_224"
"""A `VisionTransformer` of a shape without a name is built by the name of another, with all its sizes told."""


def write_weights(folder: Path, subject: Subject, request: Request) -> None:
    """`model.safetensors`: the tensors of the dense model, and the plan in the metadata, where there is one.

    Raises:
        OutputError: it cannot be written.
    """
    loaded = subject.opened.loaded
    tensors = loaded.tensors
    if request.dtype is not None:
        tensors = {
            key: value.to(request.dtype) if value.is_floating_point() else value for key, value in tensors.items()
        }
    document = {"model": loaded.description.to_dict()} if subject.plan is None else loaded.document
    metadata = {"format": "pt", METADATA_KEY: json.dumps(document, allow_nan=False)}
    try:
        save_file(artifact.separated(tensors), folder / WEIGHTS, metadata=metadata)
    except SafetensorError as error:
        raise OutputError(f"cannot write {WEIGHTS}: {error}", "Nothing was left under its name.") from error


def write_config(folder: Path, subject: Subject, document: ExportDocument) -> None:
    """`config.json`, as timm writes it, and under `repshift` what the folder says of itself."""
    loaded = subject.opened.loaded
    preprocessing = loaded.description.preprocessing.to_dict()
    classes = int(getattr(loaded.model, "num_classes", 0) or 0)
    config = {
        "architecture": loaded.description.architecture or _NAMELESS,
        "num_classes": classes,
        "num_features": getattr(loaded.model, "num_features", getattr(loaded.model, "embed_dim", None)),
        "model_args": loaded.description.args,
        "pretrained_cfg": {**preprocessing, "num_classes": classes, **_layers(loaded.model), "custom_load": False},
        METADATA_KEY: json.loads(document.model_dump_json()),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _layers(model: nn.Module) -> dict[str, Any]:
    """Names of the first convolution and the classifier, which timm adapts to other inputs and heads."""
    config: Mapping[str, Any] = getattr(model, "default_cfg", None) or {}
    return {key: config[key] for key in ("first_conv", "classifier") if config.get(key)}


def write_card(folder: Path, document: ExportDocument, in_timm: bool) -> None:
    """`README.md`: what the model is, what it was measured to do, and how to load it."""
    (folder / CARD).write_text(_card(document, in_timm), encoding="utf-8")


def reload(folder: Path) -> Opened:
    """The folder as repshift reads it."""
    return artifact.open_model(folder)


def known_to_timm(folder: Path) -> bool:
    """Whether timm has models of the architecture that the configuration names."""
    import timm

    name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architecture"]
    return bool(timm.is_model(name))


def check_timm(folder: Path, model: nn.Module, images: Tensor) -> None:
    """Hold what timm builds from the folder to the dense model; both run in float32.

    Raises:
        CheckFailed: it computes something else, or cannot be built.
    """
    import timm

    try:
        found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise CheckFailed(f"timm cannot load the folder: {error}", "Please report it.") from error
    with torch.no_grad():
        wanted, given = model.float()(images.float()), found(images.float())
    if wanted.shape != given.shape or not torch.allclose(wanted, given, rtol=1e-4, atol=1e-4):
        raise CheckFailed("what timm loads from the folder computes something else than the model", "Please report it.")


def is_ours(folder: Path) -> bool:
    """Whether a folder was written by us, so that it may be replaced."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(config, dict)
        and METADATA_KEY in config
        and {path.name for path in folder.iterdir()} <= {CONFIG, WEIGHTS, CARD, ".gitattributes"}
    )


def _card(document: ExportDocument, in_timm: bool) -> str:
    model, plan = document.model, document.plan
    reduced = f"{document.dense_macs / 1e9:.3g} to {document.macs / 1e9:.3g} GMACs per input"
    parts = [
        "---\nlibrary_name: " + ("timm" if in_timm else "repshift") + "\ntags:\n- repshift\n- token-reduction\n---",
        f"# {model['name']}{', with fewer tokens' if plan else ''}",
    ]
    if plan:
        parts.append(
            f"Between some of its layers this model lets unimportant tokens go: {reduced}. The weights are those of "
            "the dense model, unchanged. Made by [repshift](https://arxiv.org/abs/2508.00367) "
            f"{document.repshift_version}."
        )
        parts.append(_plan_table(plan))
    if document.recipe:
        parts.append(f"The recipe, `{document.recipe.name}`:\n\n```yaml\n{document.recipe.text.strip()}\n```")
    if document.measured:
        parts.append(_measured_table(document.measured))
    parts.append(_loading(document, in_timm))
    if document.verified:
        verdict = document.verified
        parts.append(
            f"Checked when it was written: loaded anew, it gives what the model gave, on {verdict.inputs} inputs "
            f"(largest difference {verdict.max_difference:.2g})."
        )
    parts.append(
        f"Source of the weights: {document.source.get('name') or document.source.get('origin')}"
        + (f", SHA-256 `{document.source['sha256']}`." if document.source.get("sha256") else ".")
    )
    return "\n\n".join(parts) + "\n"


def _plan_table(plan: Plan) -> str:
    rows = [f"| {site.site} | {site.tokens_in} | {site.tokens_out} |" for site in plan.sites]
    return "\n".join(["| after | tokens in | tokens out |", "|---|--:|--:|", *rows]) + (
        f"\n\nWhat goes is handled by `{plan.reducer.kind}`."
    )


def _measured_table(measured: Mapping[str, Any]) -> str:
    sides = {name: measured[name] for name in ("dense", "compressed") if isinstance(measured.get(name), dict)}
    if len(sides) < 2:  # noqa: PLR2004
        return "Nothing was measured."
    rows = [
        f"| {label} | {read(sides['dense'])} | {read(sides['compressed'])} |"
        for label, read in (
            ("GMACs", lambda side: f"{side['gmacs']:.3g}"),
            ("latency, median ms", lambda side: f"{side['latency_ms']['median']:.4g}"),
            ("inputs per second", lambda side: f"{side['throughput']:.4g}"),
        )
    ]
    where = ", ".join(str(measured[key]) for key in ("device", "dtype") if key in measured)
    told = f"Measured at batch {measured.get('batch')} on {where}, {measured.get('threads')} threads"
    if isinstance(agreement := measured.get("agreement"), float):
        told += f"; {agreement:.1%} of the predictions are those of the dense model"
    return "\n".join(["|  | dense | compressed |", "|---|--:|--:|", *rows]) + f"\n\n{told}."


def _loading(document: ExportDocument, in_timm: bool) -> str:
    shape = ", ".join(map(str, document.input.shape[1:]))
    lines = [
        "With fewer tokens (`pip install repshift-cli`):",
        "",
        "```python",
        "from repshift_cli import load",
        "",
        f'model = load("FOLDER")  # takes [batch, {shape}]',
        "```",
        "",
    ]
    if in_timm:
        lines += ["As the dense model, with timm alone:", "", "```python", "import timm", ""]
        lines += [
            'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # on the hub: "hf-hub:USER/NAME"',
            "```",
        ]
    else:
        lines += [
            "As the dense model: `model.safetensors` has the tensors under the keys of the model's authors, whose code "
            "loads them. timm has no such model."
        ]
    return "\n".join(lines if document.plan else lines[8:])
