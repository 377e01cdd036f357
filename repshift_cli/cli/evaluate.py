"""`repshift eval`: accuracy on a labelled dataset; of video-text models, retrieval and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repshift_cli.checkpoints.builtin import BUILTIN
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options
from repshift_cli.cli.evaluate_video import VideoOptions, refuse, run
from repshift_cli.cli.options import Pooling
from repshift_cli.cli.show.evaluate import (
    COMPRESSED,
    DENSE,
    announce_dataset,
    evaluation_document,
    report_skipped,
    show_evaluation,
)
from repshift_cli.cli.show.video_text import Run
from repshift_cli.cli.torchrun import Interrupted, is_first, one_voice, own_device, screen_of_first
from repshift_cli.errors import INTERRUPTED, ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.data.dataset import ImageDataset
    from repshift_cli.data.preprocessing import Preprocessing
    from repshift_cli.evaluation.classification.result import Evaluation
    from repshift_cli.utils.progress import Progress


__all__ = [
    "check_comparison",
    "command",
    "head_size",
    "models_of",
]


_DEFAULT_MODEL = "builtin:vit-digits"


_DEFAULT_DATASET = "builtin:digits"


_BUILTIN = "builtin:"


_FIRST = "first"


_ENOUGH_TO_JUDGE = 100
"""Pictures, before an accuracy is called no better than guessing."""


_IMAGES_AT_A_TIME, _VIDEOS_AT_A_TIME = 64, 8


@dataclass(frozen=True)
class _Setup:
    """How the command was told to run, for pictures and videos alike.

    Device and dtype are those of torch, `attention` is an `AttentionMode`.
    """

    name: str
    dataset: str | None
    data_dir: Path | None
    batch_size: int | None
    device: Any
    dtype: Any
    workers: int | None
    attention: Any
    strict: bool
    limit: int | None
    seed: int
    compare_dense: bool
    json: bool
    resume: Path | None
    saved: Mapping[str, Path]
    force: bool


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, an exported file, or a built-in model.")
    ] = _DEFAULT_MODEL,
    *,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="NAME",
            help="imagenet-val, imagenet-real, imagenet-v2, imagenet-a, imagenet-r, builtin:digits, the path of a "
            "folder with class folders or of a tar, or a name that timm reads, such as torch/cifar10. For video: "
            "msrvtt, msvd, activitynet, didemo, lsmdc, ssv2-label, ssv2-template, msrvtt-qa, msvd-qa, builtin:shapes "
            "or builtin:shapes-qa.",
            show_default=False,
        ),
    ] = None,
    data_dir: options.DataDir = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, metavar="N", help="Only N pictures, videos or questions, evenly spaced over the dataset."
        ),
    ] = None,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Evaluate the original model too, on the same inputs.")
    ] = False,
    model_name: options.ModelName = None,
    heads: options.Heads = None,
    img_size: options.ImgSize = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            min=1,
            help=f"Inputs at a time. Default: {_IMAGES_AT_A_TIME} images, {_VIDEOS_AT_A_TIME} videos.",
            show_default=False,
        ),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    attention: options.Attention = options.AttentionKind.AUTO,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=0,
            help="Processes that decode (0: decode in this one). Default: for images as many as are of use, for "
            "videos 0.",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first picture or video that cannot be read.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="DIR",
            help="Images: keep how far the run is in this folder. The same command goes on after an interruption, "
            "whatever it was; a finished run removes the folder.",
        ),
    ] = None,
    save_predictions: Annotated[
        Path | None,
        typer.Option(
            "--save-predictions",
            metavar="FILE",
            help="Images: write what was said of each (.npz, or .parquet with pyarrow), for `repshift compare`; of the "
            "dense model of --compare-dense into a second file, FILE_dense.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file of predictions.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which built-in scenes are drawn.")] = 0,
    frames: options.Frames = None,
    checkpoint_frames: options.CheckpointFrames = None,
    annotations: Annotated[
        Path | None,
        typer.Option("--annotations", metavar="FILE", help="Captions or questions of videos, as UMT's JSON files."),
    ] = None,
    videos: Annotated[
        Path | None, typer.Option("--videos", metavar="DIR", help="The folder that the annotations' videos lie in.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", metavar="FILE", help="JSON list of the answers to choose from (default: all right)."),
    ] = None,
    vocab: Annotated[
        Path | None, typer.Option("--vocab", metavar="FILE", help="vocab.txt of the BERT that reads the texts.")
    ] = None,
    rerank: Annotated[
        bool | None,
        typer.Option(
            "--rerank/--no-rerank",
            help="Retrieval: order the best of each query by the matching score (default), or by similarity alone.",
            show_default=False,
        ),
    ] = None,
    rerank_k: Annotated[
        int | None,
        typer.Option(
            "--rerank-k", min=1, metavar="K", help="How many of each query are re-ranked (128).", show_default=False
        ),
    ] = None,
    paragraph: Annotated[
        bool | None,
        typer.Option(
            "--paragraph/--no-paragraph",
            help="Whether a list of captions is one text (default: as the benchmark has it, else not).",
            show_default=False,
        ),
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(
            "--pooling",
            help="Dense models for retrieval: pool each frame, as UMT does (default), or all tokens, as compressed "
            "models do.",
            show_default=False,
        ),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Measure accuracy on a labelled dataset, and the dense model beside it where asked.

    Models for video and text: retrieval in both directions, or answers to questions.
    """
    with one_voice():
        saved = _prediction_files(save_predictions, compare_dense, force)
        told = VideoOptions(annotations, videos, answers, vocab, rerank, rerank_k, paragraph, pooling)
        chosen = _dataset_of(model, dataset, annotations)

        from repshift_cli.checkpoints.exported import open_any
        from repshift_cli.measure.device import num_threads, resolve_device, resolve_dtype

        setup = _Setup(
            name=model,
            dataset=chosen,
            data_dir=data_dir,
            batch_size=batch_size,
            device=resolve_device(own_device(device)),
            dtype=resolve_dtype(dtype),
            workers=workers,
            attention=attention.value,
            strict=strict,
            limit=limit,
            seed=seed,
            compare_dense=compare_dense,
            json=json,
            resume=resume,
            saved=saved,
            force=force,
        )
        opened = open_any(model, LoadOptions(model_name, heads, img_size, frames, checkpoint_frames))
        screen = screen_of_first()
        for note in opened.loaded.notes:
            screen.note(note)
        with num_threads(threads):
            if opened.loaded.description.preprocessing.frames is None:
                _classify(opened, told, setup, screen)
            else:
                _watch(opened, told, setup, screen)


