"""`repshift doctor`: versions, hardware, backends and extras of this installation."""

from __future__ import annotations

from typing import Any

from repshift_cli.cli import options, ui

_USES = {
    "flash": "attention on CUDA",
    "hf": "models of transformers",
    "onnx": "export --to onnx",
    "openclip": "models of open_clip",
    "openvino": "export --to openvino",
    "parquet": "predictions as .parquet",
    "video": "video files and texts",
}
"""What an extra is for. Which extras there are is in the metadata of the package."""


def command(json: options.AsJson = False) -> None:
    """Show what this machine has, and what to install for what."""
    from repshift_cli.measure.environment import environment

    found = environment()
    if json:
        ui.result.keep(found)
    else:
        show(found)


def show(found: dict[str, Any]) -> None:
    """Print the document on one screen."""
    cpu, backends, extras = found["cpu"], found["backends"], found["extras"]
    named = [f"{name} {found['versions'][name] or 'not installed'}" for name in ("repshift", "python", "torch", "timm")]
    ui.print_text(f"versions   {', '.join(named)}")
    ui.print_text(f"cpu        {cpu['name']}, {cpu['threads']} thread{'s' if cpu['threads'] > 1 else ''}")
    for use in ("vector", "int8", "bfloat16"):
        names = cpu[use]
        none = "none" if use == "vector" else f"no instructions: {use} may gain little here"
        ui.print_text(f"  {use:<8} {'unknown' if names is None else ', '.join(names) or none}")
    for gpu in found["gpus"]:
        ui.print_text(f"gpu        {gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB, capability {gpu['capability']}")
    if not found["gpus"]:
        ui.print_text("gpu        none that torch can use")
    attention = backends["attention"]
    for device, kernels in attention["kernels"].items():
        ui.print_text(f"attention  {device}: {', '.join(kernels)}")
    if attention["flash_attn"]:
        ui.print_text(f"flash-attn {attention['flash_attn_problem'] or attention['flash_attn']}")
    for label, name in (("ONNX", "onnxruntime"), ("OpenVINO", "openvino")):
        runtime = backends[name]
        usable = f"{name} {runtime['version']}: {', '.join(runtime['devices'])}"
        ui.print_text(f"{label:<10} {name + ': ' + runtime['problem'] if runtime['problem'] else usable}")
    compiler = backends["cxx_compiler"] or "no C++ compiler: install g++ for --to aoti and --compile, or set CXX"
    ui.print_text(f"compiler   {compiler}", "")
    rows = [[each["name"], _USES.get(each["name"], ""), _packages(each["packages"])] for each in extras]
    if rows:
        ui.print_table(None, ["extra", "for", "packages"], rows, left=3)
    missing = [each["name"] for each in extras if not each["complete"]]
    if missing:
        ui.print_text(f"What is missing: pip install 'repshift-cli[{','.join(missing)}]', or one of them.")


def _packages(packages: list[dict[str, Any]]) -> str:
    parts = []
    for each in packages:
        state = each["version"] or "missing"
        if each["version"] and not each["suitable"]:
            state += f", needs {each['required']}"
        parts.append(f"{each['name']} {state}")
    return "; ".join(parts)
