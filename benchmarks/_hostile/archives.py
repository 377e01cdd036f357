"""Archives with one thing changed: bytes, members, headers, and code in place of data."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzzing import changed_bytes
from safetensors.torch import save

from _hostile.attempt import Attempt, all_counted, canary, refused
from _hostile.good import BUILTIN, IMAGES, Good

_TAR_BLOCK = 512


def write_zip(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive as torch does, with the contents at multiples of 64 bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def read_zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def damaged_zip(rng: random.Random, path: Path, source: Path) -> bool:
    """Write the archive with one thing changed; returns whether it must be refused: a content without its CRC."""
    members = read_zip(source)
    name = max(members, key=lambda each: len(members[each])) if rng.random() < 0.5 else rng.choice(sorted(members))
    choice = rng.randrange(8)
    if choice == 0 and members[name]:  # the content, but not its CRC
        whole = bytearray(source.read_bytes())
        place = whole.find(members[name][:64]) + rng.randrange(len(members[name]))
        whole[place] ^= 1 << rng.randrange(8)
        path.write_bytes(whole)
        return True
    if choice == 1:
        path.write_bytes(changed_bytes(rng, source.read_bytes()))
    elif choice == 2:
        write_zip(path, {key: value for key, value in members.items() if key != name})
    elif choice == 3:
        members[name] = members[name][: rng.randrange(len(members[name]) + 1)]
        write_zip(path, members)
    elif choice == 4:
        members[rng.choice(["../x", "/x", "x\0", "a" * 60_000, f"{name}/x", "\x1b[31m"])] = members.pop(name)
        write_zip(path, members)
    elif choice == 5:
        write_zip(path, members, zipfile.ZIP_DEFLATED)
    elif choice == 6:
        members[name] = changed_bytes(rng, members[name])
        write_zip(path, members)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for key, value in (*members.items(), (name, b"other")):
                archive.writestr(key, value)
    return False


def torch_archives(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A `.pth` file."""
    must = damaged_zip(rng, folder / "m.pth", good.pth)
    command = rng.choice([["inspect", "m.pth", *good.heads], good.evaluate("m.pth", *good.heads)])
    return Attempt([command], codes=frozenset({0, 2, 3, 4, 5}), check=refused if must else None)


