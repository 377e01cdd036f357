"""UMT against vectors of the authors' code, against a naive implementation, and the keys of the real models.

`data/umt_retrieval` and `data/umt_qa` hold weights, inputs and results of the authors' UMT, `data/umt_vid_tldr` results
of vid-TLDR on the same weights and inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tiny_umt import (
    DEPTH,
    VARIANTS,
    Reference,
    compressed_umt,
    key_lists,
    naive_vision,
    reference,
    tensors_of,
    texts_for,
    tiny_umt,
    umt_clips,
    umt_recipe,
)
from torch import Tensor, nn
from torch.nn import functional

from repshift_cli.checkpoints.create import on_meta as meta_device
from repshift_cli.checkpoints.identify.match import identify
from repshift_cli.checkpoints.options import LoadOptions
from repshift_cli.evaluation.video_text.answering import rank_answers
from repshift_cli.evaluation.video_text.ranking import matching_scores, similarity
from repshift_cli.models import umt
from repshift_cli.models.bert import TextDecoder, TextEncoder, TextShape
from repshift_cli.models.umt import UmtModel, VisionShape, position_table
from repshift_cli.ops.tokens import Sized
from repshift_cli.reduction.compressed_model import CompressedModel
from repshift_cli.utils.progress import Silent

HIDDEN = 1e-5  # the authors' code in float32 and float64 differ by 1.4e-6
SCORES = 2e-6
MERGED_HIDDEN = 5e-5
"""Scaling entropies to 0..1 magnifies their last bits: merged by this model in float64, the tokens are up to 1.3e-5
away from the authors' float32, and up to 1.9e-5 from its own. Errors of `test_errors_are_detected` are above 2e-4."""

RETRIEVAL = reference("retrieval")
QA = reference("qa")
MERGED, _MERGED_METADATA = tensors_of("umt_vid_tldr.safetensors")
KEPT: dict[str, list[int]] = json.loads(_MERGED_METADATA["kept"])
FLOWS = {"flow_a": RETRIEVAL, "flow_b": RETRIEVAL, "qa": QA}

flows = pytest.mark.parametrize("flow", FLOWS)
retrieval_flows = pytest.mark.parametrize("flow", ["flow_a", "flow_b"])
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The last output of each module."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def vision_modules(model: UmtModel) -> dict[str, nn.Module]:
    """Modules by the names that the vectors give to their outputs."""
    encoder = model.vision_encoder.encoder
    blocks = {f"vision_block.{index}": block for index, block in enumerate(encoder.blocks)}
    return {"vision_patch_embed": encoder.patch_embed, **blocks}


def text_modules(model: UmtModel, name: str) -> dict[str, nn.Module]:
    # the last part of each layer: those that fuse are called part by part
    layers = {f"{name}_layer.{index}": layer.output for index, layer in enumerate(model.text_encoder.encoder["layer"])}
    return {f"{name}_embeddings": model.text_encoder.embeddings, **layers}


