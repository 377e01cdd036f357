"""The names that a model can be called by: timm's, and those of the models that are built here."""

from __future__ import annotations

from repshift_cli.models import umt, vim

__all__ = ["canonical_name", "encoder_name", "is_model_name", "model_names"]

_VIM_DETAILS = "_bimambav2"
_OTHER_VIMS = ("noclstok", "rope")


def canonical_name(name: str) -> str:
    """The name under which a model is known here: Vim's authors write out what all of their models share."""
    short, details, rest = name.partition(_VIM_DETAILS)
    if details and short in vim.MODELS and not any(word in rest for word in _OTHER_VIMS):
        return short
    return name


def encoder_name(name: str) -> str:
    """What recipes are for: UMT's models for retrieval and for questions have the same vision encoder."""
    return name.removesuffix("_qa") if name in umt.MODELS else name


def is_model_name(name: str) -> bool:
    """Whether a model can be built by this name."""
    import timm

    # timm also takes "hf-hub:" and "local-dir:" names, which would download or read elsewhere
    return ":" not in name and (canonical_name(name) in (*vim.MODELS, *umt.MODELS) or timm.is_model(name))


def model_names() -> list[str]:
    """All of them, for the nearest match to a wrong one."""
    import timm

    return [*timm.list_models(), *vim.MODELS, *umt.MODELS]
