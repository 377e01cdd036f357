"""hub: a folder that timm and the Hugging Face hub read: weights, configuration, model card. Nothing is uploaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.errors import CheckFailed, UsageError
from repshift_cli.export.format import Draft, Format
from repshift_cli.utils.files import LARGEST_DOCUMENT, open_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repshift_cli.checkpoints.schema import ExportDocument
    from repshift_cli.export.request import Request, Subject
    from repshift_cli.utils.progress import Progress

_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"
_CARD_END = b"\n<!-- SHA-256 of the text above, which an export replaces only if it is unchanged: %s -->\n"

_UNNAMED = "vit_base_patch16_224"
"""timm builds a `VisionTransformer` without a name as this architecture, with all sizes as arguments."""


def _write(subject: Subject, request: Request, path: Path, progress: Progress) -> Draft:
    import timm

    from repshift_cli.checkpoints import artifact
    from repshift_cli.checkpoints.libraries.base import library_of

    architecture = subject.opened.loaded.description.architecture or _UNNAMED
    library = library_of(architecture)
    if library and library.config:
        raise UsageError(
            f"--to hub writes the form of timm, and this is a model of {library.name}",
            f"`repshift compress MODEL -o FOLDER` writes the form of {library.name}.",
        )
    document = subject.document(request, subject.run(subject.examples(request)).output)
    in_timm = bool(timm.is_model(architecture))
    kept = _users_card(request.output / _CARD)
    if kept:
        progress.note(f"{_CARD} was edited or is not of an export: it is kept")
    _write_weights(path, subject, request)

    def save(document: ExportDocument) -> None:
        _write_config(path, subject, architecture, document)
        (path / _CARD).write_bytes(kept or _signed(_card(document, in_timm).encode()))
        if document.verified and in_timm:
            _check_timm(path, subject, request)

    def reopen() -> Callable[[Tensor], tuple[Tensor, ...]]:
        save(document)
        reopened = type(subject).of(artifact.open_model(path), request)

        def run(images: Tensor) -> tuple[Tensor, ...]:
            trace = reopened.run(images)
            return (trace.output, trace.output, *trace.kept.values())

        return run

    return Draft(document, save, reopen)


def _write_weights(folder: Path, subject: Subject, request: Request) -> None:
    from repshift_cli.checkpoints.artifact import write_tensors

    loaded = subject.opened.loaded
    tensors = loaded.tensors
    if request.dtype is not None:
        tensors = {
            key: value.to(request.dtype) if value.is_floating_point() else value for key, value in tensors.items()
        }
    document = {"model": loaded.description.to_dict()} if subject.plan is None else loaded.document
    write_tensors(folder / _WEIGHTS, tensors, document)


def _write_config(folder: Path, subject: Subject, architecture: str, document: ExportDocument) -> None:
    """Write the configuration as timm does, with our metadata."""
    from repshift_cli.checkpoints.folders import OWNER

    loaded = subject.opened.loaded
    classes = int(getattr(loaded.model, "num_classes", 0) or 0)
    default: Mapping[str, Any] = getattr(loaded.model, "default_cfg", None) or {}
    # the layers that timm adapts to another number of channels or classes
    adapted = {key: default[key] for key in ("first_conv", "classifier") if default.get(key)}
    preprocessing = loaded.description.preprocessing.to_dict()
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": getattr(loaded.model, "num_features", getattr(loaded.model, "embed_dim", None)),
        "model_args": loaded.description.args,
        "pretrained_cfg": {**preprocessing, "num_classes": classes, **adapted, "custom_load": False},
        OWNER: document.model_dump(mode="json"),
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _check_timm(folder: Path, subject: Subject, request: Request) -> None:
    """Raise CheckFailed if timm cannot build the dense model from the folder, or its outputs differ in float32."""
    import timm
    import torch

    from repshift_cli.export.verify import inputs_for

    images = inputs_for(subject, request)[0].float()
    try:
        found: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise CheckFailed(f"timm cannot load the folder: {error}", "Please report it.") from error
    subject.opened.module.float()
    dense = replace(subject, dense=True).run(images).output
    with torch.no_grad():
        loaded = found(images)
    if dense.shape != loaded.shape or not torch.allclose(dense, loaded, rtol=1e-4, atol=1e-4):
        raise CheckFailed("the outputs of the folder, loaded by timm, differ from the dense model", "Please report it.")


def _check_folder(request: Request) -> None:
    from repshift_cli.checkpoints.folders import check_folder

    check_folder(request.output, request.force)


def _users_card(path: Path) -> bytes | None:
    """The card in the output folder, unless an export wrote it and it is unchanged since."""
    try:
        with open_file(path, LARGEST_DOCUMENT) as file:
            card = file.read()
    except FileNotFoundError:
        return None
    text = card.rpartition(_CARD_END.partition(b"%s")[0])[0]
    return None if card == _signed(text) else card


def _signed(card: bytes) -> bytes:
    return card + _CARD_END % sha256(card).hexdigest().encode()


def _card(document: ExportDocument, in_timm: bool) -> str:
    model, plan = document.model, document.plan
    reduced = f"{document.dense_macs / 1e9:.3g} to {document.macs / 1e9:.3g} GMACs per input"
    parts = [
        "---\nlibrary_name: " + ("timm" if in_timm else "repshift") + "\ntags:\n- repshift\n- token-reduction\n---",
        f"# {model.name}{', with fewer tokens' if plan else ''}",
    ]
    if plan:
        weights = "The weights are those of the dense model."
        if document.recovered:
            weights = (
                f"`{_WEIGHTS}` has the weights of the dense model; with fewer tokens {len(document.recovered)} tensors "
                "(norms, biases, last layer) have other values, which are in its metadata."
            )
        parts.append(
            f"This model drops unimportant tokens between some of its layers: {reduced}. {weights} "
            f"Made by [repshift](https://arxiv.org/abs/2508.00367) {document.repshift_version}."
        )
        rows = [f"| {site.site} | {site.tokens_in} | {site.tokens_out} |" for site in plan.sites]
        parts.append("\n".join(["| after | tokens in | tokens out |", "|---|--:|--:|", *rows]))
        parts.append(f"Reducer: `{plan.reducer.kind}`.")
    if document.recipe:
        parts.append(f"The recipe, `{document.recipe.name}`:\n\n```yaml\n{document.recipe.text.strip()}\n```")
    if document.measured:
        parts.append(_measured_table(document.measured))
    parts.append(_loading(document, in_timm))
    if document.verified:
        verdict = document.verified
        parts.append(
            f"Verified: loaded again, the folder gives the outputs of the model on {verdict.inputs} inputs (largest "
            f"difference {verdict.max_difference:.2g})."
        )
    parts.append(
        f"Source of the weights: {document.source.name or document.source.origin}"
        + (f", SHA-256 `{document.source.sha256}`." if document.source.sha256 else ".")
    )
    return "\n\n".join(parts) + "\n"


def _measured_table(measured: Mapping[str, Any]) -> str:
    reads: Sequence[tuple[str, Callable[[Any], str]]] = (
        ("GMACs", lambda model: f"{model['gmacs']:.3g}"),
        ("latency, median ms", lambda model: f"{model['latency_ms']['median']:.4g}"),
        ("inputs per second", lambda model: f"{model['throughput']:.4g}"),
    )
    try:
        rows = [f"| {label} | {read(measured['dense'])} | {read(measured['compressed'])} |" for label, read in reads]
    except (KeyError, TypeError, ValueError):  # the metadata of a file are not checked so deeply
        return "Nothing was measured."
    where = ", ".join(str(measured[key]) for key in ("device", "dtype") if key in measured)
    conditions = f"Measured at batch {measured.get('batch')} on {where}, {measured.get('threads')} threads"
    if isinstance(agreement := measured.get("agreement"), float):
        conditions += f"; {agreement:.1%} of the predictions agree with the dense model"
    return "\n".join(["|  | dense | compressed |", "|---|--:|--:|", *rows]) + f"\n\n{conditions}."


def _loading(document: ExportDocument, in_timm: bool) -> str:
    parts = []
    if document.plan:
        shape = ", ".join(map(str, document.input.shape[1:]))
        code = f'from repshift_cli import load\n\nmodel = load("FOLDER")  # takes [batch, {shape}]'
        parts.append(f"With fewer tokens (`pip install repshift-cli`):\n\n```python\n{code}\n```")
    if in_timm:
        code = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'
        code += '  # on the hub: "hf-hub:USER/NAME"'
        parts.append(f"As the dense model, with timm alone:\n\n```python\n{code}\n```")
    else:
        parts.append(
            f"As the dense model: `{_WEIGHTS}` has the tensors under the keys of the model's authors, whose code loads "
            "them. timm has no such model."
        )
    return "\n\n".join(parts)


FORMAT = Format(
    "hub",
    "a folder for timm and the hub",
    "_hub",
    _write,
    files=(_WEIGHTS, _CARD, _CONFIG),
    devices=("cpu",),
    options=(),
    check=_check_folder,
)
