"""Each option of each command with odd values."""

from __future__ import annotations

import glob
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import typer.main

from _hostile.attempt import Attempt
from _hostile.good import BUILTIN, SMALL, VIDEO, Good

_VALUES = (
    *("-1", "0", "1", "-0", "99999999999999999999", "2147483648", "1000000000", "1000000", "1e300", "1e-300", "0.5"),
    *("inf", "nan", "-inf", "", " ", "x", "é", "\udcff", "[/red]", "\x1b[31m", "a\nerror: x", "../../x", "/dev/zero"),
    *("/dev/null", "/dev/full", "/", ".", "0x10", "1_000", "\u0663", "1e3", "true", "x" * 5000, "a,b", "1,,2", "%s"),
    *("/proc/self/mem", "/root/x/y", "missing.x", "folder", "file.txt", "file.png", "none", "auto", "cuda", "cuda:99"),
)
_CHOSEN = {
    "--target": (
        *("macs=0", "macs=1.5", "macs=nan", "latency=", "agreement=1", "max-drop=-1", "macs=0.5=x", "x=1"),
        *("recall@0=1", "recall@10=2", "recall@=1"),
    ),
    "--budget": ("latency<=0", "macs<=nan", "speedup>=1e400", "latency_ms<=", "x<=1", "throughput<=1"),
    "--attention": ("flash", "sdpa:flash", "sdpa:cudnn", "sdpa:", "explicit"),
    "--dtype": ("float16", "bfloat16", "float64", "int8", "complex64"),
    "--device": ("cpu:0", "cpu:9", "meta", "mps", "cuda:-1", "cuda:x"),
    "--against": (
        *("tome", "bipartite,bipartite", "class-attention", "x", ","),
        *("smaller-input", "bfloat16", "smaller-model", "smaller-model=", "smaller-model=x", "int8=x"),
    ),
    "--recipe": ("deit_base_paper", "default", "vim_tiny_paper", "file.txt", "/dev/stdin"),
    "--model": ("vit_base_patch16_224", "resnet50", "hf-hub:x/y", "vim_tiny", "local-dir:x", "\ud800"),
    "--compile": ("off", "x"),
    "--kind": ("ratios", "kept", "x"),
    "--output": (
        "o.pth",
        "o.safetensors",
        ".safetensors",
        "o.onnx",
        "o.tar",
        "o",
        "o.pdf",
        "o.PNG",
        "o.yaml",
        "a/b.png",
    ),
    "--save-predictions": ("o.npz", "o.parquet", "o.txt", ".npz", "o"),
    "--save-embeddings": ("o.npy", "o.parquet", "o.txt", ".npy", "o"),
    "--index": ("missing.npy", "file.txt", "folder"),
    "--prompt": ("{}", "a {}.", "{0.__class__}"),
    "--class-names": ("missing.txt", "folder"),
    "--recall-at": ("1,10", "0", "1,", "1e3"),
    "--ratios": ("0.2,0.3", "0.99", "1", "0.2,", "nan"),
    "--macs": ("0.8,0.5", "0.01", "1", "0,1"),
    "--metrics": ("shift,fitted", "token-norm", "x", "fitted,x"),
    "--reducers": ("prune,merge", "vid_tldr", "bipartite", "x"),
    "--layers": ("0,2", "blocks.1", "9", "-1", "0,0"),
    "--seeds": ("0,1", "0,0", "-1", "2147483648"),
    "--plot": ("o.png", "o.pdf", "o.jpg", ".svg", "o"),
    "--export": ("onnx", "hub", "x"),
}
_SLOW = {"--export": ("onnx", "aoti", "pt2"), "--compile": ("default", "frozen", "max-autotune"), "--tune": ()}
"""Values that compile, which takes minutes."""

_LARGE = {"--batch-size", "-b", "--img-size", "--images", "--calibration-images", "--batch", "--frames", "--workers"}
_LONG = {"--seconds", "--min-runs", "--evaluations", "--recover"}
"""Options that ask for long work: the largest values that are allowed are not tried."""

_OUTPUTS = (
    "o*",
    ".safetensors",
    ".npz",
    ".svg",
    "a/*",
    "*_*.yaml",
    "*.csv",
    "missing.x",
    "x",
    "x/*",
    "*.json",
    "*.png",
    "*.html",
)