def _classify(opened: Opened, told: VideoOptions, setup: _Setup, screen: Progress) -> None:
    """Evaluate a model of single pictures."""
    from repshift_cli.data.catalog import open_dataset
    from repshift_cli.evaluation.classification.evaluate import evaluate, forget
    from repshift_cli.utils.distributed import together

    refuse(setup.name, setup.dataset, told)
    assert setup.dataset is not None
    data = open_dataset(setup.dataset, setup.data_dir, setup.limit, setup.seed)
    models = models_of(opened, setup.compare_dense, setup.name)
    preprocessing = opened.loaded.description.preprocessing
    if not setup.json and is_first():
        announce_dataset(opened, data.for_head(head_size(opened.loaded.model)), preprocessing)
    with together(setup.device) as group:
        result = evaluate(
            models,
            data,
            preprocessing,
            batch_size=setup.batch_size or _IMAGES_AT_A_TIME,
            device=setup.device,
            dtype=setup.dtype,
            workers=setup.workers,
            strict=setup.strict,
            num_classes=head_size(opened.loaded.model),
            progress=screen,
            group=group,
            attention=setup.attention,
            resume=setup.resume,
            keep_rows=bool(setup.saved),
        )
        if group.is_first:
            _tell(result, opened, setup, preprocessing)
            if setup.saved and not result.interrupted:
                _save(result, data.for_head(head_size(opened.loaded.model)), setup)
        if setup.resume is not None and not result.interrupted:
            forget(setup.resume, group)
    if result.interrupted:
        raise Interrupted(INTERRUPTED)


def _tell(result: Evaluation, opened: Opened, setup: _Setup, preprocessing: Preprocessing) -> None:
    """Print what came out, all of it or what there is after an interruption."""
    from repshift_cli.cli import ui

    report_skipped(result)
    macs = {COMPRESSED: opened.macs, DENSE: opened.dense_macs}
    if setup.json:
        ui.print_json(evaluation_document(result, macs, setup.name, preprocessing))
    else:
        show_evaluation(result, macs)
    if DENSE in result.scores:
        _check_better_than_guessing(result)
    if result.interrupted:
        kept = "" if setup.resume is None else f"; the same command goes on from {setup.resume}"
        ui.warn(f"interrupted: these are the numbers of {result.images} of {result.total} pictures{kept}")


def _check_better_than_guessing(result: Evaluation) -> None:
    """Warn if the accuracy of the dense model is no better than guessing."""
    from repshift_cli.cli import ui

    score = result.scores[DENSE]
    low, high = score.top1_interval
    guessed = 100 / result.outputs
    if result.images >= _ENOUGH_TO_JUDGE and low <= guessed <= high:
        ui.warn(
            f"the dense model is no better than guessing among {result.outputs}: are the labels those of its head, and "
            "are its weights trained?"
        )


def _prediction_files(path: Path | None, compare_dense: bool, force: bool) -> dict[str, Path]:
    """Where predictions go, by the name of the model; empty where none are asked for.

    Raises:
        UsageError, OutputError: they could not be written there.
    """
    from repshift_cli.evaluation.classification.predictions import check_suffix
    from repshift_cli.utils.files import check_outputs

    if path is None:
        return {}
    check_suffix("--save-predictions", path)
    files = {_FIRST: path}
    if compare_dense:
        files[DENSE] = path.with_name(f"{path.stem}_{DENSE}{path.suffix}")
    check_outputs(files, force)
    return files


