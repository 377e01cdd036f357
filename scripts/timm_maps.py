"""Write the names of timm's networks of maps to `repshift_cli/assets/timm_maps.json`, by the names of their tensors.

    python scripts/timm_maps.py

Identification builds only the models whose tensors have the names of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm

from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.checkpoints.identify.cnn import names_digest
from repshift_cli.reduction.families.maps import MapNetwork

PATH = Path(__file__).resolve().parent.parent / "repshift_cli" / "assets" / "timm_maps.json"

MODULES = (
    *("byobnet", "convmixer", "edgenext", "efficientnet", "efficientvit_mit", "fasternet", "fastvit", "focalnet"),
    *("ghostnet", "hardcorenas", "hgnet", "iformer", "inception_next", "lcnetv2", "metaformer", "mobilenetv3", "nfnet"),
    *("repghost", "repvit", "res2net", "resnest", "resnetv2", "senet", "shvit", "sknet", "starnet", "swiftformer"),
    *("vovnet", "xception"),
)


def main() -> None:
    found: dict[str, list[str]] = {}
    for name in sorted((name for each in MODULES for name in timm.list_models(module=each)), key=lambda n: (len(n), n)):
        model = quickly_on_meta(name, {})
        if MapNetwork().accepts(model) or type(model).__name__ == "ResNet":
            found.setdefault(names_digest(model.state_dict()), []).append(name)
    PATH.write_text(json.dumps(dict(sorted(found.items())), separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{sum(map(len, found.values()))} models with {len(found)} different sets of names")


if __name__ == "__main__":
    main()
