"""Read a checkpoint and tell which model it is.

Loading is safe: safetensors, or `torch.load(weights_only=True)`; no code from a checkpoint is ever run. Weights of a
safetensors file stay memory-mapped and are held once: the model's parameters are the mapped tensors.
"""

from __future__ import annotations

import argparse
import errno
import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from repshift_cli.errors import CheckpointError, UsageError, first_line
from repshift_cli.files import EXPORT_SUFFIXES, TORCH_SUFFIXES, WEIGHT_SUFFIXES, sha256_of
from repshift_cli.identify import (
    UMT,
    VIM,
    Clips,
    Identity,
    build_on_meta,
    canonical_name,
    check_heads,
    create,
    identify,
    is_model_name,
    model_names,
)
from repshift_cli.models.umt import UmtModel
from repshift_cli.preprocessing import LARGEST_SIDE, Preprocessing, fixed_size
from repshift_cli.recipe import nearest

__all__ = [
    "BUILTIN",
    "FORMAT_VERSION",
    "METADATA_KEY",
    "LoadedModel",
    "ModelDescription",
    "Source",
    "Weights",
    "build",
    "load",
    "read_weights",
    "set_image_size",
]

FORMAT_VERSION = 4
"""Version of that document. Readers refuse newer ones: raise it with any change that an older reader would miss."""

METADATA_KEY = "repshift"
"""Under this key the metadata of a safetensors file holds our JSON document (see docs/artifact.md)."""

BUILTIN = {
    "builtin:vit-digits": "vit_digits.safetensors",
    "builtin:vit-digits-small": "vit_digits_small.safetensors",
    "builtin:cnn-digits": "cnn_digits.safetensors",
    "builtin:vim-digits": "vim_digits.safetensors",
    "builtin:umt-shapes": "umt_shapes.safetensors",
    "builtin:umt-shapes-qa": "umt_shapes_qa.safetensors",
}

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_OPTIONS = ("utils.easydict.EasyDict", "easydict.EasyDict")
_PREFIXES = ("module.", "_orig_mod.")
_MOST_WRAPPERS = 8  # a pickle can hold a mapping that holds itself
_SHOWN_KEYS = 5


