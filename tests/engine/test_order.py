"""Key tiles outermost: the values and gradients of query tiles outermost, and who takes which."""

from __future__ import annotations

import math

import pytest
import torch

import manyheads as mh
from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.engine.tiled import inverted, lists, order, products, tiled
from manyheads.mask.layout import TileLayout
from manyheads.testing import assert_within_budget
from tests.engine.kernel_calls import draw, outcome

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture
def generator():
    """The same draw every day: a budget is a bound on typical rounding, and rounding has unlucky days."""
    return torch.Generator().manual_seed(0)


def chosen(generator, nq, nk, tile, of, heads, batch=1, keep=3, mask=None):
    """Some of the key tiles of every query tile in any order, ragged, one row without any; ``of``: entries, lists."""
    tq, tk = -(-nq // tile[0]), -(-nk // tile[1])
    ids = torch.rand(*of, tq, tk, generator=generator).argsort(-1)[..., :keep]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -1)
    ids[..., tq // 2, :] = -1
    return TileLayout.from_ids(ids, nq=nq, nk=nk, tile=tile, mask=mask, batch=batch, heads=heads)


def agree(inputs, layout, dtype, by="keys", **options):
    """Asserts that key tiles outermost are within the budget of the definition."""
    exact = outcome(inputs, layout, F64, "reference", **options)
    plain = outcome(inputs, layout, dtype, "reference", **options)
    got = outcome(inputs, layout, dtype, "blocked", order=by, **options)
    for name, value in got.items():
        assert_within_budget(value, exact[name], plain[name], what=name)
    return got


@pytest.fixture(params=["fused", "products"])
def way(request, monkeypatch):
    """Both ways of computing a part in half precision."""
    monkeypatch.setattr(products, "fused_wins", lambda dtype: request.param == "fused")


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("mask", [None, Causal()], ids=str)
def test_one_query_a_tile_equals_the_definition_for_every_group(group, mask, generator):
    layout = chosen(generator, 45, 77, (1, 16), (2, 2), 2 * group, batch=2, mask=mask)
    inputs = draw(generator, 45, 77, heads=2 * group, kv_heads=2, batch=2, d=8, dv=12)
    keys = agree(inputs, layout, F32)
    queries = outcome(inputs, layout, F32, "blocked", order="queries")
    for name, value in keys.items():
        torch.testing.assert_close(value, queries[name], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("deviation", [1.0, 8.0])
def test_half_precision_stays_within_budget(deviation, way, generator):
    layout = chosen(generator, 61, 130, (1, 16), (1, 2), 6, keep=6, mask=Causal())
    agree(draw(generator, 61, 130, heads=6, kv_heads=2, d=16, dv=8, deviation=deviation), layout, BF16)


@pytest.mark.parametrize(
    ("of", "batch", "heads", "kv_heads"),
    [((1, 1), 2, 4, 2), ((2, 1), 2, 3, 1), ((1, 6), 1, 6, 2), ((1, 2), 2, 2, 2), ((1, 2), 1, 4, 4)],
    ids=["shared by all", "per batch entry", "per query head", "per head, shared", "fewer lists than key heads"],
)
def test_lists_may_be_shared_in_any_way(of, batch, heads, kv_heads, generator):
    layout = chosen(generator, 21, 50, (1, 8), of, heads, batch)
    agree(draw(generator, 21, 50, heads=heads, kv_heads=kv_heads, batch=batch, d=8), layout, F32)


@pytest.mark.parametrize("tile", [(2, 8), (4, 16), (8, 8), (16, 32)], ids=str)
def test_tiles_of_some_queries_have_their_bitmaps(tile, generator):
    layout = chosen(generator, 45, 45, tile, (1, 2), 4, mask=Causal() & Document([20, 25]))
    agree(draw(generator, 45, 45, heads=4, kv_heads=2, d=8), layout, F32)


def test_a_sink_joins_the_normaliser_in_both_precisions(way, generator):
    layout = chosen(generator, 40, 64, (1, 16), (1, 2), 4, mask=Causal())
    inputs, sink = draw(generator, 40, 64, heads=4, kv_heads=2, d=8), {"sink": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    for dtype in (F32, BF16):
        agree(inputs, layout, dtype, leaves=sink)


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.7])
def test_any_scale(scale, generator):
    layout = chosen(generator, 20, 32, (1, 8), (1, 1), 2)
    agree(draw(generator, 20, 32, heads=2, d=8), layout, F32, scale=scale)


def test_many_small_chunks_and_pieces_agree_with_one(generator, monkeypatch):
    inputs = draw(generator, 90, 90, heads=4, kv_heads=2, d=8)
    make = lambda: chosen(torch.Generator().manual_seed(3), 90, 90, (1, 8), (1, 2), 4, mask=Causal())  # noqa: E731
    want = outcome(inputs, make(), F64, "blocked", order="keys")
    for module, name, value in ((lists, "_PARTIAL", 5_000), (lists, "_TALL", 8), (inverted, "_SCORES", 100)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(lists, "_SHORT", 2)
    layout = make()
    assert len(lists.lists_of(layout, 1, 4, 2, 8).chunks) > 2
    got = outcome(inputs, layout, F64, "blocked", order="keys")
    for name, value in got.items():
        torch.testing.assert_close(value, want[name])


def test_every_choice_is_one_entry_in_a_piece_of_its_key_tile(generator):
    layout = chosen(generator, 45, 77, (1, 16), (2, 2), 4, batch=2, mask=Causal())
    found = lists.lists_of(layout, 2, 4, 2, 64)
    rows, tiles = 45, layout.grid[1]
    met = []
    for chunk in found.chunks:
        for part in chunk.parts:
            source = found.source[chunk.entries][part.first : part.first + part.size * len(part.tiles)]
            for piece, tile in zip(source.view(len(part.tiles), -1).tolist(), part.tiles.tolist(), strict=True):
                met += [(row, tile) for row in piece if row < len(found.place)]
    ids = layout.ids.flatten(0, 1)
    want = [
        (number * rows + i, number * tiles + t)
        for number, list in enumerate(ids.tolist()) for i, row in enumerate(list) for t in row if t >= 0
    ]  # fmt: skip
    assert sorted(met) == sorted(want)


@pytest.mark.parametrize("keep", [0, 1])
def test_nothing_chosen_gives_zeros_and_minus_infinity(keep, generator):
    ids = torch.full((1, 1, 5, keep), -1)
    q = torch.randn(1, 2, 5, 4, generator=generator, requires_grad=True)
    k = torch.randn(1, 1, 8, 4, generator=generator)
    out, lse = tiled(q, k, k, TileLayout.from_ids(ids, nq=5, nk=8, tile=(1, 4), heads=2), order="keys", return_lse=True)
    out.sum().backward()
    assert not out.any() and bool((lse == -math.inf).all()) and not q.grad.any()


def test_gradcheck_in_float64(generator):
    layout = chosen(generator, 7, 12, (1, 4), (1, 1), 2, keep=2)
    leaves = [torch.randn(1, h, n, 3, generator=generator, dtype=F64, requires_grad=True) for h, n in ((2, 7), (1, 12))]
    sink = torch.randn(2, generator=generator, dtype=F64, requires_grad=True)

    def call(q, k, sink):
        out, lse = tiled(q, k, k * 0.5, layout, sink=sink, order="keys", return_lse=True)
        return out, lse

    assert torch.autograd.gradcheck(call, (*leaves, sink))


def test_everything_chosen_is_dense_causal_attention(generator):
    ids = torch.arange(6).expand(1, 2, 45, 6)
    layout = TileLayout.from_ids(ids, nq=45, nk=45, tile=(1, 8), mask=Causal(), heads=4)
    inputs = draw(generator, 45, 45, heads=4, kv_heads=2, d=8)
    got = outcome(inputs, layout, F64, "blocked", order="keys")
    want = outcome(inputs, Causal(), F64, "reference")
    for name, value in got.items():
        torch.testing.assert_close(value, want[name])


def test_two_runs_give_the_same_bits_and_views_do_too(generator):
    layout = chosen(generator, 45, 64, (1, 16), (1, 2), 4)
    inputs = draw(generator, 45, 64, heads=4, kv_heads=2, d=8)
    first = outcome(inputs, layout, F32, "blocked", order="keys")
    turned = type(inputs)(*(t.mT.contiguous().mT for t in inputs[:3]), *inputs[3:])
    for again in (outcome(x, layout, F32, "blocked", order="keys") for x in (inputs, turned)):
        assert all(torch.equal(first[name], value) for name, value in again.items())


def test_the_engine_takes_key_tiles_where_queries_of_a_tile_are_few(generator, monkeypatch):
    taken = []
    monkeypatch.setattr(inverted, "forward", lambda p: taken.append(1) or (p.q, p.q[..., 0]))
    q = torch.randn(1, 2, 32, 8, generator=generator)
    for tile, options, want in (
        ((1, 8), {}, 1), ((8, 8), {}, 1), ((16, 8), {}, 0), ((1, 8), {"order": "queries"}, 0),
        ((1, 8), {"softcap": 2.0}, 0), ((16, 8), {"order": "keys"}, 1),
    ):  # fmt: skip
        taken.clear()
        tiled(q, q, q, chosen(generator, 32, 32, tile, (1, 1), 2), backend="blocked", **options)
        assert len(taken) == want, (tile, options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 3.0}, "softcap"),
        ({"backend": "reference"}, "reference"),
        ({"qk": "int8"}, "int8"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"weight": "sigmoid"}, "softmax"),
    ],
    ids=str,
)
def test_what_key_tiles_cannot_do_is_refused(options, reason, generator):
    q = torch.randn(1, 2, 16, 8, generator=generator)
    layout = chosen(generator, 16, 16, (1, 8), (1, 1), 2, keep=2)
    with pytest.raises(UnsupportedError, match=reason):
        tiled(q, q, q, layout, order="keys", **options)
    with pytest.raises(UnsupportedError, match="runs"):
        tiled(q, q, q, "causal", order="keys")
    with pytest.raises(ValueError, match="did you mean 'keys'"):
        tiled(q, q, q, layout, order="key")


def test_explain_says_which_loop_is_outermost_and_why(generator):
    ids = torch.zeros(1, 2, 64, 1, dtype=torch.int64)
    q, k = torch.ones(1, 32, 64, 8), torch.ones(1, 2, 64, 8)
    fine, coarse = (
        TileLayout.from_ids(ids[:, :, : 64 // size], nq=64, nk=64, tile=(size, 16), heads=32) for size in (1, 64)
    )
    assert "key tiles are outermost (queries of a tile: 1, heads that share a choice: 16)" in str(
        mh.explain(q, k, k, mask=fine)
    )
    assert "query tiles are outermost" in str(mh.explain(q, k, k, mask=coarse))
    assert "softcap" in str(mh.explain(q, k, k, mask=fine, softcap=2.0))
    assert not order.prefers(fine, "triton", 32, 2)
    assert order.prefers(fine, "triton", 16, 2)
    with pytest.raises(UnsupportedError, match="a layout"):
        mh.explain(q, k, k, mask=fine, backend="sdpa")
