"""Write the width of timm's transformers to `repshift_cli/assets/timm_widths.json`, by name.

    python scripts/timm_widths.py

Identification builds only the models of the width of the weights, and those that the file does not list, such as models
of newer versions of timm.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm

from repshift_cli.checkpoints.create import quickly_on_meta
from repshift_cli.checkpoints.identify import timm_transformer, vit

PATH = Path(__file__).resolve().parent.parent / "repshift_cli" / "assets" / "timm_widths.json"


def main() -> None:
    modules = dict.fromkeys((*vit.MODULES, *vit.HYBRIDS, *timm_transformer.MODULES))
    names = sorted(name for module in modules for name in timm.list_models(module=module))
    widths = {name: width for name in names if (width := width_of(name))}
    PATH.write_text(json.dumps(widths, indent=0) + "\n", encoding="utf-8")
    print(f"{len(widths)} of {len(names)} models")


def width_of(name: str) -> int | None:
    """Length of the first norm of the first block."""
    weight = quickly_on_meta(name, {}).state_dict().get("blocks.0.norm1.weight")
    return None if weight is None else len(weight)


if __name__ == "__main__":
    main()
