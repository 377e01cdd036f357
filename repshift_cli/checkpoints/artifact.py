"""Write and read compressed checkpoints.

A compressed checkpoint is one `.safetensors` file: the tensors of the dense model under their own keys, so that other
tools open it as that model, and in the metadata a JSON document with the plan. Loading replays the plan. A model of
another library can also be written as a folder in the form of that library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repshift_cli.checkpoints.describe import describe_module
from repshift_cli.checkpoints.folders import check_folder
from repshift_cli.checkpoints.identify.computation import computation
from repshift_cli.checkpoints.libraries.base import library_of
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.recovered import recovered_values
from repshift_cli.checkpoints.schema import ArtifactDocument, RecipePart, RecoveredPart, SourcePart, creation
from repshift_cli.checkpoints.weights import METADATA_KEY, Source
from repshift_cli.errors import CheckpointError, ModelError, OutputError, RecipeError
from repshift_cli.models.tensor_model import library_model
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.families.base import families, match
from repshift_cli.utils.files import (
    EXPORT_SUFFIXES,
    WEIGHT_SUFFIXES,
    atomic_folder,
    atomic_output,
    check_output,
    check_weights_name,
)
from repshift_cli.utils.reproducible import without_timings

_SIZE_BYTES = 8
"""Length of the number in front of the header of a safetensors file."""

_PART_VERSIONS = {"fuse": 4, "merge": 4, "bipartite": 4, "fitted": 4, "vid_tldr": 3, "attention_entropy": 3}
_PART_VERSIONS |= dict.fromkeys(("coverage", "redundancy", "grid"), 8)
"""The first format version with this metric or reducer; 1 for others."""

_RECOVERED_VERSION = 8
"""The first format version with recovered weights, which older readers would miss."""


@dataclass
class Opened:
    """A model that is ready to run, dense or compressed.

    Attributes:
        loaded: the dense model and its description.
        compressed: the same model with its plan attached, None for a dense checkpoint.
    """

    loaded: LoadedModel
    compressed: CompressedModel | None

    @property
    def module(self) -> nn.Module:
        """The module to run."""
        return self.compressed if self.compressed is not None else self.loaded.model

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors of the file, with recovered weights in place of the dense model's."""
        replaced = self.compressed.replaced if self.compressed is not None else None
        return {**self.loaded.tensors, **(replaced.parameters() if replaced is not None else {})}

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image of `module`."""
        return self.compressed.macs() if self.compressed is not None else self.dense_macs

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates per image of the dense model."""
        return match(self.loaded.model).macs(self.loaded.model, None)

    @property
    def reduced(self) -> bool:
        """Whether `module` drops or merges tokens."""
        return self.compressed is not None


def open_model(name: str | Path, options: LoadOptions | None = None) -> Opened:
    """Load a dense checkpoint, or a compressed one with its plan attached; `name` as for `load_checkpoint`.

    Raises:
        CheckpointError: as `load_checkpoint`; or a compressed checkpoint is damaged or from a newer version.
        UsageError: as `load_checkpoint`.
    """
    loaded = load_checkpoint(name, options)
    plan = loaded.plan
    try:
        return Opened(loaded, attach_loaded(loaded, plan) if plan else None)
    except RecipeError as error:
        raise CheckpointError(f"{loaded.source.path}: its plan is damaged: {error.message}") from error


def attach_loaded(
    loaded: LoadedModel, plan: Plan, recipe: Recipe | None = None, calibration: dict[str, Any] | None = None
) -> CompressedModel:
    """Attach a plan to a loaded model, and give the result its preprocessing and a writer; errors as `attach`.

    Args:
        recipe, calibration: where the plan comes from; by default from the checkpoint, as are recovered weights.
    """
    described = loaded.description.architecture is not None or loaded.description.args
    computed = "" if described else computation(library_model(loaded.model))  # before attention modules are replaced
    compressed = attach(loaded.model, plan)
    compressed.preprocessing = loaded.description.preprocessing
    stored = loaded.document or {}
    if recipe is None:
        compressed.replace_parameters(recovered_values(stored, loaded.model, loaded.source.path or "the checkpoint"))
    part = _recipe_part(recipe) if recipe is not None else RecipePart(**stored["recipe"])
    found = calibration if recipe is not None else stored.get("calibration")
    compressed.writer = Writer(loaded.description, computed, loaded.source, part, found)
    return compressed


