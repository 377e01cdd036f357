"""Vim against vectors of the authors' code, and against a naive implementation token by token."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from paths import VECTORS
from safetensors.torch import load_file
from tiny_vim import DEPTH, VARIANTS, Naive, naive_vim, tiny_vim, vim_images
from torch import Tensor
from torch.nn import functional

from repshift_cli.checkpoints.create import on_meta as meta_device
from repshift_cli.errors import UsageError
from repshift_cli.models.vim import MODELS, VimStream, VisionMamba, create
from repshift_cli.ops import mamba_kernels

TOLERANCE = 1e-4  # float32 and float64 differ by up to 2.8e-5; every deliberate error in the model is larger

vectors = pytest.mark.parametrize("name", ["A", "B", "C"])
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def official(name: str) -> tuple[VisionMamba, dict[str, Tensor], dict[str, Any]]:
    """A model with the weights of a vector, the result of the authors' code, and its sizes and inputs."""
    tensors = load_file(VECTORS / f"vim_{name}.safetensors")
    document = json.loads((VECTORS / f"vim_{name}.json").read_text(encoding="utf-8"))
    model = VisionMamba(**document["args"]).eval()
    start = "weights."
    weights = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    model.load_state_dict(weights, strict=True)
    return model, tensors, document


def on_meta(name: str, **args: Any) -> VisionMamba:
    with meta_device():
        return create(name, **args)


def parameter_count(model: VisionMamba) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def layer_by_layer(model: VisionMamba, images: Tensor) -> list[VimStream]:
    """The output of each layer."""
    stream, found = model.embed(images), []
    for layer in model.layers:
        stream = layer(stream)
        found.append(stream)
    return found


def naive(variant: str, model: VisionMamba, images: Tensor) -> list[Naive]:
    weights = dict(model.named_parameters())
    return [naive_vim(weights, image, stride=VARIANTS[variant].get("stride")) for image in images]