def _save(result: Evaluation, data: ImageDataset, setup: _Setup) -> None:
    """Write what was said of each picture, a file for each model."""
    from repshift_cli.cli import ui
    from repshift_cli.evaluation.classification.predictions import save_predictions
    from repshift_cli.evaluation.classification.result import predictions_of

    for name in result.scores:
        path = setup.saved.get(name, setup.saved[_FIRST])
        model = f"{setup.name} ({name})" if len(result.scores) > 1 else setup.name
        save_predictions(path, predictions_of(result, name, data, model), setup.force)
        if not setup.json:
            ui.print_text(f"wrote {path}")


def _watch(opened: Opened, told: VideoOptions, setup: _Setup, screen: Progress) -> None:
    """Evaluate a model for video and text.

    Raises:
        UsageError: an option is for models of single pictures, or torchrun started several processes.
        ModelError: it is an exported file.
    """
    from repshift_cli.checkpoints.exported import OpenedExport
    from repshift_cli.evaluation.video_text.data import Wanted
    from repshift_cli.evaluation.video_text.evaluate import DenseSelf, Settings
    from repshift_cli.utils.distributed import launched_together

    options_of_images = {
        "--resume": setup.resume is not None,
        "--save-predictions": bool(setup.saved),
    }
    if given := [option for option, is_given in options_of_images.items() if is_given]:
        raise UsageError(f"{given[0]} is for models of single pictures, and {setup.name} takes clips", "Leave it out.")
    if launched_together():
        raise UsageError(
            f"{setup.name} takes clips: retrieval and answers are evaluated by one process",
            "Start it without torchrun.",
        )
    if isinstance(opened, OpenedExport):
        raise ModelError(
            f"{setup.name} holds the vision encoder alone, and retrieval and answers need the text side too",
            "Evaluate the checkpoint that it was exported from.",
        )
    check_comparison(opened, setup.compare_dense, setup.name)
    compressed = opened.compressed
    models: dict[str, Any] = {DENSE if compressed is None else COMPRESSED: opened.loaded.model}
    if compressed is not None and setup.compare_dense:
        models[DENSE] = DenseSelf(compressed)
    wanted = Wanted(
        setup.dataset,
        told.annotations,
        told.videos,
        told.answers,
        setup.data_dir,
        told.paragraph,
        setup.limit,
        setup.seed,
    )
    settings = Settings(
        setup.batch_size or _VIDEOS_AT_A_TIME,
        setup.device,
        setup.dtype,
        setup.workers or 0,
        setup.strict,
        attention=setup.attention,
    )
    run(Run(opened, setup.name, models, settings), wanted, told, screen, setup.json)


def _dataset_of(model: str, dataset: str | None, annotations: Path | None) -> str | None:
    """The dataset that was named, or the one that belongs to a built-in model; None for annotations alone.

    Raises:
        UsageError: none was named and the model is not built in.
    """
    if dataset is not None or annotations is not None:
        return dataset
    if model.startswith(_BUILTIN):
        return BUILTIN[model].dataset if model in BUILTIN else _DEFAULT_DATASET
    raise UsageError(
        f"no dataset was named for {model}",
        "Add --dataset imagenet-val --data-dir DIR, or --dataset FOLDER with one folder per class. For video models: "
        "--dataset msrvtt --data-dir DIR, or --annotations FILE --videos DIR.",
    )


def check_comparison(opened: Opened, compare_dense: bool, name: str) -> None:
    """Refuse to compare a dense model with itself.

    Raises:
        UsageError: a comparison was asked for, but the model is dense.
    """
    if opened.compressed is None and opened.reduced and compare_dense:
        raise UsageError(
            f"--compare-dense: {name} is an exported file, which has no dense self",
            "Export that too, with --dense, and evaluate both; or evaluate the checkpoint.",
        )
    if opened.compressed is None and compare_dense:
        raise UsageError(
            f"--compare-dense: {name} is dense itself, there is nothing to compare",
            "Leave the option out, or give a checkpoint that `repshift compress` wrote.",
        )


def models_of(opened: Opened, compare_dense: bool, name: str) -> dict[str, nn.Module]:
    """The modules to run, by name; the first one is what was asked for. Errors as `check_comparison`."""
    from repshift_cli.checkpoints.exported import OpenedExport

    check_comparison(opened, compare_dense, name)
    compressed = opened.compressed
    if isinstance(opened, OpenedExport):
        return {COMPRESSED if opened.reduced else DENSE: opened.flexible}
    if compressed is None:
        return {DENSE: opened.module}
    if not compare_dense:
        return {COMPRESSED: compressed}
    return {COMPRESSED: compressed, DENSE: _dense_view(compressed)}


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
