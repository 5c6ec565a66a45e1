"""The gather engine beside its definition: values, gradients, shapes, what must not show, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads import Causal, Full
from manyheads.engine.gather import blocked, gather, refuse, rows
from manyheads.engine.tiled import tiled
from manyheads.testing import nan_poisoned
from tests.engine.gather_calls import BRAIN, FULL, HALF, WIDE, agree, draw

OWN, SHARED, CHOSEN = 10.0, 1e-6, None
EVERY = [OWN, SHARED, CHOSEN]


@pytest.fixture(params=EVERY, ids=["own rows", "shared rows", "the cheaper rows"])
def reads(request, monkeypatch):
    """Whether queries of a block fetch their own rows or share them."""
    if request.param is not None:
        monkeypatch.setattr(rows, "sharing_cost", lambda p: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [FULL, BRAIN, HALF], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"sink": True}, {"softcap": 2.0}, {"softcap": 2.0, "sink": True}, {"dv": 8}, {"dv": 24}, {"scale": -0.3},
     {"deviation": 8.0}, {"padding": 0.0}],
    ids=str,
)  # fmt: skip
def test_values_lse_and_every_gradient(options, dtype, reads):
    agree(draw(**options), dtype)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (1, 6), (2, 1), (2, 2), (2, 6)], ids=str)
def test_ids_are_shared_by_batch_entries_key_heads_or_nobody(sizes, reads):
    batch, heads = sizes
    call = draw(19, 40, heads=6, kv_heads=2, batch=2, ids_batch=batch, ids_heads=heads)
    got = agree(call, FULL)
    whole = call.ids.repeat_interleave(6 // heads, 1).expand(2, -1, -1, -1)
    again = call.run(FULL, ids=whole.to(torch.int32))
    for name, value in again.items():
        torch.testing.assert_close(value, got[name], msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=15)
@given(
    queries=st.integers(1, 70), keys=st.integers(1, 40), count=st.integers(0, 45), d=st.sampled_from([1, 5, 16]),
    group=st.sampled_from([1, 3, 7]), kv_heads=st.sampled_from([1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(queries, keys, count, d, group, kv_heads, seed):
    call = draw(queries, keys, count, heads=group * kv_heads, kv_heads=kv_heads, d=d, batch=2, seed=seed)
    exact, got = call.run(WIDE, "reference"), call.run(WIDE)
    for name, value in got.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mask", [Full(), Causal()], ids=str)
def test_listing_what_a_mask_allows_is_dense_attention(mask, reads):
    call = draw(40, 40, padding=0.0)
    ids = torch.arange(40).expand(1, 1, 40, 40)
    ids = ids.masked_fill(~mask.dense(40, 40), -1)
    got = gather(*call[:3], ids, return_lse=True)
    want = tiled(*call[:3], mask, return_lse=True)
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)


def test_order_and_place_of_padding_do_not_matter(reads):
    call = draw()
    order = torch.rand(call.ids.shape, generator=torch.Generator().manual_seed(3)).argsort(-1)
    got, want = call.run(WIDE, ids=call.ids.gather(-1, order)), call.run(WIDE)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_a_key_that_is_listed_twice_counts_twice(reads):
    q, k = torch.zeros(1, 1, 20, 4), torch.zeros(1, 1, 3, 4)
    v = torch.tensor([[[[1.0], [4.0], [100.0]]]])
    out, lse = gather(q, k, v, torch.tensor([0, 1, -1, 1]).expand(1, 1, 20, 4), return_lse=True)
    torch.testing.assert_close(out, torch.full_like(out, 3.0))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(3.0)))
    again = draw(40, 9, 20, padding=0.0)
    doubled = torch.randint(9, again.ids.shape, generator=torch.Generator().manual_seed(1))
    agree(again._replace(ids=doubled), FULL)


def test_rows_without_ids_give_nothing_and_take_nothing(reads):
    call = draw(30, 20)
    empty = (call.ids < 0).all(-1).repeat_interleave(2, 1)
    got = call.run(FULL)
    assert empty.any() and (got["out"][empty] == 0).all() and (got["lse"][empty] == -math.inf).all()
    assert (got["dq"][empty] == 0).all()
    sunk = draw(30, 20, sink=True)
    got = sunk.run(FULL)
    want = sunk.sink.float()[None, :, None].expand(1, 4, 30)[empty]
    assert (got["out"][empty] == 0).all()
    torch.testing.assert_close(got["lse"][empty], want)
    nothing = call.run(FULL, ids=torch.full_like(call.ids, -1))
    assert all((t == 0).all() for name, t in nothing.items() if name != "lse")


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_no_query_lists_may_hold_anything(bad, reads):
    call = draw(30, 20, 5)
    hidden = torch.ones(20, dtype=torch.bool).index_fill(0, call.ids[call.ids >= 0], False)
    hidden[0] = True  # padding must not read the first key
    ids = call.ids.masked_fill(call.ids == 0, -1)
    want = call.run(FULL, ids=ids)
    k, v, q = call.k.clone(), call.v.clone(), call.q.clone()
    k[:, :, hidden], v[:, :, hidden] = bad, bad
    q[:, :, 15] = bad  # the query without ids
    got = call.run(FULL, ids=ids, k=k, v=v, q=q)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("dtype", [FULL, BRAIN], ids=str)
def test_values_that_are_columns_of_the_keys_are_fetched_once(first, dtype, reads, monkeypatch):
    call, names = draw(40, 60, heads=6, kv_heads=1, d=24), []
    q, k = (t.to(dtype) for t in call[:2])
    fetch = blocked._Source._fetch
    monkeypatch.setattr(blocked._Source, "_fetch", lambda s, n, *args: [names.append(n), fetch(s, n, *args)][1])
    latent = k.clone().requires_grad_()
    out = gather(q, latent, latent[..., first : first + 16], call.ids)
    (grad,) = torch.autograd.grad(out.sum(), latent)
    assert set(names) == {"k"}
    apart = [k.clone().requires_grad_(), k[..., first : first + 16].clone().requires_grad_()]
    want = gather(q, *apart, call.ids)
    assert set(names) == {"k", "v"}
    dk, dv = torch.autograd.grad(want.sum(), apart)
    dk[..., first : first + 16] += dv
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == BRAIN else {}
    torch.testing.assert_close(out, want, **close)
    torch.testing.assert_close(grad, dk, **close)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dtype", [FULL, BRAIN], ids=str)
def test_very_long_lists_are_taken_in_parts(dtype, sink, reads, monkeypatch):
    monkeypatch.setattr(blocked, "_ROWS", 1)
    monkeypatch.setattr(rows, "_BYTES", 1)
    agree(draw(20, 300, 200, sink=sink), dtype)


def test_strides_do_not_matter(reads):
    call = draw(33, 40, batch=2)
    q, k, v = (t.float() for t in call[:3])
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    by_column = [t.mT.contiguous().mT for t in (q, k, v)]
    want = gather(q, k, v, call.ids)
    assert torch.equal(gather(*by_token, call.ids.mT.contiguous().mT), want)
    assert torch.equal(gather(*by_column, call.ids), want)
    padded = torch.full((2, 2, 90, 40), math.nan)
    padded[:, :, :80:2, :16] = k
    assert torch.equal(gather(q, padded[:, :, :80:2, :16], v, call.ids), want)
    wide = k[:1, :1].expand(2, 2, -1, -1)
    assert torch.equal(gather(q, wide, v, call.ids), gather(q, wide.contiguous(), v, call.ids))


@pytest.mark.parametrize("queries", [1, 37])
def test_nothing_uninitialised_is_read_and_two_runs_give_the_same_bits(queries, reads):
    call = draw(queries, batch=3, sink=True)
    want, again = call.run(FULL), call.run(FULL)
    with nan_poisoned():
        poisoned = call.run(FULL)
    for got in (again, poisoned):
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "count"), [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 5, 0), (1, 4, 0, 3)], ids=str
)
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_empty_calls(batch, queries, keys, count, backend):
    q = torch.randn(batch, 4, queries, 8, requires_grad=True)
    k, v = (torch.randn(batch, 2, keys, w, requires_grad=True) for w in (8, 3))
    ids = torch.full((batch, 2, queries, count), -1 if keys == 0 else 0)
    out, lse = gather(q, k, v, ids, return_lse=True, backend=backend)
    assert out.shape == (batch, 4, queries, 3) and lse.shape == (batch, 4, queries)
    if not keys or not count:
        assert (out == 0).all() and (lse == -math.inf).all()
    assert all((g == 0).all() or count * keys for g in torch.autograd.grad(out.sum(), [q, k, v]))


def test_queries_share_rows_only_where_that_is_cheaper():
    alike, apart = draw(64, 4000, 50, heads=2), draw(64, 4000, 50, heads=2)
    alike = alike._replace(ids=torch.arange(50).expand(1, 2, 64, 50))
    problem = blocked.Problem(*alike[:4], None, 1.0)
    assert [len(b.ids) for b in rows.blocks(problem)] == [1, 1]
    problem = blocked.Problem(*apart[:4], None, 1.0)
    assert [len(b.ids) for b in rows.blocks(problem)] == [64, 64]


@pytest.mark.parametrize(
    ("name", "error", "changes"),
    [
        ("ids", TypeError, {"ids": torch.zeros(1, 2, 5, 3)}),
        ("ids", TypeError, {"ids": torch.zeros(1, 2, 5, 3, dtype=torch.int16)}),
        ("ids", TypeError, {"ids": [[0]]}),
        ("ids", ValueError, {"ids": torch.zeros(2, 5, 3, dtype=torch.int64)}),
        ("ids", ValueError, {"ids": torch.zeros(1, 3, 5, 3, dtype=torch.int64)}),
        ("ids", ValueError, {"ids": torch.zeros(2, 2, 5, 3, dtype=torch.int64)}),
        ("ids", ValueError, {"ids": torch.zeros(1, 2, 4, 3, dtype=torch.int64)}),
        ("ids", ValueError, {"ids": torch.full((1, 2, 5, 3), 9)}),
        ("ids", ValueError, {"ids": torch.full((1, 2, 5, 3), -2)}),
        ("k", ValueError, {"k": torch.zeros(1, 2, 9, 7)}),
        ("softcap", ValueError, {"softcap": -1.0}),
        ("scale", ValueError, {"scale": math.inf}),
        ("sink", ValueError, {"sink": torch.zeros(2)}),
        ("did you mean 'blocked'", ValueError, {"backend": "blockd"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_bad_input_is_refused_by_name(name, error, changes, backend):
    given = {
        "q": torch.zeros(1, 4, 5, 8), "k": torch.zeros(1, 2, 9, 8), "v": torch.zeros(1, 2, 9, 6),
        "ids": torch.zeros(1, 2, 5, 3, dtype=torch.int64), "backend": backend,
    }  # fmt: skip
    gather(**given)
    with pytest.raises(error, match=name):
        gather(**given | changes)


def test_backends_say_where_they_run():
    assert refuse("blocked", "cpu") == [] == refuse("reference", "cpu")
    assert refuse("blocked", "meta") == ["meta tensors hold no data"]
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        refuse("trito", "cpu")
