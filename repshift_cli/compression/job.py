"""A compression job: a dense model and a recipe that fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repshift_cli.calibration.calibrate import Calibration, calibrate
from repshift_cli.checkpoints.build import set_image_size
from repshift_cli.checkpoints.image_processor import usual_of_maps, usual_preprocessing
from repshift_cli.checkpoints.libraries.base import libraries
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.weights import Source
from repshift_cli.compression.notes import Notes
from repshift_cli.compression.recipe import check_recipe_model, with_parts
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, RecipeError, UsageError
from repshift_cli.models.tensor_model import library_model
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import ComponentSpec, Recipe, scaled_recipe
from repshift_cli.reduction.checks import check_feeds
from repshift_cli.reduction.families.base import Family, match
from repshift_cli.reduction.families.transformer import as_function, tower_of
from repshift_cli.reduction.metrics.base import build_metric
from repshift_cli.reduction.plans import has_open_fields, resolve_for, with_defaults
from repshift_cli.reduction.specs.maps import map_blocks

_DEFAULTS = {
    "default": ("tokens are merged if a more important one is similar", ". This was best on real images."),
    "matching": ("similar tokens are merged", ". This was best without images; it is not checked on your data."),
    "paper": ("tokens are dropped by their shift, since those of this model cannot be merged", ""),
}
"""What a scaled recipe does and why it is used, by its name."""


class CompressionJob:
    """A dense model and a checked recipe that fits it.

    Attributes:
        plan: the resolved recipe. Its metrics can have open fields, see `open`.
        free: whether no metric was asked for, so that calibration can also drop tokens by their position.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        recipe: Recipe | None,
        notes: Notes,
        *,
        images: bool = False,
        parts: Mapping[str, ComponentSpec] | None = None,
    ) -> None:
        """Take a recipe, or the default one.

        Args:
            images: whether there are images to fit a score on; without a recipe it decides which one is used.
            parts: metric and reducer in place of those of the recipe.
        """
        self.loaded, self.notes, self._parts = loaded, notes, parts or {}
        self.family = match(loaded.model)
        self.free = "metric" not in self._parts and (
            recipe is None
            or not ("metric" in recipe.model_fields_set or any(drop.metric is not None for drop in recipe.layers))
        )
        self.recipe = with_parts(recipe, self._parts) if recipe else self._default_recipe(images)
        self._by_default = recipe is None
        check_recipe_model(self.recipe, loaded.description)
        self.plan = resolve_for(loaded.model, self.recipe)
        self._sites = {site.name: site for site in self.family.sites(loaded.model)}
        self._check_feeds()
        if self.plan.restore:
            self.notes.note(_restore_note(loaded, self.family))

    @property
    def has_open_fields(self) -> bool:
        """Whether the recipe has fields that calibration chooses."""
        return has_open_fields(self.plan)

    def default_plan(self) -> Plan:
        """The plan with open fields as in the paper, or as the model allows."""
        return with_defaults(self.plan, self._sites)

    def calibrate(self, images: Tensor, identity: dict[str, Any], *, batch_size: int) -> Calibration:
        """Choose the open fields on preprocessed images `[n, ...]`."""
        return calibrate(
            as_function(self.loaded.model),
            self.family,
            self.plan,
            usual=self._paper_plan(),
            images=images,
            identity=identity,
            batch_size=batch_size,
            progress=self.notes.progress,
            cover=self.free,
        )

    def _default_recipe(self, images: bool) -> Recipe:
        """Without a recipe: the best one of docs/results/leaderboard.md that the model and the images allow."""
        layers, kind = self._layers, "default"
        if not images:
            kind = "paper" if self._parts else "matching"
        recipe = with_parts(self._scaled(kind), self._parts)
        try:
            resolve_for(self.loaded.model, recipe)
        except RecipeError:  # tokens of the model cannot be merged
            if "reducer" in self._parts:
                raise
            kind = "paper"
            recipe = with_parts(self._scaled(kind), self._parts)
        blocks = len(layers)
        schedule = ", ".join(f"{{layer: {drop.layer}, drop_ratio: {drop.drop_ratio}}}" for drop in recipe.layers)
        if layers == list(range(blocks)):
            schedule = f"to see or change it: repshift recipes show {kind} --blocks {blocks}"
        what, why = ("metric and reducer are as given", "") if self._parts else _DEFAULTS[kind]
        self.notes.note(
            f"no recipe was given: {what}, at the paper's schedule scaled to {blocks} blocks ({schedule}){why}"
        )
        return recipe

    @property
    def _layers(self) -> list[int]:
        return [site.layer for site in self.family.layout(self.loaded.model).sites]

    def _scaled(self, kind: str) -> Recipe:
        restore = self.family.needs_restore(self.loaded.model) is not None
        return scaled_recipe(kind, len(self._layers), self._layers, restore)

    def _paper_plan(self) -> Plan | None:
        """Without a recipe, the plan of the paper's choice to compare with."""
        if not self._by_default:
            return None
        return resolve_for(self.loaded.model, self._scaled("paper"))

    def _check_feeds(self) -> None:
        for planned in self.plan.sites:
            own = [
                index
                for index, drop in enumerate(self.recipe.layers)
                if drop.metric is not None and drop.layer in (planned.layer, planned.site)
            ]
            path = ("layers", own[0], "metric") if own else ("metric",)
            metric = build_metric(planned.metric)
            check_feeds(metric, self._sites[planned.site], planned.after, self.recipe.place, path)


