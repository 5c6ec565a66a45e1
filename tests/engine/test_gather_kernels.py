"""The kernels of the gather engine beside the definition: values, every gradient, sharing, padding, extremes."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads.common.errors import UnsupportedError
from manyheads.engine.configs import WIDTHS, Config, using
from manyheads.engine.gather import gather, launch
from manyheads.engine.gather.op import op
from manyheads.engine.gpu import architecture
from manyheads.testing import nan_poisoned
from tests.engine.gather_calls import BRAIN, FULL, HALF, WIDE, agree, draw

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def small(device):
    """Few heads and ids at once, so that small calls go round every loop."""
    arch, config = architecture(torch.device(device)), Config(16, 16, 4, 1)
    with using({(k, arch, w, n, "lists"): config for k in launch.KERNELS for w in WIDTHS for n in (2, 4)}):
        yield


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"sink": True}, {"softcap": 2.0, "sink": True}, {"scale": -0.3}, {"deviation": 8.0}, {"padding": 0.0}],
    ids=str,
)
def test_values_lse_and_every_gradient(options, dtype, device):
    agree(draw(6, 30, 21, heads=2, kv_heads=1, **options), dtype, "triton", device)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 4)], ids=str)
def test_ids_are_shared_by_batch_entries_key_heads_or_nobody(sizes, device):
    batch, heads = sizes
    agree(draw(4, 19, 7, batch=2, ids_batch=batch, ids_heads=heads), FULL, "triton", device)


@pytest.mark.parametrize(("d", "dv"), [(1, 1), (20, 7), (8, 40), (130, 3)], ids=str)
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_widths(d, dv, dtype, device):
    agree(draw(4, 12, 9, heads=2, kv_heads=1, d=d, dv=dv), dtype, "triton", device)


@pytest.mark.parametrize("group", [3, 7, 19])
def test_heads_of_a_group_are_the_rows_of_a_product(group, device):
    agree(draw(3, 20, 9, heads=group, kv_heads=1, d=8, sink=True), FULL, "triton", device)


@pytest.mark.parametrize("first", [0, 9])
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_values_that_are_columns_of_the_keys_are_loaded_with_them(first, dtype, device, monkeypatch):
    call, seen = draw(5, 20, 11, heads=3, kv_heads=1, d=24), []
    original = launch.launch
    monkeypatch.setattr(launch, "launch", lambda k, n, a, c: [seen.append(a["SHARED"]), original(k, n, a, c)][1])
    q, k = (t.to(device, dtype) for t in call[:2])
    ids = call.ids.to(device)

    def results(shared, where):
        latent = k.clone().requires_grad_()
        v = latent[..., first : first + 15]
        out = gather(q, latent, v if shared else v.clone(), ids, backend=where)
        return [out, *torch.autograd.grad(out.square().sum(), latent)]

    got = results(True, "triton")
    assert seen == [True] * 3
    want = results(False, "triton")
    assert seen == [True] * 3 + [False] * 3
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == HALF else {}
    for a, b, c in zip(got, want, results(True, "reference"), strict=True):
        torch.testing.assert_close(a, b, **close)
        torch.testing.assert_close(a, c, **close)


@pytest.mark.parametrize("sink", [False, True])
def test_rows_without_ids_give_nothing_and_take_nothing(sink, device):
    call = draw(6, 20, 9, heads=2, kv_heads=1, sink=sink)
    got = call.run(FULL, "triton", device)
    assert (got["out"][:, :, 3] == 0).all() and (got["dq"][:, :, 3] == 0).all()
    expected = call.sink.to(device, FULL) if sink else torch.full((2,), -math.inf, device=device)
    torch.testing.assert_close(got["lse"][0, :, 3], expected)
    nothing = call.run(FULL, "triton", device, ids=torch.full_like(call.ids, -1))
    assert all((nothing[name] == 0).all() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_no_query_lists_may_hold_anything(bad, device):
    call = draw(6, 20, 3, heads=2, kv_heads=1)
    hidden = torch.ones(20, dtype=torch.bool).index_fill(0, call.ids[call.ids >= 0], False)
    hidden[0] = True  # padding must not read the first key
    ids = call.ids.masked_fill(call.ids == 0, -1)
    want = call.run(FULL, "triton", device, ids=ids)
    k, v = (t.masked_fill(hidden[:, None], bad) for t in (call.k, call.v))
    got = call.run(FULL, "triton", device, ids=ids, k=k, v=v)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_key_that_is_listed_twice_counts_twice(device):
    call = draw(6, 5, 9, heads=2, kv_heads=1, padding=0.0)
    ids = torch.randint(5, call.ids.shape, generator=torch.Generator().manual_seed(1))
    agree(call._replace(ids=ids), FULL, "triton", device)


def test_strides_do_not_matter_and_bfloat16_is_taken(device):
    call = draw(5, 20, 9, batch=2)
    q, k, v = (t.to(device, BRAIN) for t in call[:3])
    ids = call.ids.to(device)
    want = gather(q, k, v, ids, backend="triton")
    assert want.dtype == BRAIN
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    by_column = [t.mT.contiguous().mT for t in (q, k, v)]
    for given in (by_token, by_column):
        assert torch.equal(gather(*given, ids.mT.contiguous().mT, backend="triton"), want)


def test_nothing_uninitialised_is_read_and_two_runs_give_the_same_bits(device):
    call = draw(6, 20, 9, heads=2, kv_heads=1, sink=True)
    want, again = call.run(FULL, "triton", device), call.run(FULL, "triton", device)
    with nan_poisoned():
        poisoned = call.run(FULL, "triton", device)
    for got in (again, poisoned):
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "count"), [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 5, 0), (1, 4, 0, 3)], ids=str
)
def test_empty_calls(batch, queries, keys, count, device):
    q = torch.randn(batch, 4, queries, 8, device=device, requires_grad=True)
    k, v = (torch.randn(batch, 2, keys, w, device=device, requires_grad=True) for w in (8, 3))
    ids = torch.full((batch, 2, queries, count), -1 if keys == 0 else 0, device=device)
    out, lse = gather(q, k, v, ids, return_lse=True, backend="triton")
    assert out.shape == (batch, 4, queries, 3) and lse.shape == (batch, 4, queries)
    if not keys or not count:
        assert (out == 0).all() and (lse == -math.inf).all()
    assert all((g == 0).all() or count * keys for g in torch.autograd.grad(out.sum(), [q, k, v]))


def test_lists_are_inverted_in_the_order_of_queries():
    ids = torch.tensor([[[[2, 0, 2], [-1, 2, 9], [0, -1, -1]]]])
    queries, starts = launch.inverted(ids, 4)
    assert starts.tolist() == [[[0, 2, 2, 5, 5]]]
    assert queries[0, 0, :5].tolist() == [0, 2, 0, 0, 1]


def test_the_operator_is_registered_soundly_and_compiles_whole(device):
    call = draw(4, 12, 5, heads=2, kv_heads=1, d=8, sink=True)
    q, k, v, sink = (t.to(device, FULL).requires_grad_() for t in (*call[:3], call.sink))
    torch.library.opcheck(op, (q, k, v, call.ids.to(device), sink, 0.3, 0.0, "triton"))
    torch._dynamo.reset()

    def run(q, k, v, sink):
        return gather(q, k, v, call.ids.to(device), sink=sink, backend="triton") + 1

    leaves = [q, k, v, sink]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, run))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_kernels_cannot_take_is_refused_with_reasons(device):
    q = torch.zeros(1, 1, 2, 8, device=device, dtype=WIDE)
    ids = torch.zeros(1, 1, 2, 3, dtype=torch.int64, device=device)
    with pytest.raises(UnsupportedError, match="'triton' cannot take this call: float64 has no matrix instruction"):
        gather(q, q, q, ids, backend="triton")
    wide = torch.zeros(1, 1, 2, 300, device=device)
    with pytest.raises(UnsupportedError, match="head widths from 1 to 256, got D = 300"):
        gather(wide, wide, wide, ids, backend="triton")
    long = torch.empty(1, 1, 2**16, 2**15, dtype=torch.int32, device="meta")
    assert launch.refuse_call(q.float(), q.float(), long) == ["at most 2^31 ids a head, got 65536 x 32768"]
