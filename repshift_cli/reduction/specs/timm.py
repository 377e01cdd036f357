"""Specs of timm's transformers, except `VisionTransformer`, which has a family of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from repshift_cli.reduction.specs.spec import BlockSpec, Output, PerToken, Pool, Spec

# `drop_path1` returns the update after layer scale, and the update itself in eval mode
_PRE_NORM = BlockSpec(attention="attn", attention_update="drop_path1", mlp_update="drop_path2", mlp_stream="norm2")
_HEADS = replace(_PRE_NORM, query="attn.q_norm", key="attn.k_norm", mask="attn_mask")
_RELATIVE = replace(_PRE_NORM, positions="attn.rel_pos")
_POOL = Pool("attn_pool", ("kv",))

_EVA = Spec(
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
)
_LANGUAGE = replace(
    _EVA,
    block={"EvaBlock": _HEADS, "DeepseekVitBlock": _HEADS},
    any_size=True,
    prefix=(),
    has_class="",
    pooling="tokens",
    pools=(),
)
_UNROTATED = replace(_EVA, has_class="", rotary="", follows=(), pools=())

SPECS = (
    _EVA,
    replace(
        _UNROTATED,
        tower="Beit",
        block={"Block": _PRE_NORM},
        prefix=(1,),
        follows=(
            PerToken("shared_rel_pos_bias", pairs=True, prefix=True),
            PerToken("attn._get_rel_pos_bias", pairs=True, prefix=True, source="method"),
        ),
        outputs={"Beit": Output()},
    ),
    replace(
        _UNROTATED,
        tower="VisionTransformerRelPos",
        block={"RelPosBlock": _RELATIVE, "ResPostRelPosBlock": replace(_RELATIVE, mlp_stream="mlp")},
        follows=(
            PerToken("shared_rel_pos", pairs=True, prefix=True),
            PerToken("attn.rel_pos.get_bias", pairs=True, prefix=True, source="method"),
        ),
        positions="shared_rel_pos",
        outputs={"VisionTransformerRelPos": Output()},
    ),
    replace(
        _UNROTATED,
        tower="Cait",
        # one `drop_path` returns both updates, the one of the MLP last
        block={
            "LayerScaleBlock": replace(
                _PRE_NORM, attention_update="", mlp_update="drop_path", maps=("attn.proj_l", "attn.proj_w")
            )
        },
        prefix=(),
        pools=(Pool("blocks_token_only", ("attn.k", "attn.v"), extra=1),),
        outputs={"Cait": Output()},
    ),
    replace(
        _EVA,
        tower="NaFlexVit",
        block={"Block": _HEADS, "EvaBlock": _HEADS},
        patches="embeds",
        patch="embeds.patch_size",
        size="embeds.default_img_size",
        any_size=True,
        has_class="has_class_token",
        pools=(replace(_POOL, prefix="pool_include_prefix"),),
        outputs={"NaFlexVit": Output()},
    ),
    replace(
        _LANGUAGE,
        tower="Qwen3VitEncoder",
        outputs={
            "Qwen3VitEncoder": Output(needs_all=True, repeated={"merger": "merge_size"}),
            "Qwen3VitClassifier": Output(needs_all=True, repeated={"encoder.merger": "merge_size"}),
        },
    ),
    replace(
        _LANGUAGE,
        tower="DeepseekVitEncoder",
        outputs={
            "DeepseekVitEncoder": Output(needs_all=True, repeated={"aligner": "downsample_ratio"}),
            "DeepseekVitClassifier": Output(needs_all=True, repeated={"encoder.aligner": "downsample_ratio"}),
        },
    ),
)

REFUSED: Mapping[str, str] = dict.fromkeys(
    ("Gemma4VitEncoder", "Gemma4VitClassifier"), "makes rotary positions for each image, which no spec describes"
)
"""Why modules of these classes are not supported."""
