"""The dense model of a compression job, and the job itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from repshift_cli.calibration.calibrate import Calibration
from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.build import set_image_size
from repshift_cli.checkpoints.identify import Clips
from repshift_cli.checkpoints.identify.names import canonical_name, encoder_name
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source
from repshift_cli.compression.measured import CompressReport, Measured
from repshift_cli.data.inputs import ImageBatch
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, RecipeError
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe, default_recipe
from repshift_cli.reduction.checks import check_components, check_feeds, has_open_fields, resolve_for, with_defaults
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.families.base import Family, Site, match
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.utils.progress import Progress

__all__ = [
    "CompressionJob",
    "DenseModel",
    "checked_recipe",
    "load_dense",
    "with_layers",
    "wrap_module",
]


def with_layers(recipe: Recipe | None) -> Recipe | None:
    """The recipe, where it says which layers reduce.

    Raises:
        RecipeError: it has a budget, and no search is run here.
    """
    if recipe is not None and recipe.budget is not None:
        raise RecipeError(
            f"{recipe.place.at(('budget',))}: the recipe has a budget in place of layers, and no search is run here",
            "`repshift search MODEL --recipe FILE` finds the layers and writes a recipe that has them.",
        )
    return recipe


def checked_recipe(recipe: Recipe | str | Path | None) -> Recipe | None:
    """The recipe, loaded and with its parts checked: what cannot be is said before any weights are read."""
    if recipe is not None and not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if recipe is not None:
        check_components(recipe)
    return recipe


class DenseModel:
    """A model that may be compressed, and what the user is told about it."""

    def __init__(self, loaded: LoadedModel, progress: Progress) -> None:
        self.loaded = loaded
        self.progress = progress
        self.notes: list[str] = []
        self.family: Family = match(loaded.model)

    @classmethod
    def of(cls, loaded: LoadedModel, progress: Progress, force: bool = False) -> DenseModel:
        """A model that was just loaded: what was assumed of it is told, and it is refused if it is compressed."""
        dense = cls(loaded, progress)
        for text in loaded.notes:
            (dense.warn if loaded.source.origin == "random" else dense.note)(text)
        dense._refuse_compressed(force)
        return dense

    def note(self, text: str) -> None:
        """Tell the user at once, and keep it for the report."""
        self.notes.append(text)
        self.progress.note(text)

    def warn(self, text: str) -> None:
        """As `note`, so that it is not missed."""
        self.notes.append(text)
        self.progress.warn(text)

    def check_name(self, recipe: Recipe) -> None:
        """Refuse a recipe that was written for another model.

        Raises:
            RecipeError: with its place.
        """
        wanted, description = recipe.model, self.loaded.description
        # the tag of the weights (.augreg_in21k) does not change what the recipe is for
        names = {encoder_name((name or "").partition(".")[0]) for name in (description.name, description.architecture)}
        if wanted is None or encoder_name(canonical_name(wanted.partition(".")[0])) in names:
            return
        where = recipe.place.at(("model",))
        raise RecipeError(
            f"{where}: the recipe is for {wanted}, but the model is {description.name}",
            f"Use a recipe for {description.name}, or take the key `model` out of a copy of this one.",
        )

    def tell_skipped(self, batch: ImageBatch) -> None:
        """Warn of pictures that could not be read."""
        if batch.skipped:
            self.warn(f"{len(batch.skipped)} pictures could not be read: {'; '.join(batch.skipped[:3])}")

    def _refuse_compressed(self, force: bool) -> None:
        if artifact.stored_plan(self.loaded) is None:
            return
        where = self.loaded.source.path or "the model"
        if not force:
            raise CheckpointError(
                f"{where} is compressed already: its own plan would be lost",
                "Start from the dense checkpoint, or add --force to compress its dense weights anew.",
            )
        self.note(f"{where} was compressed already; its dense weights are compressed anew")


class CompressionJob:
    """A model and a checked recipe that were found to go together."""

    def __init__(self, dense: DenseModel, recipe: Recipe | None) -> None:
        self.dense = dense
        self.loaded, self.family, self.progress = dense.loaded, dense.family, dense.progress
        self.note, self.warn = dense.note, dense.warn
        loaded = self.loaded
        layout = self.family.layout(loaded.model)
        if recipe is None:
            blocks, layers = len(layout.sites), [site.layer for site in layout.sites]
            recipe = default_recipe(blocks, layers)
            told = ", ".join(f"{{layer: {drop.layer}, drop_ratio: {drop.drop_ratio}}}" for drop in recipe.layers)
            if layers == list(range(blocks)):
                told = f"to see or change it: repshift recipes show default --blocks {blocks}"
            self.note(f"no recipe was given: the paper's schedule scaled to {blocks} blocks is used ({told})")
        self.recipe = recipe
        dense.check_name(recipe)
        self.plan = resolve_for(loaded.model, recipe)
        self._check_feeds()

    @property
    def open(self) -> bool:
        """Whether the recipe leaves something for calibration to choose."""
        return has_open_fields(self.plan)

    def default_plan(self) -> Plan:
        """The plan with open fields as the paper has them, or as the model allows."""
        return with_defaults(self.plan, self._sites())

    def report(
        self, plan: Plan, calibration: Calibration | None, measured: Measured | None, output: Path | None
    ) -> CompressReport:
        """Gather what was found."""
        if measured:
            macs, dense_macs = measured.compressed.macs, measured.dense.macs
        else:
            compressed = attach(self.loaded.model, plan)
            macs, dense_macs = compressed.macs(), compressed.dense_macs()
        return CompressReport(
            loaded=self.loaded,
            family=self.family.name,
            recipe=self.recipe,
            plan=plan,
            dense_macs=dense_macs,
            macs=macs,
            calibration=calibration,
            measured=measured,
            output=output,
            notes=tuple(self.dense.notes),
        )

    def _check_feeds(self) -> None:
        sites = self._sites()
        for planned in self.plan.sites:
            own = [
                index
                for index, drop in enumerate(self.recipe.layers)
                if drop.metric is not None and drop.layer in (planned.layer, planned.site)
            ]
            path = ("layers", own[0], "metric") if own else ("metric",)
            check_feeds(build_metric(planned.metric), sites[planned.site], planned.after, self.recipe.place, path)

    def _sites(self) -> dict[str, Site]:
        return {site.name: site for site in self.family.sites(self.loaded.model)}


def load_dense(
    name: str | Path,
    recipe: Recipe | None,
    model_name: str | None = None,
    heads: int | None = None,
    img_size: int | None = None,
    *,
    clips: Clips | None = None,
) -> LoadedModel:
    """Load a checkpoint; where nothing else tells which model it is, the recipe does."""
    return load_checkpoint(name, model_name, heads, img_size, recipe.model if recipe else None, clips=clips)


def wrap_module(model: nn.Module, img_size: int | None) -> LoadedModel:
    """A model in memory, described as far as it tells; where it tells no image size, 224 is assumed, as timm does."""
    match(model)
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = str(config.get("architecture") or type(model).__name__)
    description = ModelDescription(name, None, {}, Preprocessing.of_model(model))
    loaded = LoadedModel(model, description, Source("object", None, None), dict(model.state_dict()))
    set_image_size(loaded, img_size)
    return loaded
