"""Load a checkpoint: read its weights, identify the model and build it.

No code from a checkpoint is run: files are safetensors, or read by `torch.load(weights_only=True)`. Weights are held
once: the model's parameters are the tensors that were read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repshift_cli.checkpoints.build import build, configure, set_image_size, set_preprocessing
from repshift_cli.checkpoints.builtin import BUILTIN
from repshift_cli.checkpoints.containers import check_kind, extreme
from repshift_cli.checkpoints.create import REFUSED_ARGS, build_on_meta, create
from repshift_cli.checkpoints.folders import read_config
from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.identify.names import canonical_name, is_model_name, model_names
from repshift_cli.checkpoints.identify.sizes import check_heads
from repshift_cli.checkpoints.libraries.base import libraries
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import PREPROCESSING, ImageSize, LoadOptions
from repshift_cli.checkpoints.schema import describe
from repshift_cli.checkpoints.weights import INDEX_SUFFIX, Source, Weights, read_weights
from repshift_cli.data.preprocessing import LARGEST_SIDE, Preprocessing, built_size, fixed_size
from repshift_cli.errors import CheckpointError, UsageError
from repshift_cli.utils.files import WEIGHT_SUFFIXES, export_file
from repshift_cli.utils.suggest import first_names, nearest

_FOLDER_WEIGHTS = ("model.safetensors", f"model{INDEX_SUFFIX}", "pytorch_model.bin")


def load_checkpoint(name: str | Path, options: LoadOptions | None = None) -> LoadedModel:
    """Load a dense model from a file, a folder, the name of a model or a `builtin:` name.

    A compressed checkpoint gives its dense model, with the plan in `document`.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or fits no known model; or the model has another number
            of heads than `options`.
        UsageError: an unknown name of a model, or an image size or frames that the weights do not fit.
    """
    options = options or LoadOptions()
    _check_model_name(options.model_name)
    if refused := sorted(REFUSED_ARGS & (options.model_args or {}).keys()):
        raise UsageError(
            f"--model-args: unsupported {', '.join(refused)}", "Allowed are arguments that shape the model."
        )
    try:
        loaded = _load(str(name), options)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or name}: {error.strerror or error}") from error
    set_image_size(loaded, options.img_size)
    _check_clips(loaded, options)
    set_preprocessing(loaded, options.preprocessing)
    return loaded


def _load(name: str, options: LoadOptions) -> LoadedModel:
    if name.startswith("builtin:"):
        return _load_builtin(name, options)
    path = export_file(Path(name))
    library = next((library for library in libraries() if library.opens(path)), None) if path.is_dir() else None
    if options.tower is not None and not (library and library.towers):
        raise UsageError(f"--tower {options.tower}: {name} is not a folder of transformers", "Leave --tower out.")
    if path.is_dir():
        if library is not None:
            loaded = library.read(path, options)
            _note_extreme(loaded)
            return loaded
        return _load_folder(path, options)
    if path.exists():
        return _from_weights(read_weights(path, options.weights), options, path.stem)
    if is_model_name(name):
        return _load_name(canonical_name(name), options)
    raise _not_found(name)


def _from_weights(weights: Weights, options: LoadOptions, hint: str) -> LoadedModel:
    """The model of our metadata, else of the name that the user gives, else detected from the tensors."""
    where = weights.source.path or hint
    if weights.document is None:
        if weights.training:
            return _from_training(weights, options, hint)
        loaded = _detected(weights, options, hint)
        note_assumed(loaded, options.preprocessing)
        return loaded
    description = describe(weights.document, where)
    names = (description.name, description.architecture)
    if options.model_name and canonical_name(options.model_name) not in names:
        raise UsageError(f"{where} is a {description.name}, not a {options.model_name}", "Leave --model out.")
    if options.model_args and not options.model_args.items() <= description.args.items():
        raise UsageError(f"--model-args: {where} states its model: {description.args}", "Leave --model-args out.")
    loaded = _assemble(description, weights, weights.tensors, [])
    _check_metadata(loaded, where)
    check_heads(loaded.model, description.name, options.heads, where)
    return loaded


def _detected(weights: Weights, options: LoadOptions, hint: str, **given: Any) -> LoadedModel:
    return _from_identity(identify(weights.tensors, weights.source.path or hint, options, hint, **given), weights)


def _from_training(weights: Weights, options: LoadOptions, hint: str) -> LoadedModel:
    """The model that a training script names in the file, with the preprocessing of its options."""
    training = weights.training
    name = training.get("model")
    given: dict[str, Any] = {"size": _training_size(training.get("img_size", training.get("input_size")))}
    if isinstance(name, str) and not options.model_name:
        if is_model_name(name):
            _check_tag(name)
            options = replace(options, model_name=name)
            arguments = training.get("model_kwargs")
            given["args"] = dict(arguments) if isinstance(arguments, Mapping) else {}
            if "gp" in training:
                given["args"]["global_pool"] = training["gp"]
            weights.notes.append(f"the file names its model: {name}")
        else:
            weights.notes.append(f"the file names a model that is not known: {name}")
    loaded = _detected(weights, options, hint, **given)
    known = {key: training[key] for key in (*PREPROCESSING, "crop_mode") if key in training}
    if given["size"]:
        known["input_size"] = (loaded.description.preprocessing.input_size[0], *given["size"])
    _set_preprocessing(loaded, known)
    note_assumed(loaded, {*known, *options.preprocessing})
    return loaded


def note_assumed(loaded: LoadedModel, stated: Collection[str]) -> None:
    """Note the fields of the preprocessing that are not stated, neither by the file nor by the user."""
    if assumed := [key for key in PREPROCESSING if key not in stated]:
        loaded.notes.append(
            f"assumed {', '.join(assumed)}, which the file does not state: {loaded.description.preprocessing}. "
            "Others than in training lower the accuracy: give --mean, --std, --crop-pct, --interpolation"
        )


def _training_size(value: Any) -> ImageSize | None:
    """The image size in options of a training script: a number, height and width, or these after the channels."""
    sides = list(value)[-2:] if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not sides or not all(isinstance(side, int) and 0 < side <= LARGEST_SIDE for side in sides):
        return None
    return ImageSize(sides[0], sides[-1])


def _set_preprocessing(loaded: LoadedModel, known: dict[str, Any]) -> None:
    """Replace what a file says about the preprocessing, except the size of a model with a fixed or stated one."""
    if fixed_size(loaded.model) or "img_size" in loaded.description.args:
        known["input_size"] = loaded.description.preprocessing.input_size
    where = f"{loaded.source.path}: the preprocessing of the model"
    preprocessing = Preprocessing.from_dict({**loaded.description.preprocessing.to_dict(), **known}, where)
    loaded.description = replace(loaded.description, preprocessing=preprocessing)
    configure(loaded.model, preprocessing)


def _check_clips(loaded: LoadedModel, options: LoadOptions) -> None:
    """Raise UsageError if the model does not take clips as the user describes them."""
    what, frames = loaded.source.path or loaded.description.name, loaded.description.preprocessing.frames
    if frames is None and {options.frames, options.checkpoint_frames, options.frame_step} != {None}:
        hint = "Leave --frames, --checkpoint-frames and --frame-step out."
        raise UsageError(f"{what} takes single images, not clips", hint)
    if options.checkpoint_frames not in (None, getattr(loaded.model, "checkpoint_frames", None)):
        raise UsageError(
            f"--checkpoint-frames {options.checkpoint_frames}: the positions of {what} are already interpolated",
            "Leave the option out, or start from the authors' checkpoint.",
        )
    if options.frames not in (None, frames):
        raise UsageError(
            f"--frames {options.frames}: the metadata of {what} names clips of {frames} frames",
            "Leave --frames out, or start from the authors' checkpoint.",
        )


def _check_metadata(loaded: LoadedModel, where: str) -> None:
    """Raise CheckpointError if the metadata names another image size or number of frames than the model takes."""
    size, named = fixed_size(loaded.model), loaded.description.preprocessing
    if size and size != named.input_size[1:]:
        height, width = named.input_size[1:]
        raise CheckpointError(
            f"{where}: its metadata names images of {height}x{width}, but the model takes {size[0]}x{size[1]}"
        )
    frames = getattr(loaded.model, "frames", None)
    if frames != named.frames:
        raise CheckpointError(
            f"{where}: its metadata names {named.frames or 'no'} frames, but the model takes {frames or 'no clips'}"
        )


def _from_identity(identity: Identity, weights: Weights) -> LoadedModel:
    description = ModelDescription(identity.name, identity.architecture, identity.args, identity.preprocessing)
    return _assemble(description, weights, identity.tensors, identity.notes)


def _assemble(
    description: ModelDescription, weights: Weights, tensors: dict[str, Tensor], notes: list[str]
) -> LoadedModel:
    model = build(description, tensors, weights.source.path or description.name)
    loaded = LoadedModel(model, description, weights.source, tensors, weights.notes + notes, weights.document)
    _note_extreme(loaded)
    return loaded


def _note_extreme(loaded: LoadedModel) -> None:
    if wrong := extreme(loaded.tensors):
        text = f"{len(wrong)} tensors hold values that are not finite or are very large: {first_names(wrong)}"
        loaded.notes.append(text)


def _load_builtin(name: str, options: LoadOptions) -> LoadedModel:
    if name not in BUILTIN:
        raise UsageError(f"unknown built-in model {name}", f"{nearest(name, BUILTIN)}Allowed: {', '.join(BUILTIN)}.")
    parts = [_read_asset(file, options) for file in BUILTIN[name].files]
    digests = [str(part.source.sha256) for part in parts]
    digest = digests[0] if len(parts) == 1 else sha256("\n".join(digests).encode()).hexdigest()
    tensors = {key: value for part in parts for key, value in part.tensors.items()}
    widened = {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()}
    weights = replace(parts[0], tensors=widened, source=Source("builtin", name, digest))
    return _from_weights(weights, replace(options, model_name=None), name)


def _read_asset(file: str, options: LoadOptions) -> Weights:
    with as_file(files("repshift_cli").joinpath("assets").joinpath(file)) as path:
        return read_weights(path, options.weights)


def _load_folder(folder: Path, options: LoadOptions) -> LoadedModel:
    weights = read_folder_weights(folder, options)
    if weights.document is not None:
        return _from_weights(weights, options, folder.name)
    config = _read_timm_config(folder / "config.json")
    name = options.model_name or config["architecture"]
    args = config["model_args"] if name == config["architecture"] else {}
    known = {key: value for key, value in config["pretrained_cfg"].items() if value is not None}
    size = _training_size(known.get("input_size"))
    loaded = _detected(weights, replace(options, model_name=name), folder.name, args=args, size=size)
    _set_preprocessing(loaded, known)
    return loaded


def read_folder_weights(folder: Path, options: LoadOptions) -> Weights:
    """The weights of a model folder; raises CheckpointError if it has none or no configuration."""
    found = [folder / name for name in _FOLDER_WEIGHTS if (folder / name).is_file()]
    if not (folder / "config.json").is_file() or not found:
        raise CheckpointError(
            f"{folder} is not a model folder", "It needs config.json, and model.safetensors or pytorch_model.bin."
        )
    weights = read_weights(found[0], options.weights)
    weights.source = Source("folder", str(folder), weights.source.sha256)
    return weights


def _read_timm_config(path: Path) -> dict[str, Any]:
    config = read_config(path)
    if not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{path} has no key 'architecture'", "timm writes one with save_for_hf.")
    if not is_model_name(config["architecture"]):
        raise CheckpointError(f"{path}: unknown model {config['architecture']!r}")
    for key in ("model_args", "pretrained_cfg"):
        config[key] = config.get(key) or {}
        if not isinstance(config[key], dict):
            raise CheckpointError(f"{path}: {key} is not a mapping")
    return config


def _load_name(name: str, options: LoadOptions) -> LoadedModel:
    """A model by name, with weights of the local cache or random ones. Nothing is downloaded."""
    _check_tag(name)
    cached = _cached_weights(name)
    if cached is None:
        check_kind(options.weights, name)
        loaded = _with_random_weights(name, options)
        check_heads(loaded.model, name, options.heads, name)
        return loaded
    weights = read_weights(cached, options.weights)
    weights.source = Source("cache", str(cached), weights.source.sha256)
    identity = identify(weights.tensors, str(cached), replace(options, model_name=name), name)
    identity.notes.append(f"pretrained weights of {name} from the local cache: {cached}")
    return _from_identity(identity, weights)


def _with_random_weights(name: str, options: LoadOptions) -> LoadedModel:
    model = build_on_meta(name, {}, name, {})
    args = dict(options.model_args or {})  # random weights fit any
    if options.size and built_size(model):
        args["img_size"] = options.size.square(name) if hasattr(model, "frames") else options.size.argument
    if hasattr(model, "frames"):
        clip = {"frames": options.frames, "checkpoint_frames": options.checkpoint_frames}
        args |= {key: value for key, value in clip.items() if value is not None}
    if args:
        _check_buildable(name, args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create(name, args, name).eval().requires_grad_(False)
    description = ModelDescription(name, name, args, Preprocessing.of_model(model))
    note = f"{name} has RANDOM weights (seed 0): none are cached here. Good for speed, meaningless for accuracy."
    return LoadedModel(model, description, Source("random", None, None), dict(model.state_dict()), [note])


def _check_buildable(name: str, args: dict[str, Any]) -> None:
    try:
        build_on_meta(name, args, name, {})
    except CheckpointError as error:
        reason = error.message.rpartition("cannot be built: ")[2]
        options = ("img_size", "frames", "checkpoint_frames")
        given = ", ".join(
            f"--{key.replace('_', '-')} {value}" if key in options else f"--model-args {key}={value}"
            for key, value in args.items()
        )
        raise UsageError(f"{given} does not fit {name}: {reason}") from error


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
    """Raise CheckpointError for a timm model with an unknown tag (the part after the dot)."""
    import timm

    if not timm.is_model(name):
        return
    try:
        timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError) as error:
        known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        tags = ", ".join(full.partition(".")[2] for full in known)
        raise CheckpointError(
            f"timm has no weights named {name}", f"{nearest(name, known)}Allowed tags: {tags}." if known else ""
        ) from error


def _check_model_name(model_name: str | None) -> None:
    if model_name is None:
        return
    if not is_model_name(model_name):
        others = [name for library in libraries() for name in library.names()]
        if model_name not in others:
            hint = nearest(model_name, [*model_names(), *others])
            raise UsageError(f"--model: unknown model {model_name!r}", hint)
    _check_tag(model_name)


def _not_found(name: str) -> CheckpointError:
    if "/" in name or Path(name).suffix.lower() in WEIGHT_SUFFIXES:
        return CheckpointError(f"there is no file {name}")
    hint = f"{nearest(name, [*model_names(), *BUILTIN])}Give a file, a folder with config.json, or a timm name."
    return CheckpointError(f"{name} is neither a file nor the name of a model", hint)
