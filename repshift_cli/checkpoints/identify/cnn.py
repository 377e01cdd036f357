"""timm's ResNet, ConvNeXt and RegNet, and by the names of their tensors all other networks of maps.

A model has up to a hundred blocks, and timm has dozens of models of each kind. Cheap comparisons come first: a model
with one block per stage, or timm's table of depths. Only the models that are left are built in full.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.checkpoints.identify.identity import Fitting, Identity, best_fit, shapes, supported
from repshift_cli.checkpoints.identify.sizes import size_args
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError

_COUNTER = ".num_batches_tracked"
"""A buffer of batch norms that only training reads and older files lack."""

_DEPTH_OF_A_NAME = re.compile(r"\d+")
_NEAR = 2
"""Some names count layers of the stem, or leave out the classifier."""

_CLASSIFIER = ("fc.weight", "fc.bias", "head.fc.weight", "head.fc.bias")
_STAGES = 4
_SHOWN_TAGS = 3


@dataclass(frozen=True)
class Kind:
    """One of timm's kinds of networks.

    Attributes:
        name: for messages.
        module: of timm.
        signs: every such network has one of these tensors.
        block: prefix of the keys of a block, with groups `stage` and `block`.
        candidates: names of models that can have these tensors, likely ones first.
    """

    name: str
    module: str
    signs: tuple[str, ...]
    block: re.Pattern[str]
    candidates: Callable[[Kind, Mapping[str, Tensor]], Iterator[list[str]]]

    def stages(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Blocks per stage."""
        found: dict[str, set[str]] = {}
        for match in map(self.block.match, tensors):
            if match:
                found.setdefault(match["stage"], set()).add(match["block"])
        return {stage: len(blocks) for stage, blocks in sorted(found.items())}


def names_digest(names: Iterable[str]) -> str:
    """A number for the names of all tensors, without counters."""
    text = "\n".join(sorted(name for name in names if not name.endswith(_COUNTER)))
    return f"{zlib.crc32(text.encode()):08x}"


@cache
def _digests() -> dict[str, list[str]]:
    """Models of timm by `names_digest` (`scripts/timm_maps.py`), likely ones first."""
    found: dict[str, list[str]] = json.loads(files("repshift_cli").joinpath("assets/timm_maps.json").read_text("utf-8"))
    return found


