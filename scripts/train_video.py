"""Train the built-in video models on the built-in moving shapes, on a CPU, in about an hour.

    python scripts/train_video.py

One vision and one text encoder learn both tasks: retrieval by a contrastive loss and a matching loss with the hardest
negative of the batch, question answering by the decoder's loss (UMT, arXiv 2303.16058, sections 3.2 and 4.3). A second,
temporary head reads each token in the beginning (which shape covers its patch, in which colour, moving where), as the
image models have one; it is not stored. The result is stored under the authors' keys, in a file of the encoders and one
of the rest of each model.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from store_builtin import ASSETS, store
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from repshift_cli.checkpoints.loaded import ModelDescription
from repshift_cli.data.builtin import moving_shapes as world
from repshift_cli.data.preprocessing import Preprocessing
from repshift_cli.data.video.tokenizer import Tokenizer
from repshift_cli.models.bert import TextShape
from repshift_cli.models.umt import UmtAnswering, UmtRetrieval, VisionShape

TRAIN_SEED = 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE = 0.07
LONGEST_TEXT, LONGEST_ANSWER = 32, 5
PATCH_LOSS_SHARE = 0.6


@dataclass(frozen=True)
class Setup:
    vision: VisionShape
    text: TextShape
    embed_dim: int = 64
    steps: int = 2500
    batch: int = 48
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


class Student(nn.Module):
    """Both models on shared encoders, and the head that reads each token."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.retrieval = UmtRetrieval(setup.vision, setup.text, setup.embed_dim)
        self.retrieval.pooling = "all"
        self.answering = UmtAnswering(setup.vision, setup.text, tied=False)
        self.answering.vision_encoder.encoder = self.retrieval.vision_encoder.encoder
        self.answering.text_encoder = self.retrieval.text_encoder
        outputs = len(world.SHAPES) + len(world.COLOURS) + len(world.MOTIONS) + 1
        self.reader = nn.Linear(setup.vision.width, outputs)


@dataclass
class Batch:
    video: Tensor  # [B, T, 3, H, W]
    captions: tuple[Tensor, Tensor]  # ids, mask
    questions: tuple[Tensor, Tensor]
    answers: tuple[Tensor, Tensor]
    content: Tensor  # int64 [B, N, 3]: shape, colour and motion at each token, -1 for background


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=Setup.steps)
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--checkpoint", type=Path, help="keep the state here, and go on from it")
    options = parser.parse_args()
    with world.vocabulary_file() as path:
        tokenizer = Tokenizer(path)
    vision = VisionShape(img_size=48, frames=6, patch_size=8, width=96, depth=6, heads=4, hidden=384)
    text = TextShape(tokenizer.size, width=96, depth=4, heads=4, hidden=384, positions=32, fusion_layer=2)
    setup = Setup(vision, text, steps=options.steps)
    student = train(setup, tokenizer, options.checkpoint)
    save(student, setup, options.output)


