"""Quality of the embeddings of a compressed encoder: cosine to the dense ones, and recall on a dense index.

An index of dense embeddings stays as it is, and only the queries come from the compressed model. The k nearest entries
of the dense query are the correct ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.data.dataset import ImageDataset
from repshift_cli.data.loader import cut_batches, default_workers, image_loader
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import DataError, ModelError
from repshift_cli.evaluation.common import Skipped, check_finite, explain_out_of_memory, import_pyarrow
from repshift_cli.evaluation.models import COMPRESSED, DENSE, DenseView
from repshift_cli.models.attention_mode import AttentionMode, attention_mode
from repshift_cli.ops.neighbours import recall_at, unit
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.reduction.reducers.base import build_reducer
from repshift_cli.utils.documents import parse_json
from repshift_cli.utils.files import atomic_output, open_file, read_text, write_text
from repshift_cli.utils.hashing import digest_of_tensors
from repshift_cli.utils.progress import Progress

RANDOM = "random"
_EMBEDDING_RANK = 2
_DENSE_INDEX = "Give an index of the dense model: `repshift eval DENSE --embeddings IMAGES --save-embeddings FILE.npy`."
_SAME = 1e-3
"""Largest difference of unit vectors that are the same embedding, in any dtype."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of images.

    Attributes:
        by_model: float32 `[N, C]` on the CPU, by name of the model.
        images: the number of each encoded image in its dataset.
    """

    by_model: Mapping[str, Tensor]
    images: tuple[int, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class EmbeddingIndex:
    """The dense embeddings to search.

    Attributes:
        entries: `[M, C]`.
        own: int64 `[N]`, the entry of each query itself, -1 for none.
        name: where the entries come from.
    """

    entries: Tensor
    own: Tensor
    name: str

    @property
    def with_queries(self) -> bool:
        """Whether queries have entries of their own, which are left out."""
        return bool((self.own >= 0).any())


def check_index_size(count: int, ks: Sequence[int], name: str) -> None:
    """Raise a DataError if a recall would be high by chance: there must be two entries per neighbour."""
    if count < 2 * max(ks):
        raise DataError(
            f"recall@{max(ks)} needs an index of at least {2 * max(ks)} images besides the query, {name} has {count}",
            "Give more images, or fewer neighbours with --recall-at.",
        )


def encoders(model: nn.Module, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What to evaluate: a compressed model, its dense self, and the same plan with tokens dropped at random.

    A dense model is alone. A plan whose reducer uses no score has no random row.
    """
    if not isinstance(model, CompressedModel):
        return {DENSE: model}

    def at_random(images: Tensor) -> Tensor:
        with model.at_random(seed):
            found: Tensor = model(images)
            return found

    scored = build_reducer(model.plan.reducer).scored
    return {COMPRESSED: model, DENSE: DenseView(model)} | ({RANDOM: at_random} if scored else {})


@torch.inference_mode()
def encode(
    model: nn.Module,
    functions: Mapping[str, Callable[[Tensor], Tensor]],
    data: ImageDataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    workers: int | None,
    strict: bool,
    progress: Progress,
    attention: AttentionMode = "auto",
) -> Embeddings:
    """Encode all images of a dataset by functions of one model.

    Args:
        model: moved to `device` and `dtype` in place.
        functions: by name, each from `[B, C, H, W]` to `[B, C]`.
        workers, strict: as for `classification.evaluate`.

    Raises:
        DataError: no image can be read, or (`strict`) one cannot.
        ModelError: the model does not return one vector per image.
        CheckFailed: an embedding is not finite.
        UsageError: not enough memory for a batch; unsupported attention.
    """
    model.to(device=device, dtype=dtype).eval()
    workers = default_workers(device, 1) if workers is None else workers
    batches, pinned = cut_batches(len(data), batch_size), device.type == "cuda"
    loader = image_loader(
        data, preprocessing, batches, workers=workers, pinned=pinned, strict=strict, warn=progress.warn
    )
    found: dict[str, list[Tensor]] = {name: [] for name in functions}
    images: list[int] = []
    skipped: list[Skipped] = []
    memory = explain_out_of_memory(f"{batch_size} images")
    with attention_mode(model, attention), memory, progress.task("encoding", len(data)) as task:
        for batch in loader:
            skipped += [Skipped(data.sample_id(index), reason) for index, reason in batch.broken]
            if batch.pixels is not None:
                pixels = batch.pixels.to(device=device, dtype=dtype)
                for name, function in functions.items():
                    found[name].append(_checked(name, function(pixels), len(pixels)))
                images += batch.indices
            task.advance(batch.count)
    if not images:
        raise DataError(f"none of the {len(skipped)} images in {data.name} can be read; {skipped[0].reason}")
    return Embeddings({name: torch.cat(parts) for name, parts in found.items()}, tuple(images), tuple(skipped))


def _checked(name: str, output: Any, count: int) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != _EMBEDDING_RANK or len(output) != count:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"{name}: the model returns {shape} for {count} images, not one vector per image",
            "Give an encoder that pools its tokens.",
        )
    return check_finite(name, output).float().cpu()


def index_of_images(
    queries: ImageDataset, found: Embeddings, data: ImageDataset, entries: Embeddings
) -> EmbeddingIndex:
    """The dense embeddings of a dataset as the index; a file that is also a query is the query's own entry."""
    if data is queries:  # names can occur twice
        own = list(range(len(found.images)))
    else:
        place = {_identity(data, index): row for row, index in enumerate(entries.images)}
        own = [place.get(_identity(queries, index), -1) for index in found.images]
    return EmbeddingIndex(entries.by_model[DENSE], torch.tensor(own), data.name)