def program_archives(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A `.pt2` file."""
    from _hostile.documents import trusting

    must = damaged_zip(rng, folder / "m.pt2", good.pt2)
    command = trusting(rng, good.evaluate("m.pt2"))
    return Attempt([command], codes=frozenset({0, 2, 3, 4}), check=refused if must else None)


def prediction_archives(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A `.npz` file."""
    must = damaged_zip(rng, folder / "p.npz", good.predictions)
    command = ["compare", "p.npz", str(good.predictions)]
    return Attempt([command], codes=frozenset({0, 2, 4}), check=refused if must else None)


def safetensors_headers(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """The header of a `.safetensors` file."""
    whole = save(good.tiny_tensors, good.metadata)
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = whole[8 : 8 + length], whole[8 + length :]
    if rng.random() < 0.6:
        document = json.loads(header)
        key = rng.choice(sorted(document.keys() - {"__metadata__"}))
        entry = document[key]
        change = rng.choice(["dtype", "shape", "offsets", "name", "metadata"])
        if change == "dtype":
            entry["dtype"] = rng.choice(["F64", "F16", "BF16", "F8_E4M3", "I8", "BOOL", "C64", "X", 3, "F4"])
        elif change == "shape":
            entry["shape"] = rng.choice([[], [0], [*entry["shape"], 1], entry["shape"][::-1], [-1], [2**62, 4], "x"])
        elif change == "offsets":
            entry["data_offsets"] = rng.choice([[0, 0], [0, 4], [len(data), 2 * len(data)], [8, 4], [-4, 4], [0]])
        elif change == "name":
            document[rng.choice(["", "\ud800", "a\nb", "\x1b[31m", "x" * 10_000, f"{key}.x"])] = document.pop(key)
        else:
            document["__metadata__"] = rng.choice([{}, {"format": "tf"}, {good.key: ""}, {good.key: "[" * 9000}])
        header = json.dumps(document).encode()
        header += b" " * (-len(header) % 8)
    else:
        header = changed_bytes(rng, header)
    size = len(header) if rng.random() < 0.9 else rng.choice([0, 2**31, 2**63, len(header) + 8])
    (folder / "m.safetensors").write_bytes(struct.pack("<Q", size) + header + data)
    command = rng.choice([["inspect", "m.safetensors"], good.evaluate("m.safetensors")])
    return Attempt([command], codes=frozenset({0, 2, 3, 4}))


def tars(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A tar of images: a zeroed header, a hole, a cut, two of them, the same name twice."""
    content = bytearray(good.tar.read_bytes())
    with tarfile.open(good.tar) as archive:
        members = archive.getmembers()
    member, images = rng.choice(members), IMAGES
    choice = rng.randrange(8)
    if choice == 0:
        content[member.offset : member.offset + _TAR_BLOCK] = bytes(_TAR_BLOCK)
    elif choice == 1:
        first = rng.randrange(len(content) // _TAR_BLOCK) * _TAR_BLOCK
        content[first : first + rng.choice([1, 2, 9, 99]) * _TAR_BLOCK] = bytes(rng.choice([1, 2, 9, 99]) * _TAR_BLOCK)
    elif choice == 2:
        del content[rng.randrange(len(content)) :]
    elif choice == 3:
        del content[member.offset :]
    elif choice == 4:
        content = content * 2
        images = 2 * IMAGES
    elif choice == 5:
        content = bytearray(changed_bytes(rng, bytes(content)))
    elif choice == 6:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as made:
            for each in members:
                data = good.tar.read_bytes()[each.offset_data : each.offset_data + each.size]
                _odd_member(rng, each, made, changed=each is member)
                made.addfile(each, io.BytesIO(data))
        content = bytearray(stream.getvalue())
    else:
        return _labelled_tar(rng, good, folder)
    (folder / "d.tar").write_bytes(content)
    command = good.evaluate(BUILTIN, data="d.tar")
    if rng.random() < 0.3:
        command += ["--save-predictions", "p.npz"]
    counted = all_counted(images) if choice in (0, 1, 2, 3, 4) else None
    return Attempt([command], codes=frozenset({0, 2, 4}), outputs=("p.npz",), check=counted)


def _odd_member(rng: random.Random, member: tarfile.TarInfo, made: tarfile.TarFile, *, changed: bool) -> None:
    if not changed:
        return
    kind = rng.randrange(5)
    if kind == 0:
        made.addfile(member, io.BytesIO(bytes(member.size)))
    elif kind == 1:
        member.name = rng.choice(["../x.png", "/etc/x.png", "a\nb/c.png", "[/red]/x.png", "\udcff/x.png", "x" * 3000])
    elif kind == 2:
        member.type, member.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "/dev/zero"
    elif kind == 3:
        member.type = rng.choice([tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
    else:
        member.pax_headers = {rng.choice(["size", "path", "GNU.sparse.major"]): rng.choice(["1", "x", "-5", "9" * 30])}


def _labelled_tar(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A WebDataset with an odd label or key."""
    with tarfile.open(folder / "w.tar", "w") as made:
        odd = rng.randrange(IMAGES)
        for index, path in enumerate(good.images):
            label = str(good.labels[path]) if index != odd else rng.choice(
                ["1" + "0" * 30, "-1", "", "x", "1.5", "nan", "9" * 5000, "10", "\u0663", "1\n2"]
            )  # fmt: skip
            key = f"{index:05d}" if index != odd or rng.random() < 0.7 else rng.choice(["00000", "a/00000", "\n"])
            for name, data in ((f"{key}.png", path.read_bytes()), (f"{key}.cls", label.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                made.addfile(info, io.BytesIO(data))
    return Attempt([good.evaluate(BUILTIN, data="w.tar")], codes=frozenset({0, 2, 4}), check=all_counted(IMAGES))


class _Code:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def code(rng: random.Random, good: Good, folder: Path) -> Attempt:
    """A file that has code in place of data; it must not run."""
    payload = _Code(canary(folder))
    command = [["inspect", "m"], good.evaluate("m"), ["compress", "m", "--dry-run"], ["bench", "m", "--seconds", "0"]]
    choice = rng.randrange(7)
    if choice == 0:
        value = rng.choice([{**good.tensors, "x": payload}, {"state_dict": good.tensors, "args": payload}, payload])
        torch.save(value, folder / "m.pth", _use_new_zipfile_serialization=rng.random() < 0.7)
        name = "m.pth"
    elif choice == 1:
        with np.load(good.predictions) as found:
            arrays: dict[str, Any] = dict(found)
        arrays[rng.choice(sorted(arrays))] = np.array([payload], dtype=object)
        np.savez(folder / "p.npz", **arrays)
        return Attempt([["compare", "p.npz", str(good.predictions)]], codes=frozenset({2, 4}))
    elif choice == 2:
        tag = f"!!python/object/apply:os.mkdir ['{canary(folder)}']"
        (folder / "r.yaml").write_text(good.recipe.read_text() + f"description: {tag}\n")
        return Attempt([["recipes", "check", "r.yaml"]], codes=frozenset({2}))
    elif choice == 3:
        name = _code_in_program(rng, good, folder, payload)
    elif choice == 4:
        (folder / "hub").mkdir()
        torch.save({"x": payload}, folder / "hub" / "pytorch_model.bin")
        config = {"architecture": "vit_tiny_patch16_224", "custom_load": True, "auto_map": {"AutoModel": "x.Model"}}
        (folder / "hub" / "config.json").write_text(json.dumps(config))
        name = "hub"
    elif choice == 5:
        (folder / "m.pt2").write_bytes(pickle.dumps(payload))
        name = "m.pt2"
    else:
        (folder / "m.ckpt").write_bytes(pickle.dumps({"state_dict": payload}, protocol=rng.randrange(6)))
        name = "m.ckpt"
    chosen = [name if part == "m" else part for part in rng.choice(command)]
    return Attempt([chosen], codes=frozenset({2, 3, 4}))


def _code_in_program(rng: random.Random, good: Good, folder: Path, payload: _Code) -> str:
    members = dict(good.members)
    root = next(iter(members)).partition("/")[0]
    stream = io.BytesIO()
    torch.save(payload, stream)
    choice = rng.randrange(3)
    if choice == 0:
        weights = [name for name in members if "/weights/" in name and not name.endswith(".json")]
        members[rng.choice(weights)] = stream.getvalue()
        config = next((name for name in members if name.endswith("weights_config.json")), None)
        if config:
            members[config] = members[config].replace(b'"use_pickle": false', b'"use_pickle": true')
    elif choice == 1:
        members[f"{root}/data/sample_inputs/model.pt"] = stream.getvalue()
    else:
        model = next(name for name in members if name.endswith("models/model.json"))
        expression = f"__import__('os').mkdir('{canary(folder)}')".encode()
        members[model] = members[model].replace(b'"expr_str": "', b'"expr_str": "' + expression + b" or ")
    write_zip(folder / "m.pt2", members)
    return "m.pt2"


KINDS = {
    "archives of torch": (torch_archives, 5),
    "archives of programs": (program_archives, 5),
    "archives of predictions": (prediction_archives, 3),
    "headers of safetensors": (safetensors_headers, 4),
    "tars": (tars, 6),
    "code in files": (code, 5),
}
