"""What a file in `formats/` declares. The command line reads it, so it does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from repshift_cli.utils.files import default_output

if TYPE_CHECKING:
    from torch import Tensor

    from repshift_cli.checkpoints.schema import ExportDocument
    from repshift_cli.export.request import Request, Subject
    from repshift_cli.reduction.compressed_model import Trace
    from repshift_cli.utils.progress import Progress


@dataclass(frozen=True)
class Draft:
    """An export before it is verified.

    Attributes:
        document: its metadata, without the result of the verification.
        reopen: opens the export. The returned function maps inputs to the output of the export, followed by the output
            and the kept positions of each site, of the same graph.
        operators: of an ONNX graph, how often each operator occurs.
        known: inputs to verify it on, each with the trace of the model in torch; empty for `verify.inputs_for`.
    """

    document: ExportDocument
    save: Callable[[ExportDocument], None]
    reopen: Callable[[], Callable[[Tensor], tuple[Tensor, ...]]]
    operators: dict[str, int] | None = None
    known: Sequence[tuple[Tensor, Trace]] = ()


@dataclass(frozen=True)
class Format:
    """A format of `repshift export`.

    Attributes:
        name: value of `--to`.
        suffix: what the default output name adds to the name of the model.
        files: names in the folder that it writes; empty if it writes one file.
        packages: what the format needs of the extra of its name.
        options: which of `--batch`, `--opset`, `--tune` and `--quantize` are supported.
        check: raises UsageError for an invalid request; runs before a model is loaded.
    """

    name: str
    description: str
    suffix: str
    write: Callable[[Subject, Request, Path, Progress], Draft]
    files: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    options: tuple[str, ...] = ("batch",)
    check: Callable[[Request], None] = lambda request: None

    def default_output(self, model: str) -> Path:
        """Name of the model with the suffix of the format, in the current folder."""
        return default_output(model, self.suffix)