def _identity(data: ImageDataset, index: int) -> str:
    name = data.sample_id(index)
    return os.path.realpath(name) if Path(name).exists() else f"{data.name}:{name}"


def load_index(path: Path) -> Tensor:
    """The embeddings in a `.npy` file, float32 `[M, C]`.

    Raises:
        DataError: it cannot be read, or is no matrix of finite floating-point numbers.
    """
    try:
        open_file(path).close()
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a .npy file of embeddings: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != _EMBEDDING_RANK or array.dtype.kind != "f":
        raise DataError(f"{path} is not a matrix of floating-point numbers [images, channels]")
    entries = torch.from_numpy(np.array(array, dtype=np.float32))
    if not bool(entries.isfinite().all()):
        raise DataError(f"{path} has values that are not finite")
    return entries


def origin_of(loaded: LoadedModel) -> dict[str, Any]:
    """What dense embeddings depend on: the weights, the same in a compressed checkpoint, and the preprocessing."""
    weights = digest_of_tensors(sorted(loaded.tensors.items()))
    return {"weights_sha256": weights, "preprocessing": loaded.description.preprocessing.to_dict()}


def origin_file(path: Path) -> Path:
    """The file beside a `.npy` file that says which model its embeddings are of."""
    return path.with_name(f"{path.name}.json")


def check_origin(path: Path, origin: Mapping[str, Any]) -> str | None:
    """Compare the index in a `.npy` file with the dense model, `origin_of`.

    Returns:
        A note if there is no file beside it that says what it is of.

    Raises:
        DataError: it is of another model, of another preprocessing or of a compressed model, or that file is damaged.
    """
    beside = origin_file(path)
    if not beside.is_file():
        return f"{beside} does not exist, so only the width of {path} shows whether it is of this dense model"
    try:
        stored = parse_json(read_text(beside))
    except (OSError, ValueError) as error:
        raise DataError(f"{beside} is not readable JSON: {error}") from error
    stated = stored if isinstance(stored, dict) else {}
    reasons = {
        "of a compressed model": stated.get("model") != DENSE,
        "of a model with other weights": stated.get("weights_sha256") != origin["weights_sha256"],
        "of another preprocessing": stated.get("preprocessing") != json.loads(json.dumps(origin["preprocessing"])),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise DataError(f"the embeddings in {path} are {reason}, as {beside} says", _DENSE_INDEX)
    return None


def index_of_file(path: Path, entries: Tensor, queries: Tensor) -> EmbeddingIndex:
    """The index of a file, `[M, C]`.

    If its rows are the dense embeddings of the queries `[N, C]`, in their order, each query has its own entry.

    Raises:
        DataError: it has another width.
    """
    if entries.shape[1] != queries.shape[1]:
        raise DataError(
            f"{path} has embeddings of width {entries.shape[1]}, the model of width {queries.shape[1]}",
            _DENSE_INDEX,
        )
    same = len(entries) == len(queries) and bool(((unit(entries) - unit(queries)).abs() < _SAME).all())
    own = torch.arange(len(queries)) if same else torch.full((len(queries),), -1)
    return EmbeddingIndex(entries, own, str(path))


def compare(found: Embeddings, index: EmbeddingIndex, ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Each model but the dense one against it, by name.

    Returns:
        `cosine` with `mean`, `p5` and `min` over the images, and `recall`: for each k the mean `share` with its
        standard `error`.

    Raises:
        DataError: the index is too small.
    """
    check_index_size(len(index.entries) - index.with_queries, ks, index.name)
    dense = found.by_model[DENSE]
    others = {name: given for name, given in found.by_model.items() if name != DENSE}
    recall = recall_at(dense, others, index.entries, ks, index.own)
    scores = {}
    for name, given in others.items():
        cosine = (unit(given) * unit(dense)).sum(-1).double()
        spread = {"mean": cosine.mean(), "p5": cosine.quantile(0.05), "min": cosine.min()}
        shares = {k: values.double() for k, values in recall[name].items()}
        errors = {k: float(values.std(correction=0)) / len(values) ** 0.5 for k, values in shares.items()}
        scores[name] = {
            "cosine": {key: round(float(value), 6) for key, value in spread.items()},
            "recall": [
                {"k": k, "share": round(float(values.mean()), 6), "error": round(errors[k], 6)}
                for k, values in shares.items()
            ],
        }
    return scores


def save_embeddings(
    path: Path, embeddings: Tensor, names: Sequence[str], origin: Mapping[str, Any], force: bool
) -> None:
    """Write float32 `[N, C]`: `.npy`, or `.parquet` with the names of the images; errors as `atomic_output`.

    `origin` goes into the metadata of the table, or into the file beside the array.
    """
    stated = json.dumps(dict(origin), indent=2)
    if path.suffix == ".npy":
        write_text(origin_file(path), stated + "\n", force)
    with atomic_output(path, force) as temporary, temporary.open("wb") as stream:
        if path.suffix == ".npy":
            np.save(stream, embeddings.numpy())
            return
        arrow, parquet = import_pyarrow(str(path), ".npy")
        rows = arrow.FixedSizeListArray.from_arrays(embeddings.flatten().numpy(), embeddings.shape[1])
        table = arrow.table({"file": arrow.array(names), "embedding": rows})
        parquet.write_table(table.replace_schema_metadata({"repshift": stated}), stream)
