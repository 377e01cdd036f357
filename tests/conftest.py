"""Every test runs on one thread, and finds neither a network nor weights that happen to lie on the machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before timm or huggingface_hub are imported, by this process or by one that it starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = str(Path(tempfile.gettempdir()) / "repshift-tests-have-no-hub")
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repshift", deadline=None, max_examples=60)
settings.load_profile("repshift")