@dataclass(frozen=True)
class ModelDescription:
    """All that is needed to build the model again without its weights.

    Attributes:
        name: what people call it: the name of the model, or words for a shape that has none.
        architecture: name in timm's registry or of one of Vim's models; or what is built from `args` alone: None for a
            `VisionTransformer`, "vim" for a `VisionMamba`, "umt" for a UMT.
        args: keyword arguments for the builder.
        preprocessing: the model's own evaluation transform.
    """

    name: str
    architecture: str | None
    args: dict[str, Any]
    preprocessing: Preprocessing

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelDescription:
        """From the form that `to_dict` gives.

        Raises:
            CheckpointError: a key is missing or of a wrong type.
        """
        try:
            name, architecture, args = values["name"], values["architecture"], values["args"]
            preprocessing = Preprocessing.from_dict(values["preprocessing"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the description of the model in the file is incomplete: {error!r}") from error
        if not (isinstance(name, str) and isinstance(architecture, str | None) and isinstance(args, dict)):
            raise CheckpointError("the description of the model in the file has values of the wrong type")
        return cls(name, architecture, args, preprocessing)


@dataclass(frozen=True)
class Source:
    """Where weights came from. `sha256` is None where there is no file (random weights, a model in memory)."""

    origin: Literal["file", "folder", "cache", "random", "builtin", "object"]
    path: str | None
    sha256: str | None


@dataclass
class Weights:
    """What a file holds: tensors under the model's keys, and our document where there is one."""

    tensors: dict[str, Tensor]
    document: dict[str, Any] | None
    source: Source
    notes: list[str] = field(default_factory=list)


@dataclass
class LoadedModel:
    """A dense model in eval mode on the CPU, with what is known of it.

    Attributes:
        tensors: the weights as they were read (dtype included), under the model's keys.
        notes: what was assumed rather than told by the file, in words for the user.
        document: our metadata of the file, which holds a plan if it is a compressed checkpoint.
    """

    model: nn.Module
    description: ModelDescription
    source: Source
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    document: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Told:
    """What the user, or a recipe for him, tells of a model; see `load`."""

    model_name: str | None = None
    heads: int | None = None
    img_size: int | None = None
    fallback_name: str | None = None
    clips: Clips = field(default_factory=Clips)


def load(
    name: str | Path,
    model_name: str | None = None,
    heads: int | None = None,
    img_size: int | None = None,
    fallback_name: str | None = None,
    *,
    clips: Clips | None = None,
) -> LoadedModel:
    """Load a dense model from a file, a folder, the name of a model or a `builtin:` name.

    A compressed checkpoint gives its dense model; its plan is in `document`.

    Args:
        name: what to load.
        model_name: name of the model, where the file does not tell.
        heads: attention heads, for a shape that no convention covers.
        img_size: side of the image: any for a convolutional network, else that of the weights.
        fallback_name: name of the model that a recipe gives. Only where nothing else tells which model it is, and only
            if the weights fit it.
        clips: what is known of the clips that a video model takes.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or fits no model that is known; or `heads` are not
            those of the model that it is.
        UsageError: an unknown `builtin:` name, a `model_name` that there is not, or an `img_size` that the weights do
            not fit.
    """
    _check_model_name(model_name)
    told = _Told(model_name, heads, img_size, fallback_name, clips or Clips())
    text = str(name)
    if text.startswith("builtin:"):
        return _load_builtin(text, told)
    path = Path(name)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if is_folder:
        return _load_folder(path, told)
    if is_there:
        return _from_weights(read_weights(path), told, path.stem)
    if is_model_name(text):
        return _load_name(canonical_name(text), told)
    raise _not_found(text)


def read_weights(path: Path) -> Weights:
    """Read the tensors of a `.safetensors` or a PyTorch file, unwrapped (`model`, `state_dict`, `module.`, ...).

    Raises:
        CheckpointError: the file is empty, damaged, exported, of an unknown kind, or a pickle that would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        size = path.stat().st_size
        if size == 0:
            raise CheckpointError(f"{path} is empty")
        if path.suffix == ".safetensors":
            tensors, document = _read_safetensors(path)
            notes: list[str] = []
        elif path.suffix in TORCH_SUFFIXES:
            tensors, notes = _unwrap(_read_torch(path), path)
            document = None
        elif path.suffix in EXPORT_SUFFIXES:
            raise CheckpointError(
                f"{path} is an exported file, whose graph is as it is: bench and eval run it, nothing changes it",
                "Name the checkpoint that it was exported from.",
            )
        else:
            allowed = ", ".join(WEIGHT_SUFFIXES)
            raise CheckpointError(f"{path} has an ending that is not known", f"Known are {allowed}.")
        source = Source("file", str(path), sha256_of(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return Weights(tensors, document, source, notes)


def build(description: ModelDescription, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """Build the model of a description around these weights (float32, eval mode, CPU).

    Raises:
        CheckpointError: the weights do not fit; the message says which keys and shapes.
    """
    architecture = description.architecture
    if architecture not in (None, VIM, UMT) and not is_model_name(architecture):
        raise CheckpointError(f"{where}: there is no model named {architecture!r}")
    model = build_on_meta(architecture, description.args, where, tensors, description.name)
    _check_fit(model, tensors, description.name, where)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    if isinstance(model, UmtModel):
        model.restore_buffers()
    if any(buffer.is_meta for buffer in model.buffers()):
        # A buffer that is not stored has to be computed, which needs a real device.
        model = create(architecture, description.args, where)
        model.load_state_dict(dict(tensors), strict=True, assign=True)
    _configure(model, description.preprocessing)
    return model.float().eval().requires_grad_(False)


def _configure(model: nn.Module, preprocessing: Preprocessing) -> None:
    """Let the model's own configuration say what is known of its images: a convolutional network takes any size."""
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    model.pretrained_cfg = {**config, **preprocessing.to_dict()}  # type: ignore[assignment]


def set_image_size(loaded: LoadedModel, img_size: int | None) -> None:
    """Let a model take images of another size, where its weights fit any; None leaves it as it is.

    Raises:
        UsageError: the weights fit one size only, or what was decided for it does.
    """
    preprocessing = loaded.description.preprocessing
    channels, *size = preprocessing.input_size
    if img_size is None or size == [img_size, img_size]:
        return
    what, now = loaded.source.path or loaded.description.name, f"{size[0]}x{size[1]}"
    _checked_size(img_size)
    if loaded.document is not None and "plan" in loaded.document:
        raise UsageError(
            f"--img-size {img_size}: {what} was compressed for images of {now}, and its plan holds for no other size",
            f"Leave --img-size out, or compress the dense checkpoint again with --img-size {img_size}.",
        )
    if fixed_size(loaded.model):
        raise UsageError(
            f"--img-size {img_size}: {what} takes images of {now}: its positions are made for that size",
            "Leave --img-size out, or resize the position table first.",
        )
    changed = replace(preprocessing, input_size=(channels, img_size, img_size))
    loaded.description = replace(loaded.description, preprocessing=changed)
    loaded.notes.append(f"images of {img_size}x{img_size} are used instead of {now}, as --img-size says")
    _configure(loaded.model, changed)


def _checked_size(img_size: int) -> int:
    if not 1 <= img_size <= LARGEST_SIDE:
        raise UsageError(f"--img-size: {img_size} is not a number from 1 to {LARGEST_SIDE}")
    return img_size


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor], name: str, where: str) -> None:
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = []
    for label, keys in (("missing", expected.keys() - given.keys()), ("not known", given.keys() - expected.keys())):
        if keys:
            problems.append(f"{label}: {_some(sorted(keys))}")
    wrong = [
        f"{key} is {list(given[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in given and given[key] != shape
    ]
    if wrong:
        problems.append(f"shapes: {_some(wrong)}")
    parameters = [key for key, _ in model.named_parameters() if key in tensors]
    whole = [f"{key} is {tensors[key].dtype}" for key in parameters if not tensors[key].is_floating_point()]
    if whole:
        problems.append(f"not floating point: {_some(whole)}")
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit {name}: {'; '.join(problems)}")


