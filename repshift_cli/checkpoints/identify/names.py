"""Names of models: those of timm, Vim and UMT."""

from __future__ import annotations

from repshift_cli.models import umt, vim

_VIM_DETAILS = "_bimambav2"
_OTHER_VIMS = ("noclstok", "rope")


def canonical_name(name: str) -> str:
    """The short name of a model. Names of Vim's authors also list what all of their models share."""
    short, details, rest = name.partition(_VIM_DETAILS)
    if details and short in vim.MODELS and not any(word in rest for word in _OTHER_VIMS):
        return short
    return name


def encoder_name(name: str) -> str:
    """The name of the vision encoder, which UMT's models for retrieval and for question answering share."""
    return name.removesuffix("_qa") if name in umt.MODELS else name


def is_model_name(name: str) -> bool:
    """Whether `create` builds a model of this name."""
    import timm

    # timm also accepts "hf-hub:" and "local-dir:" names, which download or read other files
    return ":" not in name and (canonical_name(name) in (*vim.MODELS, *umt.MODELS) or timm.is_model(name))


def model_names() -> list[str]:
    """All names, for suggestions."""
    import timm

    return [*timm.list_models(), *vim.MODELS, *umt.MODELS]
