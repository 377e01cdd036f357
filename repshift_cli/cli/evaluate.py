"""`repshift eval`: accuracy on a labelled dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.cli import options
from repshift_cli.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from repshift_cli.artifact import Opened
    from repshift_cli.data import ImageDataset
    from repshift_cli.evaluate import Evaluation, Score
    from repshift_cli.preprocessing import Preprocessing

__all__ = ["command", "document", "head_size", "models_of", "show"]

_DEFAULT_MODEL = "builtin:vit-digits"
_DEFAULT_DATASET = "builtin:digits"
_BUILTIN = "builtin:"
_DENSE = "dense"
_COMPRESSED = "compressed"
_SHOWN_SKIPPED = 10


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, dense or compressed, or a built-in model.")
    ] = _DEFAULT_MODEL,
    *,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="NAME",
            help="imagenet-val, folder, builtin:digits, the path of a folder with class folders, "
            "or a name that timm reads, such as torch/cifar10.",
            show_default=False,
        ),
    ] = None,
    data_dir: options.DataDir = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="Only N pictures, evenly spaced over the dataset."),
    ] = None,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Evaluate the original model too, on the same pictures.")
    ] = False,
    model_name: options.ModelName = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    batch_size: options.BatchSize = 64,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Processes that decode pictures (0: decode in this one).")
    ] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first picture that cannot be read.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which built-in scenes are drawn.")] = 0,
    json: options.AsJson = False,
) -> None:
    """Measure accuracy on a labelled dataset, and the dense model beside it where asked."""
    name = _dataset_of(model, dataset)

    from repshift_cli import measure, ui
    from repshift_cli.artifact import open_model
    from repshift_cli.data import open_dataset
    from repshift_cli.evaluate import evaluate

    where, number_type = measure.resolve_device(device), measure.resolve_dtype(dtype)
    data = open_dataset(name, data_dir, limit, seed)
    opened = open_model(model, model_name, heads, img_size)
    models = models_of(opened, compare_dense, model)
    preprocessing = opened.loaded.description.preprocessing
    screen = ui.Screen()
    for note in opened.loaded.notes:
        screen.note(note)
    if not json:
        _announce(opened, data, preprocessing)
    with measure.threads(threads):
        result = evaluate(
            models,
            data,
            preprocessing,
            batch_size=batch_size,
            device=where,
            dtype=number_type,
            workers=workers,
            strict=strict,
            num_classes=head_size(opened.loaded.model),
            progress=screen,
        )
    _report_skipped(result)
    macs = {_COMPRESSED: opened.macs, _DENSE: opened.dense_macs}
    if json:
        ui.print_json(document(result, macs, model, preprocessing))
    else:
        show(result, macs)


def _dataset_of(model: str, dataset: str | None) -> str:
    """The dataset that was named, or the one that belongs to a built-in model.

    Raises:
        UsageError: none was named and the model is not built in.
    """
    if dataset is not None:
        return dataset
    if model.startswith(_BUILTIN):
        return _DEFAULT_DATASET
    raise UsageError(
        f"no dataset was named for {model}",
        "Add --dataset imagenet-val --data-dir DIR, or --dataset FOLDER with one folder per class.",
    )


def models_of(opened: Opened, compare_dense: bool, name: str) -> dict[str, nn.Module]:
    """The modules to run, by name; the first one is what was asked for.

    Raises:
        UsageError: a comparison was asked for, but the model is dense.
    """
    compressed = opened.compressed
    if compressed is None:
        if compare_dense:
            raise UsageError(
                f"--compare-dense: {name} is dense itself, there is nothing to compare",
                "Leave the option out, or give a checkpoint that `repshift compress` wrote.",
            )
        return {_DENSE: opened.module}
    if not compare_dense:
        return {_COMPRESSED: compressed}
    return {_COMPRESSED: compressed, _DENSE: _dense_view(compressed)}


def _dense_view(compressed: Any) -> nn.Module:
    """A module that runs the original of a compressed model, on the same weights."""
    from torch import Tensor, nn

    class DenseView(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.compressed = compressed

        def forward(self, images: Tensor) -> Any:
            with self.compressed.dense() as dense:
                return dense(images)

    return DenseView()


def head_size(model: nn.Module) -> int:
    """How many classes the head of a model has.

    Raises:
        ModelError: the model does not tell.
    """
    size = getattr(model, "num_classes", None)
    if not isinstance(size, int):
        raise ModelError("the model does not say how many classes its head has, so it cannot be evaluated on labels")
    return size


def _announce(opened: Opened, data: ImageDataset, preprocessing: Preprocessing) -> None:
    from repshift_cli import ui

    ui.print_text(f"model:         {opened.loaded.description.name}")
    ui.print_text(f"dataset:       {data.description}")
    ui.print_text(f"preprocessing: {preprocessing}\n")


def _report_skipped(result: Evaluation) -> None:
    from repshift_cli import ui

    if not result.skipped:
        return
    lines = [f"{len(result.skipped)} pictures could not be read and were left out (--strict stops at the first):"]
    lines += [f"  {entry.sample}: {entry.reason}" for entry in result.skipped[:_SHOWN_SKIPPED]]
    if len(result.skipped) > _SHOWN_SKIPPED:
        lines.append(f"  and {len(result.skipped) - _SHOWN_SKIPPED} more (--json lists all)")
    ui.warn("\n".join(lines))


def show(result: Evaluation, macs: Mapping[str, int]) -> None:
    """Print the result for people, in 80 columns; `macs` per image, by the names of the models."""
    from repshift_cli import ui

    columns = ("model", "top-1 %", "95% interval", "top-5 %", "GMACs", "images/s")
    rows = [_row(name, score, macs[name]) for name, score in result.scores.items()]
    ui.print_table(f"{result.dataset}, {result.images} images", columns, rows)
    if result.same_top1 is not None:
        change = result.scores[_COMPRESSED].top1 - result.scores[_DENSE].top1
        ui.print_text(
            f"top-1 {change:+.2f} points against dense; {result.same_top1} of {result.images} predictions are the same"
        )
    ui.print_text(f"images/s is model time alone; end to end it was {result.images_per_s:.1f} images/s")


def _row(name: str, score: Score, macs: int) -> tuple[str, ...]:
    low, high = score.top1_interval
    gmacs = macs / 1e9
    return (
        name,
        f"{score.top1:.2f}",
        f"{low:.2f} - {high:.2f}",
        f"{score.top5:.2f}",
        f"{gmacs:.3g}" if gmacs < 1 else f"{gmacs:.2f}",
        f"{score.images_per_s:.1f}",
    )


def document(result: Evaluation, macs: Mapping[str, int], model: str, preprocessing: Preprocessing) -> dict[str, Any]:
    """The JSON document of the command."""
    first, *others = result.scores
    found = {
        "model": model,
        "dataset": result.dataset,
        "images": result.images,
        "skipped": len(result.skipped),
        **_numbers(result.scores[first], macs[first]),
        "end_to_end_images_per_s": result.images_per_s,
        "skipped_files": [{"file": entry.sample, "reason": entry.reason} for entry in result.skipped],
        "preprocessing": preprocessing.to_dict(),
    }
    if others:
        found["dense"] = _numbers(result.scores[others[0]], macs[others[0]])
        found["agreement"] = result.agreement
    return found


def _numbers(score: Score, macs: int) -> dict[str, Any]:
    return {
        "top1": score.top1,
        "top5": score.top5,
        "top1_interval": list(score.top1_interval),
        "top1_correct": score.top1_correct,
        "top5_correct": score.top5_correct,
        "images_per_s": score.images_per_s,
        "gmacs": macs / 1e9,
    }
