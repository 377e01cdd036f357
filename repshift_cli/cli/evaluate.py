"""`repshift eval`: accuracy on labelled images or videos; retrieval and question answering of video-text models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repshift_cli.checkpoints.builtin import BUILTIN
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.cli import options, ui
from repshift_cli.cli.evaluate_embeddings import EmbeddingOptions, evaluate_embeddings
from repshift_cli.cli.evaluate_video import (
    IMAGE_BATCH,
    VIDEO_BATCH,
    EvalOptions,
    VideoOptions,
    evaluate_videos,
    refuse_videos,
)
from repshift_cli.cli.evaluate_zero_shot import ZeroShotOptions
from repshift_cli.cli.options import Pooling
from repshift_cli.cli.show.evaluate import (
    announce_dataset,
    evaluation_document,
    show_evaluation,
    warn_of_guessing,
    warn_of_skipped,
)
from repshift_cli.cli.show.several import several_numbers, show_several
from repshift_cli.cli.torchrun import (
    Interrupted,
    own_device,
    rank_zero_errors,
    screen_of_first,
)
from repshift_cli.errors import INTERRUPTED, OutputError, UsageError

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.data.dataset import ImageDataset
    from repshift_cli.evaluation.classification.result import Evaluation
    from repshift_cli.evaluation.models import Candidate
    from repshift_cli.utils.distributed import Processes
    from repshift_cli.utils.progress import Progress

_DEFAULT_MODEL = "builtin:vit-digits"
_DEFAULT_DATASET = "builtin:digits"
_BUILTIN = "builtin:"
_ALONE = "Give one model, and leave --against out."


@options.takes_model
def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoints, exported files, or built-in models. Several are compared on the same images. "
            f"Default: {_DEFAULT_MODEL}.",
            show_default=False,
        ),
    ] = None,
    *,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Images: imagenet-val, imagenet-real, imagenet-v2, imagenet-a, imagenet-r, fashion-mnist, "
            "builtin:digits, a folder of class folders, a tar file, or a dataset that timm can read (torch/cifar10). "
            "Labelled videos: a folder of class folders. Videos with texts: msrvtt, msvd, activitynet, didemo, lsmdc, "
            "ssv2-label, ssv2-template, msrvtt-qa, msvd-qa, builtin:shapes, builtin:shapes-qa.",
            show_default=False,
        ),
    ] = None,
    data_dir: options.DataDir = None,
    order: options.ClassOrder = None,
    limit: Annotated[
        int | None,
        options.number("limit", help="Use N images, videos or questions, evenly spaced over the dataset."),
    ] = None,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Also evaluate the dense model, on the same inputs.")
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="With labels: also evaluate the dense model and these baselines, on the same weights and at the same "
            "cost: class-attention, bipartite, tome, fuse, random.",
        ),
    ] = None,
    load: LoadOptions,
    trust: options.Trust = False,
    batch_size: Annotated[
        int | None,
        options.number(
            "batch_size",
            "--batch-size",
            "-b",
            help=f"Batch size (default: {IMAGE_BATCH} images, {VIDEO_BATCH} videos).",
            show_default=False,
        ),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    attention: options.Attention = options.AttentionKind.AUTO,
    workers: Annotated[
        int | None,
        options.number(
            "workers",
            help="Worker processes that decode; 0 decodes in the main process (default: chosen by the number of cores "
            "for images, 0 for videos).",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first image or video that cannot be read.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With labels: save progress in this folder. After an interruption, the same command continues from "
            "there. A finished run deletes the folder.",
        ),
    ] = None,
    save_predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With labels: write the predictions (.npz, or .parquet with pyarrow) for `repshift compare`. With "
            "--compare-dense, those of the dense model go to FILE_dense.",
        ),
    ] = None,
    force: options.Overwrite = False,
    seed: Annotated[int, options.number("seed", help="Random seed of the built-in scenes.")] = 0,
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Captions or questions of videos, as JSON in UMT's format.")
    ] = None,
    videos: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the videos named in --annotations.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON list of possible answers (default: all correct answers).")
    ] = None,
    vocab: Annotated[Path | None, typer.Option(metavar="FILE", help="vocab.txt of the BERT text encoder.")] = None,
    rerank: Annotated[
        bool | None,
        typer.Option(
            "--rerank/--no-rerank",
            help="Retrieval: re-rank the top candidates by matching score (default), or rank by similarity only.",
            show_default=False,
        ),
    ] = None,
    rerank_k: Annotated[
        int | None,
        options.number(
            "rerank_k", metavar="K", help="Candidates per query to re-rank (default: 128).", show_default=False
        ),
    ] = None,
    paragraph: Annotated[
        bool | None,
        typer.Option(
            "--paragraph/--no-paragraph",
            help="Join the captions of a video into one text (default: as in the benchmark).",
            show_default=False,
        ),
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(
            help="Retrieval with dense models: pool per frame as UMT does (default), or over all tokens as compressed "
            "models do.",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="Encoders without a head: compare the embeddings of these unlabelled images (a folder at any depth, "
            "or a dataset) with the dense ones: cosine, and recall on an index of dense embeddings.",
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="Images of the index, or a .npy file of dense embeddings (default: the images of --embeddings; each "
            "query's own entry is left out).",
            show_default=False,
        ),
    ] = None,
    recall_at: Annotated[
        str | None,
        typer.Option(metavar="K,...", help="Numbers of neighbours of the recall (default: 1,10).", show_default=False),
    ] = None,
    save_embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the embeddings of --embeddings (.npy, float32, one row per image). With --compare-dense, those "
            "of the dense model go to FILE_dense.",
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Models with a text tower (CLIP, SigLIP): classify zero-shot. The file has one class name per line.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Text of a class, with {} for its name (default: a photo of a {}.). Repeated: their mean.",
            show_default=False,
        ),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Measure accuracy on a labelled dataset.

    For video-text models: retrieval in both directions, or question answering. For encoders without a head: how near
    the embeddings are to the dense ones (--embeddings). For models with a text tower: zero-shot (--class-names).
    """
    with rank_zero_errors():
        names = options.label_models(models or [_DEFAULT_MODEL])
        baselines = options.split_values(against or [])
        label, first = next(iter(names.items()))
        several = len(names) > 1 or bool(baselines)
        for option, value in (("--embeddings", embeddings), ("--save-predictions", save_predictions)):
            if several and value is not None:
                raise UsageError(f"{option} is for one model, without --against", _ALONE)
        of_embeddings = EmbeddingOptions.of(embeddings, index, recall_at, save_embeddings, compare_dense, force)
        zero_shot = ZeroShotOptions.of(class_names, prompt, embeddings)
        predictions = _prediction_paths(save_predictions, compare_dense, force)
        if of_embeddings is None:
            dataset = _dataset_of(first, dataset, annotations)

        from repshift_cli.checkpoints.exported import open_any
        from repshift_cli.evaluation.models import check_against
        from repshift_cli.measure.device import num_threads, resolve_device, resolve_dtype
        from repshift_cli.utils.distributed import together

        check_against(baselines)
        place = resolve_device(own_device(device))
        settings = {
            "batch_size": batch_size,
            "device": place,
            "dtype": resolve_dtype(dtype),
            "workers": workers,
            "strict": strict,
            "attention": attention.value,
        }
        given = EvalOptions(
            first,
            dataset,
            data_dir,
            order,
            limit,
            seed,
            compare_dense,
            resume,
            predictions,
            force,
            json,
            settings,
            zero_shot,
            tuple(baselines),
            several,
        )
        video = VideoOptions(annotations, videos, answers, vocab, rerank, rerank_k, paragraph, pooling)
        screen = screen_of_first()
        with num_threads(threads), together(place) as group:
            opened = group.agreed(lambda: {label: open_any(name, load, trust) for label, name in names.items()})
            for note in dict.fromkeys(note for each in opened.values() for note in each.loaded.notes):
                screen.note(note)
            texts = [label for label, each in opened.items() if not zero_shot and _takes_texts(each)]
            if of_embeddings is not None:
                evaluate_embeddings(opened[label], given, video, of_embeddings, screen)
            elif not texts:
                _evaluate_images(opened, given, video, screen, group)
            elif several:
                raise UsageError(f"{texts[0]} takes videos with texts, and is evaluated alone", _ALONE)
            else:
                evaluate_videos(opened[label], given, video, screen)


