"""Attention modes: all backends give the same result, the requested one runs, and the model is restored."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, get_args

import pytest
import timm
import torch
from flash_stand_in import STAND_IN, FlashStandIn, allow_flash
from timm.layers import Attention
from tiny import VARIANTS, images, make_recipe, tiny_vit
from tiny_umt import compressed_umt, tiny_umt, umt_clips, umt_recipe
from torch import Tensor, nn

from repshift_cli.cli.options import AttentionKind
from repshift_cli.errors import UsageError
from repshift_cli.measure.attention_kernel import observed_attention
from repshift_cli.measure.macs import count_macs
from repshift_cli.models import attention_mode as backends
from repshift_cli.models import timm_attention, umt
from repshift_cli.models.attention_mode import AttentionMode, attention_mode, auto_note, flash_missing, flash_problem
from repshift_cli.models.attention_mode import attention_mode as of_benchmark
from repshift_cli.models.timm_attention import FlexibleAttention
from repshift_cli.ops.attention import WIDEST, attend_projected
from repshift_cli.reduction.compressed_model import CompressedModel, attach
from repshift_cli.reduction.plans import resolve_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NORM = nn.LayerNorm

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "with_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True, "norm_layer": NORM},
    "scale_norm": {"scale_norm": True, "norm_layer": NORM},
    "gated": {"gated": True},
    "all": {"qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": NORM, "qkv_bias": True},
    "narrow_heads": {"attn_head_dim": 4},
}
KNOWN = {
    name: options for name, options in OPTIONS.items() if set(options) <= set(inspect.signature(Attention).parameters)
}
"""Those that the installed timm offers."""

ON_CPU: tuple[AttentionMode, ...] = ("auto", "flash", "sdpa", "sdpa:flash", "sdpa:math", "explicit")

on_cpu = pytest.mark.parametrize("mode", ON_CPU)


class FixedSizes:
    """Fixed token sizes."""

    def __init__(self, sizes: Tensor) -> None:
        self.sizes = sizes

    def sizes_of(self, count: int) -> Tensor | None:
        return self.sizes


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashStandIn:
    return allow_flash(monkeypatch)


@pytest.fixture
def no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)


def attention_of(options: dict[str, Any]) -> Attention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        part = Attention(32, num_heads=4, **options)
        for parameter in part.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return part.eval()


def tokens(count: int = 9, width: int = 32) -> Tensor:
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(1))


def some_sizes(count: int = 9) -> Tensor:
    return torch.randint(1, 6, (2, count), generator=torch.Generator().manual_seed(2)).float()


def merged_vit(**options: Any) -> CompressedModel:
    model = tiny_vit(**options)
    return attach(model, resolve_for(model, make_recipe(metric="{kind: token_norm}", reducer="merge")))


def merged_umt() -> CompressedModel:
    return compressed_umt(tiny_umt(), umt_recipe("[{layer: 0, drop_ratio: 0.3}]", "{kind: token_norm}", "merge"))


def scored_by_class(**options: Any) -> CompressedModel:
    model = tiny_vit(**options)
    return attach(model, resolve_for(model, make_recipe(metric="{kind: class_attention}")))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "dense": (tiny_vit, lambda _: images()),
    "dense_qk_norm": (lambda: tiny_vit(qk_norm=True), lambda _: images()),
    "class_attention": (scored_by_class, lambda _: images()),
    "merged": (merged_vit, lambda _: images()),
    "merged_attention_pooling": (lambda: merged_vit(**VARIANTS["map_pooling"]), lambda _: images()),
    "umt": (tiny_umt, umt_clips),
    "merged_umt": (merged_umt, umt_clips),
}
each_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, sample = MODELS[name]
    model = make()
    return model, sample(model)


def state_of(model: nn.Module) -> list[tuple[type, set[str], Any, Any]]:
    return [
        (type(part), set(vars(part)), getattr(part, "fused_attn", None), getattr(part, "flash_attn", None))
        for part in model.modules()
    ]


class TestParity:
    """One attention module against the plain formula and the other backends."""

    @pytest.mark.parametrize("sized", [False, True])
    @pytest.mark.parametrize("name", KNOWN)
    @on_cpu
    def test_timm(self, mode: AttentionMode, name: str, sized: bool, flash: FlashStandIn) -> None:
        part, x = attention_of(KNOWN[name]), tokens()
        with torch.no_grad():
            if not sized:
                wanted = part(x)
            else:
                # a token of size s is s equal tokens to all others
                whole = some_sizes().long()
                rows = [part(row.repeat_interleave(n, 0)[None])[0] for row, n in zip(x, whole, strict=True)]
                firsts = whole.cumsum(1) - whole
                wanted = torch.stack([row[first] for row, first in zip(rows, firsts, strict=True)])
                timm_attention.use_proportional_attention([part], FixedSizes(some_sizes()))
            flash.calls = 0
            with attention_mode(part, mode):
                found = part(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert flash.calls == (1 if mode in ("auto", "flash") else 0)

    @pytest.mark.parametrize("sized", [False, True])
    @on_cpu
    def test_umt(self, mode: AttentionMode, sized: bool, flash: FlashStandIn) -> None:
        part = umt.Attention(32, 4)
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.2)
        sizes = some_sizes() if sized else None
        with torch.no_grad():
            part.fused_attn = False
            wanted = part(tokens(), sizes)
            part.fused_attn = True
            with attention_mode(part, mode):
                torch.testing.assert_close(part(tokens(), sizes), wanted, rtol=1e-5, atol=1e-5)

    @each_model
    @on_cpu
    def test_whole_models(self, mode: AttentionMode, name: str, flash: FlashStandIn) -> None:
        model, sample = built(name)
        with torch.no_grad():
            wanted = model(sample)
            with attention_mode(model, mode):
                torch.testing.assert_close(model(sample), wanted, rtol=1e-4, atol=1e-4)
            assert torch.equal(model(sample), wanted)
        assert bool(flash.calls) == (mode in ("auto", "flash"))

    def test_every_mode_is_tested(self) -> None:
        assert {*ON_CPU, "sdpa:efficient", "sdpa:cudnn"} == set(get_args(AttentionMode))
        assert {kind.value for kind in AttentionKind} == set(get_args(AttentionMode))

    @pytest.mark.parametrize("name", ["dense_qk_norm", "merged", "merged_umt"])
    def test_gradients(self, name: str, flash: FlashStandIn) -> None:
        model, sample = built(name)
        weights = next(part for key, part in model.named_parameters() if key.endswith("qkv.weight"))

        def gradient(mode: AttentionMode) -> Tensor:
            with attention_mode(model, mode):
                (found,) = torch.autograd.grad(model(sample).square().sum(), weights)
            return found

        wanted = gradient("explicit")
        torch.testing.assert_close(gradient("flash"), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))

    def test_dropout_of_weights(self, flash: FlashStandIn) -> None:
        part = attention_of({"attn_drop": 0.5})
        with attention_mode(part, "flash"), torch.no_grad():
            still = part(tokens())
            assert torch.equal(part(tokens()), still)
            part.train()
            assert not torch.equal(part(tokens()), still)

    def test_autocast_with_normed_queries(self, flash: FlashStandIn) -> None:
        """Under autocast norms return float32 and values half precision; flash-attn needs one dtype."""
        part = attention_of(KNOWN["qk_norm"])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted = part(tokens())
            with attention_mode(part, "flash"):
                torch.testing.assert_close(part(tokens()), wanted, rtol=0.05, atol=0.05)
        assert flash.calls == 1

    def test_heads_too_wide_to_fold_sizes_into(self, flash: FlashStandIn) -> None:
        projected = torch.randn(1, 5, 3, 1, WIDEST, generator=torch.Generator().manual_seed(0))
        sizes = torch.tensor([[1.0, 2, 3, 1, 1]])
        wanted = attend_projected(projected, sizes, backend="explicit")
        found = attend_projected(projected, sizes, backend="flash")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert flash.calls == 0
        attend_projected(projected, backend="flash")
        assert flash.calls == 1

    @pytest.mark.parametrize("how", [{"attn_mask": torch.zeros(9, 9).tril()}, {"is_causal": True}])
    def test_unsupported_attention_runs_on_timm(self, how: dict[str, Any], flash: FlashStandIn) -> None:
        part = attention_of({})
        if not set(how) <= set(inspect.signature(Attention.forward).parameters):
            pytest.skip("this timm has no such argument")
        with torch.no_grad():
            wanted = part(tokens(), **how)
            with attention_mode(part, "flash"):
                assert torch.equal(part(tokens(), **how), wanted)
        assert flash.calls == 0


class TestState:
    @each_model
    @on_cpu
    def test_the_model_is_restored(self, mode: AttentionMode, name: str, flash: FlashStandIn) -> None:
        model, _ = built(name)
        before, keys, parameters = state_of(model), list(model.state_dict()), list(model.parameters())
        for ends in (nullcontext(), pytest.raises(ZeroDivisionError)):
            with ends, attention_mode(model, mode):
                assert list(model.state_dict()) == keys
                assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
                if not isinstance(ends, nullcontext):
                    raise ZeroDivisionError
            assert state_of(model) == before
        assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()

    def test_contexts_nest(self, flash: FlashStandIn) -> None:
        model = tiny_vit()

        def seen() -> str:
            return observed_attention(model, images(1))

        with attention_mode(model, "flash"):
            assert seen() == "flash-attn"
            with attention_mode(model, "explicit"):
                assert seen() == "explicit"
                with attention_mode(model, "sdpa:math"):
                    assert seen() == "sdpa:math"
                    with attention_mode(model, "sdpa"):
                        assert seen() == "sdpa:flash"
                    assert seen() == "sdpa:math"
                assert seen() == "explicit"
            assert seen() == "flash-attn"
        assert seen() == "sdpa:flash"

    def test_auto_does_not_change_an_explicit_model(self, flash: FlashStandIn) -> None:
        model = tiny_vit()
        model.blocks[1].attn.fused_attn = False
        with attention_mode(model, "auto"):
            assert observed_attention(model, images(1)) == "explicit+flash-attn"
        assert [block.attn.fused_attn for block in model.blocks] == [True, False, True, True]

    def test_hooks_get_the_same_tensors(self, flash: FlashStandIn) -> None:
        """Hooks on the module and on its projection, registered before and inside the context."""
        model, seen = tiny_vit(), []
        model.blocks[0].attn.register_forward_hook(lambda _, args, output: seen.append("outside"))
        with attention_mode(model, "flash"), torch.no_grad():
            handle = model.blocks[0].attn.qkv.register_forward_hook(lambda _, args, output: seen.append("inside"))
            model(images(1))
            handle.remove()
        assert seen == ["inside", "outside"]
        with torch.no_grad():
            model(images(1))
        assert seen == ["inside", "outside", "outside"]

    def test_class_attention_keeps_the_same_tokens(self, flash: FlashStandIn) -> None:
        model = scored_by_class()
        wanted = model.trace(images()).kept
        with attention_mode(model, "flash"):
            found = model.trace(images()).kept
        assert all(torch.equal(found[layer], wanted[layer]) for layer in wanted)
        assert flash.calls == 4

    def test_attaching_and_detaching_inside(self, flash: FlashStandIn) -> None:
        """Sizes and flash-attn are two options of one module, which may be set and removed in any order."""
        model = tiny_vit()
        before = state_of(model)
        with attention_mode(model, "flash"):
            wrapped = attach(model, resolve_for(model, make_recipe(metric="{kind: token_norm}", reducer="merge")))
            with torch.no_grad():
                wanted = wrapped(images())
        with torch.no_grad():
            torch.testing.assert_close(wrapped(images()), wanted, rtol=1e-4, atol=1e-4)
        with attention_mode(model, "flash"):
            wrapped.detach()
            assert all(type(block.attn) is FlexibleAttention for block in model.blocks)
        assert state_of(model) == before

    @pytest.mark.parametrize("name", ["dense", "merged", "merged_umt"])
    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_a_copy_made_inside_keeps_its_mode(self, way: str, name: str, flash: FlashStandIn) -> None:
        model, sample = built(name)
        with attention_mode(model, "flash"):
            other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert observed_attention(model, sample) == "sdpa:flash"
        assert "flash-attn" in observed_attention(other, sample)

    def test_another_model_stays_on_its_backend(self, flash: FlashStandIn) -> None:
        model, other = tiny_vit(), tiny_vit()
        with attention_mode(model, "flash"), attention_mode(other, "explicit"):
            assert observed_attention(model, images(1)) == "flash-attn"
            assert observed_attention(other, images(1)) == "explicit"

    def test_bench_uses_the_same_context(self) -> None:
        assert of_benchmark is attention_mode


class TestCompile:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["dense_qk_norm", "merged_attention_pooling", "merged_umt"])
    @pytest.mark.parametrize("mode", ["flash", "sdpa", "explicit"])
    def test_in_one_graph(self, mode: AttentionMode, name: str, flash: FlashStandIn) -> None:
        model, sample = built(name)
        torch._dynamo.reset()
        with torch.no_grad():
            wanted = model(sample)
            with attention_mode(model, mode):
                program = torch.compile(model, fullgraph=True, backend="aot_eager")
                torch.testing.assert_close(program(sample), wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    def test_a_compiled_model_follows_the_mode(self, flash: FlashStandIn) -> None:
        model = tiny_vit()
        torch._dynamo.reset()
        program = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            wanted = program(images())
            assert flash.calls == 0
            with attention_mode(model, "flash"):
                torch.testing.assert_close(program(images()), wanted, rtol=1e-4, atol=1e-4)
            assert flash.calls
            assert torch.equal(program(images()), wanted)


class TestErrors:
    @pytest.mark.parametrize("mode", ["explicit", "sdpa", "sdpa:math"])
    def test_nothing_to_switch(self, mode: AttentionMode) -> None:
        with pytest.raises(UsageError, match=f"'{mode}'"), attention_mode(nn.Identity(), mode):
            pass

    def test_no_attention_that_flash_attn_supports(self, flash: FlashStandIn) -> None:
        model = tiny_vit(**VARIANTS["parallel_scaling_block"])
        with pytest.raises(UsageError, match="no attention in VisionTransformer can run on flash-attn") as caught:
            backends.check_attention(model, "flash")
        assert "--attention sdpa" in str(caught.value)
        with attention_mode(model, "auto"):
            assert observed_attention(model, images(1)) == "sdpa:flash"

    def test_flash_on_a_cpu(self) -> None:
        with pytest.raises(UsageError, match=r"the model is on cpu; .* the model is float32") as caught:
            backends.check_attention(tiny_vit(), "flash")
        assert caught.value.exit_code == 2
        for word in ("repshift-cli[flash]", "--device cuda", "--dtype float16", "--attention sdpa"):
            assert word in str(caught.value.hint)

    def test_flash_that_is_not_installed(self, no_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_misfits", lambda *kind: [])
        with pytest.raises(UsageError, match="cannot run on flash-attn: it is not installed"):
            backends.check_attention(tiny_vit(), "flash")

    @pytest.mark.parametrize(
        ("device", "dtype", "width", "capability", "reason"),
        [
            (CPU, torch.float16, 64, (9, 0), "is on cpu"),
            (CUDA, torch.float32, 64, (9, 0), "is float32"),
            (CUDA, torch.float64, 64, (9, 0), "is float64"),
            (CUDA, torch.float16, 264, (9, 0), "has 264"),
            (CUDA, torch.bfloat16, 64, (7, 5), "compute capability 8.0"),
            (CUDA, torch.bfloat16, 256, (8, 0), None),
            (CUDA, torch.float16, 64, (9, 0), None),
        ],
    )
    def test_problems(  # noqa: PLR0917
        self,
        device: torch.device,
        dtype: torch.dtype,
        width: int,
        capability: tuple[int, int],
        reason: str | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setitem(sys.modules, "flash_attn", STAND_IN)
        found = flash_problem(device, dtype, width)
        assert (found is None) == (reason is None)
        assert reason is None or reason in str(found)

    def test_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        assert flash_missing() is None
        monkeypatch.delitem(sys.modules, "flash_attn")
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "flash_attn.py").write_text("import flash_attn_2_cuda_that_is_not_there\n")
        assert "does not load" in str(flash_missing())
        (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
        assert "undefined symbol" in str(flash_missing())

    @pytest.mark.parametrize("mode", ["sdpa:efficient", "sdpa:cudnn"])
    def test_a_kernel_that_is_not_for_this_device(self, mode: AttentionMode) -> None:
        with pytest.raises(UsageError, match=mode) as caught, attention_mode(tiny_vit(), mode) as _, torch.no_grad():
            tiny_vit()(images(1))
        assert "--attention sdpa" in str(caught.value)

    @pytest.mark.parametrize("mode", ["sdpa:efficient", "sdpa:cudnn"])
    def test_errors_are_raised_before_the_run(self, mode: AttentionMode) -> None:
        with pytest.raises(UsageError, match=mode):
            backends.check_attention(tiny_vit(), mode)
        backends.check_attention(tiny_vit(), "sdpa")

    def test_other_errors_are_raised_unchanged(self) -> None:
        with pytest.raises(RuntimeError, match="of the model"), attention_mode(tiny_vit(), "sdpa"):
            raise RuntimeError("of the model")


class TestFallBack:
    """`auto` if flash-attn cannot run."""

    def test_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "flash_attn", STAND_IN)
        with attention_mode(tiny_vit(), "auto") as _:
            assert observed_attention(tiny_vit(), images(1)) == "sdpa:flash"
        assert auto_note(tiny_vit(), "auto") is None

    def test_a_note_if_it_is_only_not_installed(self, no_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_misfits", lambda *kind: [])
        model = tiny_vit()
        assert "it is not installed" in str(auto_note(model, "auto"))
        assert "repshift-cli[flash]" in str(auto_note(model, "auto"))
        assert auto_note(model, "sdpa") is None
        assert auto_note(nn.Identity(), "auto") is None
        with attention_mode(model, "auto"):
            assert observed_attention(model, images(1)) == "sdpa:flash"

    def test_no_note_if_it_runs(self, flash: FlashStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_misfits", lambda *kind: [])
        assert auto_note(tiny_vit(), "auto") is None

    def test_only_attention_with_supported_heads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the attention modules of a model differ, those that flash-attn supports run on it."""
        allow_flash(monkeypatch)
        monkeypatch.setattr(backends, "flash_problem", lambda device, dtype, width: "wide" if width > 8 else None)
        model = nn.Sequential(attention_of({"attn_head_dim": 16}), attention_of({}))
        with attention_mode(model, "flash"):
            assert observed_attention(model, tokens()) == "flash-attn+sdpa:flash"