def every_pair(model: Any, texts: tuple[Tensor, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States after fusion `[videos, texts, L, C]` and matching logits `[videos, texts, 2]`."""
    hidden, mask = model.encode_text(*texts), texts[1]
    videos = tokens.split(1)  # one for all texts
    fused = [model.text_encoder.fuse(hidden, mask, video) for video in videos]
    return torch.stack(fused), torch.stack([model.match_logits(hidden, mask, video) for video in videos])


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestVision:
    @pytest.mark.parametrize("case", [RETRIEVAL, QA], ids=["retrieval", "qa"])
    def test_patches_blocks_and_the_last_norm(self, case: Reference) -> None:
        model, expected = case.model(), case.tensors
        with watched(vision_modules(model)) as seen:
            tokens = model.encode_video(expected["in/video"])
        assert len(seen) == 1 + case.vision["depth"]
        for name, value in seen.items():
            close(value, expected[f"out/{name}"], HIDDEN)
        close(tokens, expected["out/vision_embeds"], HIDDEN)

    @pytest.mark.parametrize("case", [RETRIEVAL, QA], ids=["retrieval", "qa"])
    def test_tokens_that_enter_the_first_block(self, case: Reference) -> None:
        model, entered = case.model(), []
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0].tokens))
        model.encode_video(case.tensors["in/video"])
        handle.remove()
        close(entered[0], case.tensors["out/vision_tokens_in"], HIDDEN)

    def test_positions_are_bit_identical(self) -> None:
        shape = VisionShape(**RETRIEVAL.vision)
        assert torch.equal(position_table(shape), RETRIEVAL.tensors["tables/pos_embed"])
        encoder = RETRIEVAL.model().vision_encoder.encoder
        assert torch.equal(encoder.positions, RETRIEVAL.tensors["tables/pos_embed"])
        assert torch.equal(encoder.img_positions, RETRIEVAL.tensors["tables/img_pos_embed"])

    def test_positions_of_a_checkpoint_with_fewer_frames(self) -> None:
        model = RETRIEVAL.model(checkpoint_frames=int(RETRIEVAL.metadata["checkpoint_frames"]))
        encoder, expected = model.vision_encoder.encoder, RETRIEVAL.tensors
        assert torch.equal(encoder.positions, expected["tables/pos_embed_ckpt_frames"])
        assert torch.equal(encoder.img_positions, expected["tables/img_pos_embed"])
        tokens = model.encode_video(expected["in/video"])
        close(tokens, expected["ckptframes/vision_embeds"], HIDDEN)
        close(model.pool(tokens), expected["ckptframes/pooled_vision_embeds"], HIDDEN)

    def test_a_single_image(self) -> None:
        model, expected = RETRIEVAL.model(), RETRIEVAL.tensors
        tokens = model.encode_video(expected["in/image"])
        close(tokens, expected["image/vision_embeds"], HIDDEN)
        close(model.pool(tokens), expected["image/pooled_vision_embeds"], HIDDEN)

    def test_explicit_attention_is_the_same(self) -> None:
        model, expected = RETRIEVAL.model(), RETRIEVAL.tensors
        for block in model.blocks:
            block.attn.fused_attn = False
        with watched(vision_modules(model)) as seen:
            close(model.encode_video(expected["in/video"]), expected["out/vision_embeds"], HIDDEN)
        for name, value in seen.items():
            close(value, expected[f"out/{name}"], HIDDEN)

    @pytest.mark.parametrize("case", [RETRIEVAL, QA], ids=["retrieval", "qa"])
    def test_the_naive_form_is_the_same_model(self, case: Reference) -> None:
        places = case.model().vision_encoder.encoder.positions[0].double()
        weights = {key: value.double() for key, value in case.weights.items() if value.is_floating_point()}
        for row, clip in enumerate(case.tensors["in/video"].double()):
            one = naive_vision(weights, clip, heads=case.vision["heads"], places=places)
            close(one.tokens.float(), case.tensors["out/vision_embeds"][row], HIDDEN)
            for index, block in enumerate(one.blocks):
                close(block.float(), case.tensors[f"out/vision_block.{index}"][row], HIDDEN)


class TestRetrieval:
    @pytest.mark.parametrize(("pooling", "start"), [("frames", "out"), ("all", "nokt")])
    def test_pooling_and_projection(self, pooling: umt.Pooling, start: str) -> None:
        model, expected = RETRIEVAL.model(), RETRIEVAL.tensors
        assert model.pooling == "frames"
        model.pooling = pooling
        tokens = model.encode_video(expected["in/video"])
        close(model.pool(tokens), expected[f"{start}/pooled_vision_embeds"], HIDDEN)
        with watched({"projection": model.vision_proj}) as seen:
            projected = model.project_video(tokens)
        close(projected, expected[f"{start}/vision_proj_l2"], HIDDEN)
        if start == "out":
            close(seen["projection"], expected["out/vision_proj"], HIDDEN)
        close(model(expected["in/video"]), expected[f"{start}/vision_proj_l2"].mean(1), HIDDEN)

    def test_text(self) -> None:
        model, expected = RETRIEVAL.model(), RETRIEVAL.tensors
        with watched({**text_modules(model, "text"), "text_proj": model.text_proj}) as seen:
            hidden = model.encode_text(expected["in/input_ids"], expected["in/attention_mask"])
            projected = model.project_text(hidden)
        assert set(seen) == {"text_embeddings", "text_layer.0", "text_layer.1", "text_proj"}
        for name, value in seen.items():
            close(value, expected[f"out/{name}"], HIDDEN)
        close(hidden, expected["out/text_embeds"], HIDDEN)
        close(hidden[:, 0], expected["out/pooled_text_embeds"], HIDDEN)
        close(projected, expected["out/text_proj_l2"], HIDDEN)

    @pytest.mark.parametrize(("pooling", "start"), [("frames", "out"), ("all", "nokt")])
    def test_similarity(self, pooling: umt.Pooling, start: str) -> None:
        model, expected = RETRIEVAL.model(), RETRIEVAL.tensors
        model.pooling = pooling
        videos = model.project_video(model.encode_video(expected["in/video"]))
        texts = model.project_text(model.encode_text(expected["in/input_ids"], expected["in/attention_mask"]))
        close(similarity(videos, texts), expected[f"{start}/sim_v2t"], SCORES)

    def test_fusion_and_matching(self) -> None:
        model, expected = RETRIEVAL.model(), RETRIEVAL.tensors
        texts = expected["in/input_ids"], expected["in/attention_mask"]
        tokens = model.encode_video(expected["in/video"])
        fused, logits = every_pair(model, texts, tokens)
        close(fused, expected["out/fusion_hidden"], HIDDEN)
        close(logits, expected["out/itm_logits"], SCORES)
        scores = model.match(model.encode_text(*texts), texts[1], tokens)
        close(scores, expected["out/itm_logits"][[0, 1], [0, 1], 1], SCORES)

    @pytest.mark.parametrize(
        ("case", "k", "pooling"), [("ktest", None, "frames"), ("full", 128, "frames"), ("full_nokt", 128, "all")]
    )
    def test_the_whole_evaluation(self, case: str, k: int | None, pooling: umt.Pooling) -> None:
        model = RETRIEVAL.model()
        model.pooling = pooling
        self.compare(model, f"eval/{case}/", RETRIEVAL.tensors, k or int(RETRIEVAL.metadata["k"]))

    def test_the_whole_evaluation_with_merged_tokens(self) -> None:
        self.compare(merging("flow_a").model, "flow_a/eval_", MERGED, int(RETRIEVAL.metadata["k"]))

    @staticmethod
    def compare(model: Any, start: str, expected: dict[str, Tensor], k: int) -> None:
        gallery = RETRIEVAL.tensors
        ids, mask = gallery["eval/input_ids"], gallery["eval/attention_mask"]
        tokens, hidden = model.encode_video(gallery["eval/video"]), model.encode_text(ids, mask)
        found = similarity(model.project_video(tokens), model.project_text(hidden))
        close(found, expected[f"{start}i2t_emb"], SCORES)
        close(found.T, expected[f"{start}t2i_emb"], SCORES)
        scores = matching_scores(model, found, hidden, mask, tokens, k=k, pair_batch=4, device="cpu", progress=Silent())
        close(scores.video_to_text, expected[f"{start}i2t_x"], SCORES)
        close(scores.text_to_video, expected[f"{start}t2i_x"], SCORES)

    @pytest.mark.parametrize("pair_batch", [1, 3, 64])
    def test_the_pair_batch_does_not_change_the_result(self, pair_batch: int) -> None:
        model, gallery = RETRIEVAL.model(), RETRIEVAL.tensors
        mask = gallery["eval/attention_mask"]
        found = matching_scores(
            model,
            gallery["eval/full/i2t_emb"],
            model.encode_text(gallery["eval/input_ids"], mask),
            mask,
            model.encode_video(gallery["eval/video"]),
            k=9,
            pair_batch=pair_batch,
            device="cpu",
            progress=Silent(),
        )
        close(found.video_to_text, gallery["eval/full/i2t_x"], SCORES)

    def test_texts_that_share_a_video(self) -> None:
        model, expected = RETRIEVAL.model(), RETRIEVAL.tensors
        ids, mask = expected["in/input_ids"], expected["in/attention_mask"]
        hidden, tokens = model.encode_text(ids, mask), model.encode_video(expected["in/video"])
        twice = model.match_logits(hidden.repeat(2, 1, 1), mask.repeat(2, 1), tokens)
        for video, logits in zip(tokens, twice.split(2), strict=True):
            close(logits, model.match_logits(hidden, mask, video.expand(2, -1, -1)), SCORES)


class TestAnswering:
    @pytest.fixture
    def asked(self) -> tuple[Any, Tensor]:
        """The model and the states of the questions."""
        model, expected = QA.model(), QA.tensors
        questions = expected["in/question_input_ids"], expected["in/question_attention_mask"]
        with torch.no_grad():
            return model, model.encode_question(*questions, model.encode_video(expected["in/video"]))

    def test_question(self) -> None:
        model, expected = QA.model(), QA.tensors
        tokens = model.encode_video(expected["in/video"])
        with watched(text_modules(model, "question")) as seen:
            states = model.encode_question(
                expected["in/question_input_ids"], expected["in/question_attention_mask"], tokens
            )
        assert len(seen) == 1 + QA.text["depth"]
        for name, value in seen.items():
            close(value, expected[f"out/{name}"], HIDDEN)
        close(states, expected["out/question_states"], HIDDEN)

    def test_the_first_token(self, asked: tuple[Any, Tensor]) -> None:
        (model, states), expected = asked, QA.tensors
        start = int(expected["in/answer_input_ids"][0, 0])
        found = model.first_token_probabilities(states, expected["in/question_attention_mask"], start)
        close(found, expected["out/start_logits"].softmax(-1), SCORES)
        close(found[:, expected["in/answer_input_ids"][:, 1]], expected["out/prob_first_token"], SCORES)
        close(found.sum(1), torch.ones(2), SCORES)

    def test_the_decoder(self, asked: tuple[Any, Tensor]) -> None:
        (model, states), expected = asked, QA.tensors
        ids, mask = expected["out/decoder_input_ids"], expected["out/decoder_attention_mask"]
        states, seen = (value.repeat_interleave(3, 0) for value in (states, expected["in/question_attention_mask"]))
        close(model.text_decoder(ids, mask, states, seen), expected["out/decoder_logits"], HIDDEN)
        close(model.answer_loss(states, seen, ids, mask).view(2, 3), expected["out/answer_loss"], HIDDEN)

    @pytest.mark.parametrize(("start", "k"), [("out", 3), ("all", 6)])
    def test_the_ranking(self, asked: tuple[Any, Tensor], start: str, k: int) -> None:
        (model, states), expected = asked, QA.tensors
        answers = expected["in/answer_input_ids"], expected["in/answer_attention_mask"]
        found = rank_answers(model, states, expected["in/question_attention_mask"], *answers, k=k, pair_batch=4)
        assert torch.equal(found.topk_ids, expected[f"{start}/topk_ids"])
        wanted = expected[f"{start}/log_probs_sum"].sort(dim=1, descending=True).values
        close(found.log_probs, wanted, HIDDEN)

    def test_the_decoder_is_causal(self, asked: tuple[Any, Tensor]) -> None:
        (model, states), expected = asked, QA.tensors
        ids, mask = expected["in/answer_input_ids"][:2].clone(), torch.ones(2, 5, dtype=torch.int64)
        before = model.text_decoder(ids, mask, states, expected["in/question_attention_mask"])
        ids[:, 3:] = 7
        after = model.text_decoder(ids, mask, states, expected["in/question_attention_mask"])
        close(after[:, :3], before[:, :3], HIDDEN)
        assert not torch.allclose(after[:, 3:], before[:, 3:], atol=1e-3)


def merging(flow: str, case: Reference | None = None) -> CompressedModel:
    """vid-TLDR in the authors' configuration."""
    first, second = KEPT[flow]
    layers = f"[{{layer: 0, keep_tokens: {first}}}, {{layer: 1, keep_tokens: {second}}}]"
    recipe = umt_recipe(layers, "{kind: attention_entropy}", "vid_tldr")
    return compressed_umt((case or FLOWS[flow]).model(), recipe)


class TestMerging:
    @flows
    @pytest.mark.parametrize("fused", [True, False])
    def test_every_block(self, flow: str, fused: bool) -> None:
        model = merging(flow).model
        for block in model.blocks:
            block.attn.fused_attn = fused
        with watched(vision_modules(model)) as seen:
            tokens = model.encode_video(FLOWS[flow].tensors["in/video"])
        first, second = KEPT[flow]
        for index, count in enumerate([first, second, second, second]):
            value = seen[f"vision_block.{index}"]
            assert value.shape == (2, count, 48)
            close(value, MERGED[f"{flow}/vision_block.{index}"], MERGED_HIDDEN)
        close(tokens, MERGED[f"{flow}/vision_embeds"], MERGED_HIDDEN)

    @flows
    def test_sizes(self, flow: str) -> None:
        model, sizes = merging(flow).model, []
        for block in model.blocks:
            block.register_forward_hook(lambda _, args, output: sizes.append(output.sizes))
        model.encode_video(FLOWS[flow].tensors["in/video"])
        for found, expected in zip(sizes, [f"{flow}/size.0", *[f"{flow}/size.1"] * 3], strict=True):
            close(found, MERGED[expected].squeeze(2), MERGED_HIDDEN)

    @flows
    def test_which_tokens_are_kept(self, flow: str) -> None:
        kept = merging(flow).trace(FLOWS[flow].tensors["in/video"]).kept
        left = torch.arange(64).expand(2, -1)
        for layer in (0, 1):
            whole = 2 * MERGED[f"{flow}/unm_idx.{layer}"].squeeze(2)
            odd = torch.arange(1, left.shape[1], 2).expand(2, -1)
            left = left.gather(1, torch.cat((whole, odd), dim=1))
            assert kept[layer].sort(dim=1).values.tolist() == left.sort(dim=1).values.tolist()

    @retrieval_flows
    def test_projection_similarity_and_matching(self, flow: str) -> None:
        model, expected = merging(flow).model, RETRIEVAL.tensors
        texts = expected["in/input_ids"], expected["in/attention_mask"]
        tokens = model.encode_video(expected["in/video"])
        close(model.pool(tokens), MERGED[f"{flow}/pooled_vision_embeds"], HIDDEN)
        close(model.project_video(tokens), MERGED[f"{flow}/vision_proj_l2"], HIDDEN)
        embedded = model.project_text(model.encode_text(*texts))
        close(similarity(model.project_video(tokens), embedded), MERGED[f"{flow}/sim_v2t"], SCORES)
        fused, logits = every_pair(model, texts, tokens)
        close(fused, MERGED[f"{flow}/fusion_hidden"], HIDDEN)
        close(logits, MERGED[f"{flow}/itm_logits"], SCORES)

    def test_questions_and_answers(self) -> None:
        model, expected = merging("qa").model, QA.tensors
        mask = expected["in/question_attention_mask"]
        states = model.encode_question(
            expected["in/question_input_ids"], mask, model.encode_video(expected["in/video"])
        )
        close(states, MERGED["qa/question_states"], HIDDEN)
        answers = expected["in/answer_input_ids"], expected["in/answer_attention_mask"]
        first = model.first_token_probabilities(states, mask, int(answers[0][0, 0]))[:, answers[0][:, 1]]
        close(first, MERGED["qa/prob_first_token"], SCORES)
        found = rank_answers(model, states, mask, *answers, k=3)
        assert torch.equal(found.topk_ids, MERGED["qa/topk_ids"])
        close(found.topk_probs, MERGED["qa/topk_probs"], HIDDEN)
        close(found.log_probs, MERGED["qa/log_probs_sum"].sort(dim=1, descending=True).values, HIDDEN)

    def test_dense_is_the_dense_model(self) -> None:
        model, expected = merging("flow_a"), RETRIEVAL.tensors
        with model.dense() as dense:
            assert isinstance(dense, UmtModel)
            close(dense.encode_video(expected["in/video"]), expected["out/vision_embeds"], HIDDEN)
            found = dense.project_video(dense.encode_video(expected["in/video"]))  # type: ignore[attr-defined]
        close(found, expected["nokt/vision_proj_l2"], HIDDEN)

    @pytest.mark.parametrize("error", ["sizes are left out", "the key has a bias", "pooled by size"])
    def test_errors_are_detected(self, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = merging("flow_a").model
        block = umt.Attention.forward
        if error == "sizes are left out":
            monkeypatch.setattr(umt.Attention, "forward", lambda self, tokens, sizes=None: block(self, tokens))
        elif error == "the key has a bias":
            for each in model.blocks:
                each.attn.qkv.register_forward_hook(lambda module, args, output: output + 0.05)
        tokens = model.encode_video(RETRIEVAL.tensors["in/video"])
        pooled = model.pool(tokens)
        if error == "pooled by size":
            sizes = MERGED["flow_a/size.1"]
            pooled = model.vision_encoder.pool_norm((tokens * sizes).sum(1, keepdim=True) / sizes.sum(1, keepdim=True))
        assert (pooled - MERGED["flow_a/pooled_vision_embeds"]).abs().max() > 20 * HIDDEN


class TestWrittenOut:
    @each_variant
    def test_float64(self, variant: str) -> None:
        model = tiny_umt(**VARIANTS[variant]).double()
        clips, places = umt_clips(model), model.vision_encoder.encoder.positions[0]
        with watched(vision_modules(model)) as seen:
            tokens = model.encode_video(clips)
        for row, clip in enumerate(clips):
            one = naive_vision(model.state_dict(), clip, heads=model.vision.heads, places=places)
            close(tokens[row], one.tokens, 1e-11)
            for index in range(DEPTH):
                close(seen[f"vision_block.{index}"][row], one.blocks[index], 1e-11)

    def test_a_token_of_size_two_counts_as_two(self) -> None:
        """Attention to a token of size two equals attention to two equal tokens, fused or not."""
        block = tiny_umt().double().blocks[1]
        tokens = torch.randn(2, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        twice = torch.cat((tokens, tokens[:, 3:4]), dim=1)
        sizes = torch.ones(2, 9)
        sizes[:, 3] = 2
        for fused in (True, False):
            block.attn.fused_attn = fused
            found = block(Sized(tokens, sizes))
            close(found.tokens, block(Sized(twice)).tokens[:, :9], 1e-12)
            assert torch.equal(found.sizes, sizes)
            assert not torch.allclose(found.tokens, block(Sized(tokens)).tokens, atol=1e-3)

    @pytest.mark.parametrize("pooling", ["frames", "all"])
    def test_pooling_by_hand(self, pooling: umt.Pooling) -> None:
        model: Any = tiny_umt()
        model.pooling = pooling
        tokens = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(0))
        parts = [tokens[:, 16 * frame : 16 * frame + 16] for frame in range(3)] if pooling == "frames" else [tokens]
        means = torch.stack([part.mean(1) for part in parts], dim=1)
        expected = functional.layer_norm(
            means, (64,), model.vision_encoder.pool_norm.weight, model.vision_encoder.pool_norm.bias, 1e-6
        )
        close(model.pool(tokens), expected, 1e-6)

    def test_incomplete_frames_are_pooled_over_all_tokens(self) -> None:
        assert tiny_umt().pool(torch.randn(2, 47, 64)).shape == (2, 1, 64)


class TestText:
    def test_padding_does_not_change_the_result(self) -> None:
        model: Any = tiny_umt()
        ids, mask = texts_for(2, 7)
        tokens = model.encode_video(umt_clips(model))
        hidden = model.encode_text(ids, mask)
        alone = model.encode_text(ids[1:, :5], mask[1:, :5])
        close(hidden[1:, :5], alone, 1e-5)
        scores = model.match(hidden, mask, tokens)
        close(scores[1:], model.match(alone, mask[1:, :5], tokens[1:]), 1e-5)
        ids[1, 5:] = 9
        assert torch.equal(model.match(model.encode_text(ids, mask), mask, tokens), scores)

    def test_keys_and_values_of_another_width(self) -> None:
        model: Any = tiny_umt(text={"width": 32, "heads": 4})
        (first, *crossing) = model.text_encoder.encoder["layer"]
        assert not hasattr(first, "crossattention")
        for layer in crossing:
            shapes = [layer.crossattention.self.get_parameter(f"{name}.weight").shape for name in ("query", "key")]
            assert shapes == [(32, 32), (32, 64)]
        ids, mask = texts_for()
        assert model.match(model.encode_text(ids, mask), mask, model.encode_video(umt_clips(model))).shape == (2,)

    def test_the_encoder_is_its_lower_and_its_upper_layers(self) -> None:
        model: Any = tiny_umt()
        ids, mask = texts_for()
        memory = model.encode_video(umt_clips(model))
        fused = model.text_encoder.fuse(model.text_encoder.read(ids, mask), mask, memory)
        assert torch.equal(model.text_encoder(ids, mask, memory), fused)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fusion_layer": 0}, "invalid fusion_layer=0: must be between 0 and depth=3"),
            ({"fusion_layer": 3}, "invalid fusion_layer=3: must be between 0 and depth=3"),
            ({"depth": -1}, "invalid fusion_layer=1: must be between 0 and depth=-1"),
            ({"heads": 5}, "invalid heads=5: must divide width=64"),
        ],
    )
    def test_invalid_sizes(self, changes: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tiny_umt(text=changes)

    def test_the_decoder_has_the_layers_above_the_fusion_layer(self) -> None:
        shape = TextShape(vocabulary=20, width=32, depth=5, heads=2, hidden=40, positions=8, fusion_layer=3)
        decoder, encoder = TextDecoder(shape), TextEncoder(shape, memory=48)
        assert len(decoder.bert["encoder"]["layer"]) == 2  # type: ignore[index, arg-type]
        assert len(encoder.encoder["layer"]) == 5  # type: ignore[arg-type]


class TestForm:
    @pytest.mark.parametrize(
        "shape",
        [(3, 3, 24, 32), (3, 3, 24, 24), (2, 3, 32, 32), (4, 3, 32, 32), (3, 1, 32, 32), (3, 32, 32), (1, 3, 40, 40)],
    )
    def test_other_clips_raise(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"invalid clip shape .*: must be \(3, 3, 32, 32\)"):
            tiny_umt()(torch.zeros(2, *shape))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"img_size": 30}, "invalid img_size=30: must be a multiple of patch_size=8"),
            ({"heads": 5}, "invalid heads=5: must divide width=64"),
            ({"heads": 0}, "at least 1"),
            ({"frames": -1}, "at least 1"),
            ({"depth": 0}, "at least 1"),
            ({"patch_size": 0}, "at least 1"),
            ({"checkpoint_frames": 0}, "invalid checkpoint_frames=0: must be at least 1"),
            ({"frames": 10**9}, "tokens, must be at most 32768"),
            ({"checkpoint_frames": 2**12}, "65536 tokens, must be at most 32768"),
            ({"img_size": 8 * 10**6}, "tokens, must be at most 32768"),
        ],
    )
    def test_invalid_sizes(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tiny_umt(**options)

    def test_forward(self) -> None:
        model: Any = tiny_umt()
        clips = umt_clips(model)
        assert torch.equal(model(clips), model.project_video(model.encode_video(clips)).mean(1))
        model = tiny_umt(embed_dim=0)
        assert torch.equal(model(clips), model.encode_video(clips).mean(1))

    @each_variant
    def test_restore_buffers(self, variant: str) -> None:
        model, other = tiny_umt(**VARIANTS[variant]), tiny_umt(**VARIANTS[variant])
        for buffer in other.buffers():
            if buffer.is_floating_point():
                buffer.fill_(7)
        other.restore_buffers()
        wanted, found = dict(model.named_buffers()), dict(other.named_buffers())
        assert list(wanted) == list(found)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())

    def test_interpolation_does_not_change_single_images(self) -> None:
        shape = {"img_size": 32, "patch_size": 8, "width": 64}
        plain = position_table(VisionShape(frames=1, **shape))
        assert torch.equal(position_table(VisionShape(frames=1, checkpoint_frames=9, **shape)), plain)
        same = position_table(VisionShape(frames=5, checkpoint_frames=5, **shape))
        assert torch.equal(same, position_table(VisionShape(frames=5, **shape)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        model: Any = tiny_umt()
        clips, texts = umt_clips(model), texts_for()
        wanted = model(clips)
        model.to(dtype)
        tokens = model.encode_video(clips.to(dtype))
        assert tokens.dtype == model(clips.to(dtype)).dtype == dtype
        assert model.match(model.encode_text(*texts), texts[1], tokens).isfinite().all()
        assert (model(clips.to(dtype)).float() - wanted).abs().max() < 0.05

    def test_clips_of_a_batch_are_independent(self) -> None:
        model: Any = tiny_umt()
        clips = umt_clips(model, 4)
        together = model.encode_video(clips)
        others = model.encode_video(torch.cat((clips[:1], torch.full_like(clips[1:], 3.0))))
        assert torch.equal(others[0], together[0])
        for row, clip in enumerate(clips):
            close(model.encode_video(clip.unsqueeze(0))[0], together[row], 1e-5)


def on_meta(name: str, **changes: Any) -> UmtModel:
    with meta_device():
        return umt.create(name, **changes)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def official_state(name: str) -> dict[str, Tensor]:
    """The tensors of one of the authors' files, without values."""
    listed = key_lists()[name].items()
    return {key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in listed}


class TestOfficialKeys:
    @pytest.mark.parametrize(("name", "listed", "count"), [("umt_base", "retrieval", 397), ("umt_base_qa", "qa", 479)])
    def test_names_shapes_and_types(self, name: str, listed: str, count: int) -> None:
        found, expected = on_meta(name).state_dict(), official_state(listed)
        assert len(found) == len(expected) == count
        assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
            key: (value.shape, value.dtype) for key, value in expected.items()
        }

    @pytest.mark.parametrize(("name", "count"), [("umt_base", 202_411_267), ("umt_base_qa", 254_435_898)])
    def test_parameters(self, name: str, count: int) -> None:
        """Word embeddings and bias of the decoder are shared with its head, although files hold both twice."""
        assert parameter_count(on_meta(name)) == count

    def test_the_pretraining_checkpoint(self) -> None:
        state = official_state("pretraining")
        assert len(state) == 580
        identity = identify(state, "b16_25m.pth", LoadOptions(), "b16_25m")
        assert (identity.name, identity.architecture) == ("umt_base", "umt")
        expected = {key: value.shape for key, value in on_meta("umt_base").state_dict().items()}
        assert {key: value.shape for key, value in identity.tensors.items()} == expected
        assert f"left out {580 - 397} tensors that only pretraining uses" in identity.notes

    @pytest.mark.parametrize("name", umt.MODELS)
    def test_every_model_is_identified_by_its_tensors(self, name: str) -> None:
        identity = identify(dict(on_meta(name).state_dict()), "weights.pth", LoadOptions(), "weights")
        vision, text, embed_dim = umt.MODELS[name]
        assert identity.name == name
        assert identity.args == {"vision": asdict(vision), "text": asdict(text), "embed_dim": embed_dim}
        assert identity.preprocessing.shape == (12, 3, 224, 224)

    def test_the_large_model_by_hand(self) -> None:
        model, width, hidden, layers = on_meta("umt_large"), 1024, 4096, 24
        norm, mlp = 2 * width, 2 * width * hidden + width + hidden
        vision = layers * (4 * width**2 + 3 * width + 2 * norm + mlp) + 3 * 16 * 16 * width + width + norm
        assert parameter_count(model.vision_encoder) == vision + norm  # pooling
        attention = 4 * (width**2 + width) + norm
        text = layers * (attention + mlp + norm) + 5 * attention + (30522 + 512 + 2) * width + norm
        assert parameter_count(model.text_encoder) == text
        assert parameter_count(model) == vision + norm + text + 2 * (width + 1) * 768 + 2 * (width + 1) + 1

    def test_changes(self) -> None:
        model = on_meta("umt_base", img_size=384, frames=4, checkpoint_frames=2)
        assert model.vision.tokens == 4 * 24 * 24
        assert model.vision_encoder.encoder.positions.shape == (1, 2304, 768)
        assert model.pretrained_cfg["frames"] == 4
        assert model.img_size == (384, 384)
