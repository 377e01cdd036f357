"""Open and run exported files: ONNX graphs, OpenVINO IRs, `torch.export` programs and AOTInductor packages.

Each file holds our JSON document. A `.pt2` is a zip archive with a program or a package; both can run code of their
author, so they are opened only on request (docs/security.md).
"""

from __future__ import annotations

import logging
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from repshift_cli.checkpoints import artifact
from repshift_cli.checkpoints.artifact import Opened
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.schema import EXPORT_VERSION, ExportDocument, Port
from repshift_cli.checkpoints.weights import METADATA_KEY, Source, check_members
from repshift_cli.errors import CheckpointError, RepshiftError, UsageError, first_line, last_line
from repshift_cli.measure.device import out_of_memory
from repshift_cli.utils.documents import parse_document, validated
from repshift_cli.utils.files import EXPORT_SUFFIXES, LARGEST_DOCUMENT, export_file, sha256_of
from repshift_cli.utils.intel import import_without_telemetry

Kind = Literal["onnx", "openvino", "pt2", "aoti"]
"""The runtime of an exported file: ONNX Runtime, OpenVINO, torch's interpreter, or compiled code."""

IR_WEIGHTS_KEY = f"{METADATA_KEY}_weights"
"""Key of the SHA-256 of the weights in an IR, which are a file of their own."""

DOCUMENT_FILE = f"{METADATA_KEY}.json"
"""Name of our JSON document in a `.pt2`."""

_Value = TypeVar("_Value")

_ELF_HEADER = struct.Struct("<5s35xQ10xHH2x")
"""Magic bytes with the class of 64 bits; offset of the section table, size and number of its entries."""

_ONNX_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)"}

_IR_TYPES = {"float32": "f32", "float16": "f16"}

_AGAIN = "Copy it again, or export the model again."


class Runtime(nn.Module, ABC):
    """An exported file as a module. The runtime holds the weights, so `to` and `state_dict` do not see them.

    Attributes:
        num_classes: outputs of the head, None without a head.
        hides_memory: whether torch does not see the memory of the runtime.
    """

    hides_memory: ClassVar[bool] = True

    def __init__(self, path: Path, document: ExportDocument) -> None:
        super().__init__()
        self.path = path
        self.document = document
        self.num_classes = document.num_classes

    def forward(self, images: Tensor) -> Tensor:
        """The output for inputs `[B, ...]`.

        Raises:
            UsageError: the file is for another dtype or shape.
            CheckpointError: it does not run, or its output has another shape than its document says.
        """
        self._check(images)
        try:
            found = self.outputs(images)[0]
        except Exception as error:  # those of runtimes have no common class
            if isinstance(error, RepshiftError) or (isinstance(error, RuntimeError) and out_of_memory(error)):
                raise
            raise CheckpointError(f"{self.path} does not run: {first_line(error)}", _AGAIN) from error
        wanted = [len(images), *self.document.output.shape[1:]]
        if list(found.shape) != wanted:
            raise CheckpointError(f"{self.path} returns {_words(found.shape)}, but its metadata says {_words(wanted)}")
        return found

    @abstractmethod
    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """All outputs: one, or more in a file that is written for a check."""

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


class _CpuRuntime(Runtime):
    """On the CPU, with as many threads as torch."""

    def __init__(self, path: Path, document: ExportDocument) -> None:
        super().__init__(path, document)
        self._threads = torch.get_num_threads()
        self._session = self._open()

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.device.type != "cpu":
            raise UsageError(f"{self.path} runs on the CPU only", "Use --device cpu.")
        if torch.get_num_threads() != self._threads:
            self._threads = torch.get_num_threads()
            self._session = self._open()
        return tuple(map(torch.from_numpy, self._run(images.contiguous().numpy())))

    @abstractmethod
    def _open(self) -> Any: ...

    @abstractmethod
    def _run(self, images: Any) -> Iterable[Any]: ...