class TestObserved:
    def test_attention_pooling_is_listed_too(self, flash: FlashStandIn) -> None:
        model = tiny_vit(**VARIANTS["map_pooling"])
        with attention_mode(model, "flash"):
            assert observed_attention(model, images(1)) == "flash-attn+sdpa:flash"
        with attention_mode(model, "explicit"):
            assert observed_attention(model, images(1)) == "explicit"

    def test_operations_inside_flash_attn_are_ignored(self, flash: FlashStandIn) -> None:
        """The softmax that the stand-in runs is not that of the model."""
        with attention_mode(tiny_vit(), "flash") as _:
            pass
        model = scored_by_class()
        with attention_mode(model, "flash"):
            assert "flash-attn" in observed_attention(model, images(1))

    @pytest.mark.parametrize("namespace", ["flash_attn", "flashattn", "flash_attn_3"])
    def test_an_operation_of_flash_attn_that_the_model_calls_itself(self, namespace: str) -> None:
        with torch.library._scoped_library(namespace, "DEF") as library:
            library.define("repshift_test(Tensor x) -> Tensor")
            library.impl("repshift_test", lambda x: x.clone(), "CPU")
            run = getattr(torch.ops, namespace).repshift_test
            assert observed_attention(run, torch.zeros(1, 2, 8, 8)) == "flash-attn"

    def test_operations_are_counted_too(self, flash: FlashStandIn) -> None:
        model = merged_vit()
        wanted = count_macs(model, (3, 32, 32))
        with attention_mode(model, "flash"):
            assert count_macs(model, (3, 32, 32)) == wanted
        assert flash.calls == 0

    def test_saved_weights_do_not_depend_on_the_mode(self, flash: FlashStandIn) -> None:
        def saved(model: nn.Module) -> bytes:
            buffer = io.BytesIO()
            torch.save(model.state_dict(), buffer)
            return buffer.getvalue()

        model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
        wanted = saved(model)
        with attention_mode(model, "flash"):
            assert saved(model) == wanted