def _takes_texts(opened: Opened) -> bool:
    """Whether it is a video-text model."""
    videos = opened.loaded.description.preprocessing.frames is not None
    return videos and not getattr(opened.loaded.model, "num_classes", None)


def _evaluate_images(
    opened: Mapping[str, Opened], given: EvalOptions, video: VideoOptions, screen: Progress, group: Processes
) -> None:
    from repshift_cli.evaluation.classification.evaluate import finish
    from repshift_cli.evaluation.classification.several import evaluate_passes
    from repshift_cli.evaluation.models import head_size

    first = next(iter(opened.values()))
    usual = IMAGE_BATCH if first.loaded.description.preprocessing.frames is None else VIDEO_BATCH
    settings = given.settings | {"batch_size": given.settings["batch_size"] or usual}
    models, labelled = group.agreed(lambda: _open_images(opened, given, video))
    labelled.info.report(screen)
    if given.zero_shot:
        given.zero_shot.note_order(labelled, screen)
    if not given.json and group.is_first:
        # with predictions to save, the run continues although nothing can be printed
        with suppress(*(OSError, OutputError) if given.predictions else ()):
            announce_dataset(opened, labelled)
    result = evaluate_passes(
        models,
        labelled,
        num_classes=head_size(next(iter(models.values())).module if given.zero_shot else first.loaded.model),
        progress=screen,
        group=group,
        resume=given.resume,
        keep_rows=bool(given.predictions) or given.several,
        **settings,
    )
    if group.is_first:
        try:
            saved = () if result.interrupted else _save_predictions(result, labelled, given)
        finally:
            _report(result, labelled, models, given)
        if not given.json:
            ui.print_text(*(f"wrote {path}" for path in saved))
    if given.resume is not None and not result.interrupted:
        ui.result.print()  # the state is deleted after the result is printed
        finish(given.resume, group)
    if result.interrupted:
        raise Interrupted(INTERRUPTED)


