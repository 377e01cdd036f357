"""Specs of timm's transformers, except `VisionTransformer`, which has a family of its own."""

from __future__ import annotations

from dataclasses import replace

from repshift_cli.reduction.specs.spec import BlockSpec, Output, PerToken, Pool, Spec

# `drop_path1` returns the update after layer scale, and the update itself in eval mode
_PRE_NORM = BlockSpec(attention="attn", attention_update="drop_path1", mlp_update="drop_path2", mlp_stream="norm2")
_HEADS = replace(_PRE_NORM, query="attn.q_norm", key="attn.k_norm", mask="attn_mask")
_RELATIVE = replace(_PRE_NORM, positions="attn.rel_pos")
_POOL = Pool("attn_pool", ("kv",))

SPECS = (
    Spec(
        library="timm",
        tower="Eva",
        blocks="blocks",
        block={"EvaBlock": _HEADS, "EvaBlockPostNorm": replace(_HEADS, mlp_stream="mlp")},
        patches="patch_embed",
        heads="blocks.0.attn.num_heads",
        size="patch_embed.img_size",
        prefix=("num_prefix_tokens",),
        has_class="cls_token",
        rotary="rope",
        follows=(PerToken("rope"),),
        pooling="global_pool",
        pools=(_POOL,),
        outputs={"Eva": Output()},
    ),
    Spec(
        library="timm",
        tower="Beit",
        blocks="blocks",
        block={"Block": _PRE_NORM},
        patches="patch_embed",
        heads="blocks.0.attn.num_heads",
        size="patch_embed.img_size",
        follows=(
            PerToken("shared_rel_pos_bias", pairs=True, prefix=True),
            PerToken("attn._get_rel_pos_bias", pairs=True, prefix=True, source="method"),
        ),
        pooling="global_pool",
        outputs={"Beit": Output()},
    ),
    Spec(
        library="timm",
        tower="VisionTransformerRelPos",
        blocks="blocks",
        block={
            "RelPosBlock": _RELATIVE,
            "ResPostRelPosBlock": replace(_RELATIVE, mlp_stream="mlp"),
        },
        patches="patch_embed",
        heads="blocks.0.attn.num_heads",
        size="patch_embed.img_size",
        prefix=("num_prefix_tokens",),
        follows=(
            PerToken("shared_rel_pos", pairs=True, prefix=True),
            PerToken("attn.rel_pos.get_bias", pairs=True, prefix=True, source="method"),
        ),
        pooling="global_pool",
        positions="shared_rel_pos",
        outputs={"VisionTransformerRelPos": Output()},
    ),
    Spec(
        library="timm",
        tower="Cait",
        blocks="blocks",
        # one `drop_path` returns both updates, the one of the MLP last
        block={
            "LayerScaleBlock": replace(
                _PRE_NORM, attention_update="", mlp_update="drop_path", maps=("attn.proj_l", "attn.proj_w")
            )
        },
        patches="patch_embed",
        heads="blocks.0.attn.num_heads",
        size="patch_embed.img_size",
        prefix=(),
        pooling="global_pool",
        pools=(Pool("blocks_token_only", ("attn.k", "attn.v"), extra=1),),
        outputs={"Cait": Output()},
    ),
    Spec(
        library="timm",
        tower="NaFlexVit",
        blocks="blocks",
        block={"Block": _HEADS, "EvaBlock": _HEADS},
        patches="embeds",
        patch="embeds.patch_size",
        heads="blocks.0.attn.num_heads",
        size="embeds.default_img_size",
        any_size=True,
        prefix=("num_prefix_tokens",),
        has_class="has_class_token",
        rotary="rope",
        follows=(PerToken("rope"),),
        pooling="global_pool",
        pools=(replace(_POOL, prefix="pool_include_prefix"),),
        outputs={"NaFlexVit": Output()},
    ),
)
