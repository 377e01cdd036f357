"""Odd files in the place of inputs and outputs: FIFOs, devices, links, without permission, huge, of odd names."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from _hostile.attempt import Attempt, all_counted, same_number
from _hostile.good import BUILTIN, IMAGES, SMALL, VIDEO, Good

_CAPABILITIES = 0x20080522
"""Version of the structures of capset(2)."""


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is limited to 107 bytes
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(50 << 30)


def _linked_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


ODD: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "link to a fifo": _linked_fifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "random": lambda path: path.symlink_to("/dev/urandom"),
    "null": lambda path: path.symlink_to("/dev/null"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "folder": Path.mkdir,
    "empty": Path.touch,
    "dangling": lambda path: path.symlink_to("missing"),
    "loop": lambda path: path.symlink_to(path.name),
    "socket": _socket,
    "sparse": _sparse,
    "text": lambda path: path.write_text("text\x1b[31m\n"),
    "zeros of 1 MB": lambda path: path.write_bytes(bytes(1 << 20)),
    "brackets": lambda path: path.write_text("[" * 200_000),
    "lines": lambda path: path.write_bytes(b"- a\n" * 3_000_000),
}


def inputs(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """An odd file where an input is expected."""
    kind = rng.choice(sorted(ODD))
    name, command, outputs = rng.choice(_roles(good))
    if name.startswith("data/"):
        target = rng.choice(sorted(good.copy_data(folder).rglob("*.png")))
        target.unlink()
    else:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
    ODD[kind](target)
    counted = name.startswith("data/") and command[0] == "eval" and kind != "folder"  # no image, whatever its name
    check = all_counted(IMAGES) if counted else None
    finished = ("state",) if kind == "folder" else ()  # a finished run deletes its folder
    return Attempt([command], codes=frozenset({0, 1, 2, 3, 4, 5}), outputs=outputs, replaced=finished, check=check)


def _roles(good: Good) -> list[tuple[str, list[str], tuple[str, ...]]]:
    """Path of an odd input, the command that reads it, and what that writes."""
    video = ["eval", VIDEO, "--json", "--limit", "2"]
    captions = [*video, "--annotations", "a.json", "--videos", "videos"]
    weights = [
        (f"m{suffix}", command, ())
        for suffix in (".safetensors", ".pth", ".pt2", ".onnx", "")
        for command in (["inspect", f"m{suffix}"], good.evaluate(f"m{suffix}"))
    ]
    return [
        *weights,
        *[("data/x", good.evaluate(BUILTIN, data="data"), ())] * 4,
        ("data/x", ["visualize", str(good.artifact), "--data", "data", "--count", "30", "-o", "k.png"], ("k.png",)),
        ("d.tar", good.evaluate(BUILTIN, data="d.tar"), ()),
        ("d", good.evaluate(BUILTIN, data="d"), ()),
        ("d/air/x.png", good.evaluate(BUILTIN, data="d"), ()),
        ("d/synset_labels.txt", good.evaluate(BUILTIN, data="d"), ()),
        ("r.yaml", ["recipes", "check", "r.yaml"], ()),
        ("r.yaml", ["compress", SMALL, "-r", "r.yaml", "--dry-run"], ()),
        ("p.npz", ["compare", "p.npz", str(good.predictions)], ()),
        ("p.parquet", ["compare", "p.parquet", str(good.predictions)], ()),
        ("a.json", captions, ()),
        ("vocab.txt", [*video, "--dataset", "builtin:shapes", "--vocab", "vocab.txt"], ()),
        ("answers.json", ["eval", f"{VIDEO}-qa", "--limit", "2", "--answers", "answers.json"], ()),
        ("s.json", [*good.search(), "--state", "s.json", "-o", "r.yaml"], ("r.yaml",)),
        ("state", good.evaluate(BUILTIN, "--resume", "state"), ("state", "state/*")),
        ("state/run.json", good.evaluate(BUILTIN, "--resume", "state"), ("state", "state/*")),
        ("hub/config.json", ["inspect", "hub"], ()),
        ("hub/model.safetensors", ["inspect", "hub"], ()),
    ]


def outputs(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """An odd file where an output is to be written; it stays, unless `--force` is given and it is a regular file."""
    data, model = str(good.data), str(good.artifact)
    name, command = rng.choice(
        [
            ("o.safetensors", ["compress", SMALL, "--seconds", "0", "--no-calibrate", "-o", "o.safetensors"]),
            ("o.png", ["visualize", model, "--data", data, "--count", "1", "-o", "o.png"]),
            ("i.json", ["visualize", model, "--data", data, "--count", "1", "-o", "k.png", "--indices", "i.json"]),
            ("o", ["export", model, "--to", "hub", "-o", "o"]),
            ("p.npz", good.evaluate(BUILTIN, "--save-predictions", "p.npz")),
            ("c.csv", ["bench", model, "--seconds", "0", "--min-runs", "1", "-b", "1", "--csv", "c.csv"]),
            ("o.yaml", [*good.search(), "-o", "o.yaml"]),
        ]
    )
    kind = rng.choice(sorted(ODD))
    ODD[kind](folder / name)
    force = rng.random() < 0.4
    if force:
        command = [*command, "--force"]
    replaced = kind not in ("fifo", "folder", "socket", "link to a fifo", "zeros", "random", "null", "terminal")
    written = (name, f"{name}/*") if force and (replaced or (name == "o" and kind == "folder")) else ()
    return Attempt([command], outputs=(name, f"{name}/*", "k.png"), replaced=written)


def permissions(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """Files and folders that another user may not read or enter."""
    shutil.copytree(good.hub, folder / "hub")
    data = good.copy_data(folder)
    (folder / "state").mkdir()
    (folder / "videos").mkdir()
    (folder / "a.json").write_text('[{"video": "v.mp4", "caption": "x"}]')
    (folder / "w").mkdir()
    shutil.copy(good.recipe, folder / "r.yaml")
    shutil.copy(good.predictions, folder / "p.npz")
    barred, command = rng.choice(
        [
            (data, good.evaluate(BUILTIN, data="data")),
            (data / "air", good.evaluate(BUILTIN, data="data")),
            (rng.choice(sorted(data.rglob("*.png"))), good.evaluate(BUILTIN, data="data")),
            (data, ["visualize", str(good.artifact), "--data", "data", "-o", "w/k.png"]),
            (data, ["compress", BUILTIN, "--calibration", "data", "--seconds", "0", "-o", "w/o.safetensors"]),
            (folder / "hub", ["inspect", "hub"]),
            (folder / "hub" / "config.json", good.evaluate("hub")),
            (folder / "hub", ["export", str(good.artifact), "--to", "hub", "-o", "hub", "--force"]),
            (folder / "w", ["export", str(good.artifact), "--to", "hub", "-o", "w/x/hub"]),
            (folder / "w", good.evaluate(BUILTIN, "--save-predictions", "w/x/p.npz")),
            (folder / "w", ["recipes", "check", "w/r.yaml"]),
            (folder / "w", good.evaluate("w/m.pth")),
            (folder / "w", ["inspect", "w/x"]),
            (folder / "r.yaml", ["recipes", "check", "r.yaml"]),
            (folder / "p.npz", ["compare", "p.npz", "p.npz"]),
            (folder / "state", good.evaluate(BUILTIN, "--resume", "state")),
            (folder / "w", good.evaluate(BUILTIN, "--resume", "w/state")),
            (folder / "videos", ["eval", VIDEO, "--annotations", "a.json", "--videos", "videos", "--limit", "1"]),
        ]
    )
    folder.chmod(0o755)
    barred.chmod(rng.choice([0o000, 0o000, 0o400, 0o100]))

    inside = _drop_capabilities if os.getuid() == 0 else None
    counted = all_counted(IMAGES) if barred.suffix == ".png" else None
    return Attempt([command], inside=inside, outputs=("w/*", "state/*", "state"), check=counted)


def _drop_capabilities() -> None:
    """Let permissions hold for root, too."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