def train(setup: Setup, tokenizer: Tokenizer, keep: Path | None) -> Student:
    torch.manual_seed(setup.seed)
    student = Student(setup)
    decayed = [parameter for parameter in student.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in student.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": setup.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    begin = 0
    if keep and keep.exists():
        state = torch.load(keep, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    started, totals = time.monotonic(), np.zeros(5)
    for step in range(begin, setup.steps):
        student.train()
        share = step / setup.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, setup)
        batch = draw(step * setup.batch, setup, tokenizer)
        losses = all_losses(student, batch, tokenizer)
        weight = max(0.0, 1.0 - share / PATCH_LOSS_SHARE)
        loss = losses["contrast"] + losses["match"] + losses["answer"] + weight * losses["read"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        totals += [loss.item(), *(losses[key].item() for key in ("contrast", "match", "answer", "read"))]
        if step % 25 == 24:
            shown = " ".join(f"{value:.3f}" for value in totals / 25)
            print(
                f"{step + 1} {time.monotonic() - started:.0f} s  loss contrast match answer read: {shown}", flush=True
            )
            totals[:] = 0
        if step % 250 == 249:
            print(f"  check: {check(student, setup, tokenizer)}", flush=True)
            if keep:
                state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, keep.with_suffix(".new"))
                keep.with_suffix(".new").replace(keep)
    return student.eval()


def learning_rate(share: float, setup: Setup) -> float:
    warm = min(1.0, share / 0.04 + 0.01)
    return setup.learning_rate * warm * (0.5 * (1 + math.cos(math.pi * share)) + 0.01)


def draw(start: int, setup: Setup, tokenizer: Tokenizer, seed: int = TRAIN_SEED) -> Batch:
    rng = np.random.default_rng([seed, start, 1])
    scenes = [world.scene(start + index, seed) for index in range(setup.batch)]
    frames = np.stack([world.render(one, setup.vision.frames, setup.vision.img_size) for one in scenes])
    video = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255
    video = (video - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    # what an encoder of videos does to pixels is a little noise
    video = video + 0.05 * torch.from_numpy(rng.standard_normal(video.shape, dtype=np.float32))
    asked = [world.questions(one)[rng.integers(len(world.questions(one)))] for one in scenes]
    return Batch(
        video,
        tokenizer.texts([world.caption(one) for one in scenes], LONGEST_TEXT),
        tokenizer.texts([one.question for one in asked], LONGEST_TEXT),
        tokenizer.answers([one.answer for one in asked], LONGEST_ANSWER),
        torch.from_numpy(np.stack([content(one, setup.vision) for one in scenes])),
    )


def content(scene: world.Scene, shape: VisionShape) -> np.ndarray:
    """Shape, colour and motion at the middle of each patch, int64 `[N, 3]`; -1 for background."""
    middles = (np.arange(shape.side) + 0.5) / shape.side
    found = np.full((shape.frames, shape.side, shape.side, 3), -1, dtype=np.int64)
    for one in scene.objects:
        look = (world.SHAPES.index(one.shape), world.COLOURS.index(one.colour), world.MOTIONS.index(one.motion))
        for frame, (x, y) in enumerate(one.centres(shape.frames)):
            inside = (np.abs(middles[:, None] - y) < one.size / 2) & (np.abs(middles[None, :] - x) < one.size / 2)
            found[frame][inside] = look
    return found.reshape(-1, 3)


def all_losses(student: Student, batch: Batch, tokenizer: Tokenizer) -> dict[str, Tensor]:
    retrieval, answering = student.retrieval, student.answering
    tokens = retrieval.encode_video(batch.video)
    hidden = retrieval.encode_text(*batch.captions)
    videos, texts = retrieval.project_video(tokens).mean(1), retrieval.project_text(hidden)
    same = videos @ texts.T
    targets = torch.arange(len(same))
    contrast = (cross_entropy(same / TEMPERATURE, targets) + cross_entropy(same.T / TEMPERATURE, targets)) / 2
    states = answering.encode_question(*batch.questions, tokens)
    ids, mask = batch.answers
    answer = answering.answer_loss(states, batch.questions[1], ids, mask).mean()
    return {
        "contrast": contrast,
        "match": matching_loss(retrieval, same.detach(), tokens, hidden, batch.captions[1]),
        "answer": answer,
        "read": reading_loss(student.reader(tokens), batch.content),
    }


def matching_loss(model: UmtRetrieval, same: Tensor, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """Each pair, each video with a wrong text and each text with a wrong video, drawn by how alike they look."""
    weights = (same / TEMPERATURE).softmax(1).fill_diagonal_(0) + 1e-6
    text_for_video, video_for_text = (torch.multinomial(each, 1).squeeze(1) for each in (weights, weights.T))
    here = torch.arange(len(same))
    text = torch.cat((here, text_for_video, here))
    video = torch.cat((here, here, video_for_text))
    logits = model.match_logits(hidden[text], mask[text], tokens[video])
    return cross_entropy(logits, (text == video).long())


def reading_loss(logits: Tensor, content: Tensor) -> Tensor:
    """What each token shows; empty patches count little, since most are."""
    parts = logits.split((1, len(world.SHAPES), len(world.COLOURS), len(world.MOTIONS)), dim=-1)
    busy = content[..., 0] >= 0
    loss = nn.functional.binary_cross_entropy_with_logits(parts[0].squeeze(-1), busy.float())
    for index, part in enumerate(parts[1:]):
        loss = loss + cross_entropy(part[busy], content[..., index][busy])
    return loss


@torch.no_grad()
def check(student: Student, setup: Setup, tokenizer: Tokenizer) -> dict[str, float]:
    """Share of 4 batches of other scenes that find their caption among the batch, and that are answered right."""
    student.eval()
    found, right, total = 0, 0, 0
    answers = tokenizer.answers(world.ANSWERS, LONGEST_ANSWER).ids[:, 1]
    for index in range(4):
        batch = draw(index * setup.batch, setup, tokenizer, seed=77)
        tokens = student.retrieval.encode_video(batch.video)
        texts = student.retrieval.project_text(student.retrieval.encode_text(*batch.captions))
        same = student.retrieval.project_video(tokens).mean(1) @ texts.T
        states = student.answering.encode_question(*batch.questions, tokens)
        first = student.answering.first_token_probabilities(states, batch.questions[1], tokenizer.start)
        found += int((same.argmax(1) == torch.arange(len(same))).sum())
        right += int((answers[first[:, answers].argmax(1)] == batch.answers[0][:, 1]).sum())
        total += len(same)
    return {"vtc": found / total, "answers": right / total}


def save(student: Student, setup: Setup, folder: Path) -> None:
    size = (3, setup.vision.img_size, setup.vision.img_size)
    preprocessing = Preprocessing(size, MEAN, STD, "bicubic", 1.0, "squash", frames=setup.vision.frames)
    models = {"umt-shapes": student.retrieval.state_dict(), "umt-shapes-qa": student.answering.state_dict()}
    first, second = models.values()
    shared = {key for key in first.keys() & second.keys() if torch.equal(first[key], second[key])}
    store(folder / "umt_encoders.safetensors", {key: first[key] for key in shared})
    for name, tensors in models.items():
        embed_dim = setup.embed_dim if name == "umt-shapes" else 0
        sizes = {"vision": asdict(setup.vision), "text": asdict(setup.text), "embed_dim": embed_dim}
        description = ModelDescription(name, "umt", {**sizes, "pooling": "all"}, preprocessing)
        own = {key: value for key, value in tensors.items() if key not in shared}
        store(folder / f"{name.replace('-', '_')}.safetensors", own, description)


if __name__ == "__main__":
    main()
