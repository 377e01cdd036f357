"""openvino: a folder with an OpenVINO IR, made from the ONNX graph.

As in ONNX, the kept positions of each site are extra outputs while the model is verified, and removed from the files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from repshift_cli.errors import UsageError
from repshift_cli.export.format import Draft, Format
from repshift_cli.utils.files import IR_FILES, check_output, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from repshift_cli.checkpoints.schema import ExportDocument
    from repshift_cli.export.request import Request, Subject
    from repshift_cli.utils.progress import Progress


def _write(subject: Subject, request: Request, path: Path, progress: Progress) -> Draft:
    import openvino
    import torch

    from repshift_cli.checkpoints import exported
    from repshift_cli.checkpoints.weights import METADATA_KEY
    from repshift_cli.export.formats.onnx_graph import DEFAULT_OPSET, watched_graph

    graph, _, output = watched_graph(subject, request, DEFAULT_OPSET, progress)
    document = subject.document(request, output)
    progress.note("converting to OpenVINO")
    watched = openvino.Core().read_model(graph.SerializeToString())
    model = watched.clone()
    for result in model.get_results()[1:]:
        model.remove_result(result)
    weights, description = (path / name for name in IR_FILES)
    openvino.save_model(model, description, compress_to_fp16=False)
    model.set_rt_info(sha256_of(weights), [exported.IR_WEIGHTS_KEY])

    def save(document: ExportDocument) -> None:
        model.set_rt_info(document.model_dump_json(), [METADATA_KEY])
        openvino.save_model(model, description, compress_to_fp16=False)

    def reopen() -> Callable[[Tensor], tuple[Tensor, ...]]:
        save(document)
        run = exported.run_file(description, "openvino", document)
        watch = exported.compile_ir(watched, document)
        return lambda images: (run(images), *map(torch.from_numpy, watch(images.numpy()).to_tuple()))

    return Draft(document, save, reopen)


def _check(request: Request) -> None:
    check_output(request.output, request.force, is_folder=True)
    if (request.output / "config.json").exists():
        raise UsageError(f"{request.output} holds another model: it has a config.json", "Choose another name with -o.")


FORMAT = Format(
    "openvino",
    "a folder for OpenVINO",
    "_openvino",
    _write,
    files=IR_FILES,
    packages=("openvino", "onnx", "onnxscript"),
    dtypes=("float32", "float16"),
    devices=("cpu",),
    check=_check,
)
