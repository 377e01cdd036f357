"""MACs computed from shapes equal those counted in a run."""

from __future__ import annotations

import pytest
from timm.layers import SwiGLUPacked
from tiny import VARIANTS, compressed, make_recipe, tiny_vit

from repshift_cli.measure.macs import count_macs
from repshift_cli.reduction.families.base import match

MORE = {
    "swiglu": {"mlp_layer": SwiGLUPacked},
    "scaled_attention_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
    "wide_image": {"img_size": (16, 64)},
    "max_pooling": {"global_pool": "max"},
    "average_and_max_pooling": {"global_pool": "avgmax"},
    "no_pooling": {"global_pool": "", "num_classes": 0},
    "one_channel": {"in_chans": 1},
}


WITHOUT_QUERIES = ("parallel_things_block", "differential_attention")
CASES = [
    *((variant, "{kind: representation_shift, operation: block}") for variant in (*VARIANTS, *MORE)),
    *((variant, "{kind: class_attention}") for variant in (*VARIANTS, *MORE) if variant not in WITHOUT_QUERIES),
]


@pytest.mark.parametrize(("variant", "metric"), CASES)
def test_computed_and_counted_macs_agree(variant: str, metric: str) -> None:
    options = {**VARIANTS, **MORE}[variant]
    model = tiny_vit(**options)
    wrapped = compressed(model, make_recipe(metric=metric))
    size = (int(options.get("in_chans", 3)), *model.patch_embed.img_size)
    assert count_macs(model, size) == wrapped.macs()
    with wrapped.dense():
        assert count_macs(model, size, batch=3) == wrapped.dense_macs()
    assert wrapped.macs() < wrapped.dense_macs()
    assert match(model).macs(model, None) == wrapped.dense_macs()


def test_class_attention_costs_one_row() -> None:
    wrapped = compressed(tiny_vit(), make_recipe(metric="{kind: class_attention}"))
    plain = compressed(tiny_vit(), make_recipe(metric="{kind: token_norm}"))
    # 17 tokens at the first site and 13 at the second, 32 channels each
    assert wrapped.macs() - plain.macs() == (17 + 13) * 32