def _restore_note(loaded: LoadedModel, family: Family) -> str:
    name = loaded.description.name
    if family.reads_class_token(loaded.model):
        return (
            f"restore: the output of {name} is computed from its class token and does not change. Use it for its "
            "tokens or feature maps"
        )
    return (
        f"restore: what reads the tokens of {name} gets all of them. A dropped token gets the updates of a similar one "
        "that was kept"
    )


def load_dense(
    name: str | Path, options: LoadOptions, recipe: Recipe | None, notes: Notes, force: bool = False
) -> LoadedModel:
    """Load a dense checkpoint; the model that the recipe names is used if nothing else identifies it.

    Args:
        force: also load a compressed checkpoint, without its plan.

    Raises:
        CheckpointError, UsageError: as `load_checkpoint`; or the checkpoint is compressed.
    """
    loaded = load_checkpoint(name, replace(options, fallback_name=recipe.model if recipe else None))
    show_assumptions(loaded, notes)
    if loaded.plan is not None:
        where = loaded.source.path or "the model"
        if not force:
            raise CheckpointError(
                f"{where} is already compressed: its own plan would be lost",
                "Start from the dense checkpoint, or add --force to compress its dense weights again.",
            )
        notes.note(f"{where} was already compressed; its dense weights are compressed again")
    return loaded


def show_assumptions(loaded: LoadedModel, notes: Notes) -> None:
    """Note what was assumed because the file does not state it."""
    for text in loaded.notes:
        (notes.warn if loaded.source.origin == "random" else notes.note)(text)


def wrap_module(model: nn.Module, img_size: int | None) -> LoadedModel:
    """Describe a model in memory. Without an image size of its own 224 is assumed, as in timm.

    Raises a ModelError if it is not supported, a UsageError if it does not take this image size.
    """
    match(model)
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = str(config.get("architecture") or type(model).__name__)
    tower = None if config else tower_of(model)
    stated = None if config else next(filter(None, (each.preprocessing_of(model) for each in libraries())), None)
    if stated:
        preprocessing = stated
    elif tower or (not config and map_blocks(model)):
        usual = usual_preprocessing(tower) if tower else usual_of_maps(library_model(model).config.model_type)
        preprocessing = Preprocessing.from_dict(usual)
    else:
        preprocessing = Preprocessing.of_model(model)
    if (stated or (tower and not tower.spec.any_size)) and img_size not in (None, *preprocessing.input_size[1:]):
        height, width = preprocessing.input_size[1:]
        raise UsageError(f"img_size={img_size}: this {name} takes inputs of {height}x{width}", "Leave it out.")
    description = ModelDescription(name, None, {}, preprocessing)
    loaded = LoadedModel(model, description, Source("object", None, None), dict(model.state_dict()))
    set_image_size(loaded, img_size)
    return loaded
