"""Identify a model by the names and shapes of its tensors, one kind of model per file.

Names and shapes give depth, widths and the number of classes. A registered model with the same tensors gives heads,
activation and preprocessing. If several registered models fit and compute different things, the user has to choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from repshift_cli.checkpoints.create import UMT, build_on_meta
from repshift_cli.checkpoints.identify import cnn, timm_transformer, umt, vim, vit
from repshift_cli.checkpoints.identify.identity import Identity, shapes, supported
from repshift_cli.checkpoints.identify.names import canonical_name, is_model_name
from repshift_cli.checkpoints.identify.sizes import check_heads, size_args
from repshift_cli.checkpoints.identify.unsupported import is_unsupported, known_kind
from repshift_cli.checkpoints.libraries.base import libraries, library_for
from repshift_cli.checkpoints.options import ImageSize, LoadOptions
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, RepshiftError, UsageError
from repshift_cli.reduction.families.base import find

_CHANNELS = 3
"""Images are read as RGB."""

_FIRST_CONVOLUTIONS = (
    "patch_embed.proj.weight",
    "conv1.weight",
    "conv1.0.weight",
    "stem.weight",
    "stem.0.weight",
    "stem.conv.weight",
    "conv_stem.weight",
    "downsample_layers.0.0.weight",
)


def identify(
    tensors: Mapping[str, Tensor],
    where: str,
    options: LoadOptions,
    hint: str,
    *,
    args: Mapping[str, Any] | None = None,
    size: ImageSize | None = None,
) -> Identity:
    """Find the model that the weights belong to.

    Args:
        tensors: the weights under the keys of the file.
        where: the file, for messages.
        options: a `model_name` decides; a `fallback_name` is tried before the tensors are searched.
        hint: the file's name, which can name one of several models that fit.
        args: builder arguments of `model_name` that the file gives.
        size: image size that the file gives; that of the options is preferred.

    Raises:
        CheckpointError: no known model fits, or several do; or it does not have the given number of heads.
        UsageError: the model does not take the given image size.
    """
    given = {**(args or {}), **(options.model_args or {})}
    size = options.size or (None if "img_size" in given else size)
    tensors = _recognised(tensors)
    _check_channels(tensors, where)
    if library := library_for(tensors, options.model_name):
        if options.model_args:
            raise UsageError(f"--model-args: models of {library.name} take no arguments", "Leave --model-args out.")
        return library.identify(tensors, where, options)
    if options.model_name:
        if not is_model_name(options.model_name) and any(options.model_name in each.names() for each in libraries()):
            raise CheckpointError(f"{where} does not hold the tensors of a {options.model_name}", "Leave --model out.")
        return _named(canonical_name(options.model_name), tensors, where, given, options, size)[0]
    fallback = options.fallback_name
    if fallback and is_model_name(fallback) and (found := _fallback(fallback, tensors, where, given, options, size)):
        return found
    return _by_tensors(tensors, where, options, hint, size, given)


def _by_tensors(  # noqa: PLR0917
    tensors: Mapping[str, Tensor],
    where: str,
    options: LoadOptions,
    hint: str,
    size: ImageSize | None,
    given: Mapping[str, Any],
) -> Identity:
    """The model of tensors that nothing names."""
    kind, named = cnn.kind_of(tensors), cnn.registered(tensors)
    if given and (umt.recognises(tensors) or vim.recognises(tensors) or kind or named):
        raise UsageError("--model-args: the name of the model is not known", "Give --model.")
    if umt.recognises(tensors):
        return umt.identify(tensors, where, options)
    if vim.recognises(tensors):
        return vim.identify(tensors, where, options)
    if named:
        return cnn.identify_registered(tensors, where, options.heads, hint)
    if error := known_kind(tensors, where):
        raise error
    if kind:
        return cnn.identify(kind, tensors, where, options.heads, hint)
    module = timm_transformer if timm_transformer.recognises(tensors) else vit
    return module.identify(tensors, where, options, hint, size, given)


def _recognised(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without names that all keys start with (`module.`, `backbone.`), until they are recognised."""
    own = [library.recognises for library in libraries()]
    kinds = (umt.recognises, vim.recognises, cnn.kind_of, cnn.registered, vit.recognises, timm_transformer.recognises)
    known = (*own, *kinds, is_unsupported)
    while not any(recognises(tensors) for recognises in known):
        outer = {key.partition(".")[::2] for key in tensors}
        if len({first for first, _ in outer}) != 1 or not all(rest for _, rest in outer):
            break
        tensors = {key.partition(".")[2]: value for key, value in tensors.items()}
    return tensors


def _named(  # noqa: PLR0917
    name: str,
    tensors: Mapping[str, Tensor],
    where: str,
    given: Mapping[str, Any],
    options: LoadOptions,
    size: ImageSize | None,
) -> tuple[Identity, nn.Module]:
    """The named model; only image size and number of classes are read from the weights."""
    if name in umt.MODELS:
        if given:
            raise UsageError(f"--model-args: {name} takes none", "Use --heads, --img-size, --frames.")
        identity = umt.identify(tensors, where, options, name)
        model = build_on_meta(UMT, identity.args, where, tensors)
    elif name in vim.MODELS:
        identity = vim.named(name, tensors, where, given, options)
        model = build_on_meta(name, identity.args, where, tensors)
    else:
        model = build_on_meta(name, given, where, tensors)
        if find(model) is None:
            raise CheckpointError(f"{where}: {name} is a {type(model).__name__}, which is not supported", supported())
        read = size_args(model, tensors, where, size, given)
        args = {**given, **read}
        if read:
            model = build_on_meta(name, args, where, tensors)
        notes = [f"{key} {value} is read from the weights" for key, value in read.items() if key != "global_pool"]
        if "global_pool" in read:
            notes.append("the weights pool over all tokens: assumed the mean. Another: --model-args global_pool=max")
        native = cnn.native_keys(vit.native_keys(tensors, model), model)
        identity = Identity(name, name, args, Preprocessing.of_model(model), native, notes)
    check_heads(model, name, options.heads, where)
    return identity, model


def _fallback(  # noqa: PLR0917
    name: str,
    tensors: Mapping[str, Tensor],
    where: str,
    given: Mapping[str, Any],
    options: LoadOptions,
    size: ImageSize | None,
) -> Identity | None:
    """The model that a recipe names, if names and shapes of all its tensors agree."""
    name = canonical_name(name)
    try:
        identity, model = _named(name, tensors, where, given, options, size)
    except RepshiftError:
        return None
    if shapes(model.state_dict()) != shapes(identity.tensors):
        return None
    identity.notes.insert(0, f"assumed {name}, which the recipe names: the tensors fit it")
    return identity


def _check_channels(tensors: Mapping[str, Tensor], where: str) -> None:
    hybrid = any(key.startswith("patch_embed.backbone.") for key in tensors)
    for key in _FIRST_CONVOLUTIONS:
        weight = None if hybrid else tensors.get(key)
        if weight is not None and weight.ndim == 4 and weight.shape[1] != _CHANNELS:  # noqa: PLR2004 (a convolution's)
            raise CheckpointError(
                f"{where}: {_CHANNELS} input channels are supported, these weights take {weight.shape[1]}"
            )
