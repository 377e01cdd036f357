"""Write the tensors of a built-in model to `repshift_cli/assets`, with what builds the model.

Matrices are stored in float16, for a smaller wheel; `load_checkpoint` widens them to float32. Vectors (biases, norms,
statistics) stay in float32. The rounded weights are the weights of the built-in models: all results are of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.checkpoints.weights import METADATA_KEY

ASSETS = Path(__file__).resolve().parents[1] / "repshift_cli" / "assets"


def store(path: Path, tensors: Mapping[str, Tensor], description: ModelDescription | None = None) -> None:
    """Write a file of tensors; the description is left out where another file of the model has it."""
    stored = {key: _rounded(value.detach()).clone().contiguous() for key, value in tensors.items()}
    document = {METADATA_KEY: json.dumps({"model": description.to_dict()})} if description else {}
    save_file(stored, path, metadata={"format": "pt", **document})
    path.chmod(0o644)  # the library writes files that only the owner can read
    print(f"{path}: {path.stat().st_size} bytes")


def _rounded(value: Tensor) -> Tensor:
    return value.half() if value.dtype == torch.float32 and value.ndim > 1 else value
