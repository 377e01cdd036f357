"""Proportional attention: its definition, agreement of its forms, and the arguments of the fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from repshift_cli.ops.attention import Form, attend, cheapest_form, fold, size_bias

FORMS: tuple[Form, ...] = get_args(Form)
FUSED: tuple[Form, ...] = ("mask", "folded")

each_form = pytest.mark.parametrize("form", FORMS)
each_fused = pytest.mark.parametrize("form", FUSED)


@st.composite
def cases(draw: st.DrawFn, largest: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values in float64, and whole sizes."""
    batch, heads, total = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    width = draw(st.sampled_from([1, 4, 8, 12, 16, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (3, batch, heads, total, width)
    query, key, value = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(
        st.sampled_from([0.3, 1, 3])
    )
    sizes = torch.randint(1, largest + 1, (batch, total), generator=generator).double()
    return query, key, value, sizes


def one_case(total: int = 30, width: int = 16, seed: int = 0, largest: int = 200) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, 2, 2, total, width, generator=generator, dtype=torch.float64)
    return (*qkv, torch.randint(1, largest + 1, (2, total), generator=generator).double())


def repeated(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor) -> Tensor:
    """Plain attention in which each key and value is repeated by its size."""
    images = []
    for one, once, other, times in zip(query, key, value, sizes.long(), strict=True):
        keys, values = once.repeat_interleave(times, dim=1), other.repeat_interleave(times, dim=1)
        logits = one @ keys.mT / one.shape[-1] ** 0.5
        powers = (logits - logits.amax(-1, keepdim=True)).exp()
        images.append(powers @ values / powers.sum(-1, keepdim=True))
    return torch.stack(images)


def to(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(dtype) for tensor in tensors)


def assert_same_but_for_rounding(found: Tensor, wanted: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Within 1e-5, or for large logits within the error of a weight by rounding them to float32.

    Processors round differently: of 10,000 cases with logits up to 114, 28 were up to 2.2e-5 apart with AVX-512.
    """
    logit = (query @ key.mT).abs().max() / query.shape[-1] ** 0.5
    rounding = float(torch.finfo(torch.float32).eps * logit * value.abs().max())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=max(1e-5, rounding))


class Calls:
    """A stand-in for scaled dot-product attention that records its arguments."""

    def __init__(self) -> None:
        self.run: Callable[..., Tensor] = functional.scaled_dot_product_attention
        self.seen: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.seen.append((args, kwargs))
        return self.run(*args, **kwargs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(functional, "scaled_dot_product_attention", found)
    return found


class TestMeaning:
    @each_form
    @given(cases())
    def test_a_token_of_size_s_is_s_tokens(self, form: Form, case: tuple[Tensor, ...]) -> None:
        torch.testing.assert_close(attend(*case, form=form), repeated(*case), rtol=0, atol=1e-11)

    @each_form
    def test_fractional_sizes(self, form: Form) -> None:
        """A token of size s and one of size 1 with equal logits: the weight is s / (s + 1)."""
        query, key = torch.zeros(2, 1, 1, 2, 8, dtype=torch.float64)
        value = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1).expand(1, 1, 2, 8)
        sizes = torch.tensor([[2.5, 0.25]], dtype=torch.float64)
        found = attend(query, key, value, sizes, form=form)
        torch.testing.assert_close(found, torch.full_like(found, 0.25 / 2.75), rtol=0, atol=1e-12)

    @each_form
    @given(cases())
    def test_without_sizes_it_is_plain_attention(self, form: Form, case: tuple[Tensor, ...]) -> None:
        query, key, value, _ = to(torch.float32, *case)
        plain = functional.scaled_dot_product_attention(query, key, value)
        assert_same_but_for_rounding(attend(query, key, value, form=form), plain, query, key, value)

    @each_fused
    def test_without_sizes_it_is_bit_identical(self, form: Form, calls: Calls) -> None:
        query, key, value, _ = to(torch.float32, *one_case())
        assert torch.equal(attend(query, key, value, form=form), calls.run(query, key, value))
        assert len(calls.seen) == 1
        assert all(map(torch.equal, calls.seen[0][0], (query, key, value)))

    @each_form
    @given(cases())
    def test_sizes_of_one_change_nothing(self, form: Form, case: tuple[Tensor, ...]) -> None:
        query, key, value, sizes = to(torch.float32, *case)
        plain = functional.scaled_dot_product_attention(query, key, value)
        found = attend(query, key, value, torch.ones_like(sizes), form=form)
        assert_same_but_for_rounding(found, plain, query, key, value)

    @each_form
    @given(cases())
    def test_only_the_ratio_of_sizes_matters(self, form: Form, case: tuple[Tensor, ...]) -> None:
        query, key, value, sizes = case
        found = attend(query, key, value, 7 * sizes, form=form)
        torch.testing.assert_close(found, attend(query, key, value, sizes, form=form), rtol=0, atol=1e-11)


class TestForms:
    @each_fused
    @given(cases())
    def test_they_agree_in_float32(self, form: Form, case: tuple[Tensor, ...]) -> None:
        case = to(torch.float32, *case)
        assert_same_but_for_rounding(attend(*case, form=form), attend(*case, form="explicit"), *case[:3])

    @pytest.mark.parametrize("largest", [3, 200, 20_000])
    @pytest.mark.parametrize("width", [8, 64, 80])
    @pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
    def test_folded_holds_large_sizes_in_half_precision(
        self, dtype: torch.dtype, within: float, width: int, largest: int
    ) -> None:
        """As exact as half precision without sizes; `log s` in a single channel has several times the error."""
        query, key, value, sizes = one_case(40, width, largest=largest)
        query, key, value = to(dtype, query, key, value)
        wanted = attend(*to(torch.float64, query, key, value), sizes, form="explicit")
        found = attend(query, key, value, sizes.float(), form="folded")
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=within)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_folded_keeps_the_ratio_of_close_sizes(self, dtype: torch.dtype) -> None:
        """Sizes 190 to 199 with equal logits: their biases differ by less than the precision of the first channel."""
        sizes = torch.arange(190.0, 200.0).unsqueeze(0)
        query, key = torch.zeros(2, 1, 1, 10, 64, dtype=dtype)
        value = functional.pad(torch.eye(10), (0, 54)).to(dtype)[None, None]
        found = attend(query, key, value, sizes, form="folded")[0, 0, :, :10].float()
        torch.testing.assert_close(found, (sizes / sizes.sum()).expand(10, -1), rtol=2**-8, atol=0)

    @each_fused
    @pytest.mark.parametrize("with_sizes_that_learn", [False, True])
    def test_gradients_are_those_of_the_explicit_form(self, form: Form, with_sizes_that_learn: bool) -> None:
        def gradients(form: Form) -> list[Tensor]:
            leaves = [tensor.requires_grad_() for tensor in one_case()]
            wanted = leaves if with_sizes_that_learn else leaves[:3]
            output = attend(*leaves[:3], leaves[3] if with_sizes_that_learn else leaves[3].detach(), form=form)
            return list(torch.autograd.grad((output * torch.linspace(-1, 1, 16).double()).sum(), wanted))

        for found, wanted in zip(gradients(form), gradients("explicit"), strict=True):
            assert wanted.abs().max() > 1e-6
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)

    @pytest.mark.parametrize("form", FORMS)
    def test_rows_of_a_batch_are_independent(self, form: Form) -> None:
        case = to(torch.float32, *one_case())
        alone = attend(*(tensor[1:] for tensor in case), form=form)
        torch.testing.assert_close(alone, attend(*case, form=form)[1:], rtol=1e-6, atol=1e-6)

    @each_form
    def test_dropout_sets_weights_to_zero(self, form: Form) -> None:
        case = to(torch.float32, *one_case())
        still = attend(*case, form=form)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            assert not torch.allclose(attend(*case, form=form, dropout=0.5), still, atol=1e-2)
            assert torch.equal(attend(*case, form=form, dropout=1.0), torch.zeros_like(still))


class TestKernel:
    @pytest.mark.parametrize(("width", "wide"), [(8, 16), (64, 72), (80, 88), (12, 20)])
    def test_folded_passes_no_mask_and_one_width(self, width: int, wide: int, calls: Calls) -> None:
        *qkv, sizes = to(torch.float16, *one_case(width=width))
        found = attend(*qkv, sizes.float(), form="folded")
        ((args, kwargs),) = calls.seen
        assert len(args) == 3
        assert kwargs.get("attn_mask") is None
        assert kwargs["scale"] == width**-0.5
        assert [part.shape[-1] for part in args] == [wide] * 3
        assert {part.dtype for part in args} == {torch.float16}
        assert found.shape[-1] == width
        if width % 8 == 0:
            assert wide % 8 == 0

    def test_mask_passes_one_row_that_all_queries_share(self, calls: Calls) -> None:
        *qkv, sizes = to(torch.bfloat16, *one_case())
        attend(*qkv, sizes.float(), form="mask")
        ((args, kwargs),) = calls.seen
        assert kwargs["attn_mask"].shape == (2, 1, 1, 30)
        assert kwargs["attn_mask"].dtype == torch.bfloat16
        assert torch.equal(kwargs["attn_mask"][:, 0, 0], sizes.float().log().bfloat16())
        assert [part.shape[-1] for part in args] == [16] * 3

    def test_explicit_calls_no_kernel(self, calls: Calls) -> None:
        attend(*one_case(), form="explicit")
        assert calls.seen == []

    def test_the_added_channels(self) -> None:
        query, key, value, sizes = to(torch.float32, *one_case(width=16))
        wide_query, wide_key, wide_value = fold(query, key, value, sizes)
        for wide, plain in ((wide_query, query), (wide_key, key), (wide_value, value)):
            assert torch.equal(wide[..., :16], plain)
        product = wide_query[..., 16:] @ wide_key[..., 16:].mT
        torch.testing.assert_close(product, 4 * sizes.log()[:, None, None].expand_as(product))
        assert not wide_value[..., 16:].any()

    def test_the_form_of_a_device(self) -> None:
        assert cheapest_form(torch.device("cpu"), 64) == "mask"
        assert cheapest_form(torch.device("cuda", 1), 64) == "folded"
        assert cheapest_form(torch.device("cuda", 1), 256) == "mask"  # wider than flash kernels take

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_the_logarithm_is_rounded_once(self, dtype: torch.dtype) -> None:
        """Also of sizes that the dtype cannot hold."""
        sizes = torch.arange(1.0, 100_000.0, 7)
        found = size_bias(sizes, dtype)
        assert found.dtype == dtype
        half_a_bit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 2e-7
        torch.testing.assert_close(found.double(), sizes.double().log(), rtol=1.01 * half_a_bit, atol=0)


def test_every_form_is_tested() -> None:
    assert set(FORMS) == {"mask", "folded", "explicit"}
