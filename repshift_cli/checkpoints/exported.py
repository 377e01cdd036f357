"""Run exported files: ONNX graphs, `torch.export` programs and AOTInductor packages, as modules that take tensors.

Each file carries our JSON document, so that it says what it is without the library that runs it. A `.pt2` holds a
program or a package: both are zip archives, and what lies in them tells them apart.
"""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.identify import Clips
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.schema import EXPORT_VERSION, ExportDocument
from repshift_cli.checkpoints.weights import METADATA_KEY, Source
from repshift_cli.errors import CheckpointError, UsageError, first_line
from repshift_cli.utils.files import EXPORT_SUFFIXES

__all__ = [
    "DOCUMENT_FILE",
    "RUNTIMES",
    "InChunks",
    "Kind",
    "OpenedExport",
    "Runtime",
    "is_exported",
    "kind_of",
    "open_any",
    "open_exported",
    "read_document",
    "require",
    "run_file",
]

Kind = Literal["onnx", "pt2", "aoti"]
"""What an exported file is run by: ONNX Runtime, torch's interpreter, or as the compiled code that it is."""

DOCUMENT_FILE = f"{METADATA_KEY}.json"
"""Under this name a `.pt2` holds our JSON document."""

_LARGEST_DOCUMENT = 1 << 24
"""Bytes of what a file says of itself."""

_AGAIN = "Copy it again, or export the model anew."


class Runtime(nn.Module, ABC):
    """An exported file as a module. Weights belong to the runtime: `to` and `state_dict` do not see them.

    Args:
        path: the file.
        document: what it says of itself.

    Attributes:
        num_classes: outputs of the head, None where there is none.
        hides_memory: whether the runtime allocates where torch does not see it.
    """

    hides_memory: ClassVar[bool] = True

    def __init__(self, path: Path, document: ExportDocument) -> None:
        super().__init__()
        self.path = path
        self.document = document
        self.num_classes = document.num_classes

    def forward(self, images: Tensor) -> Tensor:
        """What the model gives for `[B, ...]` of the dtype and the shape that the file is for.

        Raises:
            UsageError: they are not those.
        """
        self._check(images)
        return self.outputs(images)[0]

    @abstractmethod
    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """All that the file gives; our own files give one tensor, but for those that a check is made with."""

    def _check(self, images: Tensor) -> None:
        wanted = self.document.input
        dtype = str(images.dtype).removeprefix("torch.")
        if dtype != wanted.dtype:
            raise UsageError(f"{self.path} takes {wanted.dtype}, not {dtype}", f"Use --dtype {wanted.dtype}.")
        batch, *shape = wanted.shape
        if list(images.shape[1:]) != shape:
            raise UsageError(f"{self.path} takes inputs of {_words(shape)}, not {_words(images.shape[1:])}")
        if batch is not None and len(images) != batch:
            raise UsageError(
                f"{self.path} takes batches of {batch}, not of {len(images)}",
                f"Use --batch-size {batch}, or export it with --batch dynamic.",
            )