class TestAuthorsCode:
    @vectors
    def test_logits(self, name: str) -> None:
        model, expected, _ = official(name)
        with torch.no_grad():
            torch.testing.assert_close(model(expected["input"]), expected["logits"], rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize("name", ["A", "C"])
    def test_every_layer(self, name: str) -> None:
        model, expected, _ = official(name)
        for index, stream in enumerate(layer_by_layer(model, expected["input"])):
            torch.testing.assert_close(stream.hidden, expected[f"block_out.{index}"], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(stream.residual, expected[f"residual.{index}"], rtol=0, atol=TOLERANCE)

    @vectors
    def test_the_naive_form_is_the_same_model(self, name: str) -> None:
        model, expected, _ = official(name)
        for image, logits in zip(expected["input"][:1], expected["logits"][:1], strict=True):
            found = naive_vim(model.double().state_dict(), image.double()).logits
            torch.testing.assert_close(found.float(), logits, rtol=0, atol=TOLERANCE)

    @vectors
    def test_parameters(self, name: str) -> None:
        model, _, document = official(name)
        assert parameter_count(model) == document["parameters"]

    def test_the_keys_of_vim_tiny(self) -> None:
        lines = (VECTORS / "vim_tiny_keys.txt").read_text(encoding="utf-8").splitlines()
        expected = {key: json.loads(shape) for key, shape in (line.split("\t") for line in lines)}
        model = on_meta("vim_tiny_patch16_224")
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
        assert len(expected) == 415
        assert parameter_count(model) == 7_148_008

    @pytest.mark.parametrize("name", MODELS)
    def test_the_grid_of_every_model(self, name: str) -> None:
        model = on_meta(name)
        side = 27 if "stride8" in name else 14
        assert model.patch_embed.grid_size == (side, side)
        assert model.pos_embed.shape == (1, side * side + 1, MODELS[name]["embed_dim"])


class TestWrittenOut:
    @each_variant
    def test_float64(self, variant: str) -> None:
        model = tiny_vim(**VARIANTS[variant]).double()
        images = vim_images(model)
        streams = layer_by_layer(model, images)
        with torch.no_grad():
            expected, logits = naive(variant, model, images), model(images)
        for row, one in enumerate(expected):
            torch.testing.assert_close(logits[row], one.logits, rtol=0, atol=1e-11)
            for index, stream in enumerate(streams):
                torch.testing.assert_close(stream.hidden[row], one.hidden[index], rtol=0, atol=1e-11)
                torch.testing.assert_close(stream.residual[row], one.residual[index], rtol=0, atol=1e-11)
                classes = [place for place, label in enumerate(one.labels[index]) if isinstance(label, str)]
                assert stream.place[row].tolist() == classes

    @each_variant
    def test_gradients(self, variant: str) -> None:
        model = tiny_vim(**VARIANTS[variant]).double()
        images, parameters = vim_images(model, 1), list(model.parameters())
        expected = torch.autograd.grad(naive(variant, model, images)[0].logits.square().sum(), parameters)
        found = torch.autograd.grad(model(images).square().sum(), parameters)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("variant", "differs"), [("middle", False), ("odd", True)])
    def test_the_class_token_is_not_symmetric_for_odd_patches(self, variant: str, differs: bool) -> None:
        model = tiny_vim(**VARIANTS[variant])
        images = vim_images(model)
        with torch.no_grad():
            stream = model.forward_features(images)
            mirrored = stream._replace(place=stream.hidden.shape[1] - 1 - stream.place)
            gap = (model.pool(stream) - model.pool(mirrored)).abs().max()
        assert (gap > 0.1) == differs

    @each_variant
    def test_patch_features(self, variant: str) -> None:
        model = tiny_vim(**VARIANTS[variant]).double()
        images = vim_images(model, 1)
        with torch.no_grad():
            found = model.patch_features(model.forward_features(images))
            (one,) = naive(variant, model, images)
        last = (one.hidden[-1] + one.residual[-1])[one.patches(-1)]
        torch.testing.assert_close(found[0], functional.rms_norm(last, (32,), model.norm_f.weight, 1e-5))
        assert found.shape[1] == model.patch_embed.num_patches


class TestUse:
    @each_variant
    def test_images_of_a_batch_are_independent(self, variant: str) -> None:
        model = tiny_vim(**VARIANTS[variant])
        images = vim_images(model, 5)
        with torch.no_grad():
            alone = torch.cat([model(image.unsqueeze(0)) for image in images])
            torch.testing.assert_close(model(images), alone, rtol=1e-5, atol=1e-5)

    @each_variant
    def test_half_precision_has_a_float32_residual(self, variant: str) -> None:
        model = tiny_vim(**VARIANTS[variant])
        images = vim_images(model)
        with torch.no_grad():
            wanted = model(images)
            logits = model.bfloat16()(images.bfloat16())
        for stream in layer_by_layer(model, images.bfloat16()):
            assert (stream.hidden.dtype, stream.residual.dtype) == (torch.bfloat16, torch.float32)
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - wanted).abs().max() < 0.1 * wanted.abs().max()

    def test_autocast(self) -> None:
        model = tiny_vim()
        images = vim_images(model)
        with torch.no_grad():
            wanted = model(images)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
        assert (logits.float() - wanted).abs().max() < 0.1 * wanted.abs().max()

    @pytest.mark.parametrize("size", [(24, 32), (32, 24), (40, 40), (33, 32)])
    def test_images_of_another_size_are_refused(self, size: tuple[int, int]) -> None:
        with pytest.raises(UsageError, match=f"the model takes images of 32x32, not {size[0]}x{size[1]}"):
            tiny_vim()(torch.zeros(1, 3, *size))

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"class_token": "first"}, "invalid class_token='first': must be middle or double"),
            ({"img_size": 4}, "patches of 8 at stride 8 do not fit an image of 4x4"),
            ({"img_size": (32, 30)}, "leave a rest of an image of 32x30"),
            ({"stride": 5}, "patches of 8 at stride 5 leave a rest"),
            ({"stride": -1}, "do not fit"),
        ],
    )
    def test_invalid_sizes(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tiny_vim(**args)

    def test_without_a_head_it_returns_features(self) -> None:
        model = tiny_vim(num_classes=0)
        assert model(vim_images(model)).shape == (2, 32)

    def test_steps_start_as_in_mamba(self) -> None:
        model = create("vim_tiny_patch16_224", depth=1, num_classes=3)
        mixer = model.layers[0].mixer
        for step in (mixer.dt_proj, mixer.dt_proj_b):
            delta = functional.softplus(step.bias)
            assert 0.9e-3 < delta.min() < 2e-3
            assert 0.05 < delta.max() < 0.11
        assert torch.equal(mixer.A_log.exp().round()[5], torch.arange(1.0, 17.0))

    def test_a_new_model_has_distinct_outputs(self) -> None:
        model = create("vim_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
        logits = model(torch.randn(2, 3, 32, 32))
        assert logits.isfinite().all()
        assert logits.std() > 0


def scan_stand_in(  # noqa: PLR0917 (as in the package)
    u: Tensor,
    delta: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:
    """`selective_scan_fn` of mamba_ssm, as documented; it raises for inputs that the kernel does not support."""
    batch, width, length = u.shape
    assert delta.shape == u.shape and delta.dtype == u.dtype == B.dtype == C.dtype
    assert A.dtype == torch.float32 and A.shape[0] == width
    assert z is None and not return_last_state
    if delta_bias is not None:
        assert delta_bias.dtype == torch.float32
        delta = delta + delta_bias[:, None]
    delta = functional.softplus(delta) if delta_softplus else delta
    state, outputs = u.new_zeros(batch, width, A.shape[1]), []
    for t in range(length):
        drive = (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        state = torch.exp(delta[:, :, t, None] * A) * state + drive
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        assert D.dtype == torch.float32
        y = y + D[:, None] * u
    return y.to(u.dtype)


def convolution_stand_in(  # noqa: PLR0917 (as in the package)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`causal_conv1d_fn` of causal_conv1d, as documented."""
    assert activation in (None, "silu", "swish")
    assert x.shape[1] == weight.shape[0] and weight.ndim == 2
    padded = functional.pad(x, (weight.shape[1] - 1, 0))
    out = functional.conv1d(padded, weight[:, None], bias, groups=x.shape[1])
    return functional.silu(out) if activation else out


class TestKernels:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """Stand-ins under the names of the packages; returns the names of the called functions."""
        calls: list[str] = []

        def noting(function: Any) -> Any:
            def called(*args: Any, **kwargs: Any) -> Tensor:
                calls.append(function.__name__)
                return function(*args, **kwargs)

            return called

        scan, convolution = ModuleType("selective_scan_interface"), ModuleType("causal_conv1d")
        scan.selective_scan_fn = noting(scan_stand_in)  # type: ignore[attr-defined]
        convolution.causal_conv1d_fn = noting(convolution_stand_in)  # type: ignore[attr-defined]
        for name in ("mamba_ssm", "mamba_ssm.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", scan)
        monkeypatch.setitem(sys.modules, "causal_conv1d", convolution)
        mamba_kernels._kernels.cache_clear()
        yield calls
        mamba_kernels._kernels.cache_clear()

    @each_variant
    def test_the_same_logits(self, variant: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_vim(**VARIANTS[variant])
        images = vim_images(model)
        with torch.no_grad():
            wanted = model(images)
            assert calls == []
            monkeypatch.setattr(mamba_kernels, "usable", lambda x, d_state: True)
            torch.testing.assert_close(model(images), wanted, rtol=1e-5, atol=1e-5)
        assert calls == ["convolution_stand_in", "scan_stand_in"] * 2 * DEPTH

    def test_half_precision(self, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_vim()
        images = vim_images(model)
        monkeypatch.setattr(mamba_kernels, "usable", lambda x, d_state: True)
        with torch.no_grad():
            wanted = model(images)
            logits = model.bfloat16()(images.bfloat16())
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - wanted).abs().max() < 0.1 * wanted.abs().max()

    def test_not_on_the_cpu(self, calls: list[str]) -> None:
        assert mamba_kernels._kernels() is not None
        assert not mamba_kernels.usable(torch.zeros(1, 1, 8), 4)

    @pytest.mark.parametrize(
        ("compiling", "dtype", "channels", "d_state", "expected"),
        [
            (False, torch.float32, 16, 16, True),
            (False, torch.bfloat16, 16, 256, True),
            (True, torch.float32, 16, 16, False),
            (False, torch.float64, 16, 16, False),
            (False, torch.float32, 12, 16, False),
            (False, torch.float32, 16, 257, False),
        ],
    )
    def test_when(  # noqa: PLR0917 (one case)
        self,
        compiling: bool,
        dtype: torch.dtype,
        channels: int,
        d_state: int,
        expected: bool,
        calls: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tensor = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 5, channels))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        assert mamba_kernels.usable(cast(Any, tensor), d_state) == expected

    @pytest.mark.parametrize("broken", ["mamba_ssm.ops.selective_scan_interface", "causal_conv1d"])
    def test_a_package_that_does_not_load_is_not_used(
        self, broken: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert mamba_kernels._kernels() is not None
        mamba_kernels._kernels.cache_clear()
        monkeypatch.setitem(sys.modules, broken, None)
        tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(1, 5, 8))
        assert not mamba_kernels.usable(cast(Any, tensor), 4)