_NAMES = (
    "[red]x",
    "[bold]x",
    "\x1b[31mx",
    "a\nerror: x",
    "\udcff",
    " ",
    "-x",
    "é",
    "%s",
    "\u202e",
    "x" * 180,
    "~",
    "$HOME",
)


def names(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """Inputs and outputs of odd names."""
    odd = rng.choice(_NAMES)

    def named(source: Path, suffix: str) -> str:
        name = f"{odd}{suffix}"
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        return f"./{name}"

    choice, same = rng.randrange(11), None
    if choice == 0:
        command = good.evaluate(named(good.artifact, ".safetensors"))
        same = same_number(good.numbers[str(good.artifact)])
    elif choice == 1:
        command = good.evaluate(BUILTIN, data=named(good.data, ""))
        same = same_number(good.numbers[BUILTIN])
    elif choice == 2:
        command = ["compare", named(good.predictions, ".npz"), str(good.predictions)]
    elif choice == 3:
        command = ["export", named(good.artifact, ".safetensors"), "--to", rng.choice(["hub", "hub", "pt2"])]
    elif choice == 4:
        command = ["visualize", named(good.artifact, ".safetensors"), "--data", str(good.data), "-o", f"./{odd}.png"]
    elif choice == 5:
        command = ["compress", named(good.tiny, ".safetensors"), *good.heads, "--seconds", "0", "--no-calibrate"]
    elif choice == 6:
        command = ["compress", SMALL, "-r", named(good.recipe, ".yaml"), "--dry-run"]
    elif choice == 7:
        command = [
            "compress",
            SMALL,
            "--calibration",
            named(good.data, ""),
            "--seconds",
            "0",
            "-o",
            f"./{odd}.safetensors",
        ]
    elif choice == 8:
        command = [*good.search(), "--data", named(good.data, ""), "-o", f"./{odd}.yaml"]
    elif choice == 9:
        command = ["inspect", named(good.hub, ""), *rng.choice([[], ["--json"]])]
    else:
        command = good.evaluate(BUILTIN, "--resume", f"./{odd}", "--save-predictions", f"./{odd}.npz")
    return Attempt(
        [command],
        outputs=("*.png", "*.safetensors", "*.yaml", "*_hub", "*_hub/*", "*.pt2", "*.npz", "*.json"),
        check=same,
    )


KINDS = {"odd inputs": (inputs, 10), "odd outputs": (outputs, 5), "permissions": (permissions, 4), "names": (names, 6)}
