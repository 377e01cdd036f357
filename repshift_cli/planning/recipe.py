"""Parse a recipe: after which layers tokens are dropped, how many, and by which score. YAML in, a frozen `Recipe` out.

Of a metric or a reducer only `kind` is read here. Its own file checks the options (see `reduction/metrics/` and
`reduction/reducers/`), so that a new one needs no change here.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from repshift_cli.errors import RecipeError
from repshift_cli.utils.files import read_pipe, read_text
from repshift_cli.utils.suggest import nearest

_Model = TypeVar("_Model", bound=BaseModel)
_Path = tuple[str | int, ...]

LastBlock = Literal["exact", "full"]

_INDEX, _SITE_NAME = re.compile(r"0|[1-9][0-9]{0,8}"), re.compile(r"\w+(\.\w+)+|[a-z]\w*\d")

PAPER_DROP_RATIO = 0.2
"""What the paper drops at each of its three sites (arXiv 2508.00367)."""


_AMOUNTS = ("drop_ratio", "drop_tokens", "keep_tokens", "keep_grid")


class StrictModel(BaseModel):
    """A frozen model without other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ComponentSpec(BaseModel):
    """A metric or a reducer in a recipe: its kind, and options that its own file checks."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: StrictStr

    @property
    def options(self) -> dict[str, Any]:
        """All keys but `kind`."""
        return dict(self.model_extra or {})


class LayerDrop(StrictModel):
    """One entry of `layers`. Exactly one of `drop_ratio`, `drop_tokens`, `keep_tokens` and `keep_grid` is given.

    Attributes:
        layer: index of the block from 0, or the name of the site (`blocks.3`).
        drop_ratio: share of the patch tokens at this layer; `floor(ratio * tokens)` are dropped. Of a feature map,
            share of its positions: at most that share is dropped, as whole rows and columns.
        drop_tokens: number of patch tokens to drop.
        keep_tokens, keep_grid: number of patch tokens, or rows and columns of a feature map, to keep.
        metric: the metric at this site; None for that of the recipe.
    """

    layer: Annotated[StrictInt, Field(ge=0)] | StrictStr
    drop_ratio: Annotated[StrictFloat, Field(gt=0, lt=1)] | None = None
    drop_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    keep_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    keep_grid: tuple[Annotated[StrictInt, Field(ge=1)], Annotated[StrictInt, Field(ge=1)]] | None = None
    metric: ComponentSpec | None = None

    @field_validator("layer")
    @classmethod
    def _check_name(cls, layer: int | str) -> int | str:
        """An index in quotes is the index. Names have two or more parts, or a number: `blocks.3`, `block4`."""
        if isinstance(layer, str) and _INDEX.fullmatch(layer):
            return int(layer)
        if isinstance(layer, str) and not _SITE_NAME.fullmatch(layer):
            raise ValueError("should be the index of one block, or its name, such as blocks.3")
        return layer

    @model_validator(mode="after")
    def _check_amount(self) -> LayerDrop:
        if sum(getattr(self, amount) is not None for amount in _AMOUNTS) != 1:
            raise ValueError("give exactly one of drop_ratio, drop_tokens, keep_tokens and keep_grid")
        return self


class Budget(StrictModel):
    """The target of a search for the layers. Exactly one is given.

    Attributes:
        macs, latency: as a fraction of the dense model's; latency is measured where the search runs.
        agreement: minimum share of predictions equal to the dense model's.
        max_drop: maximum loss of top-1 accuracy in percentage points, on labelled images.
        recall: minimum share of the `k` (default 10) nearest neighbours on an index of dense embeddings.
        cosine: minimum mean cosine to the dense embeddings.
    """

    macs: Annotated[StrictFloat, Field(gt=0, lt=1)] | None = None
    latency: Annotated[StrictFloat, Field(gt=0, lt=1)] | None = None
    agreement: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    max_drop: Annotated[StrictFloat, Field(ge=0, lt=100)] | None = None

    recall: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    cosine: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    k: Annotated[StrictInt, Field(ge=1, le=9999)] | None = None

    @model_validator(mode="after")
    def _check_target(self) -> Budget:
        kinds = ", ".join(key for key in Budget.model_fields if key != "k")
        if len(self.model_dump(exclude_none=True, exclude={"k"})) != 1:
            raise ValueError(f"give exactly one of {kinds}, such as {{macs: 0.65}}")
        if self.k is not None and self.recall is None:
            raise ValueError("k is the number of neighbours of recall, such as {recall: 0.99, k: 10}")
        return self

    def __str__(self) -> str:
        """As `--target` takes it: `max-drop=0.5`, `recall@10=0.99`."""
        ((key, value),) = self.model_dump(exclude_none=True, exclude={"k"}).items()
        if key == "recall":
            key = f"recall@{self.k or 10}"
        return f"{key.replace('_', '-')}={value:.12g}"


@dataclass(frozen=True)
class Place:
    """Positions in the text of a recipe: file name, and (line, column) from 1 of each key path."""

    name: str
    marks: Mapping[_Path, tuple[int, int]]

    def at(self, path: _Path) -> str:
        """`file:line:column` of the key, or of the nearest key above it that the text has."""
        while path and path not in self.marks:
            path = path[:-1]
        line, column = self.marks.get(path, (1, 1))
        return f"{self.name}:{line}:{column}"


class Recipe(StrictModel):
    """A parsed recipe, made by `Recipe.load` (file or shipped name) or `Recipe.parse` (text).

    Exactly one of `layers` and `budget` is given; with a budget `layers` is empty, and a search finds them. The tokens
    that `drop_ratio` or a search keeps, prefix included, are rounded to a multiple of `round_tokens`, since matrix
    kernels work in tiles. With `restore` the blocks run on fewer tokens, and what is around them gets all of them. An
    `exact` last block computes only the prefix tokens, which are all that the head reads; None where that is possible.

    Two short forms of `layers`: `drop_ratio` is that of all entries without an amount, which may be plain indices, and
    `drop_ratios` has one number per block, 0 for none. `schedules` has lists of `drop_tokens`, one per block from the
    first, by name; `schedule` names the one that replaces `layers`.
    """

    version: Literal[1]
    description: StrictStr | None = None
    model: StrictStr | None = None
    metric: ComponentSpec = ComponentSpec(kind="representation_shift")
    reducer: ComponentSpec = ComponentSpec(kind="prune")
    round_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    restore: StrictBool = False
    last_block: LastBlock | None = None
    drop_ratio: Annotated[StrictFloat, Field(gt=0, lt=1)] | None = Field(default=None, exclude=True)
    drop_ratios: tuple[Annotated[StrictFloat, Field(ge=0, lt=1)], ...] | None = Field(default=None, exclude=True)
    schedules: dict[StrictStr, tuple[Annotated[StrictInt, Field(ge=0)], ...]] = Field(default={}, exclude=True)
    schedule: StrictStr | None = Field(default=None, exclude=True)
    layers: Annotated[tuple[LayerDrop, ...], Field(min_length=1)] = ()
    budget: Budget | None = None

    _text: str = PrivateAttr(default="")
    _place: Place = PrivateAttr(default=Place("recipe", {}))

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        if data.get("schedule") is not None:
            data = _with_schedule(data, data["schedule"], data.get("schedules"))
        ratio, ratios, layers = (data.get(key) for key in ("drop_ratio", "drop_ratios", "layers"))
        if ratios is not None:
            if {"layers", "drop_ratio", "budget"} & data.keys():
                raise ValueError("give exactly one of drop_ratios, layers (with drop_ratio) and budget")
            if isinstance(ratios, list) and not any(ratios):
                raise ValueError("drop_ratios drops nothing")
            if isinstance(ratios, list):
                return {**data, "layers": [{"layer": i, "drop_ratio": each} for i, each in enumerate(ratios) if each]}
        elif ratio is not None:
            full = [_with_ratio(entry, ratio) for entry in (layers if isinstance(layers, list) else ())]
            if full == layers or not full:
                raise ValueError("drop_ratio is for entries of layers without an amount, and there are none")
            return {**data, "layers": full}
        return data

    @field_validator("budget")
    @classmethod
    def _check_no_layers(cls, budget: Budget | None, info: ValidationInfo) -> Budget | None:
        if budget is not None and info.data.get("layers"):
            raise ValueError("give exactly one of layers and budget: a budget leaves the layers to a search")
        return budget

    @model_validator(mode="after")
    def _check_layers(self) -> Recipe:
        if not self.layers and self.budget is None:
            raise ValueError("the key layers is missing; give it, or budget: {macs: 0.65} for a search to find them")
        return self

    @property
    def text(self) -> str:
        """The YAML as given."""
        return self._text

    @property
    def place(self) -> Place:
        """Position of each key, for messages."""
        return self._place

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a recipe from a YAML file, or by the name of a shipped one (`deit_small_paper`).

        `umt_base_vidtldr:msvd` is a shipped recipe with one of its `schedules`.

        Raises a RecipeError if there is none or it is invalid; the message has file, line and key.
        """
        path = Path(source)
        kind = _kind_of(path)
        if kind and not stat.S_ISDIR(kind):
            return cls.parse(_read(path, is_file=stat.S_ISREG(kind)), str(source))
        shipped = shipped_recipes()
        name, colon, schedule = path.name.partition(":")
        if (found := shipped.get(name.removesuffix(".yaml"))) is not None and path.parent == Path():
            chosen = f"schedule: {json.dumps(schedule)}\n" if colon else ""
            return cls.parse(found + chosen, f"{path.name.removesuffix('.yaml')}.yaml")
        if kind:
            raise RecipeError(f"{source} is a folder, not a recipe", "Give a YAML file.")
        hint = nearest(path.name.removesuffix(".yaml"), shipped) + "`repshift recipes list` shows the shipped ones."
        if str(path) in SCALED:
            hint = f"It is scaled to a model: `repshift recipes show {path} --blocks 12 > recipe.yaml` writes it."
        raise RecipeError(f"no recipe {source}: no such file, and none of that name is shipped", hint)

    @classmethod
    def parse(cls, text: str, name: str = "recipe") -> Recipe:
        """Read a recipe from YAML text; errors as `load`."""
        data, place = _read_yaml(
            text, name.encode("utf-8", "backslashreplace").decode()
        )  # names of files can be any bytes
        recipe = validate(cls, data, place, ())
        recipe._text, recipe._place = text, place
        return recipe

    def to_yaml(self) -> str:
        """The recipe as YAML, without empty keys."""
        data = self.model_dump(mode="json", exclude_none=True)
        if not self.layers:
            del data["layers"]
        if not self.restore:
            del data["restore"]
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)


