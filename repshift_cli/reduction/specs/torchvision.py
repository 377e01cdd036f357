"""Specs of torchvision; its ResNet is in `families/resnet.py`."""

from __future__ import annotations

from repshift_cli.reduction.specs.spec import BlockSpec, Output, Spec

SPECS = (
    Spec(
        library="torchvision",
        tower="VisionTransformer",
        blocks="encoder.layers",
        block=BlockSpec(
            attention="self_attention", attention_update="self_attention", mlp_update="mlp", mlp_stream="ln_2"
        ),
        patches="conv_proj",
        heads="encoder.layers.encoder_layer_0.num_heads",
        size="image_size",
        requires=(("conv_proj.conv_last", None, "its patches are made by several convolutions"),),
        outputs={"VisionTransformer": Output(logits=True)},
    ),
)
