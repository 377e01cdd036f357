"""Write width and names of tensors of timm's transformers to `repshift_cli/assets/timm_widths.json`, by model.

    python scripts/timm_widths.py

Identification builds only the models of the width of the weights or with the same names, and those that the file does
not list, such as models of newer versions of timm.
"""

from __future__ import annotations

import json
from pathlib import Path

from repshift_cli.checkpoints.identify import timm_transformer, vit
from repshift_cli.checkpoints.identify.cnn import names_digest

PATH = Path(__file__).resolve().parent.parent / "repshift_cli" / "assets" / "timm_widths.json"


def main() -> None:
    modules = dict.fromkeys((*vit.MODULES, *vit.HYBRIDS, *timm_transformer.MODULES))
    lines = []
    for model in sorted(vit.registered(tuple(modules)), key=lambda model: model.name):
        if weight := model.block.get("blocks.0.norm1.weight"):
            digest = names_digest([*model.block, *model.others])
            lines.append(f"{json.dumps(model.name)}: {json.dumps([weight[0], digest])}")
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{len(lines)} models")


if __name__ == "__main__":
    main()
