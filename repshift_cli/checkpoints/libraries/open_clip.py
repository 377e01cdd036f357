"""Models of open_clip: folders with `open_clip_config.json`, and files with the tensors of a whole CLIP.

Tensors show neither the number of heads nor the activation. A file without a configuration is compared with the models
that open_clip has configurations of.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.artifact import write_tensors
from repshift_cli.checkpoints.build import build, check_fit
from repshift_cli.checkpoints.create import check_depth, check_runs, on_meta
from repshift_cli.checkpoints.folders import read_config, stored_document, write_config
from repshift_cli.checkpoints.identify.computation import computation
from repshift_cli.checkpoints.identify.identity import Identity, shapes
from repshift_cli.checkpoints.identify.sizes import check_heads
from repshift_cli.checkpoints.libraries.base import Library
from repshift_cli.checkpoints.load import note_assumed
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import PREPROCESSING, LoadOptions
from repshift_cli.checkpoints.schema import describe
from repshift_cli.checkpoints.texts import TextTower, tokenizer_folder
from repshift_cli.checkpoints.towers import ALONE
from repshift_cli.checkpoints.weights import Source, Weights, read_weights
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, ModelError, OutputError, UsageError, first_line
from repshift_cli.models.tensor_model import TensorModel, library_model, library_of_class
from repshift_cli.reduction.families.base import find
from repshift_cli.reduction.families.transformer import output_of
from repshift_cli.reduction.specs.spec import Output
from repshift_cli.utils.suggest import first_names

_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_WEIGHT_FILES = (_WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

_FIRST = "visual.transformer.resblocks.0.ln_1.weight"
_TRUNK = "visual.trunk."

_SETTINGS = frozenset(
    {
        *("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text"),
        *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
    }
)
"""The keys of a configuration."""

_WITHOUT_EFFECT = ("patch_dropout", "output_tokens", "timm_drop", "timm_drop_path", "timm_model_pretrained")
"""Settings of the image tower that change no output in eval mode."""

_CLEANING = frozenset({"clean", "strip_sep_token"})
"""Settings of a tokenizer that name no file and no code."""

_CROPS = {"shortest": "center", "squash": "squash", "longest": "border"}
_MOST_CONTEXT = 4096
_CONTEXT, _WORDS = 77, 49408
"""The defaults of a text tower."""


class OpenClip(Library):
    """The open_clip library. The arguments in a description are `{"model_cfg": ...}`, as in a configuration.

    Those of an image tower alone also have the key `tower`.
    """

    name: ClassVar[str] = "open_clip"
    extra: ClassVar[str] = "openclip"
    config: ClassVar[str] = _CONFIG

    def names(self) -> Collection[str]:
        return _configs() if find_spec(self.name) else ()

    def opens(self, folder: Path) -> bool:
        return (folder / _CONFIG).is_file()

    def read(self, folder: Path, options: LoadOptions) -> LoadedModel:
        where, path = str(folder), folder / _CONFIG
        self.require(where)
        content, weights = read_config(path), _folder_weights(folder, options)
        config = _checked(content.get("model_cfg"), str(path))
        name = next((name for name, known in _configs().items() if known == config), "custom")
        if options.model_name not in (None, name):
            raise UsageError(f"{path} describes the model, not {options.model_name}", "Leave --model out.")
        document = stored_document(weights, content, path)
        notes, stated = list(weights.notes), {*PREPROCESSING}
        if document is None:
            given = content.get("preprocess_cfg") or {}
            preprocessing = _preprocessing(_image_size(config), given, str(path), notes)
            stated -= {"mean", "std"} - given.keys()
        else:
            described = describe(document, where)
            if not str(described.architecture).startswith(f"{self.name}:"):
                raise CheckpointError(f"{where}: its repshift metadata is of {described.architecture}")
            preprocessing = described.preprocessing
        description = ModelDescription(name, f"{self.name}:{name}", {"model_cfg": config}, preprocessing)
        model = build(description, weights.tensors, where)
        check_heads(model, name, options.heads, where)
        loaded = LoadedModel(model, description, weights.source, weights.tensors, notes, document)
        note_assumed(loaded, {*stated, *options.preprocessing})
        return loaded

    def build(self, description: ModelDescription, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
        self.require(where)
        config, name = _checked(description.args.get("model_cfg"), where), description.name
        check_depth(config, tensors, name, where)
        alone = "tower" in description.args
        model = _on_meta(config, name, where, alone)
        inner, own = model.inner, _own_keys(model.inner, tensors)
        check_fit(inner, own, name, where)
        check_runs(model, (3, *_image_size(config)), name, where)
        inner.load_state_dict(own, strict=True, assign=True)
        for part in inner.modules():
            if (mask := part._buffers.get("attn_mask")) is not None:  # causal, and not stored
                part._buffers["attn_mask"] = torch.full(mask.shape, float("-inf")).triu_(1)
        if any(buffer.is_meta for buffer in inner.buffers()):  # computed, which needs a real device
            model = _wrapped(_create(config), alone)
            model.load_state_dict(own, strict=True, assign=True)
        return model.float().eval().requires_grad_(False)

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        # timm reads the image tower alone
        return _table(tensors) is not None and (_FIRST in tensors or _has_trunk(tensors))

    def identify(self, tensors: Mapping[str, Tensor], where: str, options: LoadOptions) -> Identity:
        self.require(where)
        configs, notes = _configs(), list[str]()
        fitting = [name for name, config in configs.items() if _fits(name, config, tensors, where)]
        if options.model_name:
            if options.model_name not in fitting:  # say how they differ
                inner = _on_meta(_checked(configs[options.model_name], where), options.model_name, where).inner
                check_fit(inner, _own_keys(inner, tensors), options.model_name, where)
            fitting = [options.model_name]
        if not fitting:
            raise CheckpointError(
                f"{where}: no configuration of open_clip has exactly these tensors",
                f"Give a folder with {_CONFIG} and {_WEIGHTS}.",
            )
        if len({_computation(configs[name]) for name in fitting}) > 1:
            raise CheckpointError(
                f"{where}: several models have exactly these tensors but compute different things: "
                f"{', '.join(fitting)}",
                f"Choose one with --model, such as --model {fitting[0]}; the activation is not in the tensors.",
            )
        name = min(fitting, key=lambda name: (len(name), name))
        if not options.model_name:
            same = f"; these compute the same: {first_names(fitting)}" if len(fitting) > 1 else ""
            notes.append(f"detected {name} of open_clip from tensor names and shapes{same}")
        config = configs[name]
        check_heads(_on_meta(config, name, where), name, options.heads, where)
        preprocessing = _preprocessing(_image_size(config), _preprocessing_of(name), where, notes)
        return Identity(name, f"{self.name}:{name}", {"model_cfg": config}, preprocessing, dict(tensors), notes)

    def preprocessing_of(self, model: nn.Module) -> Preprocessing | None:
        from open_clip import get_model_preprocess_cfg

        inner = library_model(model)
        tower = getattr(inner, "visual", inner)
        if library_of_class(inner) != self.name or not hasattr(tower, "image_size"):
            return None
        given = get_model_preprocess_cfg(inner)
        found = _preprocessing(_image_size({"vision_cfg": {"image_size": tower.image_size}}), given, "the model", [])
        unstated = f"the image tower of this {type(inner).__name__} has no image_mean and image_std"
        return replace(found, unstated="" if given.get("mean") and given.get("std") else unstated)

    def describe(self, model: nn.Module, preprocessing: Preprocessing, computed: str) -> ModelDescription | None:
        inner = library_model(model)
        if library_of_class(inner) != self.name:
            return None
        if preprocessing.unstated:
            advice = "Before `compress`, give them to open_clip.set_model_preprocess_cfg, or set these attributes."
            raise ModelError(preprocessing.unstated, advice)
        name, config = _config_of(inner, computed)
        args = {"model_cfg": config} | ({} if hasattr(inner, "visual") else {"tower": "visual"})
        return ModelDescription(name, f"{self.name}:{name}", args, preprocessing)

    def text_tower(self, loaded: LoadedModel) -> TextTower | None:
        if "tower" in loaded.description.args:
            return None
        inner, text = library_model(loaded.model), loaded.description.args["model_cfg"]["text_cfg"]
        hub = text.get("hf_tokenizer_name")
        folder = tokenizer_folder(loaded) if hub else None
        settings = dict(text.get("tokenizer_kwargs") or {})
        if unknown := sorted(settings.keys() - _CLEANING):
            raise CheckpointError(f"{loaded.source.path}: unknown keys in tokenizer_kwargs: {first_names(unknown)}")

        def tokenize(texts: list[str]) -> Tensor:
            from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

            length = text.get("context_length", _CONTEXT)
            if folder is None:
                tokens: Tensor = SimpleTokenizer(context_length=length, **settings)(texts)
            else:
                local: Any = {"local_files_only": True, "trust_remote_code": False, **settings}
                mode = text.get("tokenizer_mode")
                tokens = HFTokenizer(str(folder), context_length=length, tokenizer_mode=mode, **local)(texts)
            return tokens

        return TextTower(tokenize, inner.encode_text, text.get("vocab_size", _WORDS))

    def write(self, folder: Path, loaded: LoadedModel, document: Mapping[str, Any]) -> None:
        if "tower" in loaded.description.args:
            raise OutputError("a folder of open_clip holds a whole model, and this is an image tower", ALONE)
        write_tensors(folder / _WEIGHTS, loaded.tensors, document)
        preprocessing = loaded.description.preprocessing
        content = {
            **loaded.description.args,
            "preprocess_cfg": {
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
                "interpolation": "bilinear" if preprocessing.interpolation == "bilinear" else "bicubic",
                "resize_mode": next(key for key, crop in _CROPS.items() if crop == preprocessing.crop_mode),
            },
        }
        write_config(folder / _CONFIG, content, loaded, document)


def _configs() -> dict[str, dict[str, Any]]:
    import open_clip

    return {name: open_clip.get_model_config(name) for name in open_clip.list_models()}


def _folder_weights(folder: Path, options: LoadOptions) -> Weights:
    found = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} has no weights of open_clip", f"It needs one of {', '.join(_WEIGHT_FILES)}.")
    weights = read_weights(found[0], options.weights)
    weights.source = Source("folder", str(folder), weights.source.sha256)
    return weights


def _checked(config: Any, where: str) -> dict[str, Any]:
    """A configuration that shapes a model and reads nothing from elsewhere; raises CheckpointError for others."""
    import timm

    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise CheckpointError(f"{where} has no model_cfg with vision_cfg and text_cfg")
    if unknown := sorted(config.keys() - _SETTINGS):
        raise CheckpointError(f"{where}: unknown keys in model_cfg: {first_names(unknown)}")
    text, trunk = config["text_cfg"], config["vision_cfg"].get("timm_model_name")
    if text.get("hf_model_name"):
        raise CheckpointError(
            f"{where}: the text tower {text['hf_model_name']!r} is a model of the Hugging Face hub, which is not "
            "supported",
            "Models with a text tower of open_clip are.",
        )
    if trunk is not None and (not isinstance(trunk, str) or ":" in trunk or not timm.is_model(trunk)):
        raise CheckpointError(f"{where}: {trunk!r} is not a model of timm")
    length = text.get("context_length", 0)
    if not isinstance(length, int) or not 0 <= length <= _MOST_CONTEXT:
        raise CheckpointError(f"{where}: context_length is {length!r}, and must be at most {_MOST_CONTEXT}")
    _image_size(config, where)
    return config


def _image_size(config: Mapping[str, Any], where: str = "") -> tuple[int, int]:
    size = config["vision_cfg"].get("image_size", 224)
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):  # noqa: PLR2004 (height and width)
        raise CheckpointError(f"{where}: image_size is {size!r}, not a number or height and width")
    return sides[0], sides[1]


def _create(config: Mapping[str, Any]) -> nn.Module:
    """The model of a checked configuration, with random weights; raises errors of every kind for invalid values."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    values = deepcopy(dict(config))
    # the tokens are for the text decoder of CoCa
    values["vision_cfg"] |= {"timm_model_pretrained": False, "output_tokens": "multimodal_cfg" in values}
    custom = CoCa if "multimodal_cfg" in values else CustomTextCLIP
    model: nn.Module = (custom if values.pop("custom_text", False) else CLIP)(**values)
    return model.eval()


