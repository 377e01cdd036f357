"""`repshift doctor`: what is installed, what the machine can run, and what to install."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import Any

import pytest
from outcome import Command
from paths import ROOT

from repshift_cli.cli import doctor
from repshift_cli.measure import environment

METADATA = """Metadata-Version: 2.1
Name: repshift-cli
Version: 0.1.0
"""


def read_from(monkeypatch: pytest.MonkeyPatch, **installed: str | None) -> None:
    """Use the extras of pyproject.toml, in place of those of the installed package, and these versions."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = list(project["dependencies"])
    lines = [METADATA]
    for extra, packages in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}\n")
        listed += [f"{package}; extra == '{extra}'" for package in packages]
    import email

    found, versions = email.message_from_string("".join(lines)), metadata.version

    def version(name: str) -> str:
        if installed.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return installed.get(name) or versions(name)

    monkeypatch.setattr(metadata, "metadata", lambda name: found)
    monkeypatch.setattr(metadata, "requires", lambda name: listed)
    monkeypatch.setattr(metadata, "version", version)


def test_extras_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    read_from(monkeypatch, onnxruntime=None, onnx="1.0")
    found = {each["name"]: each for each in environment.extras()}
    assert set(found) == set(doctor._USES)
    onnx = found["onnx"]
    assert not onnx["complete"]
    assert onnx["install"] == "pip install 'repshift-cli[onnx]'"
    states = {each["name"]: (each["version"], each["suitable"]) for each in onnx["packages"]}
    assert states["onnxruntime"] == (None, False)
    assert states["onnx"] == ("1.0", False)
    assert states["onnxscript"][1]


def test_one_screen(monkeypatch: pytest.MonkeyPatch, cli: Command) -> None:
    read_from(monkeypatch, onnxruntime=None, onnx="1.0", openvino=None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(environment, "cpu_features", lambda: frozenset({"avx2", "avx512_vnni"}))
    outcome = cli("doctor")
    assert outcome.rc == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    shown = " ".join(outcome.stdout.split())
    for words in (
        "vector avx2 int8 avx512_vnni bfloat16 no instructions: bfloat16 may gain little here",
        "attention cpu: sdpa:flash, sdpa:math",
        "OpenVINO openvino:",
        "onnx 1.0, needs >=1.18",
        "onnxruntime missing",
        "onnx,openvino",
    ):
        assert words in shown


def test_an_unknown_cpu_and_a_missing_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    for name in ("metadata", "requires", "version"):
        monkeypatch.setattr(metadata, name, missing)
    monkeypatch.setattr(environment, "cpu_features", frozenset)
    found = environment.environment()
    assert found["extras"] == []
    assert found["versions"]["timm"] is None
    assert found["cpu"]["int8"] is None
    doctor.show(json.loads(json.dumps(found)))
