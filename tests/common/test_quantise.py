"""Whole numbers of few bits: how far off they may be, packing, and what smoothing takes away and puts back."""

from __future__ import annotations

import pytest
import torch

from manyheads.common.quantise import LEVELS, pack_int4, quantise, smoothed, unpack_int4


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_element_is_off_by_more_than_half_a_step(dtype, bits, block, generator):
    x = (torch.randn(2, 3, 37, 9, generator=generator) * torch.logspace(-3, 3, 37)[:, None]).to(dtype)
    got = quantise(x, bits, block=block)
    off = (got.dequantise() - x).abs()
    assert (off <= got.steps[..., None] * 0.5 * (1 + 1e-5)).all()
    assert int(got.values.abs().max()) == LEVELS[bits]
    assert got.scale.shape == (2, 3, -(-37 // block))


def test_every_block_uses_its_whole_range(generator):
    got = quantise(torch.randn(4, 21, 8, generator=generator), 4, block=7)
    tops = got.values.abs().unflatten(1, (3, 7)).amax((2, 3))
    assert (tops == 7).all()


def test_zeros_and_the_smallest_numbers_stay_what_they_are():
    x = torch.tensor([[0.0, 0.0], [1e-44, 0.0]])
    got = quantise(x, 8)
    assert (got.scale > 0).all() and got.dequantise().isfinite().all()
    assert (got.dequantise() - x).abs().max() <= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_packing_two_to_a_byte_comes_back(width, generator):
    values = torch.randint(-8, 8, (3, 5, width), dtype=torch.int8, generator=generator)
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, -(-width // 2))
    assert torch.equal(unpack_int4(packed, width), values)


def test_packed_holds_the_values_at_either_width(generator):
    x = torch.randn(6, 10, generator=generator)
    four, eight = quantise(x, 4), quantise(x, 8)
    assert four.packed().nbytes * 2 == eight.packed().nbytes == 60
    assert torch.equal(unpack_int4(four.packed(), 10), four.values)


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("keys", [True, False])
def test_smoothing_puts_back_what_it_took(queries, keys, generator):
    q = torch.randn(2, 6, 5, 8, generator=generator, dtype=torch.float64) + 3
    k = torch.randn(2, 2, 9, 8, generator=generator, dtype=torch.float64) - 4
    got = smoothed(q, k, queries=queries, keys=keys)
    dots = got.queries @ got.keys.repeat_interleave(3, 1).mT + got.row[..., None] + got.column[:, :, None]
    torch.testing.assert_close(dots, q @ k.repeat_interleave(3, 1).mT, rtol=1e-12, atol=1e-12)
    assert (got.keys.mean(2).abs().max() < 1e-12) == keys
    assert (got.queries.mean(2).abs().max() < 1e-12) == queries


def test_smoothing_makes_four_bits_several_times_better_where_channels_are_shifted(generator):
    q, k = (torch.randn(1, 1, 256, 64, generator=generator) for _ in range(2))
    k = k + 8 * torch.randn(64, generator=generator)
    exact = q @ k.mT

    def error(keys, row):
        low = quantise(q, 4).dequantise() @ quantise(keys, 4).dequantise().mT + row
        return (low - exact).square().mean().sqrt()

    parts = smoothed(q, k, queries=False)
    assert error(parts.keys, parts.row[..., None]) * 3 < error(k, 0.0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantise(torch.ones(2, 2, dtype=torch.int32)), TypeError, "x: .*int32"),
        (lambda: quantise(torch.ones(3)), ValueError, r"x: .*\(3,\)"),
        (lambda: quantise(torch.ones(2, 2), 5), ValueError, "bits: expected 8 or 4, got 5"),
        (lambda: quantise(torch.ones(2, 2), block=0), ValueError, "block: .*got 0"),
        (lambda: pack_int4(torch.ones(2)), TypeError, "values: expected int8"),
        (lambda: unpack_int4(torch.ones(2), 4), TypeError, "packed: expected uint8"),
        (lambda: unpack_int4(torch.ones(2, dtype=torch.uint8), 6), ValueError, "width: 2 bytes hold 4"),
    ],
)
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