def _some(words: list[str]) -> str:
    rest = len(words) - _SHOWN_KEYS
    return ", ".join(words[:_SHOWN_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def _from_weights(weights: Weights, told: _Told, hint: str) -> LoadedModel:
    """Which model it is: from our metadata, else from the name that the user gives, else from the tensors."""
    where = weights.source.path or hint
    if weights.document is not None:
        description = _described(weights.document, where)
        names = (description.name, description.architecture)
        if told.model_name and canonical_name(told.model_name) not in names:
            raise UsageError(f"{where} says that it is {description.name}, not {told.model_name}", "Leave --model out.")
        loaded = _assemble(description, weights, weights.tensors, [])
        _check_size_told(loaded, where)
        check_heads(loaded.model, description.name, told.heads, where)
    else:
        fallback = told.fallback_name if told.fallback_name and is_model_name(told.fallback_name) else None
        identity = identify(
            weights.tensors,
            where,
            told.model_name,
            told.heads,
            hint,
            fallback=fallback,
            img_size=told.img_size,
            clips=told.clips,
        )
        loaded = _from_identity(identity, weights)
    set_image_size(loaded, told.img_size)
    _check_clips(loaded, told.clips)
    return loaded


def _check_clips(loaded: LoadedModel, clips: Clips) -> None:
    """Refuse what the user tells of clips where the model takes others, or none.

    Raises:
        UsageError: naming both.
    """
    what, frames = loaded.source.path or loaded.description.name, loaded.description.preprocessing.frames
    if frames is None and clips != Clips():
        raise UsageError(f"{what} takes single pictures, no clips", "Leave --frames and --checkpoint-frames out.")
    made = loaded.model.vision.checkpoint_frames if isinstance(loaded.model, UmtModel) else None
    if clips.checkpoint_frames not in (None, made):
        raise UsageError(
            f"--checkpoint-frames {clips.checkpoint_frames}: the positions of {what} are made already, as its metadata "
            "says",
            "Leave the option out, or start from the authors' checkpoint.",
        )
    if clips.frames not in (None, frames):
        raise UsageError(
            f"--frames {clips.frames}: {what} takes clips of {frames} frames, as its metadata says",
            "Leave --frames out, or start from the authors' checkpoint.",
        )


def _check_size_told(loaded: LoadedModel, where: str) -> None:
    """Refuse metadata that names another image size than the one that the model is built for."""
    size, told = fixed_size(loaded.model), loaded.description.preprocessing.input_size[1:]
    if size and size != told:
        raise CheckpointError(
            f"{where}: its metadata names images of {told[0]}x{told[1]}, but the model takes {size[0]}x{size[1]}"
        )
    frames, named = _frames(loaded.model), loaded.description.preprocessing.frames
    if frames != named:
        raise CheckpointError(
            f"{where}: its metadata names {named or 'no'} frames, but the model takes {frames or 'single pictures'}"
        )


def _frames(model: nn.Module) -> int | None:
    return model.vision.frames if isinstance(model, UmtModel) else None


def _described(document: Mapping[str, Any], where: str) -> ModelDescription:
    try:
        return ModelDescription.from_dict(document["model"])
    except KeyError:
        raise CheckpointError(f"{where}: its repshift metadata is damaged: it has no key 'model'") from None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}") from error


def _from_identity(identity: Identity, weights: Weights) -> LoadedModel:
    description = ModelDescription(identity.name, identity.architecture, identity.args, identity.preprocessing)
    return _assemble(description, weights, identity.tensors, identity.notes)


def _assemble(
    description: ModelDescription, weights: Weights, tensors: dict[str, Tensor], notes: list[str]
) -> LoadedModel:
    model = build(description, tensors, weights.source.path or description.name)
    return LoadedModel(model, description, weights.source, tensors, weights.notes + notes, weights.document)


def _load_builtin(name: str, told: _Told) -> LoadedModel:
    if name not in BUILTIN:
        raise UsageError(f"there is no {name}", f"{nearest(name, BUILTIN)}Built in are {', '.join(BUILTIN)}.")
    with as_file(files("repshift_cli").joinpath("assets").joinpath(BUILTIN[name])) as path:
        weights = read_weights(path)
        weights.source = Source("builtin", name, weights.source.sha256)
        return _from_weights(weights, _Told(heads=told.heads, img_size=told.img_size, clips=told.clips), name)


def _load_folder(folder: Path, told: _Told) -> LoadedModel:
    """A folder as timm and the hub write it: `config.json` beside `model.safetensors`."""
    config_path = folder / "config.json"
    found = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not config_path.is_file() or not found:
        raise CheckpointError(
            f"{folder} is not a model folder", "It needs config.json, and model.safetensors or pytorch_model.bin."
        )
    weights = read_weights(found[0])
    weights.source = Source("folder", str(folder), weights.source.sha256)
    if weights.document is not None:
        return _from_weights(weights, told, folder.name)
    config = _read_config(config_path)
    name = told.model_name or config["architecture"]
    args = config["model_args"] if name == config["architecture"] else {}
    identity = identify(
        weights.tensors,
        str(folder),
        name,
        told.heads,
        folder.name,
        args=args,
        img_size=told.img_size,
        clips=told.clips,
    )
    loaded = _from_identity(identity, weights)
    known = {key: value for key, value in config["pretrained_cfg"].items() if value is not None}
    if fixed_size(loaded.model):
        known["input_size"] = loaded.description.preprocessing.input_size
    preprocessing = Preprocessing.from_dict({**loaded.description.preprocessing.to_dict(), **known})
    loaded.description = replace(loaded.description, preprocessing=preprocessing)
    _configure(loaded.model, preprocessing)
    set_image_size(loaded, told.img_size)
    _check_clips(loaded, told.clips)
    return loaded


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if isinstance(config, dict) and "architectures" in config and "architecture" not in config:
        kind = ", ".join(map(str, config["architectures"] or ()))
        raise CheckpointError(
            f"{path} describes a model of the transformers library ({kind}), which is not supported",
            "Use the timm checkpoint of the same model.",
        )
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{path} has no key 'architecture'", "timm writes one with save_for_hf.")
    if not is_model_name(config["architecture"]):
        raise CheckpointError(f"{path}: there is no model named {config['architecture']!r}")
    for key in ("model_args", "pretrained_cfg"):
        config[key] = config.get(key) or {}
        if not isinstance(config[key], dict):
            raise CheckpointError(f"{path}: {key} is not a mapping")
    return config


def _load_name(name: str, told: _Told) -> LoadedModel:
    """A model by name: cached weights where they are on this machine, else random ones. Never a download."""
    _check_tag(name)
    cached = _cached_weights(name)
    if cached is not None:
        weights = read_weights(cached)
        weights.source = Source("cache", str(cached), weights.source.sha256)
        identity = identify(
            weights.tensors, str(cached), name, told.heads, name, img_size=told.img_size, clips=told.clips
        )
        loaded = _from_identity(identity, weights)
        loaded.notes.append(f"pretrained weights of {name} from the local cache: {cached}")
    else:
        loaded = _with_random_weights(name, told.img_size, told.clips)
        check_heads(loaded.model, name, told.heads, name)
    set_image_size(loaded, told.img_size)
    _check_clips(loaded, told.clips)
    return loaded


def _with_random_weights(name: str, img_size: int | None, clips: Clips) -> LoadedModel:
    model = build_on_meta(name, {}, name, {})
    # weights that are drawn anew fit any size
    args = {"img_size": _checked_size(img_size)} if img_size is not None and fixed_size(model) else {}
    if isinstance(model, UmtModel):
        args |= {key: value for key, value in asdict(clips).items() if value is not None}
    if args:
        _check_buildable(name, args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create(name, args, name).eval().requires_grad_(False)
    description = ModelDescription(name, name, args, Preprocessing.of_model(model))
    note = f"{name} has RANDOM weights (seed 0): none are cached here. Good for speed, meaningless for accuracy."
    return LoadedModel(model, description, Source("random", None, None), dict(model.state_dict()), [note])


def _check_buildable(name: str, args: dict[str, Any]) -> None:
    """Refuse an image size, or clips, that a model cannot be built for.

    Raises:
        UsageError: with the reason that the model gives.
    """
    try:
        build_on_meta(name, args, name, {})
    except CheckpointError as error:
        reason = error.message.rpartition("cannot be built: ")[2]
        told = ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in args.items())
        raise UsageError(f"{told} does not fit {name}: {reason}") from error


def _cached_weights(name: str) -> Path | None:
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None or not config.hf_hub_id:
        return None
    identity = config.hf_hub_id
    if identity.endswith("/"):
        identity += f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)
    found = try_to_load_from_cache(identity, config.hf_hub_filename or "model.safetensors")
    return Path(found) if isinstance(found, str) else None