def _on_meta(config: Mapping[str, Any], name: str, where: str, alone: bool = False) -> TensorModel:
    """The model of a configuration, or its image tower alone, on the meta device."""
    try:
        with on_meta():
            model = _wrapped(_create(config), alone)
    except Exception as error:  # as `_create`
        raise CheckpointError(f"{where}: {name} cannot be built: {first_line(error)}") from error
    if find(model) is None:
        tower: Any = getattr(model.inner, "visual", model.inner)
        kind = type(getattr(tower, "trunk", tower)).__name__
        raise CheckpointError(f"{where}: the image tower of {name} is a {kind}, which is not supported")
    return model


def _wrapped(whole: Any, alone: bool = False) -> TensorModel:
    tower, inner = whole.visual, whole.visual if alone else whole
    output = output_of(inner) or Output()
    model = TensorModel(inner, output.tensor, output.call, output.arguments, prefix=1, num_classes=0)
    size = tower.image_size
    model.img_size = (size, size) if isinstance(size, int) else (size[0], size[1])
    if trunk := getattr(tower, "trunk", None):
        trunk.pretrained_cfg = {**(trunk.pretrained_cfg or {}), "input_size": (3, *model.img_size)}
    return model


def _own_keys(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the model: older files have the text tower without a prefix."""
    from open_clip.model import convert_to_custom_text_state_dict

    own = {
        key: value for key, value in tensors.items() if key not in ("input_resolution", "context_length", "vocab_size")
    }
    if hasattr(model, "text"):
        own = convert_to_custom_text_state_dict(own)
    for key in ("logit_scale", "logit_bias"):  # a number, or a list of one
        if key in own and getattr(model, key, None) is not None and own[key].numel() == 1:
            own[key] = own[key].reshape(getattr(model, key).shape)
    return own


def _table(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The word embeddings of a text tower of open_clip."""
    return tensors.get("token_embedding.weight", tensors.get("text.token_embedding.weight"))


def _has_trunk(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(_TRUNK) for key in tensors)


def _fits(name: str, config: dict[str, Any], tensors: Mapping[str, Tensor], where: str) -> bool:
    """Whether the model of a configuration has exactly these tensors."""
    text, table = config["text_cfg"], _table(tensors)
    if not _can_fit(config, tensors, "visual."):
        return False
    if table is None or table.shape != (text["vocab_size"], text["width"]):
        return False
    try:
        inner = _on_meta(config, name, where).inner
    except CheckpointError:
        return False
    return shapes(inner.state_dict()) == shapes(_own_keys(inner, tensors))


def _can_fit(config: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the image tower under a prefix can be that of a configuration; built models are compared after this."""
    vision, patches = config["vision_cfg"], tensors.get(f"{prefix}conv1.weight")
    if "hf_model_name" in config["text_cfg"] or ("timm_model_name" in vision) != (
        any(key.startswith(f"{prefix}trunk.") for key in tensors)
    ):
        return False
    return patches is None or patches.shape[::3] == (vision["width"], vision["patch_size"])


def _config_of(model: Any, computed: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a whole model in memory, or of one with this image tower; "custom" for changed ones.

    Compared are open_clip's configurations, also with the activation, image size and text tower of the model, which
    open_clip's `create_model` can change.

    Raises:
        ModelError: none computes the same.
    """
    tensors, kind, whole = model.state_dict(), type(model).__name__, hasattr(model, "visual")
    tower, configs = getattr(model, "visual", model), _configs()
    size, trunk = list(tower.image_size), (getattr(getattr(tower, "trunk", None), "pretrained_cfg", None) or {})
    names = [name for name, each in configs.items() if _can_fit(each, tensors, "visual." if whole else "")]
    # those with a trunk of this name first: building the others takes seconds
    names.sort(key=lambda name: configs[name]["vision_cfg"].get("timm_model_name") != trunk.get("architecture"))
    known = {name: configs[name] for name in names}
    changed = [
        {**each, "vision_cfg": {**each["vision_cfg"], "image_size": size}, "quick_gelu": quick}
        | ({"custom_text": kind != "CLIP"} if whole else {})
        for each in known.values()
        for quick in (False, True)
    ]
    for name, config in (*known.items(), *(("custom", each) for each in changed)):
        try:
            built = _on_meta(_checked(config, name), name, name, not whole).inner
        except CheckpointError:
            continue
        if shapes(built.state_dict()) == shapes(tensors) and computation(built) == computed:
            return name, config
    raise ModelError(
        f"no configuration of open_clip computes the same as this {kind}, so a reader could not build it",
        "Add its configuration with `open_clip.add_model_config(FILE)`, and build the model in float32.",
    )


def _computation(config: Mapping[str, Any]) -> str:
    """What the image tower of a configuration computes, as text."""
    from open_clip.model import CLIPVisionCfg

    vision = asdict(CLIPVisionCfg(**config["vision_cfg"]))
    effective = {key: value for key, value in vision.items() if key not in _WITHOUT_EFFECT}
    return json.dumps([effective, bool(config.get("quick_gelu"))], sort_keys=True)


def _preprocessing_of(name: str) -> dict[str, Any]:
    """The preprocessing of the published weights of a name, if it is the same for all; else empty."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    keys = ("mean", "std", "interpolation", "resize_mode")
    found = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    known = [{key: entry[key] for key in keys if entry.get(key)} for entry in found]
    return known[0] if known and all(entry == known[0] for entry in known) else {}


def _preprocessing(size: tuple[int, int], given: Any, where: str, notes: list[str]) -> Preprocessing:
    """The evaluation transform that open_clip makes of its `preprocess_cfg`."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    if not isinstance(given, dict) or (mode := given.get("resize_mode") or "shortest") not in _CROPS:
        raise CheckpointError(f"{where}: invalid preprocess_cfg", f"Allowed for resize_mode: {', '.join(_CROPS)}.")
    if mode == "longest":
        notes.append(
            "borders of images are filled with the mean of the preprocessing, where open_clip fills with black"
        )
    values = {
        "input_size": (3, *size),
        "mean": given.get("mean") or OPENAI_DATASET_MEAN,
        "std": given.get("std") or OPENAI_DATASET_STD,
        "interpolation": "bilinear" if given.get("interpolation") == "bilinear" else "bicubic",
        "crop_pct": 1.0,
        "crop_mode": _CROPS[mode],
    }
    return Preprocessing.from_dict(values, f"{where}: preprocess_cfg")
