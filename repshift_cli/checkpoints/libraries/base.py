"""The interface of a library whose models are read and written in their own form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from repshift_cli.checkpoints.identify.identity import Identity
from repshift_cli.checkpoints.loaded import LoadedModel, ModelDescription
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.checkpoints.texts import TextTower, embed_texts
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.errors import CheckpointError, ModelError
from repshift_cli.planning.registry import members


class Library(ABC):
    """A library of models.

    The architecture in a `ModelDescription` is `<name>:<class or model name>`, and its arguments are what the library
    needs to build the model without weights. A built model is a `TensorModel`. The tensors of a `LoadedModel` keep the
    keys of the file.

    Attributes:
        name: of the package, as in specs.
        extra: of this package, which installs the library; empty if it is always there.
        config: the configuration in a folder of this library; empty if the library has no folders.
        towers: whether a part of a model can be loaded (`LoadOptions.tower`).
    """

    name: ClassVar[str]
    extra: ClassVar[str] = ""
    config: ClassVar[str] = ""
    towers: ClassVar[bool] = False

    def require(self, where: str) -> None:
        """Raise CheckpointError if the library is not installed."""
        if find_spec(self.name) is None:
            raise CheckpointError(
                f"{where} needs {self.name}, which is not installed",
                f"Install it with: pip install 'repshift-cli[{self.extra}]'",
            )

    @abstractmethod
    def build(self, description: ModelDescription, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
        """The model of a description with these weights: float32, eval mode, CPU, without gradients.

        Raises:
            CheckpointError: the weights do not fit, or the library is not installed.
        """

    def names(self) -> Collection[str]:
        """The models that `--model` can name for the tensors of a single file; empty if it is not installed."""
        return ()

    def opens(self, folder: Path) -> bool:
        """Whether a folder is in the form of this library."""
        return False

    def read(self, folder: Path, options: LoadOptions) -> LoadedModel:
        """The dense model of a folder that `opens` accepts; with `document` if the folder holds a compressed model.

        Raises:
            CheckpointError: a file is missing or damaged, or the class of the model is not known.
        """
        raise NotImplementedError(self.name)

    def whole(self, folder: Path) -> nn.Module:
        """The whole model of a folder, in the dtype of its weights, for a library with `towers`.

        Raises:
            CheckpointError: it does not load.
        """
        raise NotImplementedError(self.name)

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the tensors of a single file have the keys of this library."""
        return False

    def identify(self, tensors: Mapping[str, Tensor], where: str, options: LoadOptions) -> Identity:
        """The model of a file that `recognises` accepts; errors as `identify.match.identify`."""
        raise NotImplementedError(self.name)

    def preprocessing_of(self, model: nn.Module) -> Preprocessing | None:
        """What a model in memory states about its inputs; None if it is not of this library, or states nothing."""
        return None

    def describe(self, model: nn.Module, preprocessing: Preprocessing, computed: str) -> ModelDescription | None:
        """The description of a dense or hooked model in memory; None if it is not a model of this library.

        Args:
            computed: `computation` of the dense model of the library.

        Raises:
            CheckpointError: what is built from the description would not compute the same.
            ModelError: the model does not state all that a reader needs.
        """
        return None

    def text_tower(self, loaded: LoadedModel) -> TextTower | None:
        """The text tower of a model, with the tokenizer of its folder; None if it has none.

        Raises:
            CheckpointError: the tokenizer is missing or damaged.
        """
        return None

    def write(self, folder: Path, loaded: LoadedModel, document: Mapping[str, Any]) -> None:
        """Write a compressed model into an empty folder, in the form of the library: for one that has a `config`.

        Args:
            document: of the compressed model, for the metadata of the weights and for the configuration.

        Raises:
            OutputError: a file cannot be written.
        """
        raise NotImplementedError(self.name)


def libraries() -> Iterator[Library]:
    """One instance of each library."""
    # mypy rejects an abstract class as argument, but `members` only compares with it
    yield from (found() for found in members("repshift_cli.checkpoints.libraries", Library))  # type: ignore[type-abstract]


def library_for(tensors: Mapping[str, Tensor], name: str | None) -> Library | None:
    """The library of the tensors of a single file, if `name` is None or one of its models."""
    found = next((library for library in libraries() if library.recognises(tensors)), None)
    return found if found is not None and (name is None or name in found.names()) else None


def library_of(architecture: str | None) -> Library | None:
    """The library that builds an architecture, None for those of `checkpoints.create`."""
    name = (architecture or "").partition(":")[0] if ":" in (architecture or "") else ""
    return next((library for library in libraries() if library.name == name), None)


def encode_texts(loaded: LoadedModel, texts: Sequence[str]) -> Tensor:
    """The embeddings of different texts by the text tower of a model, `[K, C]` in its dtype.

    Raises:
        ModelError: it has no text tower.
        CheckpointError: tokenizer files are missing in its folder, or as `texts.embed_texts`.
    """
    library, where = library_of(loaded.description.architecture), loaded.source.path or loaded.description.name
    tower = None if library is None else library.text_tower(loaded)
    if tower is None:
        raise ModelError(
            f"{where} has no text tower of CLIP or SigLIP",
            "Supported: folders of CLIPModel and SiglipModel (transformers), folders and files of open_clip.",
        )
    return embed_texts(tower, texts, next(loaded.model.parameters()).device, where)
