"""The permute test: whether anything behind a block depends on the order of its tokens and does not follow them.

After one block the patch tokens are permuted, each image by its own permutation, and all are kept. Then the outputs,
permuted back, must equal those of the dense model. If they do not, the model would run with fewer tokens and be wrong.
Random weights are enough. At least three images are used, since a model that puts tokens first is taken for one that
puts images first without an error where both are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repshift_cli.errors import ModelError, first_line
from repshift_cli.models.tensor_model import library_model
from repshift_cli.ops.tokens import gather_tokens, with_prefix
from repshift_cli.planning.plan import PlanSite
from repshift_cli.reduction.families.base import Family, Site
from repshift_cli.reduction.hooks import register_edit
from repshift_cli.reduction.restore import register_restore
from repshift_cli.reduction.stream import Stream
from repshift_cli.reduction.token_stream import TokenStream

TOLERANCE = 1e-5
"""Of differences in float32, relative to the largest value of the output."""


class _Permute:
    """A forward hook that permutes the patch tokens behind a block."""

    def __init__(self, stream: Stream, order: Tensor, planned: Any) -> None:
        self.stream, self.order, self.planned = stream, order, planned

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        value = self.stream.enter(output)
        keep = with_prefix(self.order, self.stream.prefix)
        return self.stream.leave(self.stream.reduce(value, keep, self.planned, gather_tokens))


@torch.no_grad()
def permute_difference(  # noqa: PLR0917
    model: nn.Module,
    family: Family,
    images: Tensor,
    site: Site,
    planned: PlanSite | None,
    restore: bool = False,
) -> float:
    """The largest difference of the outputs, relative to their largest value, with tokens permuted after a site.

    Args:
        model: dense, in eval mode.
        images: `[B, ...]`, at least three.
        planned: only for families whose stream reads it.
        restore: put the tokens back in place behind each block.
    """
    layout = family.layout(model)
    generator = torch.Generator().manual_seed(site.layer)
    orders = [torch.randperm(layout.patch_tokens, generator=generator) for _ in images]
    order = torch.stack(orders).to(images.device)
    expected = list(_tensors(model(images)))
    stream = family.stream(model)
    sites, handles = family.sites(model), list[Any]()
    if restore:
        assert isinstance(stream, TokenStream)
        total = layout.prefix_tokens + layout.patch_tokens
        handles += register_restore(stream, sites, [total] * len(sites), site.layer)
    edits, undo = family.edits(model, stream)
    handles += [sites[0].block.register_forward_pre_hook(stream.begin), *map(register_edit, edits)]
    handles.append(site.block.register_forward_hook(_Permute(stream, order, planned), prepend=True))
    try:
        found = list(_tensors(model(images)))
    finally:
        undo()
        for handle in handles:
            handle.remove()
    if [part.shape for part in found] != [part.shape for part in expected]:
        return float("inf")
    back = order.argsort(dim=1)
    pairs = zip(found, expected, strict=True)
    return max((_difference(part, dense, back, stream.prefix) for part, dense in pairs), default=float("inf"))


def permutation_problem(model: nn.Module, family: Family, images: Tensor) -> str | None:
    """Run the permute test behind the first and a middle block: how a model fails it, or None."""
    sites, restore = family.sites(model), family.needs_restore(model) is not None
    for site in {site.layer: site for site in (sites[0], sites[(len(sites) - 1) // 2])}.values():
        try:
            difference = permute_difference(model, family, images, site, None, restore)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            return f"fails the permute test behind {site.name}, on inputs of {tuple(images.shape)}: {first_line(error)}"
        if not difference < TOLERANCE:
            return f"fails the permute test behind {site.name}: outputs differ by {difference:.1e}"
    return None


def check_permutation(model: nn.Module, family: Family, images: Tensor) -> None:
    """Raise a ModelError if `permutation_problem` finds one."""
    if problem := permutation_problem(model, family, images):
        raise ModelError(
            f"{type(library_model(model)).__name__} cannot be reduced: it {problem}",
            "Something behind this block depends on the order of the tokens, and the spec does not name it.",
        )


def _difference(found: Tensor, expected: Tensor, back: Tensor, prefix: int) -> float:
    """Between two outputs; a dimension of all tokens or all patches is permuted back where that fits better."""
    found, expected = found.float(), expected.float()
    scale = float(expected.abs().max().clamp(min=1e-12))
    candidates = [found]
    if found.ndim == 3 and found.shape[0] == back.shape[0]:  # noqa: PLR2004 ([B, T, C])
        if found.shape[1] == back.shape[1] + prefix:
            candidates.append(gather_tokens(found, with_prefix(back, prefix)))
        elif found.shape[1] == back.shape[1]:
            candidates.append(gather_tokens(found, back))
    return min(float((part - expected).abs().max()) for part in candidates) / scale


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating point tensors in the result of a model."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for part in output:
            yield from _tensors(part)
