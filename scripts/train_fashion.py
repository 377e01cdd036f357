"""Train the models of the benchmark on real images, Fashion-MNIST, on a CPU.

    python scripts/train_fashion.py cnn --threads 2
    python scripts/train_fashion.py vit_100 --threads 2 --teacher benchmarks/fashion/cnn.safetensors
    python scripts/train_fashion.py vit_196 --threads 2 --start benchmarks/fashion/vit_100.safetensors \
        --teacher benchmarks/fashion/cnn.safetensors

Objects fill the images, so all tokens matter. `vit_100` has 10x10 patches and the mean of the tokens, `vit_196` 14x14
patches and a class token, both 12 blocks. `cnn` is a narrow ResNet-18, and can teach them: half of the loss is then the
cross entropy with its probabilities for the same augmented images (Touvron et al. 2021, DeiT, soft distillation).

The ViTs learn on small images first, with fewer tokens and an interpolated position table. Their attention starts as in
Trockman and Kolter 2023 (mimetic initialisation), and the matrices of their blocks are trained with orthogonal updates
(Jordan et al. 2024, Muon); the rest with AdamW.

Each epoch writes a checkpoint, and prints the top-1 on every fifth test image, after the last epoch on all. A run with
`--resume` continues, and gives the same weights as a run without interruption.

The ViTs in benchmarks/fashion come from several runs with `--start`: first on labels alone, then with the teacher,
`vit_100` for five epochs at `--rate 0.5`, `vit_196` for one at 0.5 on small images and one at 0.37.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad

from repshift_cli.checkpoints.create import create
from repshift_cli.checkpoints.load import load_checkpoint
from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.checkpoints.weights import METADATA_KEY
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.sources.idx import open_fashion
from repshift_cli.utils.files import atomic_output

OUTPUT = Path(__file__).resolve().parents[1] / "benchmarks" / "fashion"
MEAN, STD = 0.2860, 0.3530
CLASSES = 10
WARM_UP = 0.04
TIMED_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One model and how it is trained.

    Attributes:
        args: what the builder of the architecture needs.
        side: height and width of the images; those of the dataset, 28, are resized by the preprocessing.
        epochs: all epochs without `--epochs`.
        sides: sides of smaller images to start with, each with the share of the run at which it ends.
        shift: images are moved by at most this number of pixels.
        learning_rate: of AdamW; the matrices of blocks have `matrix_rate`.
    """

    architecture: str | None
    args: dict[str, Any]
    side: int
    epochs: int
    seed: int
    sides: tuple[tuple[float, int], ...] = ()
    shift: int = 2
    batch: int = 128
    learning_rate: float = 2e-3
    matrix_rate: float = 0.02
    weight_decay: float = 0.05

    def side_at(self, share: float) -> int:
        """Height and width of the images at this share of the run."""
        return next((side for end, side in self.sides if share < end), self.side)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing((3, self.side, self.side), (MEAN,) * 3, (STD,) * 3, "bicubic", 1.0)