def _check_tag(name: str) -> None:
    """Refuse a known timm name whose tag, the part after the dot, names no weights.

    Raises:
        CheckpointError: with the nearest name, and all tags of the model.
    """
    import timm

    if not timm.is_model(name):
        return
    try:
        timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError) as error:
        known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        tags = ", ".join(full.partition(".")[2] for full in known)
        raise CheckpointError(
            f"timm has no weights named {name}", f"{nearest(name, known)}Its tags are {tags}." if known else ""
        ) from error


def _check_model_name(model_name: str | None) -> None:
    if model_name is None:
        return
    if not is_model_name(model_name):
        raise UsageError(f"--model: there is no model named {model_name!r}", nearest(model_name, model_names()))
    _check_tag(model_name)


def _not_found(name: str) -> CheckpointError:
    looks_like_path = "/" in name or Path(name).suffix in WEIGHT_SUFFIXES
    if looks_like_path:
        return CheckpointError(f"there is no file {name}")
    hint = f"{nearest(name, [*model_names(), *BUILTIN])}Give a file, a folder with config.json, or a timm name."
    return CheckpointError(f"{name} is neither a file nor the name of a model", hint)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt", device="cpu") as archive:
            metadata = archive.metadata() or {}
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is damaged: {error}", "Copy or download it again."
        ) from error
    return _without_prefixes(tensors), _read_document(metadata.get(METADATA_KEY), path)