def registered(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of other networks of maps whose tensors have these names."""
    return _digests().get(names_digest(tensors), [])


def identify_registered(tensors: Mapping[str, Tensor], where: str, heads: int | None, hint: str) -> Identity:
    """Find one of the `registered` models; errors as `match.identify`."""
    if heads is not None:
        raise CheckpointError(f"{where}: --heads is for transformers", "Leave --heads out.")
    names = [name for name in registered(tensors) if _is_known(name)]
    fitting = _agreeing(names, tensors)
    if not fitting:
        raise CheckpointError(
            f"{where}: its tensors have the names of {', '.join(names[:_SHOWN_TAGS]) or 'no installed model'}, but "
            "other shapes",
            "Name the model with --model, and what differs with --model-args.",
        )
    return _chosen(fitting, tensors, where, hint)


def _is_known(name: str) -> bool:
    import timm

    return bool(timm.is_model(name))


def kind_of(tensors: Mapping[str, Tensor]) -> Kind | None:
    """The kind of network with tensors of these names."""
    return next((kind for kind in _KINDS if any(sign in tensors for sign in kind.signs)), None)


def identify(kind: Kind, tensors: Mapping[str, Tensor], where: str, heads: int | None, hint: str) -> Identity:
    """Find the network that the weights belong to; errors as `match.identify`."""
    if heads is not None:
        raise CheckpointError(f"{where}: a {kind.name} has no attention heads", "Leave --heads out.")
    fitting: Fitting = next(filter(None, (_agreeing(names, tensors) for names in kind.candidates(kind, tensors))), {})
    if not fitting:
        counts = ", ".join(map(str, kind.stages(tensors).values()))
        raise CheckpointError(
            f"{where}: it looks like a {kind.name} with stages of {counts} blocks, but no timm model has these tensors",
            f"If its keys are renamed, name the model with --model. {supported()}",
        )
    return _chosen(fitting, tensors, where, hint)


def native_keys(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under timm's keys, converted from ConvNeXt's authors and OpenCLIP, with missing counters added."""
    from timm.models.convnext import ConvNeXt, checkpoint_filter_fn

    found = dict(tensors)
    if isinstance(model, ConvNeXt) and any(key.startswith(("downsample_layers.", "visual.trunk.")) for key in found):
        # weights of another shape stay as they are, and are refused later
        with suppress(KeyError, RuntimeError, IndexError):
            found = checkpoint_filter_fn(found, model)
    counters = (key for key in model.state_dict() if key.endswith(_COUNTER) and key not in found)
    return found | {key: torch.tensor(0) for key in counters}


def _agreeing(names: list[str], tensors: Mapping[str, Tensor]) -> Fitting:
    fitting: Fitting = {}
    for name in names:
        model = quickly_on_meta(name, {})
        args = size_args(model, tensors, name)
        if args:
            model = quickly_on_meta(name, args)
        if _same(tensors, model):
            fitting[name] = (model, args)
    return fitting


def _same(tensors: Mapping[str, Tensor], model: nn.Module, besides: tuple[str, ...] = ()) -> bool:
    found = shapes(native_keys(tensors, model))
    return {key: shape for key, shape in found.items() if key not in besides} == shapes(model.state_dict())


def _chosen(fitting: Fitting, tensors: Mapping[str, Tensor], where: str, hint: str) -> Identity:
    name = best_fit(fitting, where, hint)
    model, args = fitting[name]
    tag = next((tag for tag in _tags(name) if f"{name}.{tag}" in hint), None)
    if tag is not None:
        name = f"{name}.{tag}"
        model = quickly_on_meta(name, args)
    preprocessing = Preprocessing.of_model(model)
    notes = [f"detected {name} from tensor names and shapes"]
    others = [] if tag else _other_preprocessing(name, preprocessing)
    if others:
        notes.append(
            f"assumed its preprocessing: {preprocessing}; other weights of this model use another: "
            f"choose with --model, for example {', '.join(others)}"
        )
    return Identity(name, name, args, preprocessing, native_keys(tensors, model), notes)


def _tags(name: str) -> list[str]:
    import timm

    return [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]


def _other_preprocessing(name: str, assumed: Preprocessing) -> list[str]:
    """One name per other preprocessing of the model's weights; torchvision's first."""
    import timm
    from timm.data import resolve_data_config

    found: dict[str, str] = {str(assumed): ""}
    for tag in sorted(_tags(name), key=lambda tag: (not tag.startswith("tv"), tag)):
        config = timm.get_pretrained_cfg(f"{name}.{tag}")
        if config is None:
            continue
        other = Preprocessing.from_dict(resolve_data_config(pretrained_cfg=config.to_dict()))
        found.setdefault(str(other), f"{name}.{tag}")
    return list(found.values())[1 : 1 + _SHOWN_TAGS]


def _names(kind: Kind) -> list[str]:
    import timm

    return list(timm.list_models(module=kind.module))


def _by_first_blocks(kind: Kind, tensors: Mapping[str, Tensor], names: list[str], depths: str) -> list[str]:
    """The models with these tensors in the first block of each stage and outside of blocks and classifier."""
    matches = {key: kind.block.match(key) for key in tensors}
    first = {key: tensors[key] for key, match in matches.items() if match is None or int(match["block"]) == 0}
    short = {depths: (1,) * _STAGES, "num_classes": 0}
    return [name for name in names if _same(first, quickly_on_meta(name, short), _CLASSIFIER)]


def _resnets(kind: Kind, tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names hold the number of layers: two or three per block, stem and classifier."""
    per_block = 3 if "layer1.0.conv3.weight" in tensors else 2
    layers = per_block * sum(kind.stages(tensors).values()) + 2
    names = _names(kind)
    likely = [
        name for name in names if (found := _DEPTH_OF_A_NAME.search(name)) and abs(int(found[0]) - layers) <= _NEAR
    ]
    yield _by_first_blocks(kind, tensors, likely, "layers")
    yield _by_first_blocks(kind, tensors, [name for name in names if name not in likely], "layers")


def _convnexts(kind: Kind, tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    yield _by_first_blocks(kind, tensors, _names(kind), "depths")


def _regnets(kind: Kind, tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """A table of timm has the number of blocks."""
    from timm.models.regnet import model_cfgs

    blocks = sum(kind.stages(tensors).values())
    yield [name for name in _names(kind) if name not in model_cfgs or model_cfgs[name].depth == blocks]


_KINDS = (
    Kind("ResNet", "resnet", ("layer1.0.conv1.weight",), re.compile(r"layer(?P<stage>\d)\.(?P<block>\d+)\."), _resnets),
    Kind(
        "ConvNeXt",
        "convnext",
        (
            "stages.0.blocks.0.conv_dw.weight",
            "visual.trunk.stages.0.blocks.0.conv_dw.weight",
            "stages.0.0.dwconv.weight",
        ),
        re.compile(r"(?:visual\.trunk\.)?stages\.(?P<stage>\d)\.(?:blocks\.)?(?P<block>\d+)\."),
        _convnexts,
    ),
    Kind(
        "RegNet",
        "regnet",
        ("s1.b1.conv1.conv.weight", "s1.b1.conv1.weight"),
        re.compile(r"s(?P<stage>\d)\.b(?P<block>\d+)\."),
        _regnets,
    ),
)