def _open_images(
    opened: Mapping[str, Opened], given: EvalOptions, video: VideoOptions
) -> tuple[Mapping[str, Candidate], ImageDataset]:
    """The models, and the dataset with the labels of the head."""
    from repshift_cli.data.catalog import open_dataset
    from repshift_cli.data.sources.folder import MEDIA
    from repshift_cli.evaluation.classification.several import label_for_all
    from repshift_cli.evaluation.models import candidates_of, check_comparison

    unit = next(iter(opened.values())).loaded.description.preprocessing.unit
    refuse_videos(given.name, given.dataset, video, "images" if unit == "image" else f"labelled {MEDIA[unit].unit}")
    assert given.dataset is not None
    data = open_dataset(given.dataset, given.data_dir, given.limit, given.seed, given.order, unit=unit)
    check_comparison(next(iter(opened.values())), given.compare_dense, given.name)
    models = candidates_of(opened, given.compare_dense, given.against)
    if given.resume and len({each.preprocessing for each in models.values()}) > 1:
        raise UsageError(
            "--resume: the models have different preprocessing", "Leave it out, or evaluate them one by one."
        )
    if given.zero_shot:
        return given.zero_shot.classifiers(models, opened, given.settings["device"]), given.zero_shot.labelled(data)
    return models, label_for_all(data, opened)


def _report(result: Evaluation, data: ImageDataset, models: Mapping[str, Candidate], given: EvalOptions) -> None:
    from repshift_cli.evaluation.classification.several import compare_models

    warn_of_skipped(result)
    macs = {name: candidate.macs for name, candidate in models.items()}
    paired = compare_models(result, data, models) if given.several else None
    if given.json:
        several = several_numbers(result, paired, models) if paired else None
        preprocessing = next(iter(models.values())).preprocessing
        document = evaluation_document(result, macs, given.name, preprocessing, data, several=several)
        ui.result.keep(document | {"zero_shot": given.zero_shot and given.zero_shot.document()})
    elif paired:
        show_several(result, paired, models)
    else:
        show_evaluation(result, macs)
    warn_of_guessing(result, paired.reference if paired else list(result.scores)[-1])
    if result.interrupted:
        resume = f"; run the same command to continue from {given.resume}" if given.resume else ""
        left = ", ".join(name for name in models if name not in result.scores)
        resume += f"; not evaluated: {left}" if left else ""
        ui.warn(f"interrupted: this is the result of {result.images} of {result.total} {result.unit}{resume}")


def _prediction_paths(path: Path | None, compare_dense: bool, force: bool) -> tuple[Path, ...]:
    """The files of `--save-predictions`, in the order of the models."""
    from repshift_cli.evaluation.classification.predictions import check_suffix
    from repshift_cli.evaluation.models import DENSE
    from repshift_cli.utils.files import check_output

    if path is None:
        return ()
    check_suffix("--save-predictions", path)
    dense = path.with_name(f"{path.stem}_{DENSE}{path.suffix}")
    paths = (path, dense) if compare_dense else (path,)
    for each in paths:
        check_output(each, force)
    return paths


def _save_predictions(result: Evaluation, data: ImageDataset, given: EvalOptions) -> tuple[Path, ...]:
    from repshift_cli.evaluation.classification.predictions import save_predictions
    from repshift_cli.evaluation.classification.result import predictions_of

    for name, path in zip(result.scores, given.predictions, strict=False):
        model = f"{given.name} ({name})" if len(result.scores) > 1 else given.name
        save_predictions(path, predictions_of(result, name, data, model), given.force)
    return given.predictions


def _dataset_of(model: str, dataset: str | None, annotations: Path | None) -> str | None:
    """The given dataset, or the default of a built-in model; None with `--annotations` alone."""
    if dataset is not None or annotations is not None:
        return dataset
    if model.startswith(_BUILTIN):
        return BUILTIN[model].dataset if model in BUILTIN else _DEFAULT_DATASET
    raise UsageError(
        f"no dataset given for {model}",
        "Add --dataset imagenet-val --data-dir DIR, or --dataset FOLDER with one folder per class. For video models: "
        "--dataset msrvtt --data-dir DIR, or --annotations FILE --videos DIR.",
    )
