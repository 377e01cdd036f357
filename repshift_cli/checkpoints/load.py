"""Read a checkpoint and tell which model it is.

Loading is safe: safetensors, or `torch.load(weights_only=True)`; no code from a checkpoint is ever run. Weights of a
safetensors file stay memory-mapped and are held once: the model's parameters are the mapped tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.checkpoints.build import build, checked_size, configure, set_image_size
from repshift_cli.checkpoints.identify import Clips, identify
from repshift_cli.checkpoints.identify.building import build_on_meta, check_heads, create
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.names import canonical_name, is_model_name, model_names
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.weights import Source, Weights, read_weights
from repshift_cli.data.preprocessing import Preprocessing, fixed_size
from repshift_cli.errors import CheckpointError, UsageError
from repshift_cli.models.umt import UmtModel
from repshift_cli.utils.files import WEIGHT_SUFFIXES
from repshift_cli.utils.suggest import nearest

__all__ = [
    "BUILTIN",
    "load_checkpoint",
]


BUILTIN = {
    "builtin:vit-digits": "vit_digits.safetensors",
    "builtin:vit-digits-small": "vit_digits_small.safetensors",
    "builtin:cnn-digits": "cnn_digits.safetensors",
    "builtin:vim-digits": "vim_digits.safetensors",
    "builtin:umt-shapes": "umt_shapes.safetensors",
    "builtin:umt-shapes-qa": "umt_shapes_qa.safetensors",
}


@dataclass(frozen=True)
class _Told:
    """What the user, or a recipe for him, tells of a model; see `load`."""

    model_name: str | None = None
    heads: int | None = None
    img_size: int | None = None
    fallback_name: str | None = None
    clips: Clips = field(default_factory=Clips)


def load_checkpoint(
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
    configure(loaded.model, preprocessing)
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
    args = {"img_size": checked_size(img_size)} if img_size is not None and fixed_size(model) else {}
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