def _with_schedule(data: dict[str, Any], name: Any, schedules: Any) -> dict[str, Any]:
    """A recipe with the `layers` of one of its `schedules`."""
    names = list(schedules) if isinstance(schedules, dict) else []
    if name not in names:
        allowed = f"allowed are {', '.join(map(str, names))}" if names else "the recipe has no schedules"
        raise ValueError(f"unknown schedule {_shortened(name)}: {allowed}")
    counts = schedules[name] if isinstance(schedules[name], list) else []
    if counts and not any(counts):
        raise ValueError(f"the schedule {name} drops nothing")
    return {**data, "layers": [{"layer": index, "drop_tokens": count} for index, count in enumerate(counts) if count]}


def _with_ratio(entry: Any, ratio: Any) -> Any:
    """An entry of `layers` with this `drop_ratio`, unless it has an amount."""
    entry = {"layer": entry} if isinstance(entry, int | str) else entry
    if not isinstance(entry, dict) or entry.keys() & set(_AMOUNTS):
        return entry
    return {**entry, "drop_ratio": ratio}


SCALED = {
    "default": ("Tokens are merged; the score is fitted on images without labels.", "{kind: coverage}", "merge"),
    "matching": ("Similar tokens are merged, which needs no score and no images.", None, "bipartite"),
    "paper": (
        "Operation, distance, reading and polarity are left to calibration.",
        "{kind: representation_shift}",
        "prune",
    ),
}
"""Recipes for a model with any number of blocks: what they do, their metric and their reducer."""


def scaled_recipe(kind: str, blocks: int, layers: Sequence[int] | None = None, restore: bool = False) -> Recipe:
    """The paper's schedule scaled to a model: 0.2 after the first block, at a quarter and at half of them.

    `kind` is one of `SCALED`. `blocks` are sites; `layers` has the index of each among all blocks, None for
    `0..blocks - 1`.
    """
    remark, metric, reducer = SCALED[kind]
    places = sorted({0, blocks // 4, blocks // 2})
    chosen = [layers[place] for place in places] if layers else places
    drops = "\n".join(f"  - {{layer: {layer}, drop_ratio: {PAPER_DROP_RATIO}}}" for layer in chosen)
    text = (
        f"# The schedule of the Representation Shift paper, scaled to {blocks} blocks.\n# {remark}\nversion: 1\n"
        + (f"metric: {metric}\n" if metric else "")
        + f"reducer: {{kind: {reducer}}}\n"
        + ("restore: true\n" if restore else "")
        + f"layers:\n{drops}\n"
    )
    return Recipe.parse(text, f"{kind} recipe for {blocks} blocks")


def shipped_recipes() -> dict[str, str]:
    """Names and texts of the recipes in the package."""
    packaged = files("repshift_cli").joinpath("recipes")
    # next to the package in a source checkout, inside it in a wheel
    folder = packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "recipes"
    if not folder.is_dir():
        return {}
    found = {item.name: item.read_text(encoding="utf-8") for item in folder.iterdir() if item.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): found[name] for name in sorted(found)}


def validate(kind: type[_Model], data: Any, place: Place, path: _Path) -> _Model:
    """Check `data` at `path` of a recipe against a pydantic model.

    Raises a RecipeError for the first error, with file, line, key, allowed values and the nearest match.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # a wrong key often makes another look missing, so unknown keys are reported first
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise _explain(details[0], kind, data, place, path) from None


_LONGEST_VALUE = 60

_MOST_CHARACTERS, _MOST_NODES = 1 << 20, 20_000
"""Limits of a recipe: a large file given by mistake would take minutes. Fitted weights for 40 layers have 300,000
characters."""

_PLAIN_WORDS = {
    "too_short": "is empty: name at least one layer",
    "model_type": "should be a mapping with the key kind, such as {kind: prune}",
    "model_type budget": "should be a mapping with one key, such as {macs: 0.65}",
    "model_type layers": "should be a mapping, such as {layer: 0, drop_ratio: 0.2}; an index alone needs drop_ratio "
    "beside layers",
    "tuple_type": "should be a list of numbers",
    "tuple_type layers": "should be a list, such as [{layer: 0, drop_ratio: 0.2}]",
}
"""By the type of an error, and the last key where it differs."""


def _explain(detail: Any, kind: type[BaseModel], data: Any, place: Place, path: _Path) -> RecipeError:
    error, inner = detail["type"], _existing(tuple(detail["loc"]), data)
    where = (*path, *inner)
    start, key = f"{place.at(where)}: ", dotted(where)
    if error == "extra_forbidden":
        owners: dict[str | int, type[BaseModel]] = {"layers": LayerDrop, "budget": Budget}
        owner = owners.get(inner[0], kind) if inner[:-1] else kind
        allowed = list(owner.model_fields)
        hint = f"{nearest(str(inner[-1]), allowed)}Allowed keys: {', '.join(allowed)}."
        return RecipeError(f"{start}unknown key {key}", hint)
    if error == "missing":
        return RecipeError(f"{start}the key {dotted((*path, *detail['loc']))} is missing")
    last = next((step for step in reversed(where) if isinstance(step, str)), "")
    words = _PLAIN_WORDS.get(f"{error} {last}") or _PLAIN_WORDS.get(error)
    message = words or detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    value = detail.get("input")
    shown = f" (it is {_shortened(value)})" if isinstance(value, str | int | float | bool | None) else ""
    return RecipeError(f"{start}{key}{': ' if key else ''}{message}{shown}")


def _shortened(value: Any) -> str:
    """The repr of a value, cut if it is long, as weights are."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _existing(loc: _Path, data: Any) -> _Path:
    """The part of a pydantic location that is a path in `data` (pydantic adds names of union members)."""
    found: list[str | int] = []
    for step in loc:
        in_list = isinstance(data, list | tuple) and isinstance(step, int) and step < len(data)
        if not in_list and not (isinstance(data, Mapping) and step in data):
            break
        data = data[step]
        found.append(step)
    return tuple(found)


def dotted(path: _Path) -> str:
    """A key path as text: `layers[0].metric.kind`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


def _kind_of(path: Path) -> int:
    """The mode of a file, 0 if there is none."""
    try:
        return path.stat().st_mode
    except PermissionError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    except (OSError, ValueError):  # missing, or no file name, such as the text of a recipe
        return 0


def _read(path: Path, is_file: bool) -> str:
    try:
        return read_text(path, 4 * _MOST_CHARACTERS) if is_file else read_pipe(path, 4 * _MOST_CHARACTERS)
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not text", "A recipe is a YAML file in UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror or error}") from error


class _Loader(yaml.SafeLoader):
    """YAML of null, booleans, decimal numbers, texts, lists and mappings, and of a limited number of nodes.

    Version 1.1 also has tags, merge keys, dates and numbers of base 60, whose cost can grow faster than the text.
    """

    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        self.nodes += 1
        problem = None
        if self.nodes > _MOST_NODES:
            problem = f"more than {_MOST_NODES} values"
        elif (tag := getattr(event, "tag", None)) is not None:
            problem = f"could not determine a constructor for the tag {tag!r}"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys are not resolved."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, form) for tag, form in forms if tag.endswith((":null", ":bool", ":float"))]
    for letter, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})$"), list("-+0123456789")
)


def _read_yaml(text: str, name: str) -> tuple[Any, Place]:
    """The data of a YAML document and the positions of its keys."""
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(
            f"{name} has {len(text)} characters, which are too many for a recipe", f"At most {_MOST_CHARACTERS} fit."
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{where}: this is not YAML: {problem}") from None
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise RecipeError(f"{name}: this is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{name}:1:1: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    marks: dict[_Path, tuple[int, int]] = {}
    _collect_marks(node, (), marks, name, set())
    if ("drop_ratios",) in marks:
        marks.setdefault(("layers",), marks["drop_ratios",])
    if (chosen := ("schedules", str(data.get("schedule")))) in marks:
        marks = {path: mark for path, mark in marks.items() if path[0] != "layers"}
        marks["layers",] = marks[chosen]
    return data, Place(name, marks)


def _collect_marks(
    node: yaml.Node | None, path: _Path, marks: dict[_Path, tuple[int, int]], name: str, seen: set[int]
) -> None:
    """Fill `marks`, and raise `RecipeError` for a duplicate key (YAML readers keep the last one silently).

    The target of an alias is visited once: aliases may be recursive, or multiply without bound.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            start = (key.start_mark.line + 1, key.start_mark.column + 1)
            where = f"{name}:{start[0]}:{start[1]}"
            if not key.tag.endswith(":str"):
                raise RecipeError(f"{where}: unknown key {dotted(inner)}: keys are names")
            if inner in marks:
                raise RecipeError(f"{where}: the key {dotted(inner)} is given twice")
            marks[inner] = start
            _collect_marks(value, inner, marks, name, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            item = (*path, index)
            marks[item] = (value.start_mark.line + 1, value.start_mark.column + 1)
            _collect_marks(value, item, marks, name, seen)