@lru_cache(maxsize=1)
def commands() -> dict[str, list[Any]]:
    """The options of each command."""
    from repshift_cli.cli.app import app

    group: Any = typer.main.get_command(app)
    found = {**group.commands, **{f"recipes {key}": each for key, each in group.commands["recipes"].commands.items()}}
    return {
        name: [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
        for name, command in found.items()
        if name not in ("recipes", "demo", "doctor", "advise")  # a group, and what has no options or takes too long
    }


def _base(name: str, rng: random.Random, good: Good) -> list[str]:
    """A valid command."""
    data = str(good.data)
    bases = {
        "compress": [
            ["compress", SMALL, "--seconds", "0", "--no-calibrate", "-o", "o.safetensors"],
            ["compress", BUILTIN, "--dry-run"],
        ],
        "search": [[*good.search(), "-o", "o.yaml"]],
        "sweep": [
            [*("sweep", SMALL, "--ratios", "0.3", "--metrics", "token_norm", "--images", "4"), "-o", "o"],
            [*("sweep", SMALL, "--macs", "0.7", "--data", data, "--metrics", "random", "--images", "4"), "-o", "o"],
        ],
        "export": [["export", str(good.artifact), "--to", "hub", "-o", "o"]],
        "bench": [["bench", str(good.artifact), "--seconds", "0", "--min-runs", "1", "-b", "1"]],
        "eval": [
            good.evaluate(BUILTIN),
            good.evaluate(str(good.artifact), "--compare-dense"),
            good.evaluate(str(good.artifact), BUILTIN, "--against", "random"),
            ["eval", VIDEO, "--limit", "2", "--dataset", "builtin:shapes"],
        ],
        "compare": [["compare", str(good.predictions), str(good.predictions)]],
        "inspect": [["inspect", BUILTIN], ["inspect", str(good.tiny), *good.heads]],
        "diff": [["diff", str(good.artifact), str(good.artifact)]],
        "dense": [["dense", str(good.artifact), "-o", "o.safetensors"]],
        "visualize": [["visualize", str(good.artifact), "--data", data, "--count", "1", "-o", "o.png"]],
        "report": [
            ["report", str(good.artifact), "-o", "o.html"],
            ["report", str(good.artifact), "--data", data, "--count", "1", "-o", "o.html"],
        ],
        "recipes list": [["recipes", "list"]],
        "recipes show": [["recipes", "show", "default"]],
        "recipes check": [["recipes", "check", str(good.recipe)]],
        "recipes import": [["recipes", "import", "r=13", "--blocks", "12", "--tokens", "196", "-o", "o.yaml"]],
    }
    return list(rng.choice(bases[name]))


_SHARES = {"eval": 6, "compress": 5, "bench": 3, "export": 2, "visualize": 2, "inspect": 2, "search": 1}


def options(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """One or two options of a command with odd values."""
    (folder / "folder").mkdir()
    (folder / "file.txt").write_text("mine")
    (folder / "file.png").write_text("mine")
    names = sorted(commands())
    name = rng.choices(names, [_SHARES.get(each, 1) for each in names])[0]
    command, large = _base(name, rng, good), False
    candidates = [each for each in commands()[name] if "--trust" not in each.opts]
    for option in rng.sample(candidates, k=min(len(candidates), rng.choice([1, 1, 1, 2]))):
        flag = max(option.opts, key=len)
        if option.is_flag:
            command.append(rng.choice([*option.opts, *option.secondary_opts]))
            continue
        if flag in _SLOW:
            value = rng.choice([each for each in (*_CHOSEN.get(flag, ()), *_VALUES) if each not in _SLOW[flag]])
        else:
            value = rng.choice(_CHOSEN[flag]) if flag in _CHOSEN and rng.random() < 0.6 else rng.choice(_VALUES)
        if flag in _LONG and value in ("1000000", "1000000000", "2147483648"):
            value = "99999999999999999999"
        large = large or bool(_LARGE.intersection(option.opts))
        command += [flag, value]
    named = tuple(glob.escape(part) for part in command)
    return Attempt([command], outputs=(*_OUTPUTS, *named), large=large)


def arguments(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """Odd models, files and commands."""
    (folder / "folder").mkdir()
    (folder / "file.txt").write_text("mine")
    value = rng.choice([*_VALUES, "builtin:x", "builtin:", "vit_base_patch16_224", "hf-hub:x/y", "http://x/y.pth"])
    made = [
        ["inspect", value],
        good.evaluate(value),
        good.evaluate(BUILTIN, data=value),
        ["compress", value, "--dry-run"],
        ["visualize", value, "-o", "o.png"],
        ["recipes", "show", value],
        ["recipes", "check", value],
        ["compare", value, str(good.predictions)],
        ["export", value, "--to", "hub", "-o", "o"],
        ["bench", value, "--seconds", "0"],
        ["search", value, "-t", "macs=0.7"],
        [value],
        [value, "--help"],
    ]
    return Attempt([rng.choice(made)], outputs=_OUTPUTS)


KINDS = {"options": (options, 16), "arguments": (arguments, 4)}
