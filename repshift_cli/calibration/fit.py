"""Fit a score to a model: a direction of its stream that predicts the influence of a token on the output.

The influence of a token is how far the dense model's predictions move if it is dropped. To first order that is a
product with its gradient, and one backward pass computes it for all tokens at all layers. With `p` the predicted
probabilities and `d_i = x_i - mean_j x_j` the part of the stream that is lost with token i,

    I_i = sum_c p_c (d log p_c / d x_i . d_i)^2 ,

the Fisher information along `d_i`, twice the KL divergence to second order. The sum over classes is estimated with
random signs `e_c`: the squared gradient of `sum_c e_c sqrt(p_c) log p_c` has this mean.

Then `log I_i`, standardised within each image, is regressed on the channels of the token (ridge). The score is `w x_i`:
one product per channel, cheaper than a norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from repshift_cli.errors import CheckFailed
from repshift_cli.planning.layout import After
from repshift_cli.reduction.metrics.fitted import Fitted
from repshift_cli.reduction.watch import BlockOutput, record_block_outputs
from repshift_cli.utils.progress import Task

_DRAWS = 2
"""Random signs per image. On the built-in models one is as good; two reduce the variance."""

_RIDGE = 0.01
"""Relative to the mean variance of a channel. A factor of 10 did not change the accuracy of the built-in models."""

_MOST_AT_A_TIME = 16
"""Images per backward pass."""

_TINY = 1e-12


def fit_scores(  # noqa: PLR0917
    model: nn.Module,
    layers: Sequence[int],
    images: Tensor,
    batch_size: int,
    seed: int,
    task: Task,
    *,
    after: After = "block",
) -> dict[int, Fitted]:
    """The fitted score of each of the `layers`.

    Args:
        model: dense, in eval mode, of a supported family.
        images: `[n, ...]`, preprocessed, unlabelled.
        seed: of the random signs.
        after: where in a block tokens will be dropped.

    Raises a CheckFailed if the gradients are not finite.
    """
    sums: dict[int, _NormalEquations] = {layer: _NormalEquations() for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    # a caller may be in inference mode, where tensors have no gradients
    with torch.inference_mode(False), torch.enable_grad(), record_block_outputs(model, after) as seen:
        for batch in images.split(min(batch_size, _MOST_AT_A_TIME)):
            inputs = batch.clone().requires_grad_()
            responses = _responses(model, model(inputs))
            found = influence(responses, {layer: seen[layer] for layer in layers}, generator)
            for layer, target in found.items():
                sums[layer].add(seen[layer].tokens.detach(), target)
            seen.clear()
            task.advance(len(batch))
    return {layer: Fitted.of(equations.solve().tolist()) for layer, equations in sums.items()}


def influence(responses: Tensor, seen: Mapping[int, BlockOutput], generator: torch.Generator) -> dict[int, Tensor]:
    """The influence of each token on the outputs, to first order: float `[B, N]` for each layer.

    Args:
        responses: `[B, D]`, with a gradient; the squares of their changes are summed.
        generator: of the random signs, on the CPU.
    """
    layers = list(seen)
    total: dict[int, Tensor] = {}
    for draw in range(_DRAWS):
        signs = torch.randint(0, 2, responses.shape, generator=generator) * 2 - 1
        along = (responses * signs.to(responses)).sum()
        gradients = torch.autograd.grad(
            along, [seen[layer].carrier for layer in layers], retain_graph=draw + 1 < _DRAWS
        )
        for layer, gradient in zip(layers, gradients, strict=True):
            here = seen[layer]
            tokens = here.tokens.detach().float()
            centred = tokens - tokens.mean(dim=1, keepdim=True)
            moved = (here.view(gradient).float() * centred).sum(-1).square()
            total[layer] = total[layer] + moved if layer in total else moved
    return total


class _NormalEquations:
    """The sums of a linear regression within images, without a constant, which would not change the ranking."""

    def __init__(self) -> None:
        self.products: Tensor | None = None
        self.right: Tensor | None = None

    def add(self, tokens: Tensor, target: Tensor) -> None:
        """Tokens `[B, N, C]` and their influence `[B, N]`."""
        if not bool(target.isfinite().all()):
            raise CheckFailed("the gradients of the model are not finite", "Fit the score in float32.")
        wanted = (target + _TINY * target.mean(dim=1, keepdim=True) + torch.finfo(target.dtype).tiny).log()
        wanted = wanted - wanted.mean(dim=1, keepdim=True)
        wanted = (wanted / wanted.std(dim=1, correction=0, keepdim=True).clamp_min(_TINY)).flatten()
        centred = (tokens.float() - tokens.float().mean(dim=1, keepdim=True)).flatten(0, 1)
        products, right = (centred.T @ centred).double(), (centred.T @ wanted).double()
        self.products = products if self.products is None else self.products + products
        self.right = right if self.right is None else self.right + right

    def solve(self) -> Tensor:
        """The weights `[C]`, of length one: only the order of the scores matters."""
        assert self.products is not None
        assert self.right is not None
        ridge = _RIDGE * self.products.diagonal().mean().clamp_min(_TINY)
        eye = torch.eye(len(self.right), dtype=self.right.dtype, device=self.right.device)
        weights = torch.linalg.solve(self.products + ridge * eye, self.right)
        return functional.normalize(weights, dim=0).cpu()


def is_classifier(model: nn.Module) -> bool:
    """Whether the outputs are class logits, and not embeddings (which have a temperature)."""
    return getattr(model, "num_classes", 0) > 0 and not isinstance(getattr(model, "temperature", None), float)


def _responses(model: nn.Module, outputs: Tensor) -> Tensor:
    """`[B, D]`: `sqrt(p) log p` of a classifier, with a constant p; the normalised features of other models."""
    if is_classifier(model):
        logs = outputs.float().log_softmax(-1)
        return logs.detach().mul(0.5).exp() * logs
    return functional.normalize(outputs.float(), dim=-1)
