"""Blocks that run their parts directly compute the same bits, and pass by nothing that somebody has put there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from timm.layers import Attention, LayerNorm, LayerScale, Mlp
from timm.models.vision_transformer import Block, ResPostBlock
from tiny import KEEP_ALL, VARIANTS, compressed, images, make_recipe, tiny_vit
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from repshift_cli.attach import CompressedModel
from repshift_cli.attention import Backend
from repshift_cli.backends import attention_mode
from repshift_cli.measure import peak_memory
from repshift_cli.models import timm_block
from repshift_cli.models.direct import is_plain, may_pass_by, run, run_over
from repshift_cli.models.timm_attention import FlexibleAttention
from repshift_cli.models.timm_block import DirectBlock, run_directly

OPTIONS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "dropout": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.1, "drop_path_rate": 0.2, "drop_rate": 0.1},
    "norm_of_torch": {"norm_layer": nn.LayerNorm},
    "norm_of_timm": {"norm_layer": LayerNorm},
    "rms_norm": {"norm_layer": nn.RMSNorm},
    "relu": {"act_layer": nn.ReLU},
    "gelu_by_tanh": {"act_layer": lambda: nn.GELU(approximate="tanh")},
    "norms_between": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
}


def both_ways(model: CompressedModel, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` returns where parts are run directly, and by the library's own code."""
    assert any(type(block) is DirectBlock for block in model.model.blocks)
    direct = run()
    with model.own_code():
        assert not any(type(block) is DirectBlock for block in model.model.blocks)
        return direct, run()


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    found: Tensor = model(images())
    return found


@contextmanager
def seen_calls() -> Iterator[list[nn.Module]]:
    """Every module that is called in the usual way, by a hook on all of them."""
    calls: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, output: calls.append(module))
    try:
        yield calls
    finally:
        handle.remove()


class TestBits:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_as_by_its_own_code(self, options: dict[str, Any], dtype: torch.dtype) -> None:
        recipe = make_recipe(metric="{kind: representation_shift, operation: block}")
        model = compressed(tiny_vit(**options), recipe).to(dtype)
        if options.get("block_fn", Block) is not Block:
            assert not any(type(block) is DirectBlock for block in model.model.blocks)
            return
        with torch.inference_mode():
            direct, own = both_ways(model, lambda: model(images().to(dtype)))
        assert torch.equal(direct, own)

    @pytest.mark.parametrize(
        "options", [{}, OPTIONS["dropout"], OPTIONS["layer_scale"]], ids=["plain", "drop", "scale"]
    )
    def test_training(self, options: dict[str, Any]) -> None:
        model = compressed(tiny_vit(**options)).train()

        def gradients() -> list[Tensor]:
            model.zero_grad()
            torch.manual_seed(3)
            model(images()).square().sum().backward()
            return [part.grad.clone() for part in model.parameters() if part.grad is not None]

        direct, own = both_ways(model, gradients)  # by its own code both times
        assert len(direct) == len(own) > 20
        assert all(torch.equal(one, other) for one, other in zip(direct, own, strict=True))

    def test_dropout_without_gradients(self) -> None:
        model = compressed(tiny_vit(**OPTIONS["dropout"])).train()

        def dropped() -> Tensor:
            torch.manual_seed(3)
            return answer(model)

        direct, own = both_ways(model, dropped)
        assert torch.equal(direct, own)
        assert not torch.equal(direct, answer(model.eval()))

    @pytest.mark.parametrize("mode", ["auto", "sdpa", "sdpa:math", "explicit"])
    def test_every_attention(self, mode: Backend) -> None:
        model = compressed(tiny_vit(qk_norm=True))
        with attention_mode(model, mode):
            direct, own = both_ways(model, lambda: answer(model))
        assert torch.equal(direct, own)

    @pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_attn_norm": True}], ids=str)
    def test_tokens_with_sizes(self, options: dict[str, Any]) -> None:
        model = compressed(tiny_vit(**options), make_recipe(reducer="merge"))
        assert all(type(block.attn) is FlexibleAttention for block in model.model.blocks)
        direct, own = both_ways(model, lambda: answer(model))
        assert torch.equal(direct, own)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_mapped_over_images(self) -> None:
        model = compressed()
        mapped = torch.no_grad()(lambda: torch.vmap(model)(images().unsqueeze(1)))
        direct, own = both_ways(model, mapped)
        assert torch.equal(direct, own)

    def test_autocast(self) -> None:
        model = compressed()
        with torch.autocast("cpu", torch.bfloat16):
            direct, own = both_ways(model, lambda: answer(model))
        assert direct.dtype == own.dtype
        assert torch.equal(direct, own)

    def test_all_kept_is_the_dense_model(self) -> None:
        dense = tiny_vit()
        with torch.inference_mode():
            expected = dense(images())
            assert torch.equal(compressed(dense, make_recipe(KEEP_ALL))(images()), expected)

    @pytest.mark.parametrize("grad", [False, True], ids=["without_gradients", "with_gradients"])
    def test_no_images(self, grad: bool) -> None:
        model = compressed()
        with torch.set_grad_enabled(grad):
            assert model(images()[:0]).shape == (0, 10)

    def test_a_mask(self) -> None:
        block = tiny_vit().blocks[0]
        tokens, mask = torch.randn(2, 17, 32), torch.randn(17, 17)
        with torch.no_grad():
            expected = block(tokens, attn_mask=mask)
            run_directly([block], on=True)
            assert torch.equal(block(tokens, attn_mask=mask), expected)
            assert not torch.equal(block(tokens), expected)