class _OnnxRuntime(_CpuRuntime):
    def _run(self, images: Any) -> Iterable[Any]:
        return self._session.run(None, {self.document.input.name: images})

    def _open(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3  # errors are raised
        # waiting threads must not slow down the other model of a comparison
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class
            raise CheckpointError(f"ONNX Runtime cannot run {self.path}: {first_line(error)}", _AGAIN) from error
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1 or not (
            _is_port(inputs[0], self.document.input) and _is_port(outputs[0], self.document.output)
        ):
            raise CheckpointError(f"{self.path}: input and output of its graph are not those that its metadata names")
        return session


class _OpenVino(_CpuRuntime):
    def _run(self, images: Any) -> Iterable[Any]:
        return self._session(images).to_tuple()

    def _open(self) -> Any:
        model = _read_ir(self.path)
        try:
            session = compile_ir(model, self.document)
        except RuntimeError as error:
            raise CheckpointError(f"OpenVINO cannot run {self.path}: {last_line(error)}", _AGAIN) from error
        ports, known = (*session.inputs, *session.outputs), (self.document.input, self.document.output)
        if len(session.inputs) != 1 or len(ports) != len(known) or not all(map(_is_ir_port, ports, known)):
            raise CheckpointError(f"{self.path}: input and output of its graph are not those that its metadata names")
        return session


def compile_ir(model: Any, document: ExportDocument) -> Any:
    """Compile a model of OpenVINO for the CPU, with as many threads as torch.

    By default OpenVINO computes float32 in bfloat16 where the CPU has instructions for it.
    """
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if document.input.dtype == "float32":
        config["INFERENCE_PRECISION_HINT"] = "f32"
    return import_without_telemetry("openvino").Core().compile_model(model, "CPU", config)


def _is_ir_port(found: Any, port: Port) -> bool:
    shape = [None if size.is_dynamic else size.get_length() for size in found.partial_shape]
    dtype = found.element_type.get_type_name()
    return port.name in found.names and (dtype, shape) == (_IR_TYPES.get(port.dtype), port.shape)


class _Program(Runtime):
    """A program of `torch.export`, run operation by operation."""

    hides_memory: ClassVar[bool] = False

    def __init__(self, path: Path, document: ExportDocument) -> None:
        super().__init__(path, document)
        try:
            with quiet_logs(logging.CRITICAL):
                self._program: Any = torch.export.load(str(path))
        except Exception as error:  # a truncated file fails in many ways
            raise CheckpointError(f"{path} does not load as a program: {first_line(error)}", _AGAIN) from error
        self._device = torch.device(document.device)
        # in a tuple, so that `to` does not cast its parameters, which would no longer fit the program
        self._module: tuple[Any] = (self._program.module(),)

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.device.type != self._device.type:
            from torch.export.passes import move_to_device_pass

            self._program = move_to_device_pass(self._program, images.device)
            self._device, self._module = images.device, (self._program.module(),)
        return _as_tuple(self._module[0](images))


class _Package(Runtime):
    """A package of AOTInductor, compiled for one kind of device."""

    def __init__(self, path: Path, document: ExportDocument) -> None:
        super().__init__(path, document)
        if torch.device(document.device).type == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                f"{path} was compiled for CUDA, and torch finds no CUDA device", "Export it with --device cpu."
            )
        try:
            with quiet_logs(logging.CRITICAL):
                self._package: tuple[Any] = (torch._inductor.aoti_load_package(str(path)),)
        except Exception as error:  # as above, and errors of the linker
            raise CheckpointError(
                f"{path} does not load as a compiled package: {first_line(error)}",
                "It runs only where processor, system and torch are as at its compilation. Else export it again.",
            ) from error

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.device.type != torch.device(self.document.device).type:
            raise UsageError(
                f"{self.path} was compiled for {self.document.device}", f"Use --device {self.document.device}."
            )
        return _as_tuple(self._package[0](images))


RUNTIMES: Mapping[Kind, type[Runtime]] = {
    "onnx": _OnnxRuntime,
    "openvino": _OpenVino,
    "pt2": _Program,
    "aoti": _Package,
}


class InChunks(nn.Module):
    """A file with a fixed batch, run on any number of inputs in chunks. The last chunk is padded."""

    def __init__(self, runtime: Runtime, batch: int) -> None:
        super().__init__()
        self.runtime = runtime
        self.batch = batch

    def forward(self, images: Tensor) -> Tensor:
        missing = -len(images) % self.batch
        filled = torch.cat((images, images[-1:].expand(missing, *images.shape[1:])))
        return torch.cat([self.runtime(part) for part in filled.split(self.batch)])[: len(images)]


