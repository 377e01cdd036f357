"""Dense features of `restore: true` on the built-in ViT: how near they are to those of the dense model.

    python benchmarks/restore_quality.py

Tokens behind the last block are compared with the dense model's by their cosine. A linear probe tells for each patch
which digit covers its centre, or none: closed-form least squares, balanced by class, on training scenes and the dense
features, and on the restored ones for `own probe`. Metrics are fitted on 128 unlabelled scenes.

What a dropped token is given is compared: `follow` is what `restore` does (a token gets the updates of the one that it
was merged into, or of the most similar kept one), `copy` the state of that token, `last` the state that it had last.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from _results import publish, table
from PIL import Image
from torch import Tensor, nn

import repshift_cli
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import LoadedModel
from repshift_cli.data.builtin.digits import SCENE_SIZE, DigitScenes
from repshift_cli.measure.device import device_name
from repshift_cli.ops.tokens import gather_tokens
from repshift_cli.planning.plan import Plan
from repshift_cli.planning.recipe import Recipe
from repshift_cli.reduction import restore
from repshift_cli.reduction.compressed_model import attach
from repshift_cli.reduction.plans import resolve_for

MODEL, NOTHING, CALIBRATION = "builtin:vit-digits", 10, 128
RECIPE = "version: 1\nmetric: {kind: fitted}\nreducer: {kind: %s}\nrestore: true\ndrop_ratio: %.4f\nlayers: [0, 3, 6]\n"


class Last(restore.Restorer):
    """A dropped token keeps its last state."""

    def _moved(self, full: Tensor, entered: Tensor, ran: Tensor, route: Any) -> Tensor:
        return full


class Copy(restore.Restorer):
    """A dropped token gets the state of the one that it follows."""

    def restore(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if super().restore(module, args, output) is None:
            return None
        return gather_tokens(output, self.stream.routes[output.shape[1]].followed)


RESTORERS = {"follow": restore.Restorer, "copy": Copy, "last": Last}


def draw(loaded: LoadedModel, split: Any, count: int) -> tuple[Tensor, Tensor]:
    """Images, and for each patch the digit at its centre, `[n, N]`."""
    scenes, transform = DigitScenes(split, count), loaded.description.preprocessing.transform()
    side = loaded.model.patch_embed.grid_size[0]  # type: ignore[union-attr, index]
    centres = (torch.arange(side) + 0.5) * SCENE_SIZE / side
    images, labels = [], []
    for index in range(count):
        scene, placed = scenes.render(index)
        images.append(transform(Image.fromarray(scene).convert("RGB")))
        digit = placed[-1]
        rows, columns = ((centres >= start) & (centres < start + digit.side) for start in (digit.top, digit.left))
        covered = rows[:, None] & columns
        labels.append(torch.where(covered, digit.label, NOTHING).flatten())
    return torch.stack(images), torch.stack(labels)


def features(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model.forward_features(part)[:, 1:] for part in images.split(64)])


def with_one(tokens: Tensor) -> Tensor:
    tokens = tokens.flatten(0, 1).double()
    return torch.cat((tokens, torch.ones(len(tokens), 1, dtype=torch.double)), dim=1)


def fit_probe(tokens: Tensor, labels: Tensor) -> Tensor:
    inputs, wanted = with_one(tokens), labels.flatten()
    weighted = inputs / torch.bincount(wanted)[wanted, None]
    ridge = 1e-4 * torch.eye(inputs.shape[1], dtype=torch.double)
    return torch.linalg.solve(weighted.T @ inputs + ridge, weighted.T @ nn.functional.one_hot(wanted).double())


def recall(probe: Tensor, tokens: Tensor, labels: Tensor) -> float:
    """The mean over classes of the share of their patches that the probe gets right, in percent."""
    found, wanted = (with_one(tokens) @ probe).argmax(dim=1), labels.flatten()
    return 100 * sum(float((found[wanted == each] == each).double().mean()) for each in wanted.unique()) / 11


@contextmanager
def restoring(kind: type[restore.Restorer]) -> Iterator[None]:
    with mock.patch.object(restore, "Restorer", kind):
        yield


def plan_for(model: nn.Module, reducer: str, target: float, images: Tensor) -> tuple[Plan, float]:
    """The plan with this share of the MACs, and the share."""
    low, high = 0.01, 0.9
    for _ in range(12):
        ratio = (low + high) / 2
        compressed = attach(
            model, resolve_for(model, Recipe.parse((RECIPE % (reducer, ratio)).replace("fitted", "random")))
        )
        more = compressed.macs() > target * compressed.dense_macs()
        low, high = (ratio, high) if more else (low, ratio)
        compressed.detach()
    with torch.enable_grad():
        compressed = repshift_cli.compress(model, Recipe.parse(RECIPE % (reducer, high)), calibration=images)
    share = compressed.macs() / compressed.dense_macs()
    compressed.detach()
    return compressed.plan, share


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=512, help="for training the probe, and for testing it")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write no file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    loaded = load_checkpoint(MODEL)
    model: Any = loaded.model
    train, test = (draw(loaded, split, options.scenes) for split in ("train", "test"))
    dense = features(model, test[0])
    probe = fit_probe(features(model, train[0]), train[1])
    rows = [["dense", "", "1.000", "1.0000", "1.0000", *[f"{recall(probe, dense, test[1]):.1f}"] * 2]]
    for target in (0.8, 0.65):
        for reducer, kinds in (("prune", ("follow", "last")), ("merge", ("follow", "copy", "last"))):
            plan, share = plan_for(model, reducer, target, train[0][:CALIBRATION])
            for kind in kinds:
                with restoring(RESTORERS[kind]):
                    compressed = attach(model, plan)
                found, own = features(model, test[0]), fit_probe(features(model, train[0]), train[1])
                compressed.detach()
                alike = nn.functional.cosine_similarity(found, dense, dim=-1).flatten()
                shown = [f"{float(each):.4f}" for each in (alike.mean(), alike.quantile(0.1))]
                scores = [f"{recall(each, found, test[1]):.1f}" for each in (probe, own)]
                rows.append([reducer, kind, f"{share:.3f}", *shown, *scores])
    columns = ["reducer", "dropped tokens", "MACs", "cosine", "10th percentile", "probe", "own probe"]
    note = (
        f"{MODEL}, {options.scenes} test scenes, tokens behind the last norm. `probe`: mean recall over 10 digits and "
        "background, in percent, of a linear probe trained on dense features; `own probe` on the restored ones."
    )
    what = (__doc__ or "").strip().rpartition("\n\n")[2].replace("\n", " ")
    machine = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    publish(
        "restore",
        "Dense features of restored tokens",
        machine,
        [table(columns, rows), note, what],
        dry_run=options.dry_run,
    )


if __name__ == "__main__":
    main()