@dataclass(frozen=True)
class Writer:
    """Writes a compressed model with the weights that it has at that time; see `CompressedModel.save`.

    Attributes:
        computed: `computation` of a dense model of a library in memory, which has no complete description.
    """

    description: ModelDescription
    computed: str
    source: Source
    recipe: RecipePart
    calibration: dict[str, Any] | None

    def __call__(self, compressed: CompressedModel, path: Path, force: bool) -> Path:
        absent = getattr(compressed.model, "missing", ())
        weights = {key: value.detach().cpu() for key, value in compressed.state_dict().items()}
        tensors = {key: value for key, value in weights.items() if key not in absent or not value.isnan().all()}
        loaded = LoadedModel(compressed.model, self._describe(compressed.model), self.source, tensors)
        document = make_document(loaded, compressed.plan, self.recipe, self.calibration, {})
        save(path, loaded, document, force)
        return path

    def _describe(self, model: nn.Module) -> ModelDescription:
        return describe_module(self.description, model, self.computed) if self.computed else self.description


def load(path: str | Path) -> CompressedModel:
    """Load a compressed checkpoint as a model that is ready to run; the whole one, if only its tower was compressed.

    Raises:
        CheckpointError: it cannot be read, or is a dense checkpoint.
    """
    opened = open_model(path)
    if opened.compressed is None:
        raise CheckpointError(f"{path} is a dense checkpoint", "Compress it first, or load it with timm.")
    if "tower" in opened.loaded.description.args and Path(path).is_dir():
        return _whole(Path(path), opened.loaded, opened.compressed.plan)
    return opened.compressed


def _whole(folder: Path, loaded: LoadedModel, plan: Plan) -> CompressedModel:
    """The whole model of a folder, with the plan of its tower."""
    library = library_of(loaded.description.architecture)
    assert library is not None
    model = library.whole(folder)
    names = {site.layer: site.name for site in match(model).layout(model).sites}
    sites = (site.model_copy(update={"site": names[site.layer]}) for site in plan.sites)
    compressed = attach(model, plan.model_copy(update={"sites": tuple(sites)}))
    compressed.preprocessing = loaded.description.preprocessing
    compressed.writer = _refuse_whole
    return compressed


def _refuse_whole(compressed: CompressedModel, path: Path, force: bool) -> Path:
    raise ModelError(
        f"{type(compressed.model).__name__} was loaded whole, and `save` writes the part that was compressed",
        f"Use `model.model.save_pretrained({str(path)!r})`, which keeps the plan in its config.json.",
    )


def make_document(  # noqa: PLR0917
    loaded: LoadedModel,
    plan: Plan,
    recipe: Recipe | RecipePart,
    calibration: dict[str, Any] | None,
    measured: dict[str, Any],
    search: dict[str, Any] | None = None,
    recovered: RecoveredPart | None = None,
) -> dict[str, Any]:
    """The JSON document of a compressed checkpoint, see `ArtifactDocument`."""
    document = ArtifactDocument(
        format_version=max(_version_of(plan), _RECOVERED_VERSION if recovered else 1),
        **creation(),
        model=loaded.description,
        plan=plan,
        recipe=_recipe_part(recipe) if isinstance(recipe, Recipe) else recipe,
        source=SourcePart(**loaded.source.to_dict()),
        calibration=calibration,
        measured=without_timings(measured),
        search=without_timings(search),
        recovered=recovered,
    )
    left_out = {name for name, part in (("search", search), ("recovered", recovered)) if not part}
    return document.model_dump(mode="json", exclude=left_out)