@dataclass
class OpenedExport(Opened):
    """An exported file that is ready to run; `compressed` is None, since it holds no dense model."""

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
    def weights_id(self) -> str:
        """Identity of the weights: their hash, or the name of the model without a file."""
        document = self.runtime.document
        return document.source.sha256 or document.model.name

    @property
    def flexible(self) -> nn.Module:
        """A module for any number of inputs."""
        batch = self.runtime.document.input.shape[0]
        return self.runtime if batch is None else InChunks(self.runtime, batch)


def is_exported(name: str | Path) -> bool:
    """Whether this is an existing file with the suffix of an exported one, or the folder of an IR."""
    path = export_file(Path(name))
    return path.suffix.lower() in EXPORT_SUFFIXES and path.is_file()


def open_any(name: str | Path, options: LoadOptions | None = None, trust: bool = False) -> Opened:
    """Open a checkpoint or an exported file, which allows no options; `trust` as for `open_exported`.

    Raises:
        UsageError, CheckpointError: as `artifact.open_model` and `open_exported`; or options for an exported file.
    """
    if not is_exported(name):
        return artifact.open_model(name, options)
    given = [key for key, value in asdict(options or LoadOptions()).items() if value is not None]
    if given:
        option = given[0].removesuffix("_name").replace("_", "-")
        raise UsageError(f"--{option}: {name} is an exported file, made for one model and size", "Leave it out.")
    return open_exported(Path(name), trust)


def open_exported(path: Path, trust: bool = False) -> OpenedExport:
    """Open a file of `repshift export`.

    Args:
        path: the file, or the folder of an IR.
        trust: whether to open programs and packages, which can run code of their author. ONNX files and IRs need none.

    Raises:
        CheckpointError: it is damaged, of a newer version, or not written by repshift.
        UsageError: its runtime or device is missing, or it needs trust.
    """
    path = export_file(path)
    kind = kind_of(path)
    document = read_document(path, kind)
    if kind in ("pt2", "aoti"):
        if not trust:
            raise UsageError(
                f"{path} is a {'program of torch.export' if kind == 'pt2' else 'compiled package'}: opening it can run "
                "code that its author put there",
                "Add --trust if you trust its author. ONNX files are safe to open: repshift export --to onnx.",
            )
        _in_archive(path, _check_archive)
    runtime = run_file(path, kind, document)
    source = Source("file", str(path), document.source.sha256)
    loaded = LoadedModel(runtime, document.model, source, {}, [], {"source": document.source.model_dump()})
    return OpenedExport(loaded, None, runtime)


def run_file(path: Path, kind: Kind, document: ExportDocument) -> Runtime:
    """A file of a known kind, ready to run; errors as `open_exported`."""
    if kind == "onnx":
        require("onnxruntime", "onnx")
    return RUNTIMES[kind](path, document)


def kind_of(path: Path) -> Kind:
    """The kind of an exported file, by its content; raises CheckpointError for other files."""
    if path.suffix.lower() in (".onnx", ".xml"):
        return "onnx" if path.suffix.lower() == ".onnx" else "openvino"
    names = [name.partition("/")[2] for name in _in_archive(path, zipfile.ZipFile.namelist)]
    if any(name.startswith("data/aotinductor/") for name in names):
        return "aoti"
    if any(name.startswith("models/") or name == "serialized_exported_program.json" for name in names):
        return "pt2"
    raise CheckpointError(f"{path} holds neither a program of torch.export nor a compiled package")


def document_of(path: Path) -> ExportDocument:
    """The document of an exported file or the folder of an IR, without running it; errors as `read_document`."""
    path = export_file(path)
    return read_document(path, kind_of(path))


def read_document(path: Path, kind: Kind) -> ExportDocument:
    """The document in an exported file.

    Raises:
        CheckpointError: the file is damaged, has no document, is of another kind than its document says, or is of a
            newer version.
        UsageError: the package that reads it is not installed.
    """
    text = {"onnx": _onnx_document, "openvino": _ir_document}.get(kind, _archived_document)(path)
    if text is None:
        raise CheckpointError(
            f"{path} was not written by `repshift export`: it has no document",
            "Export the model with repshift. Other files run in their own runtime.",
        )
    damaged = f"{path}: its repshift metadata is damaged"
    found = parse_document(text, str(path), "export_version", EXPORT_VERSION)
    document = validated(ExportDocument, found, damaged)
    if document.kind != kind:
        raise CheckpointError(f"{damaged}: it names the kind {document.kind}, but the content is {kind}")
    return document


