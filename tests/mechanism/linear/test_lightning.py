"""Lightning Attention-2: its three forms, its limits, its slopes, what it refuses, and independent code."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.linear import decay_slopes, lightning_attention
from manyheads.mechanism.linear.lightning import reference, step
from manyheads.testing import sample_qkv

SLOPES = torch.tensor([0.0, 0.03, 0.7, 5.0], dtype=torch.float64)


def inputs(tokens, seed, **size):
    """Queries, keys and values of four heads, in float64."""
    return sample_qkv(2, 4, tokens, **{"width": 8, "value_width": 5, "dtype": torch.float64, "seed": seed} | size)


def close(a, b):
    """Equal up to float64 rounding."""
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def stepped(q, k, v, **options):
    """Token after token."""
    state, rows = None, []
    for t in range(q.shape[2]):
        row, state = step(q[:, :, t], k[:, :, t], v[:, :, t], state, **options)
        rows.append(row)
    return torch.stack(rows, 2), state


@pytest.mark.parametrize("tokens", [1, 31, 64, 65, 150])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_recurrent_parallel_and_chunked_forms_agree(tokens, kv_heads, seed):
    q, k, v = inputs(tokens, seed, kv_heads=kv_heads)
    chunked, state = lightning_attention(q, k, v, slopes=SLOPES, return_state=True)
    recurrent, last = stepped(q, k, v, slopes=SLOPES)
    close(chunked, reference(q, k, v, slopes=SLOPES))
    close(chunked, recurrent)
    close(state.S, last.S)


@pytest.mark.parametrize("chunk", [1, 2, 16, 50, 64, 256])
def test_the_chunk_changes_nothing(chunk, seed):
    q, k, v = inputs(77, seed)
    close(lightning_attention(q, k, v, slopes=SLOPES, chunk=chunk), reference(q, k, v, slopes=SLOPES))


@pytest.mark.parametrize("slopes", [None, SLOPES[:2]])
def test_gradients_match_finite_differences(slopes, seed):
    leaves = [t.requires_grad_() for t in sample_qkv(1, 2, 7, width=3, dtype=torch.float64, seed=seed)]
    assert torch.autograd.gradcheck(lambda q, k, v: lightning_attention(q, k, v, slopes=slopes, chunk=4), leaves)


def test_without_decay_it_is_masked_linear_attention(seed):
    q, k, v = inputs(70, seed)
    want = (q @ k.mT).tril() @ v
    close(lightning_attention(q, k, v), want)
    close(lightning_attention(q, k, v, slopes=torch.zeros(4, dtype=torch.float64)), want)


def test_strong_decay_leaves_each_token_its_own_value(seed):
    q, k, v = inputs(70, seed)
    strong = torch.full((4,), 80.0, dtype=torch.float64)
    close(lightning_attention(q, k, v, slopes=strong), (q * k).sum(-1, keepdim=True) * v)


@pytest.mark.parametrize("width", [130, 256])
def test_splitting_the_width_and_summing_changes_nothing(width, seed):
    q, k, v = inputs(40, seed, width=width)
    parts = [
        lightning_attention(q[..., part], k[..., part], v, slopes=SLOPES)
        for part in (slice(0, 64), slice(64, 128), slice(128, None))
    ]
    whole = lightning_attention(q, k, v, slopes=SLOPES)
    torch.testing.assert_close(whole, sum(parts), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole, reference(q, k, v, slopes=SLOPES), rtol=1e-9, atol=1e-9)


def test_streaming_pieces_with_the_carried_state_equals_one_call(seed):
    q, k, v = inputs(100, seed)
    state, parts = None, []
    for piece in zip(*(t.split([33, 0, 1, 64, 2], dim=2) for t in (q, k, v)), strict=True):
        out, state = lightning_attention(*piece, slopes=SLOPES, state=state, return_state=True)
        parts.append(out)
    whole, last = lightning_attention(q, k, v, slopes=SLOPES, return_state=True)
    close(torch.cat(parts, 2), whole)
    close(state.S, last.S)


def test_padding_takes_no_part_in_distances(seed):
    q, k, v = inputs(30, seed)
    real = torch.arange(30) % 3 != 1
    got = lightning_attention(q, k, v, slopes=SLOPES, key_padding=real.expand(2, -1))
    close(got[:, :, real], lightning_attention(*(t[:, :, real] for t in (q, k, v)), slopes=SLOPES))
    assert (got[:, :, ~real] == 0).all()


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 32])
def test_slopes_are_the_geometric_ones_of_alibi(heads):
    power = 2 ** math.floor(math.log2(heads))
    base, twice = (2.0 ** (-8.0 / n) for n in (power, 2 * power))
    want = [base ** (h + 1) for h in range(power)] + [twice ** (2 * h + 1) for h in range(heads - power)]
    torch.testing.assert_close(decay_slopes(heads), torch.tensor(want))


def test_deeper_layers_forget_more_slowly():
    layers = torch.stack([decay_slopes(6, layer=i, layers=5) for i in range(5)])
    assert (layers.diff(dim=0) < 0).all() and (layers > 0).all()
    torch.testing.assert_close(layers[-1], 1e-5 * decay_slopes(6))
    torch.testing.assert_close(layers[0], (1 + 1e-5) * decay_slopes(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slopes": torch.ones(3)}, r"slopes: expected shape \(H=4,\), got \(3,\)"),
        ({"slopes": -torch.ones(4)}, "slopes: decay rates are at least 0, got -1"),
        ({"chunk": 0}, "chunk: expected a positive number"),
        ({"mask": Document([3, 3]) & Causal()}, "mask: documents must sum to the N=9"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lightning_attention(*inputs(9, 0), **options)


def test_slopes_must_be_floating():
    with pytest.raises(TypeError, match="slopes: expected a floating tensor, got torch.int64"):
        lightning_attention(*inputs(9, 0), slopes=torch.ones(4).long())


@pytest.mark.parametrize("mask", ["full", Document([4, 5])])
def test_it_only_looks_back(mask):
    with pytest.raises(UnsupportedError, match="lightning-attention-2 does not support noncausal_self"):
        lightning_attention(*inputs(9, 0), mask=mask)


@pytest.mark.parametrize("numbers", [{"heads": 0}, {"heads": 2, "layer": 3, "layers": 3}])
def test_slopes_of_no_heads_or_no_such_layer_are_refused(numbers):
    with pytest.raises(ValueError, match=r"heads: expected|layer: expected"):
        decay_slopes(**numbers)


def test_equals_flash_linear_attention(seed):
    naive = pytest.importorskip("fla.ops.simple_gla.naive")
    q, k, v = (t.float() for t in inputs(45, seed))
    rates = -SLOPES.float().expand(2, 45, 4)
    want, state = naive.naive_recurrent_simple_gla(*(t.transpose(1, 2) for t in (q, k, v)), rates, scale=1.0)
    got, last = lightning_attention(q, k, v, slopes=SLOPES.float(), return_state=True)
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.S, state, rtol=1e-4, atol=1e-4)