def _read_document(text: str | None, path: Path) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its repshift metadata is damaged: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: its repshift metadata is damaged: not a mapping")
    version = document.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: the version of its metadata, {version!r}, is not a number from 1")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer repshift (format {version}, this one knows {FORMAT_VERSION})",
            "Upgrade: pip install --upgrade repshift-cli. As a dense model the file still opens in timm.",
        )
    return document


def _read_torch(path: Path) -> Any:
    try:
        # Checkpoints of DeiT and of UMT carry their options, which are plain data; no code of theirs is looked up.
        with torch.serialization.safe_globals([argparse.Namespace, *((OrderedDict, name) for name in _OPTIONS)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # "Unsupported global", "unsupported GLOBAL posix.system whose module is blocked", "unsupported class"
        if "global" in str(error).lower() or "class" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects beside weights; loading them could run code, so it was refused",
                "Save only the weights, torch.save(model.state_dict(), ...), better still as safetensors.",
            ) from error
        raise CheckpointError(f"{path} is not a PyTorch weights file, or is damaged") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch seeks to nowhere in a file that was cut short
            raise
        raise CheckpointError(f"{path} is not a PyTorch weights file, or is damaged") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a PyTorch weights file, or is damaged: {first_line(error)}") from error


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Take the weights out of what training scripts put around them."""
    notes = []
    for _ in range(_MOST_WRAPPERS):
        wrapper = _wrapper_of(content)
        if wrapper is None:
            break
        if "ema" in wrapper:
            notes.append(f"{path.name}: averaged weights ({wrapper}) are used, not the raw ones")
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a table of weights")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors", f"Its keys: {_some([str(key) for key in content])}.")
    return _without_prefixes(tensors), notes


def _wrapper_of(content: Any) -> str | None:
    """The first key under which weights can be: an averaged copy that was not made is None, or empty."""
    if not isinstance(content, Mapping):
        return None
    return next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping) and content[key]), None)


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys without what wrappers of the model put before all of them, in whatever order and number."""
    while prefix := next(
        (each for each in _PREFIXES if tensors and all(key.startswith(each) for key in tensors)), None
    ):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors
