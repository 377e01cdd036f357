"""`repshift eval --embeddings`: embeddings of a compressed encoder against those of its dense self."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.cli import ui
from repshift_cli.cli.evaluate_video import IMAGE_BATCH, EvalOptions, VideoOptions, refuse_videos
from repshift_cli.cli.show.embeddings import embedding_document, show_embeddings
from repshift_cli.cli.show.video_text import list_names
from repshift_cli.cli.torchrun import refuse_torchrun
from repshift_cli.errors import UsageError
from repshift_cli.utils.files import check_output

if TYPE_CHECKING:
    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.data.dataset import ImageDataset
    from repshift_cli.evaluation.embeddings import Embeddings
    from repshift_cli.utils.progress import Progress

_KS = re.compile(r"[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*")
_NPY = ".npy"
_SUFFIXES = (_NPY, ".parquet")
_DENSE = "dense"


@dataclass(frozen=True)
class EmbeddingOptions:
    """The options of `--embeddings`.

    Attributes:
        images: the queries; a folder or a dataset.
        index: the index; images or a `.npy` file, None for the queries.
        ks: numbers of neighbours.
        files: where embeddings are written, by name of the model; "" for the given one.
    """

    images: str
    index: str | None
    ks: tuple[int, ...]
    files: Mapping[str, Path]

    @classmethod
    def of(  # noqa: PLR0917
        cls, images: str | None, index: str | None, recall_at: str | None, save: Path | None, dense: bool, force: bool
    ) -> EmbeddingOptions | None:
        """The checked options; None without `--embeddings`.

        Raises:
            UsageError: one is invalid, or is given without `--embeddings`; a file exists.
            OutputError: a file cannot be written.
        """
        given = {"--index": index, "--recall-at": recall_at, "--save-embeddings": save}
        if images is None:
            if alone := [option for option, value in given.items() if value is not None]:
                raise UsageError(f"{alone[0]} needs --embeddings", "Add --embeddings IMAGES.")
            return None
        files: dict[str, Path] = {}
        if save is not None:
            from repshift_cli.evaluation.common import check_table_suffix

            check_table_suffix("--save-embeddings", save, _SUFFIXES)
            beside = {_DENSE: save.with_name(f"{save.stem}_{_DENSE}{save.suffix}")}
            files = {"": save} | (beside if dense else {})
        for path in files.values():
            check_output(path, force)
            if path.suffix == _NPY:
                from repshift_cli.evaluation.embeddings import origin_file

                check_output(origin_file(path), force)
        return cls(images, index, _parse_ks("1,10" if recall_at is None else recall_at), files)


def _parse_ks(text: str) -> tuple[int, ...]:
    if not _KS.fullmatch(text):
        raise UsageError(f"invalid --recall-at {text!r}: must be numbers from 1 to 9999", "Such as --recall-at 1,10.")
    return tuple(sorted({int(part) for part in text.split(",")}))


def evaluate_embeddings(
    opened: Opened, given: EvalOptions, video: VideoOptions, options: EmbeddingOptions, screen: Progress
) -> None:
    """Encode the images by the compressed and the dense model, compare the embeddings and print the result."""
    from repshift_cli.data.sources.folder import identical_files
    from repshift_cli.evaluation import embeddings as work

    _check(opened, given, video, options)
    settings = given.settings | {"batch_size": given.settings["batch_size"] or IMAGE_BATCH, "progress": screen}
    functions = work.encoders(opened.module, given.seed)
    queries = _open(options.images, given.limit, given, screen)
    file = Path(options.index) if options.index and options.index.endswith(_NPY) else None
    stored = None if file is None else work.load_index(file)
    origin = work.origin_of(opened.loaded) if file or options.files else {}
    if file and opened.compressed is not None and (note := work.check_origin(file, origin)):
        screen.note(note)
    data = queries if options.index is None or file else _open(options.index, None, given, screen)
    if opened.compressed is not None:
        work.check_index_size(len(data if stored is None else stored), options.ks, options.index or queries.name)

    def encode(images: ImageDataset, by: Mapping[str, Any]) -> Embeddings:
        found = work.encode(opened.module, by, images, opened.loaded.description.preprocessing, **settings)
        names = [f"{entry.sample}: {entry.reason}" for entry in found.skipped]
        list_names("images could not be read and were skipped (--strict stops at the first)", names)
        return found

    found = encode(queries, functions)
    for name, path in options.files.items():
        names = [queries.key(index) for index in found.images]
        name = name or next(iter(functions))  # noqa: PLW2901
        work.save_embeddings(path, found.by_model[name], names, {"model": name, **origin}, given.force)
    index = None
    if opened.compressed is not None and file and stored is not None:
        index = work.index_of_file(file, stored, found.by_model[_DENSE])
    elif opened.compressed is not None:
        entries = found if data is queries else encode(data, {_DENSE: functions[_DENSE]})
        index = work.index_of_images(queries, found, data, entries)
    scores = {} if index is None else work.compare(found, index, options.ks)
    if identical := identical_files(queries):
        screen.note(f"{identical} of {len(queries)} files are identical to another one: recall@1 is ambiguous there")
    document = embedding_document(opened, given.name, found, index, scores)
    saved = [str(path) for path in options.files.values()]
    document |= {"of": len(queries), "identical_files": identical, "saved": saved}
    if given.json:
        ui.result.keep(document)
    else:
        show_embeddings(document, queries.description)


def _open(where: str, limit: int | None, given: EvalOptions, screen: Progress) -> ImageDataset:
    from repshift_cli.data.catalog import DEFAULT_SCENES
    from repshift_cli.data.dataset import limited
    from repshift_cli.data.inputs import open_images

    data = limited(open_images(where, limit or DEFAULT_SCENES, given.seed), limit)
    data.info.report(screen)
    return data


def _check(opened: Opened, given: EvalOptions, video: VideoOptions, options: EmbeddingOptions) -> None:
    """Raise a UsageError for a model or an option that does not go with `--embeddings`."""
    from repshift_cli.checkpoints.exported import OpenedExport
    from repshift_cli.evaluation.models import check_comparison

    refuse_torchrun("repshift eval --embeddings")
    others: dict[str, Any] = {"--dataset": given.dataset, "--data-dir": given.data_dir, "--class-order": given.order}
    others |= {"--resume": given.resume, "--save-predictions": given.predictions}
    if unused := [option for option, value in others.items() if value]:
        raise UsageError(f"{unused[0]} is not used with --embeddings", "Leave it out.")
    who = f"--embeddings: {given.name}"
    if (unit := opened.loaded.description.preprocessing.unit) != "image":
        raise UsageError(f"{who} takes {unit}s", "Give an encoder of images.")
    refuse_videos(given.name, None, video, "images")
    if isinstance(opened, OpenedExport):
        raise UsageError(f"{who} is an exported file without its dense model", "Give the checkpoint.")
    if classes := int(getattr(opened.loaded.model, "num_classes", 0) or 0):
        raise UsageError(
            f"{who} has a head of {classes} classes, so its outputs are not embeddings",
            "Give an encoder without a head (timm: num_classes=0), or evaluate its classes with --dataset.",
        )
    check_comparison(opened, given.compare_dense, given.name)
    if opened.compressed is None and not options.files:
        raise UsageError(
            f"{who} is a dense model, so there is nothing to compare",
            "Give a checkpoint from `repshift compress`, or add --save-embeddings FILE.npy to write an index.",
        )
