"""Record the JSON keys of every command on the built-in models, or compare them with the recorded ones.

    python scripts/json_keys.py            # write tests/vectors/json_keys.json
    python scripts/json_keys.py --check    # exit with 1 where keys went missing or were added

Scripts of users rely on these keys. A list counts once (`plan[].site`), and values are not compared. Run
`scripts/write_schemas.py` next: it makes the schemas in docs/json/ from the recorded keys.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEYS = Path(__file__).resolve().parents[1] / "tests" / "vectors" / "json_keys.json"

QUICK = ("--seconds", "0.1", "-b", "2", "--threads", "1")
VIT = "builtin:vit-digits-small"
TINY = (
    *("--model-args", "num_classes=0", "--model-args", "embed_dim=48", "--model-args", "depth=4"),
    *("--img-size", "64"),
)
"""A model that is exported many times in seconds."""

COMMANDS = {
    "inspect": ("inspect", VIT),
    "inspect video": ("inspect", "builtin:umt-shapes"),
    "compress dry run": ("compress", VIT, "--dry-run"),
    "compress": ("compress", VIT, "-o", "vit.safetensors", "--calibration-images", "64", *QUICK),
    "compress cnn": ("compress", "builtin:cnn-digits", "-o", "cnn.safetensors", "--calibration-images", "32", *QUICK),
    "compress recover": (
        *("compress", VIT, "--recover", "8", "-o", "recovered.safetensors"),
        *("--calibration-images", "128", *QUICK),
    ),
    "inspect compressed": ("inspect", "vit.safetensors"),
    "inspect recovered": ("inspect", "recovered.safetensors"),
    "dense": ("dense", "vit.safetensors"),
    "diff": ("diff", "vit.safetensors", "vit_dense.safetensors"),
    "bench": ("bench", "vit.safetensors", "--against", "bipartite,class-attention", *QUICK),
    "bench data": ("bench", "vit.safetensors", "--data", "builtin:digits", "--images", "8", *QUICK),
    "bench ways": ("bench", "vit.safetensors", "--against", "smaller-input,bfloat16,compile", *QUICK),
    "bench limits": ("bench", "vit.safetensors", "--budget", "macs<=0.99", "--compile", "off", *QUICK),
    "eval": (
        "eval",
        "vit.safetensors",
        "--dataset",
        "builtin:digits",
        "--limit",
        "40",
        "--compare-dense",
        "--save-predictions",
        "p.npz",
    ),
    "eval several": (
        *("eval", "vit.safetensors", VIT, "--dataset", "builtin:digits", "--limit", "20"),
        *("--against", "random"),
    ),
    "eval dense": ("eval", VIT, "--limit", "20"),
    "compress encoder": (
        *("compress", "vit_tiny_patch16_224", *TINY, "-o", "encoder.safetensors", "--no-calibrate", *QUICK),
    ),
    "eval embeddings": ("eval", "encoder.safetensors", "--embeddings", "builtin:digits", "--limit", "24"),
    "eval retrieval": ("eval", "builtin:umt-shapes", "--limit", "8", "--threads", "1"),
    "eval answers": ("eval", "builtin:umt-shapes-qa", "--limit", "8", "--threads", "1"),
    "compare": ("compare", "p_dense.npz", "p.npz"),
    "advise": ("advise", "encoder.safetensors", "--data", "builtin:digits", "--images", "8", *QUICK),
    "search": (
        *("search", VIT, "--target", "macs=0.6", "--images", "32", "--evaluations", "6"),
        *("-o", "found.yaml", "--save", "found.safetensors", "--state", "state.json", *QUICK),
    ),
    "sweep": (
        *("sweep", VIT, "--ratios", "0.3", "--metrics", "token_norm,random", "--images", "16"),
        *("--reducers", "prune,vid_tldr", "-b", "2", "--threads", "1", "-o", "swept"),
    ),
    "compress to a target": (
        *("compress", VIT, "--target", "macs=0.6", "-o", "target.safetensors", "--calibration-images"),
        *("32", "--data", "builtin:digits", *QUICK),
    ),
    "export onnx": ("export", "vit.safetensors", "--to", "onnx"),
    "export int8": ("export", "vit.safetensors", "--to", "onnx", "--quantize", "int8", "--calibration-images", "16"),
    "export hub": ("export", "vit.safetensors", "--to", "hub"),
    "inspect exported": ("inspect", "vit.onnx"),
    "eval exported": ("eval", "vit.onnx", "--dataset", "builtin:digits", "--limit", "20"),
    "bench exported": ("bench", "vit.onnx", *QUICK),
    "visualize": ("visualize", "vit.safetensors", "--count", "2"),
    "report": ("report", "vit.safetensors", "--count", "2"),
    "demo": ("demo", "-o", "demo"),
    "recipes list": ("recipes", "list"),
    "recipes show": ("recipes", "show", "deit_small_paper"),
    "doctor": ("doctor",),
}
"""Commands in the order in which they run; later ones read files of earlier ones."""


def key_paths(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys in a JSON document."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path}.{key}".lstrip(".")
            yield from key_paths(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from key_paths(inner, f"{path}[]")


def collect(folder: Path) -> dict[str, list[str]]:
    """Run every command in `folder` and return the key paths of its document."""
    keys = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, arguments in COMMANDS.items():
        command = [sys.executable, "-m", "repshift_cli", *arguments, "--json"]
        begin = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
        keys[name] = sorted(set(key_paths(json.loads(done.stdout))))
        print(f"{name}: {len(keys[name])} keys, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return keys


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = collect(Path(folder))
    if "--check" not in sys.argv:
        KEYS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    recorded = json.loads(KEYS.read_text(encoding="utf-8"))
    differences = 0
    for name in recorded:
        for key in sorted(set(recorded[name]) ^ set(found[name])):
            print(f"{name}: {key} is {'missing' if key in recorded[name] else 'new'}")
            differences += 1
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
