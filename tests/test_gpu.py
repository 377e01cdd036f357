"""All backends of attention on a CUDA GPU, in the dtypes that are common there."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from tiny import VARIANTS, images, make_recipe, tiny_vit
from tiny_umt import compressed_umt, tiny_umt, umt_clips, umt_recipe
from torch import Tensor, nn

from repshift_cli.errors import UsageError
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.models.attention_mode import AttentionMode, attention_mode, auto_note, flash_problem
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.plans import resolve_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none")

CUDA = torch.device("cuda")
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
WITHIN = {"float16": 2e-2, "bfloat16": 1.5e-1}
"""Largest difference of two half-precision passes, as a share of the largest value."""

MODES: tuple[AttentionMode, ...] = get_args(AttentionMode)
MODELS = ("dense", "qk_norm", "attention_pooling", "merged", "merged_qk_norm", "umt", "merged_umt")


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A model in float32 on the CPU, and inputs for it."""
    if "umt" in name:
        model = tiny_umt()
        sample = umt_clips(model)
        if name == "umt":
            return model, sample
        return compressed_umt(model, umt_recipe("[{layer: 0, drop_ratio: 0.3}]", "{kind: random}", "fuse")), sample
    options = VARIANTS["map_pooling"] if name == "attention_pooling" else {"qk_norm": name.endswith("qk_norm")}
    vit = tiny_vit(**options)
    if not name.startswith("merged"):
        return vit, images()
    # the choice of tokens must not depend on rounding
    return attach(vit, resolve_for(vit, make_recipe(metric="{kind: random}", reducer="fuse"))), images()


def ran_on(model: nn.Module, sample: Tensor, mode: AttentionMode) -> tuple[Tensor, str]:
    """The output and the attention kernel; skips the test if this machine has no such kernel."""
    if mode == "flash" and (problem := flash_problem(CUDA, sample.dtype, 16)) is not None:
        pytest.skip(f"flash-attn: {problem}")
    try:
        with torch.no_grad(), attention_mode(model, mode):
            return model(sample), observed_attention(model, sample)
    except UsageError as error:
        if mode.startswith("sdpa:"):
            pytest.skip(error.message)
        raise


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_parity(mode: AttentionMode, name: str, dtype: str) -> None:
    model, sample = built(name)
    model.to(CUDA)
    sample = sample.to(CUDA)
    with torch.no_grad(), attention_mode(model, "explicit"):
        wanted = model(sample)
    half = copy.deepcopy(model).to(HALF[dtype])
    found, ran = ran_on(half, sample.to(HALF[dtype]), mode)
    assert found.dtype == HALF[dtype]
    assert float((found.float() - wanted).abs().max()) <= WITHIN[dtype] * float(wanted.abs().max())
    if mode == "sdpa":
        assert not set(ran.split("+")) & {"sdpa:math", "explicit"}
    elif mode == "flash":
        assert "flash-attn" in ran
    elif mode != "auto":
        assert ran == mode


@pytest.mark.parametrize("mode", ["flash", "sdpa", "explicit"])
@pytest.mark.parametrize("name", ["qk_norm", "merged", "merged_umt"])
def test_compiled_in_one_graph(name: str, mode: AttentionMode) -> None:
    model, sample = built(name)
    model.to(CUDA, torch.bfloat16)
    sample = sample.to(CUDA, torch.bfloat16)
    wanted, _ = ran_on(model, sample, mode)
    torch._dynamo.reset()
    with torch.no_grad(), attention_mode(model, mode):
        found = torch.compile(model, fullgraph=True)(sample)
    assert float((found - wanted).abs().max()) <= WITHIN["bfloat16"] * float(wanted.abs().max())


def test_auto_uses_flash_attn_if_it_can_run() -> None:
    model = tiny_vit().to(CUDA, torch.float16)
    there = flash_problem(CUDA, torch.float16, 16) is None
    assert (auto_note(model, "auto") is None) == there or torch.cuda.get_device_capability() < (8, 0)
    with attention_mode(model, "auto"):
        ran = observed_attention(model, images().to(CUDA, torch.float16))
    assert (ran == "flash-attn") == there
    whole = tiny_vit().to(CUDA)
    with attention_mode(whole, "auto"):
        assert "flash-attn" not in observed_attention(whole, images().to(CUDA))


def test_a_fitted_score_copies_its_weights_once() -> None:
    """A copy from the host in each pass would wait for the GPU at each site."""
    from repshift_cli.reduction.metrics.fitted import Fitted

    model = tiny_vit()
    plan = resolve_for(model, make_recipe(metric="{kind: fitted}"))
    part = Fitted.of(torch.randn(32, generator=torch.Generator().manual_seed(0)).tolist()).spec()
    wrapped = attach(model, plan.with_metrics([part] * len(plan.sites))).to(CUDA)
    sample = images().to(CUDA)
    wrapped(sample)
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrapped(sample)
    finally:
        torch.cuda.set_sync_debug_mode("default")
