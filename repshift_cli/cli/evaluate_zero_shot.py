"""`repshift eval --class-names`: the classes of a model of images and texts are the names in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repshift_cli.errors import DataError, UsageError
from repshift_cli.utils.files import sha256_of

if TYPE_CHECKING:
    import torch

    from repshift_cli.checkpoints.artifact import Opened
    from repshift_cli.data.dataset import ImageDataset
    from repshift_cli.evaluation.models import Candidate
    from repshift_cli.utils.progress import Progress

_PROMPT = "a photo of a {}."


@dataclass(frozen=True)
class ZeroShotOptions:
    """The names of the classes, in the order of the outputs, and the prompts, each with `{}` for the name."""

    file: Path
    names: tuple[str, ...]
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, file: Path | None, prompts: list[str] | None, embeddings: str | None) -> ZeroShotOptions | None:
        """The checked options, None without `--class-names`; raises UsageError, and DataError for an invalid file."""
        from repshift_cli.data.sources.class_labels import names_of_file

        if file is None:
            if prompts:
                raise UsageError("--prompt needs --class-names", "Add --class-names FILE.")
            return None
        if embeddings is not None:
            raise UsageError("--class-names is not used with --embeddings", "Leave one of them out.")
        if wrong := [prompt for prompt in prompts or () if "{}" not in prompt]:
            raise UsageError(f"invalid --prompt {wrong[0]!r}: it has no {{}}", f'Such as --prompt "{_PROMPT}".')
        return cls(file, names_of_file(file, "--class-names"), tuple(dict.fromkeys(prompts or (_PROMPT,))))

    def document(self) -> dict[str, Any]:
        """What the classes are made of, for the JSON document."""
        listed = {"path": str(self.file), "sha256": sha256_of(self.file), "classes": len(self.names)}
        return {"class_names": listed, "prompts": list(self.prompts)}

    def classifiers(
        self, models: Mapping[str, Candidate], opened: Mapping[str, Opened], device: torch.device
    ) -> dict[str, Candidate]:
        """The models with the embeddings of the classes, computed once for each opened model.

        Raises:
            UsageError: an opened model has classes.
        """
        from repshift_cli.evaluation.zero_shot import ZeroShotClassifier, class_embeddings

        embeddings = {}
        for label, each in opened.items():
            if classes := int(getattr(each.loaded.model, "num_classes", 0) or 0):
                raise UsageError(f"--class-names: {label} has a head of {classes} classes", "Leave --class-names out.")
            each.loaded.model.to(device)
            embeddings[id(each)] = class_embeddings(each.loaded, self.names, self.prompts)
        texts = (*self.names, "", *self.prompts)
        return {
            name: replace(each, module=ZeroShotClassifier(each.module, embeddings[id(each.opened)], texts))
            for name, each in models.items()
        }

    def labelled(self, data: ImageDataset) -> ImageDataset:
        """The images with labels by the names; raises DataError for another number of classes."""
        found = data.for_head(len(self.names), self.names)
        if found.classes is not None and len(found.classes) != len(self.names):
            raise DataError(
                f"{data.name} has {len(found.classes)} classes, but {self.file} has {len(self.names)} class names",
                "Give one name per class folder, in the order of the labels, or the names of the folders.",
            )
        return found

    def note_order(self, data: ImageDataset, screen: Progress) -> None:
        """Print which class is which name, where they are matched by their order."""
        from repshift_cli.data.sources.class_labels import MODEL

        if data.info.class_order != MODEL and data.classes:
            pairs = [f"{label} is {name!r}" for label, name in zip(data.classes, self.names, strict=True)]
            screen.note(f"classes of {data.name} and lines of {self.file} are matched by order: {', '.join(pairs[:3])}")