class TestWhichBlocks:
    def test_only_inside_a_compressed_model(self) -> None:
        dense = tiny_vit()
        model = compressed(dense)
        assert {type(block) for block in dense.blocks} == {DirectBlock}
        with model.dense():
            assert {type(block) for block in dense.blocks} == {Block}
            with model.dense():
                pass
            assert {type(block) for block in dense.blocks} == {Block}
        assert {type(block) for block in dense.blocks} == {DirectBlock}
        model.detach()
        assert {type(block) for block in dense.blocks} == {Block}
        with model.own_code():
            pass
        assert {type(block) for block in dense.blocks} == {Block}

    def test_detached_inside_a_context(self) -> None:
        for context in (CompressedModel.own_code, CompressedModel.dense):
            model = compressed()
            with context(model):
                model.detach()
            assert {type(block) for block in model.model.blocks} == {Block}

    def test_an_error_inside_leaves_nothing_behind(self) -> None:
        model = compressed()
        with pytest.raises(ZeroDivisionError), model.dense():
            _ = 1 / 0
        assert {type(block) for block in model.model.blocks} == {DirectBlock}

    def test_copies_and_pickles(self) -> None:
        model = compressed()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert {type(block) for block in twin.model.blocks} == {DirectBlock}
            assert torch.equal(answer(twin), answer(model))
            assert {type(block) for block in twin.detach().blocks} == {Block}
        assert {type(block) for block in model.model.blocks} == {DirectBlock}

    def test_other_kinds_are_left_alone(self) -> None:
        class Own(Block):
            pass

        blocks = [ResPostBlock(32, 2), Own(32, 2)]
        assert not run_directly(blocks, on=True)
        assert [type(block) for block in blocks] == [ResPostBlock, Own]

    @pytest.mark.parametrize("kind", [Block, Attention, Mlp])
    def test_another_version_of_the_library_runs_its_own_code(
        self, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forward(self: Any, x: Tensor, **masks: Any) -> Tensor:
            return x * self.temperature

        monkeypatch.setitem(timm_block._FORWARDS, kind, forward)
        blocks = [Block(32, 2)]
        assert not run_directly(blocks, on=True)
        assert type(blocks[0]) is Block

    @pytest.mark.parametrize("kind", [Block, Attention, Mlp])
    def test_wrappers_of_its_code_are_not_taken_for_it(
        self, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = kind.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

        monkeypatch.setitem(timm_block._FORWARDS, kind, forward)
        assert not run_directly([Block(32, 2)], on=True)

    def test_the_installed_version_is_known(self) -> None:
        assert run_directly([Block(32, 2)], on=True)


def probed() -> tuple[CompressedModel, Any]:
    """A model with a block in the middle, which no site is at, to put things into."""
    model = compressed()
    return model, model.model.blocks[1]


def parts_of(block: Any) -> set[int]:
    """Those that are called in a pass; a fused kernel drops by itself."""
    return {id(part) for part in block.modules() if part is not block.attn.attn_drop}


def assert_heeded(model: CompressedModel, plain: Tensor) -> None:
    """What was put there since the model answered `plain` changes its answer, as it does by the library's own code."""
    changed = answer(model)
    assert not torch.equal(changed, plain)
    with model.own_code():
        assert torch.equal(answer(model), changed)


PARTS = ["norm1", "attn", "attn.qkv", "attn.q_norm", "attn.proj", "attn.proj_drop", "ls1", "drop_path1"]
PARTS += ["norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2", "mlp.drop2", "ls2", "drop_path2"]


class TestNothingIsPassedBy:
    @pytest.mark.parametrize("name", PARTS)
    def test_hooks(self, name: str) -> None:
        model, block = probed()
        plain = answer(model)
        part, calls = block.get_submodule(name), list[str]()
        part.register_forward_pre_hook(lambda module, args: calls.append("before"))
        part.register_forward_hook(lambda module, args, output: output + 1)
        changed = answer(model)
        assert calls == ["before"]
        assert not torch.equal(changed, plain)
        with model.own_code():
            assert torch.equal(answer(model), changed)

    def test_hooks_on_gradients(self) -> None:
        model, block = probed()
        calls: list[str] = []
        block.mlp.fc1.register_full_backward_hook(lambda module, inner, outer: calls.append("fc1"))
        block.norm1.register_full_backward_pre_hook(lambda module, outer: calls.append("norm1"))
        model(images()).sum().backward()
        assert calls == ["fc1", "norm1"]

    def test_hooks_on_all_modules(self) -> None:
        model, block = probed()
        with seen_calls() as calls:
            answer(model)
        assert parts_of(block) <= {id(part) for part in calls}

    @pytest.mark.parametrize(
        "kind", [Block, Attention, Mlp, nn.Linear, nn.LayerNorm, nn.GELU, nn.Identity, nn.Dropout, LayerScale]
    )
    @pytest.mark.parametrize("merging", [False, True], ids=["pruning", "merging"])
    def test_a_forward_put_on_the_class(
        self, merging: bool, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vit = tiny_vit(init_values=0.3, norm_layer=nn.LayerNorm, drop_path_rate=0.1, proj_drop_rate=0.1)
        model = compressed(vit, make_recipe(reducer="merge") if merging else None)
        plain, own = answer(model), kind.forward
        monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: own(*args, **kwargs) * 1.5)
        assert_heeded(model, plain)

    @pytest.mark.parametrize("name", ["scaled_dot_product_attention", "layer_norm", "gelu", "linear"])
    def test_functions_of_torch_that_are_replaced(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, _ = probed()
        plain, own = answer(model), getattr(nn.functional, name)
        monkeypatch.setattr(nn.functional, name, lambda *args, **kwargs: own(*args, **kwargs) * 1.5)
        assert_heeded(model, plain)

    @pytest.mark.parametrize("name", ["attn", "mlp", "mlp.fc1"])
    def test_parts_that_are_compiled(self, name: str) -> None:
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        model, block = probed()
        block.get_submodule(name).compile(backend=backend)
        answer(model)
        assert graphs

    def test_tracers_that_watch_by_the_call_itself(self) -> None:
        model, block = probed()
        traced = torch.no_grad()(lambda: [str(node) for node in torch.fx.symbolic_trace(block).graph.nodes])
        direct, own = both_ways(model, traced)
        assert direct == own
        assert "mlp_fc1" in direct

    @pytest.mark.parametrize("grad", [False, True], ids=["without_gradients", "with_gradients"])
    def test_a_method_of_a_block_that_somebody_holds(self, grad: bool) -> None:
        model, block = probed()
        plain, held = answer(model), block.forward
        block.forward = lambda *args, **kwargs: held(*args, **kwargs) * 1.5
        with torch.set_grad_enabled(grad):
            changed = model(images())
            assert not torch.equal(changed, plain)
            with model.own_code():
                assert torch.equal(model(images()), changed)
            with model.dense():
                dense = model(images())
            assert torch.equal(model.detach()(images()), dense)

    @pytest.mark.parametrize("name", PARTS)
    def test_a_forward_put_on_the_object(self, name: str) -> None:
        model, block = probed()
        part = block.get_submodule(name)
        plain, before = answer(model), part.forward
        part.forward = lambda *args, **kwargs: before(*args, **kwargs) + 1
        assert_heeded(model, plain)

    def test_parts_that_are_replaced(self) -> None:
        class Adapted(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:  # noqa: A002
                return super().forward(input) + 1

        model, block = probed()
        plain = answer(model)
        block.mlp.fc1 = Adapted(32, 128)
        assert_heeded(model, plain)

    @pytest.mark.parametrize("name", ["norm1", "attn.qkv", "mlp.fc2"])
    def test_parameters_that_are_replaced(self, name: str) -> None:
        model, block = probed()
        plain = answer(model)
        part = block.get_submodule(name)
        part.weight = nn.Parameter(part.weight.detach() + 0.5)
        assert_heeded(model, plain)

    def test_parameters_of_a_functional_call(self) -> None:
        model, block = probed()
        functional = torch.no_grad()(lambda *args: torch.func.functional_call(*args, (images(),)))
        other = {"model.blocks.1.mlp.fc1.weight": block.mlp.fc1.weight.detach() + 0.5}
        direct, own = both_ways(model, lambda: functional(model, other))
        assert torch.equal(direct, own)
        assert not torch.equal(direct, answer(model))

    @pytest.mark.parametrize("key", ["weight", "bias", "gamma"])
    @pytest.mark.parametrize("name", ["norm1", "attn.proj", "ls1"])
    def test_tensors_in_the_place_of_parameters(self, name: str, key: str) -> None:
        model = compressed(tiny_vit(init_values=0.3))
        expected, part = answer(model), model.model.blocks[1].get_submodule(name)
        if key in part._parameters:
            tensor = part._parameters.pop(key).detach()
            setattr(part, key, tensor)
        assert torch.equal(answer(model), expected)

    @pytest.mark.parametrize("name", ["mlp.act", "attn.proj_drop", "ls1"])
    def test_functions_in_the_place_of_parts(self, name: str) -> None:
        model, block = probed()
        owner, _, last = name.rpartition(".")
        part = block.get_submodule(owner)
        delattr(part, last)
        setattr(part, last, lambda x: x * 1.5)
        direct, own = both_ways(model, lambda: answer(model))
        assert torch.equal(direct, own)

    def test_where_torch_no_longer_tells_calls_are_not_passed_by(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with torch.no_grad():
            assert may_pass_by()
            monkeypatch.delattr("torch.nn.modules.module._has_any_global_hook")
            assert not may_pass_by()


class TestOver:
    """A GELU may be written over what a linear layer has just made."""

    @pytest.mark.parametrize("approximate", ["none", "tanh"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_the_same_bits_in_the_same_memory(self, approximate: str, dtype: torch.dtype) -> None:
        act, x = nn.GELU(approximate), torch.randn(2, 50, 64).to(dtype)
        with torch.no_grad():
            expected = act(x)
            found = run_over(act, x)
        assert found.data_ptr() == x.data_ptr()
        assert torch.equal(found, expected)

    def test_other_modules_leave_their_input(self) -> None:
        x = torch.randn(2, 8)
        before = x.clone()
        with torch.no_grad():
            for act in (nn.ReLU(), nn.Identity(), nn.Linear(8, 8)):
                assert torch.equal(run_over(act, x), act(before))
                assert torch.equal(x, before)

    def test_what_a_pass_needs_less_is_one_hidden_layer(self) -> None:
        model = compressed()
        large = torch.randn(64, 3, 32, 32)

        peak = torch.no_grad()(lambda: peak_memory(model, large))
        direct, own = both_ways(model, peak)
        assert direct < own

    def test_what_hooks_have_seen_is_not_written_over(self) -> None:
        model, block = probed()
        seen: list[Tensor] = []
        block.mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
        answer(model)
        with model.own_code():
            answer(model)
        assert torch.equal(seen[0], seen[1])

    def test_what_a_patched_function_has_seen_is_not_written_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, _ = probed()
        seen: list[Tensor] = []

        def linear(*args: Any) -> Tensor:
            seen.append(own(*args))
            return seen[-1]

        own = nn.functional.linear
        monkeypatch.setattr(nn.functional, "linear", linear)
        answer(model)
        count = len(seen)
        with model.own_code():
            answer(model)
        assert len(seen) == 2 * count > 10
        assert all(torch.equal(one, other) for one, other in zip(seen[:count], seen[count:], strict=True))


class TestRun:
    def test_known_modules_are_passed_by(self) -> None:
        model, block = probed()
        called: list[nn.Module] = []

        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.append(module)
            return call(module, *args, **kwargs)

        call = nn.Module._call_impl
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "_call_impl", counted)
            answer(model)
            direct = len(called)
            with model.own_code():
                answer(model)
        assert {id(part) for part in called[:direct]} & parts_of(block) == {id(block)}
        assert {id(part) for part in called[direct:]} >= parts_of(block)

    def test_a_module_that_is_not_known_is_called(self) -> None:
        calls: list[Tensor] = []

        class Unknown(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                calls.append(x)
                return x + 1

        assert run(Unknown(), torch.zeros(2)).tolist() == [1, 1]
        assert len(calls) == 1

    def test_plain(self) -> None:
        part, forward = nn.Linear(2, 2), nn.Linear.forward
        assert is_plain(part, forward)
        assert not is_plain(part, nn.Identity.forward)
        handle = part.register_forward_hook(lambda module, args, output: None)
        assert not is_plain(part, forward)
        handle.remove()
        assert is_plain(part, forward)
