"""Specs of the open_clip library; timm's models in it are in `families/open_clip_timm.py`."""

from __future__ import annotations

from repshift_cli.reduction.specs.spec import BlockSpec, Output, Spec

SPECS = (
    Spec(
        library="open_clip",
        tower="VisionTransformer",
        blocks="transformer.resblocks",
        block=BlockSpec(attention="attn", attention_update="ls_1", mlp_update="ls_2", mlp_stream="ln_2"),
        patches="conv1",
        heads="transformer.resblocks.0.attn.num_heads",
        size="image_size",
        batch_first="transformer.batch_first",
        probe="attn_pool.attn",
        queries="attn_pool.query",
        projections=("proj",),
        requires=(("pool_type", frozenset({"tok", "avg"}), "it returns all tokens, or pools them twice"),),
        outputs={
            "VisionTransformer": Output(),
            "CLIP": Output(call="encode_image", unused=("transformer", "text_projection")),
            "CustomTextCLIP": Output(call="encode_image", unused=("text",)),
            "CoCa": Output(call="encode_image", arguments={"normalize": False}, unused=("text", "text_decoder")),
        },
    ),
)
