"""openvino: a folder with an OpenVINO IR, made from the ONNX graph.

As in ONNX, the kept positions of each site are extra outputs while the model is verified, and removed from the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from repshift_cli.errors import UsageError
from repshift_cli.export.format import Draft, Format
from repshift_cli.utils.files import IR_FILES, check_output, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from repshift_cli.checkpoints.schema import ExportDocument
    from repshift_cli.export.request import Request, Subject
    from repshift_cli.reduction.compressed_model import Trace
    from repshift_cli.utils.progress import Progress


def _write(subject: Subject, request: Request, path: Path, progress: Progress) -> Draft:
    import torch

    from repshift_cli.checkpoints import exported
    from repshift_cli.checkpoints.weights import METADATA_KEY
    from repshift_cli.export import quantize
    from repshift_cli.export.formats.onnx_graph import DEFAULT_OPSET, watched_graph
    from repshift_cli.export.int8_openvino import OpenVinoMaker
    from repshift_cli.utils.intel import import_without_telemetry

    openvino = import_without_telemetry("openvino")
    drawn = quantize.draw_images(subject, request, progress) if request.quantize else None
    graph, _, output = watched_graph(subject, request, DEFAULT_OPSET, progress)
    document = subject.document(request, output)
    progress.note("converting to OpenVINO")
    known: Sequence[tuple[Tensor, Trace]] = ()
    if drawn:
        job = quantize.Job(subject, request, document, path, drawn, progress)
        made = quantize.quantize(partial(OpenVinoMaker, graph), job)
        watched, known = made.graph, made.known
        document = document.model_copy(update={"quantized": made.part})
    else:
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

    return Draft(document, save, reopen, known=known)


def _check(request: Request) -> None:
    if request.quantize == "int8-dynamic":
        raise UsageError(
            "--to openvino has no int8-dynamic, only int8, which needs images",
            "Use --quantize int8 --calibration FOLDER, or --to onnx.",
        )
    if request.quantize:
        from repshift_cli.checkpoints.exported import require

        require("nncf", "openvino", "quantised ")
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
    options=("batch", "quantize"),
    check=_check,
)
