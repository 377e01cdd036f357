"""What this machine and this installation can run, for `repshift doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement

from repshift_cli.errors import first_line
from repshift_cli.measure.cpu import INSTRUCTIONS, cpu_features
from repshift_cli.measure.device import device_name
from repshift_cli.models.attention_mode import available_kernels, flash_missing
from repshift_cli.utils.intel import import_without_telemetry
from repshift_cli.version import __version__

PACKAGE = "repshift-cli"
"""Name of our distribution, whose metadata list the dependencies and extras."""

_NOT_FOR_USERS = ("dev", "docs")


def environment() -> dict[str, Any]:
    """The JSON document of `repshift doctor`."""
    return {
        "versions": {"repshift": __version__, "python": platform.python_version(), **_dependencies()},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "backends": {
            "attention": _attention(),
            "onnxruntime": _runtime("onnxruntime", _providers),
            "openvino": _runtime("openvino", _openvino_devices),
            "cxx_compiler": cxx_compiler(),
        },
        "extras": extras(),
    }


def extras() -> list[dict[str, Any]]:
    """The optional dependencies by extra, with the version that is installed of each; empty without metadata."""
    try:
        names = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        return []
    found = []
    for name in sorted(set(names).difference(_NOT_FOR_USERS)):
        packages = [_package(each) for each in _requirements() if each.marker and each.marker.evaluate({"extra": name})]
        complete = all(each["suitable"] for each in packages)
        install = f"pip install '{PACKAGE}[{name}]'"
        found.append({"name": name, "complete": complete, "packages": packages, "install": install})
    return found


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return []


def _dependencies() -> dict[str, str | None]:
    names = [each.name for each in _requirements() if each.marker is None]
    return {name: _version(name) for name in dict.fromkeys(("torch", "timm", *names))}


def _package(wanted: Requirement) -> dict[str, Any]:
    version = _version(wanted.name)
    suitable = version is not None and wanted.specifier.contains(version, prereleases=True)
    return {"name": wanted.name, "required": str(wanted.specifier), "version": version, "suitable": suitable}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    features = cpu_features()
    groups = {use: [name for name in names if name in features] for use, names in INSTRUCTIONS.items()}
    known = groups if features else dict.fromkeys(INSTRUCTIONS)
    return {"name": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), **known}


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        found.append({"name": device.name, "bytes": device.total_memory, "capability": capability})
    return found


def _attention() -> dict[str, Any]:
    kernels = {"cpu": available_kernels(torch.device("cpu"), torch.float32)}
    if torch.cuda.is_available():
        kernels["cuda"] = available_kernels(torch.device("cuda"), torch.float16)
    return {"kernels": kernels, "flash_attn": _version("flash-attn"), "flash_attn_problem": flash_missing()}


def _runtime(package: str, devices: Callable[[], list[str]]) -> dict[str, Any]:
    """Version and devices of a runtime, or why it cannot be used."""
    try:
        return {"version": _version(package), "devices": devices(), "problem": None}
    except Exception as error:  # a package for another system fails in many ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        problem = "it is not installed" if missing else f"it does not load ({first_line(error)})"
        return {"version": _version(package), "devices": [], "problem": problem}


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _openvino_devices() -> list[str]:
    return list(import_without_telemetry("openvino").Core().available_devices)


def cxx_compiler() -> str | None:
    """Path of the C++ compiler that torch's compilers call; None if there is none."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
