"""timm's ResNet, ConvNeXt and RegNet, torchvision's ResNet, and those of transformers; see `maps`."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models.convnext import ConvNeXt
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from torchvision.models import resnet as torchvision_resnet

from repshift_cli.reduction.families.maps import MapFamily
from repshift_cli.reduction.specs.maps import map_blocks


class ResidualCNN(MapFamily):
    """ResNet, ConvNeXt and RegNet."""

    name: ClassVar[str] = "resnet"
    covers: ClassVar[str] = (
        "timm's ResNet, ResNeXt, Res2Net, ResNeSt, ConvNeXt and RegNet, torchvision's ResNet, "
        "and ResNet and ConvNeXt of transformers"
    )
    format_version: ClassVar[int] = 2

    def blocks(self, model: Any) -> str | None:
        if isinstance(model, ResNet | torchvision_resnet.ResNet):
            return "layer*.*"
        if isinstance(model, ConvNeXt):
            return "stages.*.blocks.*"
        return "s1.* s2.* s3.* s4.*" if isinstance(model, RegNet) else map_blocks(model)