def require(package: str, extra: str, kind: str = "") -> None:
    """Raise UsageError if a package of an extra, `onnx` or `openvino`, that `kind` of files need is not installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        runtime = "ONNX" if extra == "onnx" else "OpenVINO"
        raise UsageError(
            f"{kind}{runtime} files need {package}, which is not installed",
            f"Install it with: pip install 'repshift-cli[{extra}]'",
        )


def _onnx_document(path: Path) -> str | None:
    require("onnx", "onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{path} is not an ONNX file, or is damaged", _AGAIN) from error
    if not model.graph.node:
        raise CheckpointError(f"{path} is not an ONNX file, or is damaged: it has no graph", _AGAIN)
    return next((str(entry.value) for entry in model.metadata_props if entry.key == METADATA_KEY), None)


def _read_ir(path: Path) -> Any:
    require("openvino", "openvino")
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        if not file.is_file():
            raise CheckpointError(f"{path.parent} has no {file.name}", f"An IR is two files. {_AGAIN}")
    try:
        return import_without_telemetry("openvino").Core().read_model(path, weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not an OpenVINO IR, or is damaged: {last_line(error)}", _AGAIN) from error


def _ir_document(path: Path) -> str | None:
    """The document in an IR, whose weights must be those that were written with it."""
    model = _read_ir(path)
    document, digest = (
        str(model.get_rt_info([key]).value) if model.has_rt_info([key]) else None
        for key in (METADATA_KEY, IR_WEIGHTS_KEY)
    )
    if document is not None and digest != sha256_of(path.with_suffix(".bin")):
        raise CheckpointError(f"{path.with_suffix('.bin')} does not belong to {path.name}, or is damaged", _AGAIN)
    return document


def _archived_document(path: Path) -> str | None:

    def read(archive: zipfile.ZipFile) -> str | None:
        name = next((name for name in archive.namelist() if name.endswith(f"/{DOCUMENT_FILE}")), None)
        if name is None:
            return None
        size = archive.getinfo(name).file_size
        if size > LARGEST_DOCUMENT:
            raise ValueError(f"{name} takes {size} bytes")
        return archive.read(name).decode("utf-8")

    return _in_archive(path, read)


def _check_archive(archive: zipfile.ZipFile) -> None:
    """Raise ValueError for a damaged archive, and for members that torch would write outside of its folder."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise ValueError("two members have the same name")
    for member in members:
        place = PurePosixPath(member.filename.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or ":" in member.filename:
            raise ValueError(f"the member {member.filename!r} would leave its folder")
        if "weights" in place.parts and not member.file_size:
            raise ValueError(f"the weight {member.filename!r} is empty, which torch takes for zeros")
        if place.suffix == ".so" and not _is_whole_library(archive, member):
            raise ValueError(f"the library {member.filename!r} is cut off, or is not for 64-bit Linux")
    check_members(archive)


def _is_whole_library(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """Whether an ELF file reaches to the end of its section table. To load a part of one ends the process."""
    if member.file_size < _ELF_HEADER.size:
        return False
    with archive.open(member) as file:
        magic, start, size, count = _ELF_HEADER.unpack(file.read(_ELF_HEADER.size))
    return bool(magic == b"\x7fELF\x02" and start + size * count <= member.file_size)


def _in_archive(path: Path, read: Callable[[zipfile.ZipFile], _Value]) -> _Value:
    try:
        with zipfile.ZipFile(path) as archive:
            return read(archive)
    except Exception as error:  # damaged archives raise errors of many kinds, such as zlib.error
        raise CheckpointError(f"{path} is not a .pt2 archive, or is damaged: {first_line(error)}", _AGAIN) from error


@contextmanager
def quiet_logs(level: int) -> Iterator[None]:
    """Hide log messages up to this level: torch logs tracebacks of errors that it raises."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def _is_port(found: Any, port: Port) -> bool:
    shape = [size if isinstance(size, int) else None for size in found.shape]
    return (found.name, found.type, shape) == (port.name, _ONNX_TYPES.get(port.dtype), port.shape)


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _words(shape: Any) -> str:
    return "x".join(map(str, shape))