class _OnnxRuntime(Runtime):
    """On the CPU, with as many threads as torch has."""

    def __init__(self, path: Path, document: ExportDocument) -> None:
        super().__init__(path, document)
        self._threads = torch.get_num_threads()
        self._session = self._open()

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.device.type != "cpu":
            raise UsageError(f"{self.path}: ONNX files are run on the CPU here", "Use --device cpu.")
        if torch.get_num_threads() != self._threads:
            self._threads = torch.get_num_threads()
            self._session = self._open()
        given = {self.document.input.name: images.contiguous().numpy()}
        return tuple(torch.from_numpy(found) for found in self._session.run(None, given))

    def _open(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3  # what goes wrong is raised
        # threads that wait in a loop take the processor from whatever is timed in turn with this
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class
            raise CheckpointError(f"{self.path} is not run by ONNX Runtime: {first_line(error)}", _AGAIN) from error


class _Program(Runtime):
    """A program of `torch.export`, operation by operation as eager models run."""

    hides_memory: ClassVar[bool] = False

    def __init__(self, path: Path, document: ExportDocument) -> None:
        super().__init__(path, document)
        try:
            self._program: Any = torch.export.load(str(path))
        except Exception as error:  # a file that is cut short fails in many ways
            raise CheckpointError(f"{path} does not load as a program: {first_line(error)}", _AGAIN) from error
        self._device = torch.device(document.device)
        # in a tuple, so that its parameters are not listed: cast alone they would not fit the program
        self._module: tuple[Any] = (self._program.module(),)

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.device.type != self._device.type:
            from torch.export.passes import move_to_device_pass

            self._program = move_to_device_pass(self._program, images.device)
            self._device, self._module = images.device, (self._program.module(),)
        return _as_tuple(self._module[0](images))


class _Package(Runtime):
    """What AOTInductor compiled, for one kind of device."""

    def __init__(self, path: Path, document: ExportDocument) -> None:
        super().__init__(path, document)
        _check_device(path, document.device)
        try:
            self._package: tuple[Any] = (torch._inductor.aoti_load_package(str(path)),)
        except Exception as error:  # as above, and what the linker says
            raise CheckpointError(
                f"{path} does not load as a compiled package: {first_line(error)}",
                "It runs where it was compiled, and where processor, system and torch are the same. Else export anew.",
            ) from error

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.device.type != torch.device(self.document.device).type:
            raise UsageError(
                f"{self.path} was compiled for {self.document.device}", f"Use --device {self.document.device}."
            )
        return _as_tuple(self._package[0](images))


RUNTIMES: Mapping[Kind, type[Runtime]] = {"onnx": _OnnxRuntime, "pt2": _Program, "aoti": _Package}


class InChunks(nn.Module):
    """A file with a fixed batch, for any number of inputs: in chunks, of which the last is filled up."""

    def __init__(self, runtime: Runtime, batch: int) -> None:
        super().__init__()
        self.runtime = runtime
        self.batch = batch

    def forward(self, images: Tensor) -> Tensor:
        """As the file, for `[B, ...]` with any B."""
        missing = -len(images) % self.batch
        filled = torch.cat((images, images[-1:].expand(missing, *images.shape[1:])))
        return torch.cat([self.runtime(part) for part in filled.split(self.batch)])[: len(images)]


@dataclass
class OpenedExport(Opened):
    """An exported file that is ready to run; `compressed` is None, since there is no dense self in it."""

    runtime: Runtime

    @property
    def module(self) -> nn.Module:
        return self.runtime

    @property
    def macs(self) -> int:
        return self.runtime.document.macs

    @property
    def dense_macs(self) -> int:
        return self.runtime.document.dense_macs

    @property
    def reduced(self) -> bool:
        return self.runtime.document.plan is not None

    @property
    def weights(self) -> str:
        """What tells weights apart: their hash, and where there was no file, the name of the model."""
        document = self.runtime.document
        return str(document.source.get("sha256") or document.model["name"])

    @property
    def flexible(self) -> nn.Module:
        """What to run on any number of inputs."""
        batch = self.runtime.document.input.shape[0]
        return self.runtime if batch is None else InChunks(self.runtime, batch)


def is_exported(name: str | Path) -> bool:
    """Whether this is the name of an exported file that is there."""
    path = Path(name)
    return path.suffix.lower() in EXPORT_SUFFIXES and path.is_file()


def open_any(
    name: str | Path,
    model_name: str | None = None,
    heads: int | None = None,
    img_size: int | None = None,
    *,
    clips: Clips | None = None,
) -> Opened:
    """As `artifact.open_model`, and exported files too, which tell themselves what the arguments tell of others.

    Raises:
        UsageError, CheckpointError: as `artifact.open_model` and `open_exported`; or an argument was given for an
            exported file.
    """
    if not is_exported(name):
        return artifact.open_model(name, model_name, heads, img_size, clips=clips)
    told = {"--model": model_name, "--heads": heads, "--img-size": img_size}
    given = [option for option, value in told.items() if value is not None]
    if clips not in (None, Clips()):
        given.append("--frames")
    if given:
        raise UsageError(
            f"{given[0]}: {name} is an exported file, which is made for one model and size", "Leave it out."
        )
    return open_exported(Path(name))


def open_exported(path: Path) -> OpenedExport:
    """Open a file that `repshift export` wrote.

    A compiled package is native code, and runs as such: open only what you trust.

    Raises:
        CheckpointError: it is damaged, of a newer version, or was not written by us.
        UsageError: its runtime is not installed, or there is no such device.
    """
    kind = kind_of(path)
    document = read_document(path, kind)
    runtime = run_file(path, kind, document)
    description = ModelDescription.from_dict(document.model)
    source = Source("file", str(path), document.source.get("sha256"))
    loaded = LoadedModel(runtime, description, source, {}, [], {"source": document.source})
    return OpenedExport(loaded, None, runtime)


def run_file(path: Path, kind: Kind, document: ExportDocument) -> Runtime:
    """A file of this kind, ready to run; errors as `open_exported`."""
    if kind == "onnx":
        require("onnxruntime")
    return RUNTIMES[kind](path, document)


def kind_of(path: Path) -> Kind:
    """What an exported file is, by its content.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    if path.suffix.lower() == ".onnx":
        return "onnx"
    names = [name.partition("/")[2] for name in _archive_names(path)]
    if any(name.startswith("data/aotinductor/") for name in names):
        return "aoti"
    if any(name.startswith("models/") or name == "serialized_exported_program.json" for name in names):
        return "pt2"
    raise CheckpointError(f"{path} holds neither a program of torch.export nor a compiled package")


def read_document(path: Path, kind: Kind) -> ExportDocument:
    """What a file says of itself.

    Raises:
        CheckpointError: it is damaged, says nothing, or is of a newer version.
        UsageError: what reads it is not installed.
    """
    text = _onnx_document(path) if kind == "onnx" else _archived_document(path)
    if text is None:
        raise CheckpointError(
            f"{path} was not written by `repshift export`: it does not say what it is",
            "Export the model with repshift; other files run in their own runtime.",
        )
    try:
        document = json.loads(text)
        version = document.get("export_version")
        if isinstance(version, int) and version > EXPORT_VERSION:
            raise CheckpointError(
                f"{path} was written by a newer repshift (export {version}, this one knows {EXPORT_VERSION})",
                "Upgrade: pip install --upgrade repshift-cli. Its own runtime opens the file all the same.",
            )
        return ExportDocument.model_validate(document)
    except (ValueError, AttributeError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
        raise CheckpointError(f"{path}: its repshift metadata is damaged: {reason}") from error


def require(package: str) -> None:
    """Refuse to go on without a package that ONNX files need.

    Raises:
        UsageError: naming the extra that brings it.
    """
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UsageError(
            f"ONNX files need {package}, which is not installed", "Install it with: pip install 'repshift-cli[onnx]'"
        )


def _onnx_document(path: Path) -> str | None:
    require("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{path} is not an ONNX file, or is damaged", _AGAIN) from error
    if not model.graph.node:
        raise CheckpointError(f"{path} is not an ONNX file, or is damaged: it has no graph", _AGAIN)
    return next((str(entry.value) for entry in model.metadata_props if entry.key == METADATA_KEY), None)


def _archived_document(path: Path) -> str | None:
    name = next((name for name in _archive_names(path) if name.endswith(f"/{DOCUMENT_FILE}")), None)
    if name is None:
        return None
    return _in_archive(path, lambda archive: _member(archive, name).decode("utf-8"))


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file in an archive, its size checked before there is memory for it."""
    size = archive.getinfo(name).file_size
    if size > _LARGEST_DOCUMENT:
        raise ValueError(f"{name} takes {size} bytes")
    return archive.read(name)


def _archive_names(path: Path) -> list[str]:
    return _in_archive(path, lambda archive: archive.namelist())


def _in_archive(path: Path, read: Callable[[zipfile.ZipFile], Any]) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            return read(archive)
    except Exception as error:  # damaged archives end in the errors of whatever unpacks them, such as zlib.error
        raise CheckpointError(f"{path} is not a .pt2 archive, or is damaged: {first_line(error)}", _AGAIN) from error


def _check_device(path: Path, device: str) -> None:
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{path} was compiled for CUDA, and torch sees no CUDA device", "Export it with --device cpu.")


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _words(shape: Any) -> str:
    return "x".join(map(str, shape))