def _recipe_part(recipe: Recipe) -> RecipePart:
    return RecipePart(name=recipe.place.name, text=recipe.text)


def _version_of(plan: Plan) -> int:
    """The first format version whose readers can load a plan."""
    kinds = {plan.reducer.kind, *(site.metric.kind for site in plan.sites)}
    family = next(family for family in families() if family.name == plan.family)
    restore, last_block = 6 if plan.restore else 1, 7 if plan.last_block == "exact" else 1
    return max(family.format_version, restore, last_block, *(_PART_VERSIONS.get(kind, 1) for kind in kinds))


def check_save(path: Path, force: bool, loaded: LoadedModel | None = None) -> None:
    """Check before the work that a compressed checkpoint can be written, with `loaded` also that the form fits it.

    A name with the ending `.safetensors` is a file. A name without a known ending is a folder in the form of the
    library of the model.

    Raises:
        UsageError: it exists and `force` is off, has another suffix, or is a folder and the model has no such form.
        OutputError: it cannot be written to.
    """
    if not _is_folder(path):
        check_weights_name(path)
        check_output(path, force)
        return
    library = library_of(loaded.description.architecture) if loaded else None
    if loaded and not (library and library.config):
        check_weights_name(path)
    check_folder(path, force)


def _is_folder(path: Path) -> bool:
    """Whether a compressed checkpoint of this name is a folder."""
    return not path.name.lower().endswith((*WEIGHT_SUFFIXES, *EXPORT_SUFFIXES))


def save(path: Path, loaded: LoadedModel, document: Mapping[str, Any], force: bool = False) -> None:
    """Write a compressed checkpoint, a file or a folder. It appears under `path` only when it is complete.

    Raises:
        UsageError, OutputError: as `check_save`.
    """
    check_save(path, force, loaded)
    library = library_of(loaded.description.architecture)
    if library and _is_folder(path):
        with atomic_folder(path, None, force) as folder:
            library.write(folder, loaded, document)
        return
    with atomic_output(path, force) as temporary:
        write_tensors(temporary, loaded.tensors, document)


def save_dense(path: Path, loaded: LoadedModel, force: bool = False) -> None:
    """Write the dense weights of a compressed checkpoint with the description of their model.

    Raises:
        CheckpointError: it is not compressed.
        UsageError, OutputError: as `check_save`.
    """
    if loaded.plan is None:
        where = loaded.source.path or loaded.description.name
        raise CheckpointError(f"{where} is already a dense checkpoint", "Give a compressed checkpoint.")
    save(path, loaded, {"model": loaded.description.to_dict()}, force)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any] | None) -> None:
    """Write a safetensors file with a document in its metadata; raises OutputError if that fails."""
    metadata = {"format": "pt", METADATA_KEY: json.dumps(document, allow_nan=False)}
    try:
        save_file(separated(tensors), path, metadata=metadata)
        _order_metadata(path, metadata)
        with safe_open(path, "pt"):
            pass  # raises if the file is incomplete, such as on a full disk
    except SafetensorError as error:
        raise OutputError(f"cannot write the weights: {error}", "No output was left.") from error


def _order_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Write the metadata in the given order in place of the random order of safetensors."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(_SIZE_BYTES), "little")
        header = json.loads(file.read(size)) | {"__metadata__": metadata}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(_SIZE_BYTES)
            file.write(text.ljust(size))


def separated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous and without shared memory, as safetensors requires; tied weights are copied.

    Negative and conjugate views are resolved: their memory holds other values.
    """
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, value in tensors.items():
        plain = value.resolve_conj().resolve_neg().contiguous()
        place = plain.untyped_storage().data_ptr()
        found[key] = plain.clone() if place in places else plain
        places.add(place)
    return found
