"""Neighbourhood attention beside the fused call: extra keys, separate scores and averages, orders of tokens."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import Neighborhood, attention
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism import exact
from manyheads.mechanism.sparse import (
    neighborhood_attention,
    neighborhood_average,
    neighborhood_scores,
    permute_tokens,
    unpermute_tokens,
)
from manyheads.mechanism.sparse.neighborhood import in_order_of_boxes, reference
from manyheads.testing import sample_qkv

F64 = torch.float64
GRIDS = [
    {"shape": (23,), "window": 6, "stride": 2},
    {"shape": (22,), "window": 4, "stride": 4, "causal": True, "dilation": 3},
    {"shape": (9, 7), "window": (4, 3), "dilation": (2, 1)},
    {"shape": (9, 8), "window": (5, 8), "stride": (3, 2), "causal": (True, False)},
    {"shape": (4, 5, 6), "window": (2, 3, 4), "stride": (1, 3, 2), "causal": (True, False, False)},
]


def draw(options, heads=4, kv_heads=2, **more):
    """Inputs on a grid in float64."""
    return sample_qkv(2, heads, math.prod(options["shape"]), kv_heads=kv_heads, width=8, dtype=F64, **more)


def grads(out, leaves, seed=3):
    """Gradients under fixed weights."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return torch.autograd.grad((out * weight).sum(), leaves)


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_gradients_are_those_of_masked_dense_attention(options):
    q, k, v = (t.requires_grad_() for t in draw(options, value_width=5))
    visible = Neighborhood(**options).dense(q.shape[2])
    wanted = grads(exact.reference(q, k, v, mask=visible), (q, k, v))
    for got, want in zip(grads(neighborhood_attention(q, k, v, **options), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_extra_keys_are_keys_concatenated(options, generator):
    q, k, v = draw(options)
    extra = tuple(torch.randn(2, 2, 7, 8, generator=generator, dtype=F64) for _ in range(2))
    leaves = [t.requires_grad_() for t in (q, k, v, *extra)]
    got = neighborhood_attention(q, k, v, **options, extra=extra, return_lse=True)
    want = reference(q, k, v, **options, extra=extra, return_lse=True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    for one, other in zip(grads(got.out, leaves), grads(want.out, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    lse = grads(neighborhood_attention(q, k, v, **options, extra=extra, return_lse=True).lse, leaves[:2])
    for one, other in zip(lse, grads(want_lse(q, k, v, options, extra), leaves[:2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def want_lse(q, k, v, options, extra):
    """The normaliser of the definition, with gradients."""
    return reference(q, k, v, **options, extra=extra, return_lse=True).lse


@pytest.mark.parametrize("length", [19, 24])
def test_stride_one_is_the_plain_neighbourhood(length):
    options = {"shape": (length,), "window": 6}
    q, k, v = draw(options)
    start = (torch.arange(length) - 3).clamp(0, length - 6)
    at = torch.arange(length)
    nearest = (at >= start[:, None]) & (at < start[:, None] + 6)
    want = exact.reference(q, k, v, mask=nearest[None, None])
    torch.testing.assert_close(neighborhood_attention(q, k, v, **options, stride=1), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(19,), (5, 6), (3, 4, 2)])
def test_a_window_of_the_whole_grid_is_plain_attention(shape):
    q, k, v = draw({"shape": shape})
    got = neighborhood_attention(q, k, v, shape=shape, window=shape, stride=shape)
    assert torch.equal(got, attention(q, k, v))


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_scores_softmax_and_average_are_the_fused_call(options):
    q, k, v = (t.requires_grad_() for t in draw(options))
    s = neighborhood_scores(q, k, **options)
    assert s.shape[3] == math.prod(Neighborhood(**options).window)
    got = neighborhood_average(s.softmax(-1), v, **options)
    want = neighborhood_attention(q, k, v, **options, return_lse=True)
    torch.testing.assert_close(got, want.out, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(s.logsumexp(-1), want.lse, rtol=1e-9, atol=1e-10)
    for one, other in zip(grads(got, (q, k, v)), grads(want.out, (q, k, v)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_a_table_adds_its_entry_for_each_distance(options, generator):
    q, k, v = draw(options)
    mask = Neighborhood(**options)
    table = torch.randn(4, *(2 * w - 1 for w in mask.window), generator=generator, dtype=F64).requires_grad_()
    s = neighborhood_scores(q, k, **options, table=table)
    got = neighborhood_average(s.softmax(-1), v, **options)
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in mask.grid), indexing="ij"), -1).flatten(0, -2)
    away = (places[None] - places[:, None]) // torch.tensor(mask.dilation)
    index = (away + torch.tensor(mask.window) - 1).clamp(torch.zeros(len(mask.grid)), torch.tensor(table.shape[1:]) - 1)
    bias = table[:, *index.long().unbind(-1)]
    keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ keys.mT * 8**-0.5 + bias).masked_fill(~mask.dense(q.shape[2]), -math.inf)
    want = scores.softmax(-1) @ values
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(*(grads(out, [table])[0] for out in (got, want)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_the_order_of_boxes_changes_nothing(options):
    q, k, v = draw(options)
    got = in_order_of_boxes(q, k, v, Neighborhood(**options), box=2, return_lse=True)
    want = reference(q, k, v, **options, return_lse=True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_kernels_over_tiles_take_the_order_of_boxes():
    pytest.importorskip("triton")
    q, k, v = sample_qkv(1, 2, 60, width=16)
    mask = Neighborhood((6, 10), (3, 4), causal=(True, False))
    try:
        got = in_order_of_boxes(q, k, v, mask, box=(2, 4), backend="triton")
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    torch.testing.assert_close(got, exact.reference(q, k, v, mask=mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "box", "dilation"), [((11,), 4, 3), ((5, 7), (2, 3), (1, 2)), ((4, 3, 5), 2, (2, 1, 3)), ((8, 8), 4, 1)]
)
def test_permuted_tokens_are_boxes_of_residue_classes(shape, box, dilation):
    tokens = math.prod(shape)
    x = torch.arange(2 * 3 * tokens * 2.0).view(2, 3, tokens, 2)
    options = {"shape": shape, "box": box, "dilation": dilation}
    moved, real = permute_tokens(x, **options)
    assert int(real.sum()) == tokens and moved.shape[2] == real.shape[1]
    assert not moved.unflatten(0, (2, -1)).masked_select(~real[None, :, None, :, None]).any()
    assert torch.equal(unpermute_tokens(moved, **options), x)
    cells = permute_tokens(torch.arange(tokens, dtype=F64).view(1, 1, tokens, 1), **options)[0][:, 0, :, 0].long()
    sizes, steps = ((one,) * len(shape) if isinstance(one, int) else one for one in (box, dilation))
    for some, own in zip(cells, real, strict=True):
        for inside, there in zip(some.split(math.prod(sizes)), own.split(math.prod(sizes)), strict=True):
            axes = torch.unravel_index(inside[there], shape)
            for at, step, size in zip(axes, steps, sizes, strict=True):
                assert len((at % step).unique()) <= 1 and len((at // step // size).unique()) <= 1


def test_a_permuted_dilation_is_a_plain_neighbourhood_of_each_class():
    x = sample_qkv(1, 2, 96, width=8, dtype=F64)
    grid = {"shape": (8, 12), "box": (2, 2), "dilation": (2, 3)}
    parts = [permute_tokens(t, **grid)[0] for t in x]
    order = [unpermute_tokens(t, shape=(4, 4), box=(2, 2)) for t in parts]
    inner = neighborhood_attention(*order, shape=(4, 4), window=3)
    back = unpermute_tokens(permute_tokens(inner, shape=(4, 4), box=(2, 2))[0], **grid)
    want = neighborhood_attention(*x, shape=(8, 12), window=3, dilation=(2, 3))
    torch.testing.assert_close(back, want, rtol=1e-9, atol=1e-10)


def test_bad_input_is_named():
    q, k, v = sample_qkv(1, 4, 20, kv_heads=2, width=8)
    grid = {"shape": (4, 5), "window": 3}

    def near(**options):
        return neighborhood_attention(q, k, v, **(grid | options))

    cases = [
        (TypeError, "extra: expected a pair", lambda: near(extra=k)),
        (ValueError, r"extra: expected keys of shape \(1, 2, E, 8", lambda: near(extra=(q, q))),
        (ValueError, "extra: expected as many values as keys", lambda: near(extra=(k, v[:, :, 1:]))),
        (TypeError, "extra: expected values in torch.float32", lambda: near(extra=(k, v.double()))),
        (ValueError, "table: expected shape", lambda: neighborhood_scores(q, k, **grid, table=torch.zeros(4, 5))),
        (ValueError, "k: expected the N=20 tokens", lambda: neighborhood_scores(q, k[:, :, 1:], **grid)),
        (ValueError, "weights: expected", lambda: neighborhood_average(torch.zeros(1, 4, 20, 8), v, **grid)),
        (ValueError, "shape: expected a grid of N=20", lambda: permute_tokens(q, shape=(4, 4), box=2)),
        (ValueError, r"x: expected \(B \* 4, H, ", lambda: unpermute_tokens(q, shape=(4, 5), box=2, dilation=2)),
        (ValueError, "window: expected at least 2", lambda: near(window=1)),
        (ValueError, "stride: expected at most the window", lambda: near(stride=4)),
        (ValueError, "window \\* dilation", lambda: near(dilation=2)),
        (ValueError, "causal: expected a bool", lambda: near(causal=(True,) * 3)),
        (UnsupportedError, "noncausal_cross", lambda: neighborhood_attention(q, k[:, :, 1:], v[:, :, 1:], **grid)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_compiled_calls_are_the_same(generator):
    q, k, v = sample_qkv(1, 2, 30, width=8)
    extra = tuple(torch.randn(1, 2, 4, 8, generator=generator) for _ in range(2))

    def call(q, k, v):
        near = neighborhood_attention(q, k, v, shape=(5, 6), window=3, extra=extra)
        s = neighborhood_scores(q, k, shape=(5, 6), window=3, causal=(True, False))
        return near + neighborhood_average(s.softmax(-1), v, shape=(5, 6), window=3, causal=(True, False))

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
