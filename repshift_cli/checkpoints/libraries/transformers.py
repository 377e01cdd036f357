"""Models of the transformers library: folders with `config.json`.

The class is the one that `config.json` names, if a spec describes it. Code in a folder is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.artifact import write_tensors
from repshift_cli.checkpoints.build import configure
from repshift_cli.checkpoints.create import check_depth, check_runs, on_meta
from repshift_cli.checkpoints.folders import OWNER, copy_weights, read_config, stored_document, write_config
from repshift_cli.checkpoints.identify.computation import computation
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.sizes import check_heads
from repshift_cli.checkpoints.image_processor import (
    check_spectrograms,
    read_processor,
    usual_of_maps,
    usual_preprocessing,
)
from repshift_cli.checkpoints.libraries.base import Library
from repshift_cli.checkpoints.load import note_assumed, read_folder_weights
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import PREPROCESSING, LoadOptions
from repshift_cli.checkpoints.schema import describe
from repshift_cli.checkpoints.texts import TextTower, tokenizer_folder
from repshift_cli.checkpoints.towers import ALONE, check_tower, read_tower, tower_config, tower_of_folder
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, OutputError, UsageError, first_line
from repshift_cli.models.tensor_model import TensorModel, library_model, library_of_class
from repshift_cli.reduction.families.transformer import Tower, all_specs, as_function, tower_of
from repshift_cli.reduction.specs.maps import MAPS
from repshift_cli.reduction.specs.spec import LOGITS, TOWER, Output
from repshift_cli.utils.suggest import first_names, nearest

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

_IGNORED = frozenset(
    {
        *("auto_map", "custom_pipelines", "fusion_config", "kernel_config", "use_kernels", "transformers_weights"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "torchscript"),
        *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states", OWNER),
    }
)
"""Keys of a configuration that name code or kernels, or change what a model returns."""

_KEYS = (
    *("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight"),
    *("vision_model.embeddings.patch_embedding.weight", "embedder.embedder.convolution.weight"),
)
"""Names of tensors that only image models of transformers have."""

_UNUSED = "embeddings.position_ids"
"""A table of whole numbers that older versions wrote."""

_COUNT = "num_batches_tracked"
"""A whole number of batch normalisation, for training only."""

_CHANNELS = 3

_SPARE = 100_000_000
"""Values that may be missing from a file: parts that the output does not need."""


class Transformers(Library):
    """The transformers library. The arguments in a description are `{"config": the content of config.json}`."""

    name: ClassVar[str] = "transformers"
    extra: ClassVar[str] = "hf"
    config: ClassVar[str] = _CONFIG
    towers: ClassVar[bool] = True

    def opens(self, folder: Path) -> bool:
        try:
            config = read_config(folder / _CONFIG)
        except CheckpointError:
            return False
        return "architecture" not in config and bool({"architectures", "model_type"} & config.keys())

    def read(self, folder: Path, options: LoadOptions) -> LoadedModel:
        where, path = str(folder), folder / _CONFIG
        self.require(where)
        config = whole = read_config(path)
        name = _class_name(config, str(path))
        if options.model_name:
            raise UsageError(f"{where} is a {name}, not a {options.model_name}", "Leave --model out.")
        if tower := tower_of_folder(config, options, where):
            config = tower_config(config, tower, where)
            name = _class_name(config, f"{path}: {tower}_config")
        elif _outputs()[name].call.endswith("vision_tower") and OWNER not in config:
            raise CheckpointError(f"{where} is a {name}, a model of images and texts", "Give --tower vision.")
        weights = read_tower(folder, tower, options) if tower else read_folder_weights(folder, options)
        document = stored_document(weights, whole, path)
        config = {key: value for key, value in config.items() if key != OWNER}
        fitted = _Fitted(name, config, weights.tensors, where, TOWER if tower else None)
        if document is None:
            preprocessing, stated = _preprocessing(fitted, folder, options)
            if tower and not {*stated, *options.preprocessing} >= {"mean", "std"}:
                unstated = f"{folder} has no preprocessor_config.json, which states mean and std of its images"
                preprocessing = replace(preprocessing, unstated=unstated)
        else:
            preprocessing, stated = _described(document, f"{self.name}:{name}", where), PREPROCESSING
        model = fitted.model(preprocessing)
        notes = weights.notes + fitted.notes
        if isinstance(auto_map := config.get("auto_map"), dict):
            notes.append(f"{path} names code ({first_names(sorted(auto_map))}), which is not run")
        check_heads(model, name, options.heads, where)
        args = {"config": config} | ({"tower": tower} if tower else {})
        description = ModelDescription(name, f"{self.name}:{name}", args, preprocessing)
        loaded = LoadedModel(model, description, weights.source, weights.tensors, notes, document)
        note_assumed(loaded, {*stated, *options.preprocessing})
        if preprocessing.frames and document is None and options.frame_step is None:
            notes.append(
                f"assumed that the {preprocessing.frames} frames of a clip are spread over its whole video, which the "
                "folder does not state: give --frame-step N if the model was trained on every N-th frame"
            )
        return loaded

    def build(self, description: ModelDescription, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
        self.require(where)
        name, config = str(description.architecture).partition(":")[2], description.args.get("config")
        if not isinstance(config, dict):
            raise CheckpointError(f"{where}: its repshift metadata is damaged: model.args has no config")
        output = TOWER if "tower" in description.args else None
        return _Fitted(name, config, tensors, where, output).model(description.preprocessing)

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        return any(key.endswith(_KEYS) for key in tensors)

    def identify(self, tensors: Mapping[str, Tensor], where: str, options: LoadOptions) -> Identity:
        raise CheckpointError(
            f"{where} holds tensors of the transformers library, which do not show heads, activation and output",
            f"Give the folder that holds the file and its {_CONFIG}.",
        )

    def describe(self, model: nn.Module, preprocessing: Preprocessing, computed: str) -> ModelDescription | None:
        inner = library_model(model)
        name = type(inner).__name__
        if library_of_class(inner) != self.name or name not in _outputs():
            return None
        config = {**json.loads(inner.config.to_json_string(use_diff=False)), "architectures": [name]}
        rebuilt = _Fitted(name, config, inner.state_dict(), "the model")
        rebuilt.model(preprocessing)
        if computation(rebuilt.inner) != computation(inner):
            raise CheckpointError(f"the {name} does not compute what its configuration describes: it was changed")
        return ModelDescription(name, f"{self.name}:{name}", {"config": config}, preprocessing)

    def text_tower(self, loaded: LoadedModel) -> TextTower | None:
        inner = library_model(loaded.model)
        if not hasattr(inner, "get_text_features"):
            return None
        folder, config = tokenizer_folder(loaded), inner.config.text_config
        # SigLIP is trained on texts of one length, without a mask
        padding = "max_length" if config.model_type.startswith("siglip") else "longest"

        def tokenize(texts: list[str]) -> Tensor:
            from transformers import AutoTokenizer

            with _quiet():
                made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                length = config.max_position_embeddings
                found = made(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
            tokens: Tensor = found["input_ids"]
            return tokens

        def encode(tokens: Tensor) -> Tensor:
            embeddings: Tensor = inner.get_text_features(input_ids=tokens).pooler_output
            return embeddings

        return TextTower(tokenize, encode, config.vocab_size)

    def write(self, folder: Path, loaded: LoadedModel, document: Mapping[str, Any]) -> None:
        config, source = loaded.description.args["config"], loaded.source
        if "tower" not in loaded.description.args:
            write_tensors(folder / _WEIGHTS, loaded.tensors, document)
        elif source.origin == "folder" and source.path:
            config = read_config(Path(source.path) / _CONFIG)
            check_tower(Path(source.path), loaded)
            copy_weights(Path(source.path), folder)
        else:
            raise OutputError("the folder of the whole model is not known", ALONE)
        write_config(folder / _CONFIG, config, loaded, document)

    def whole(self, folder: Path) -> nn.Module:
        kind = _class(_class_name(read_config(folder / _CONFIG), str(folder)))
        try:
            with _quiet():
                model: nn.Module = kind.from_pretrained(
                    folder, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
                )
        except Exception as error:  # it raises errors of every kind for invalid files
            raise CheckpointError(f"{folder}: the whole model does not load: {first_line(error)}") from error
        return model.eval().requires_grad_(False)


class _Fitted:
    """A model of transformers with its weights, and what is known about it.

    Attributes:
        inner: the model of transformers.
        tower: the part of it that a spec describes; None for a network of feature maps.
        notes: for the user.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        where: str,
        output: Output | None = None,
    ) -> None:
        """Raises CheckpointError if the class is not known, or configuration and tensors contradict each other.

        `output` is by default that of the class.
        """
        self.name, self.where, self.notes, self._output = name, where, list[str](), output
        kind = _class(name)
        if config.get("quantization_config"):
            raise CheckpointError(f"{where}: quantized weights are not supported", "Give the model that was quantized.")
        _check_types(tensors, where)
        check_depth(config, tensors, name, where)
        try:
            settings = kind.config_class.from_dict(_harmless(config))
            if getattr(settings, "mask_ratio", 0):
                settings.mask_ratio = 0.0
                self.notes.append("mask_ratio is set to 0, so that the features are computed from all patches")
            with _quiet(), on_meta():
                self._shapes = kind(settings).eval()
        except Exception as error:  # it raises errors of every kind for invalid values
            raise CheckpointError(f"{where}: {name} cannot be built from {_CONFIG}: {first_line(error)}") from error
        needed, given = (sum(map(Tensor.numel, each)) for each in (self._shapes.parameters(), tensors.values()))
        if needed > 2 * given + _SPARE:
            raise CheckpointError(f"{where}: {_CONFIG} describes {needed} weights, but the file holds {given}")
        self.inner, self._missing = self._load(kind, settings, tensors)
        self.tower: Tower | None = tower_of(self.inner)
        tower = self.tower
        assert tower or name in MAPS, f"no spec describes the tower of {name}"
        channels = tower.projection.in_channels if tower else settings.num_channels
        if channels != (1 if self.spectrogram else _CHANNELS):
            raise CheckpointError(f"{where}: {_CHANNELS} input channels are supported, these weights take {channels}")

    def _load(self, kind: Any, settings: Any, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, list[str]]:
        """The model with these weights, by the key conversion of transformers; and the weights that are missing."""
        try:
            with _quiet():
                inner, found = kind.from_pretrained(
                    None,
                    config=settings,
                    state_dict=dict(tensors),
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,  # they are errors here
                    output_loading_info=True,
                )
        except Exception as error:  # as above
            raise CheckpointError(f"{self.where}: {self.name} does not load: {first_line(error)}") from error
        own = {name.partition(".")[0] for name in inner.state_dict()}
        unknown = sorted(found["unexpected_keys"])
        problems = []
        if inside := [key for key in unknown if key.partition(".")[0] in own and not key.endswith(_UNUSED)]:
            problems.append(f"unknown: {first_names(inside)}")
        if wrong := [f"{key} is {list(has)}, not {list(needs)}" for key, has, needs in found["mismatched_keys"]]:
            problems.append(f"shapes: {first_names(sorted(wrong))}")
        if problems:
            raise self._misfit("; ".join(problems))
        if outside := [key for key in unknown if key not in inside and not key.endswith(_UNUSED)]:
            self.notes.append(f"{len(outside)} tensors are kept but not used by {self.name}: {first_names(outside)}")
        return inner.float().eval().requires_grad_(False), sorted(
            key for key in found["missing_keys"] if not key.endswith(_COUNT)
        )

    def model(self, preprocessing: Preprocessing) -> TensorModel:
        """The model as a function of images.

        Raises:
            CheckpointError: it does not run, or its output needs weights that are missing.
        """
        model, shape = self._wrapped(self.inner, preprocessing), preprocessing.shape
        weights = self.inner.state_dict()
        for key in self._missing:
            weights[key].fill_(torch.nan)  # never a random number
        try:
            check_runs(self._wrapped(self._shapes, preprocessing), shape, self.name, self.where)
            runs = True
        except CheckpointError:  # some operations have no meta kernel
            runs = False
        if self._missing or not runs:
            try:
                with torch.no_grad():
                    output = model(torch.zeros(1, *shape))
            except Exception as error:  # as above
                raise CheckpointError(f"{self.where}: {self.name} cannot run: {first_line(error)}") from error
            if not bool(output.isfinite().all()):
                raise self._misfit(f"missing: {first_names(self._missing)}")
        if self._missing:
            text = f"{len(self._missing)} weights that the output does not need are missing"
            self.notes.append(f"{text}: {first_names(self._missing)}")
            model.missing = tuple(self._missing)
        return model

    def _wrapped(self, inner: nn.Module, preprocessing: Preprocessing) -> TensorModel:
        model = as_function(inner, self._output)
        assert isinstance(model, TensorModel)
        if self.tower:
            model.img_size, model.frames = self.size if self.fixed else None, next(iter(self.tower.size[:-2]), None)
        configure(model, preprocessing)
        return model

    @property
    def fixed(self) -> bool:
        """Whether the model takes images of one size only."""
        return self.tower is not None and not self.tower.spec.any_size

    @property
    def spectrogram(self) -> bool:
        """Whether the model takes spectrograms."""
        return self.tower is not None and self.tower.spec.axes == "WH"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that the configuration names; time and frequency of a spectrogram."""
        assert self.tower is not None
        height, width = self.tower.input_size[-2:]
        return height, width

    def _misfit(self, problems: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: the weights do not fit {self.name} as in {_CONFIG}: {problems}")


def _preprocessing(fitted: _Fitted, folder: Path, options: LoadOptions) -> tuple[Preprocessing, tuple[str, ...]]:
    """The preprocessing of the processor files, and the fields that they state."""
    part: Any = fitted.tower.module if fitted.tower else fitted.inner
    model_type = str(part.config.model_type)
    usual = usual_preprocessing(fitted.tower) if fitted.tower else usual_of_maps(model_type)
    if fitted.spectrogram:
        check_spectrograms(folder, fitted.size)
        return Preprocessing.from_dict(usual, fitted.where), PREPROCESSING
    try:
        found = read_processor(folder, model_type)
    except CheckpointError as error:
        if not options.preprocessing.keys() >= set(PREPROCESSING):
            raise
        fitted.notes.append(f"{error.message}; the given preprocessing is used")
        found = None
    if found is None:
        return Preprocessing.from_dict(usual, fitted.where), ()
    size = found.pop("input_size")
    if fitted.fixed and size != fitted.size:
        made, taken = ("x".join(map(str, each)) for each in (size, fitted.size))
        raise CheckpointError(
            f"{fitted.where}: its image processor makes images of {made}, but {fitted.name} takes {taken}",
            "Correct the size in the processor file.",
        )
    values = usual | found | {"input_size": (_CHANNELS, *size)}
    return Preprocessing.from_dict(values, f"{fitted.where}: its image processor"), PREPROCESSING


def _described(document: dict[str, Any], architecture: str, where: str) -> Preprocessing:
    """The preprocessing of a document; raises CheckpointError if it is of another class."""
    described = describe(document, where)
    if described.architecture != architecture:
        raise CheckpointError(
            f"{where}: its repshift metadata is of {described.architecture}, but {_CONFIG} names {architecture}",
            "Load the folder of the class that was compressed.",
        )
    return described.preprocessing


def _outputs() -> dict[str, Output]:
    """The classes that specs describe, with their output."""
    return {
        name: output
        for spec in all_specs()
        if spec.library == Transformers.name
        for name, output in spec.outputs.items()
    } | dict.fromkeys(MAPS, LOGITS)


def _class_name(config: Mapping[str, Any], where: str) -> str:
    names, known = config.get("architectures"), _outputs()
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{where} does not name the class of the model (key 'architectures')")
    if names[0] not in known:
        hint = f"{nearest(names[0], known)}Supported: {', '.join(sorted(known))}."
        raise CheckpointError(f"{where}: the class {names[0]} of transformers is not supported", hint)
    kind = _class(names[0]).config_class.model_type
    if config.get("model_type", kind) != kind:
        raise CheckpointError(
            f"{where}: model_type is {config['model_type']!r}, but {names[0]} is of the type {kind!r}"
        )
    return names[0]


def _class(name: str) -> Any:
    import transformers

    if name not in _outputs() or not hasattr(transformers, name):
        raise CheckpointError(f"the class {name} of transformers is not supported by the installed version")
    return getattr(transformers, name)


def _harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys of `_IGNORED`, in all parts."""
    return {
        key: _harmless(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _IGNORED
    }


def _check_types(tensors: Mapping[str, Tensor], where: str) -> None:
    integers = [
        f"{key} is {value.dtype}"
        for key, value in tensors.items()
        if not value.is_floating_point() and not key.endswith((_UNUSED, _COUNT))
    ]
    if integers:
        raise CheckpointError(f"{where}: the weights are not floating point: {first_names(integers)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the reports and progress bars of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