VIT = {"embed_dim": 96, "depth": 12, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": CLASSES}
MEAN_POOLING = {"class_token": False, "global_pool": "avg"}
RESNET = {"stem_type": "deep", "stem_width": 16, "channels": [32, 64, 128, 128], "num_classes": CLASSES}

SETUPS = {
    "vit_100": Setup(
        architecture=None,
        args={"img_size": 30, "patch_size": 3, **VIT, **MEAN_POOLING},
        side=30,
        epochs=8,
        seed=0,
        sides=((0.65, 15), (0.85, 21)),
    ),
    "vit_196": Setup(
        architecture=None,
        args={"img_size": 28, "patch_size": 2, **VIT},
        side=28,
        epochs=3,
        seed=1,
        sides=((0.4, 20),),
    ),
    "cnn": Setup(architecture="resnet18", args=RESNET, side=56, epochs=8, seed=2, shift=4),
}


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal, for matrices `[m, n]`; q, k and v in one matrix are three.

    torch has it too, but computes in bfloat16, which is slow on a CPU without such instructions.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        del closure
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for matrix in group["params"]:
                buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                buffer.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(buffer, group["momentum"])
                parts = 3 if matrix.shape[0] == 3 * matrix.shape[1] else 1
                for one, change in zip(matrix.detach().chunk(parts), update.chunk(parts), strict=True):
                    shapes[one.shape].append((one, change))
            for (rows, columns), pairs in shapes.items():
                changes = orthogonal(torch.stack([change for _, change in pairs]))
                scale = max(1.0, rows / columns) ** 0.5
                for (one, _), change in zip(pairs, changes, strict=True):
                    one.mul_(1 - group["lr"] * group["decay"]).sub_(change, alpha=group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with singular values near 1, by five steps of Newton and Schulz: `[B, m, n]`."""
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if tall else matrices
    found = found / (found.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = found @ found.mT
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found.mT if tall else found


def build(setup: Setup) -> nn.Module:
    """The untrained model. A ViT takes images of other sizes too while it is trained."""
    if setup.architecture is not None:
        return create(setup.architecture, setup.args, "the setup").to(memory_format=torch.channels_last)
    from timm.layers import build_sincos2d_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**setup.args, weight_init="jax", dynamic_img_size=True)
    width, heads = model.embed_dim, setup.args["num_heads"]
    with torch.no_grad():
        grid = list(model.patch_embed.grid_size)
        model.get_parameter("pos_embed")[:, model.num_prefix_tokens :] = build_sincos2d_pos_embed(grid, width)[None]
        for block in model.blocks:
            attention: Any = block.attn
            query, key, value = attention.qkv.weight.chunk(3)
            for part in range(heads):
                rows = slice(part * width // heads, (part + 1) * width // heads)
                left, right = factors(0.7, 0.7, width, width // heads)
                query[rows], key[rows] = left.mT, right.mT
            left, right = factors(0.4, -0.4, width, width)
            attention.proj.weight.copy_(left)
            value.copy_(right.mT)
    return model


def factors(noise: float, identity: float, width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Factors `[width, rank]` whose product is near `noise * Z + identity * I`, with Z random of variance 1 / width."""
    target = noise * torch.randn(width, width) / width**0.5 + identity * torch.eye(width)
    left, values, right = torch.linalg.svd(target)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right[:rank].mT * root


def start_from(model: nn.Module, path: Path) -> None:
    """Copy the weights of another ViT; its position table and patch embedding are resampled."""
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    found, own = load_file(path), model.state_dict()
    embedding: Any = model.patch_embed
    prefix: Any = model.num_prefix_tokens
    tokens = found["pos_embed"].shape[1]
    table = found["pos_embed"][:, tokens - math.isqrt(tokens) ** 2 :]
    found["pos_embed"] = own["pos_embed"].clone()
    found["pos_embed"][:, prefix:] = resample_abs_pos_embed(table, list(embedding.grid_size), num_prefix_tokens=0)
    weight = found["patch_embed.proj.weight"]
    found["patch_embed.proj.weight"] = resample_patch_embed(weight, list(embedding.patch_size))
    for one, other in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        found.update({key.replace(one, other): found[key] for key in list(found) if key.startswith(one)})
    model.load_state_dict({key: found.get(key, value) for key, value in own.items()})
    print(f"start from {path}; new: {', '.join(sorted(own.keys() - found.keys())) or 'nothing'}", flush=True)


def load_split(setup: Setup, data_dir: Path | None, train: bool, count: int | None) -> tuple[Tensor, Tensor]:
    """The first `count` images after the preprocessing, uint8 `[n, S, S]`, and their labels, int64 `[n]`."""
    data = open_fashion(data_dir, train)
    transform = setup.preprocessing.transform()
    images = torch.empty(min(count or len(data), len(data)), setup.side, setup.side, dtype=torch.uint8)
    for index in range(len(images)):
        images[index] = transform(data.load(index)[0])[0].mul_(STD).add_(MEAN).mul_(255).round_()
    return images, torch.from_numpy(data.labels[: len(images)].astype(np.int64))


def augment(images: Tensor, shift: int, random: Generator) -> Tensor:
    """Flip half of the images `[B, S, S]` and move each by up to `shift` pixels; the border is black as theirs."""
    count, side, _ = images.shape
    offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=random)
    rows, columns = offsets + torch.arange(side)
    flipped = torch.rand(count, 1, generator=random) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    padded = pad(images, (shift,) * 4)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def model_input(images: Tensor, side: int) -> Tensor:
    """Normalised images, float32 `[B, 3, side, side]`."""
    scaled = images[:, None].float().div_(255).sub_(MEAN).div_(STD)
    if side != images.shape[-1]:
        mode = "bilinear" if side < images.shape[-1] else "bicubic"
        scaled = interpolate(scaled, (side, side), mode=mode, antialias=True)
    return scaled.expand(-1, 3, -1, -1)


class Teacher:
    """A trained model whose probabilities are learned, float32 `[B, classes]`."""

    def __init__(self, path: Path) -> None:
        loaded = load_checkpoint(str(path))
        self.model = loaded.model.to(memory_format=torch.channels_last)
        self.side = loaded.description.preprocessing.input_size[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model(model_input(images, self.side)).softmax(-1)


class Training:
    """The state of a run, and its checkpoint.

    Attributes:
        identity: what a checkpoint must agree on to be continued.
    """

    def __init__(
        self, setup: Setup, model: nn.Module, identity: dict[str, Any], rate: float, teacher: Teacher | None
    ) -> None:
        self.setup = setup
        self.model = model
        self.identity = identity
        self.teacher = teacher
        self.done = 0
        named = dict(model.named_parameters())
        matrices = {key: one for key, one in named.items() if key.startswith("blocks.") and one.ndim == 2}
        others = [one for key, one in named.items() if key not in matrices]
        decayed = [one for one in others if one.ndim > 1 and one is not named.get("pos_embed")]
        kept = [one for one in others if not any(one is other for other in decayed)]
        groups = [{"params": decayed, "weight_decay": setup.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adamw, rate * setup.learning_rate)]
        if matrices:
            matrix_rate = rate * setup.matrix_rate
            self.optimizers.append((Muon(matrices.values(), matrix_rate), matrix_rate))

    def backward(self, images: Tensor, labels: Tensor, side: int) -> float:
        logits = self.model(model_input(images, side))
        if self.teacher is None:
            loss = cross_entropy(logits, labels, label_smoothing=0.1)
        else:
            loss = (cross_entropy(logits, labels) + cross_entropy(logits, self.teacher(images))) / 2
        loss.backward()
        return loss.item()

    def epoch(self, images: Tensor, labels: Tensor) -> float:
        """Train for one epoch; returns the mean loss."""
        random = torch.Generator().manual_seed(1000 * self.setup.seed + self.done)
        steps = max(1, len(images) // self.setup.batch)
        order = torch.randperm(len(images), generator=random)
        losses = []
        self.model.train()
        for step in range(steps):
            share = (self.done * steps + step + 1) / (self.identity["epochs"] * steps + 1)
            for optimizer, rate in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(share / WARM_UP, (1 - share) / (1 - WARM_UP))
            chosen = order[step * self.setup.batch : (step + 1) * self.setup.batch]
            batch = augment(images[chosen], self.setup.shift, random)
            losses.append(self.backward(batch, labels[chosen], self.setup.side_at(share)))
            for optimizer, _ in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.done += 1
        return sum(losses) / steps

    def save(self, path: Path) -> None:
        state = {"identity": self.identity, "done": self.done, "model": self.model.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        with atomic_output(path, force=True) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if state["identity"] != self.identity:
            raise SystemExit(f"{path} is a checkpoint of another run: {state['identity']}, not {self.identity}")
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
        for (optimizer, _), stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        print(f"{path}: {self.done} epochs are done", flush=True)


def epochs_within(minutes: float, setup: Setup, model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """The number of epochs that fit, by the time of a few steps at each size of images."""
    probe = Training(setup, copy.deepcopy(model).train(), {}, 1.0, None)
    step = begin = 0.0
    for end, side in (*setup.sides, (1.0, setup.side)):
        seconds = []
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            probe.backward(images[: setup.batch], labels[: setup.batch], side)
            seconds.append(time.perf_counter() - start)
        step += (end - begin) * min(seconds)
        begin = end
    return max(1, int(minutes * 60 / (step * 1.1 * max(1, len(images) // setup.batch))))


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, side: int) -> float:
    model.eval()
    correct = 0
    for start in range(0, len(images), 250):
        logits = model(model_input(images[start : start + 250], side))
        correct += int((logits.argmax(-1) == labels[start : start + 250]).sum())
    return correct / len(images)


def save(tensors: Mapping[str, Tensor], name: str, setup: Setup, path: Path) -> None:
    """Write a checkpoint that states how to build the model."""
    description = ModelDescription(name, setup.architecture, setup.args, setup.preprocessing)
    document = json.dumps({"model": description.to_dict()})
    with atomic_output(path, force=True) as temporary:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": "pt", METADATA_KEY: document})
    print(f"{path}: {path.stat().st_size} bytes", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETUPS)
    parser.add_argument("--data-dir", type=Path, help="folder of the IDX files (default: the Debian package)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="number of epochs")
    length.add_argument("--minutes", type=float, help="time budget; the number of epochs is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="weights of another ViT to start from")
    parser.add_argument("--teacher", type=Path, help="checkpoint of a model to learn from")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="default: OUTPUT.ckpt")
    parser.add_argument("--output", type=Path, help="default: benchmarks/fashion/NAME.safetensors")
    parser.add_argument("--images", type=int, help="use the first N training images only")
    parser.add_argument("--test-images", type=int, help="use the first N test images only")
    return parser.parse_args()


def main() -> None:
    given = parse()
    torch.set_num_threads(given.threads)
    setup = SETUPS[given.name]
    output = given.output or OUTPUT / f"{given.name}.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = given.checkpoint or output.with_suffix(".ckpt")
    images, labels = load_split(setup, given.data_dir, True, given.images)
    test_images, test_labels = load_split(setup, given.data_dir, False, given.test_images)
    torch.manual_seed(setup.seed)
    model = build(setup)
    if given.start is not None:
        start_from(model, given.start)
    resumed = given.resume and checkpoint.is_file()
    if given.minutes and resumed:
        epochs = torch.load(checkpoint, weights_only=True)["identity"]["epochs"]
    elif given.minutes:
        epochs = epochs_within(given.minutes, setup, model, images, labels)
    else:
        epochs = given.epochs or setup.epochs
    teacher = None if given.teacher is None else Teacher(given.teacher)
    identity = {"name": given.name, "epochs": epochs, "images": len(images)}
    identity |= {"teacher": str(given.teacher), "rate": given.rate}
    run = Training(setup, model, identity, given.rate, teacher)
    if resumed:
        run.resume(checkpoint)
    while run.done < epochs:
        wall, used = time.perf_counter(), time.process_time()
        loss = run.epoch(images, labels)
        run.save(checkpoint)
        wall, used = time.perf_counter() - wall, time.process_time() - used
        every, side = 1 if run.done == epochs else 5, setup.side_at(run.done / epochs)
        top1 = accuracy(model, test_images[::every], test_labels[::every], side)
        words = f"epoch {run.done}/{epochs}  {side}x{side}  loss {loss:.3f}  top-1 {top1:.4f} of"
        print(f"{words} {len(test_labels[::every])}  {wall:.0f} s ({used:.0f} s of CPU)", flush=True)
    save(model.state_dict(), given.name, setup, output)


if __name__ == "__main__":
    main()
