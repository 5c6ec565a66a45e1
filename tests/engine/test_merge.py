"""Merging partial results: exact, in any grouping, with gradients."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import Attn, Causal, Window, attention, merge


@pytest.fixture
def qkv(generator):
    return [
        torch.randn(2, 3, 24, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)
    ]


def partials(q, k, v, cuts, mask):
    """Results over consecutive ranges of keys, at their logical positions."""
    parts = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        pos = (torch.arange(24), torch.arange(start, stop))
        parts.append(
            attention(q, k[:, :, start:stop], v[:, :, start:stop], mask=mask, positions=pos, return_lse=True)
        )
    return parts


@pytest.mark.parametrize("mask", [None, Causal(), Causal() & Window(5)], ids=str)
def test_split_anywhere_equals_whole(qkv, mask):
    whole = attention(*qkv, mask=mask, return_lse=True)
    merged = merge(*partials(*qkv, [0, 1, 7, 8, 24], mask))
    torch.testing.assert_close(merged.out, whole.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-12, atol=1e-12)


def test_gradients_flow_through_both_results(qkv, generator):
    seeds = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 24, 8), (2, 3, 24))]

    def gradients(result):
        loss = (result.out * seeds[0]).sum() + (result.lse * seeds[1]).sum()
        return torch.autograd.grad(loss, qkv)

    for got, want in zip(
        gradients(merge(*partials(*qkv, [0, 5, 24], Causal()))),
        gradients(attention(*qkv, mask=Causal(), return_lse=True)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_grouping_and_order_do_not_matter(qkv):
    a, b, c = partials(*qkv, [0, 6, 13, 24], None)
    for other in (merge(merge(a, b), c), merge(c, a, b), merge(a, merge(c, b))):
        torch.testing.assert_close(other.out, merge(a, b, c).out, rtol=1e-12, atol=1e-12)


def test_empty_partials_count_for_nothing():
    out, lse = torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3)
    nothing = Attn(torch.zeros_like(out), torch.full_like(lse, -math.inf))
    merged = merge((out, lse), nothing)
    torch.testing.assert_close(merged.out, out)
    torch.testing.assert_close(merged.lse, lse)
    empty = merge(nothing, nothing)
    assert (empty.out == 0).all()
    assert (empty.lse == -math.inf).all()


def test_empty_rows_have_zero_gradients():
    out, lse = (
        torch.randn(1, 1, 3, 2, requires_grad=True),
        torch.full((1, 1, 3), -math.inf, requires_grad=True),
    )
    merge((out, lse), (out, lse)).out.sum().backward()
    assert (out.grad == 0).all()
    assert (lse.grad == 0).all()


def test_half_precision_keeps_float32_statistics():
    out, lse = torch.randn(1, 1, 3, 2, dtype=torch.bfloat16), torch.randn(1, 1, 3)
    merged = merge((out, lse), (out, lse + 1))
    assert merged.out.dtype == torch.bfloat16
    assert merged.lse.dtype == torch.float32


def test_it_compiles_whole():
    parts = [(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5)) for _ in range(2)]
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*parts).out, merge(*parts).out)


def test_wrong_input_is_named():
    out, lse = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match="at least one"):
        merge()
    with pytest.raises(TypeError, match="part 1 must be a pair"):
        merge((out, lse), out)
    with pytest.raises(ValueError, match="part 0 has out .* and lse"):
        merge((out, lse[..., :2]), (out, lse))
    with pytest.raises(ValueError, match="part 1 has out of shape"):
        merge((out, lse), (out[:, :, :2], lse[:, :, :2]))
