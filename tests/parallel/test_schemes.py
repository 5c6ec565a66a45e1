"""Every scheme on every mask in several processes agrees with one device, and sends the bytes that were planned."""

from __future__ import annotations

import functools
import zlib

import pytest
import torch

import manyheads as mh
from manyheads.mask import PerBatch
from manyheads.mask.longca import LONG, STATIC, longca
from manyheads.parallel import DEALS, SCHEMES, context, counted
from manyheads.parallel.plan import Sizes, plan
from manyheads.testing import assert_within_budget
from tests.parallel import processes

N, D, DV, B = 149, 8, 6, 2
LENS = (37, 5, 64, 1, 42)
HEADS = {2: (4, 2, 1), 3: (6, 3, 1), 4: (8, 4, 2), 8: (8, 4, 2)}  # query heads, key heads, fewer key heads
QUICK, KINDS = ("grouped", "all"), ("grouped", "few", "bias", "sink", "all")


def kinds(world):
    """Kinds of calls: all apart where there is time, else the plain one and one with everything at once."""
    return KINDS if world == 3 else QUICK


def schemes(world):
    """Every scheme with its options by name; LoongTrain's divides heads around a ring of rings."""
    found = {name: {"scheme": name} for name in SCHEMES}
    if world in (4, 8):
        found["heads_double_ring"] = {"scheme": "double_ring", "degree": 2, "window": 1 if world == 4 else 2}
    return found


@functools.cache
def masks(world):
    """Every mask of the matrix, by name: lengths are odd and no multiple of anything."""
    found = {}
    for name in STATIC + LONG:
        packed = "document" in name or name in ("share_question", "causal_blockwise")
        found[name] = longca(name, N, lengths=LENS if packed else None, window=19, block=16).mask
    drawn = torch.rand(N, N, generator=torch.Generator().manual_seed(5)) < 0.3
    heads = HEADS[world][0]
    found["per_head"] = mh.PerHead([mh.Causal() & mh.Window(2 + 11 * i) for i in range(heads)])
    found["per_batch"] = PerBatch([mh.Causal() & mh.Document(LENS), mh.Window(9) | mh.Sink(3)])
    found["dense"] = mh.Dense(drawn)
    found["grid"] = mh.Neighborhood((N,), (17,))
    found["empty_rows"] = mh.Causal() & ~mh.Window(40)
    return found


@functools.cache
def drawn(world, kind, mask):
    """The inputs of one call over the whole sequence, float64: leaves, and what makes options of them."""
    heads, kv_heads, few = HEADS[world]
    kv_heads = few if kind in ("few", "all") else kv_heads
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}{mask}".encode()))
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    leaves = [draw(B, heads, N, D), draw(B, kv_heads, N, D), draw(B, kv_heads, N, DV)]
    if kind in ("bias", "all"):
        leaves += [draw(heads).abs() / 8, draw(heads, 15), draw(1, heads, N, N), draw(B, 1, N), draw(1, 1, 13, 10)]
    if kind in ("sink", "all"):
        leaves += [draw(heads)]
    return leaves, (draw(B, heads, N, DV), draw(B, heads, N))


def options(kind, more):
    """Keyword arguments of a call from its leaves beyond q, k and v."""
    found = {}
    if kind in ("bias", "all"):
        slopes, table, pair, key, block = more[:5]
        terms = mh.ALiBi(slopes) + mh.Relative(table) + mh.Pair(pair) + mh.PerKey(key)
        found["bias"] = terms + mh.PerBlock(block, (12, 16))
    return found | ({"sink": more[-1], "softcap": 3.0} if kind in ("sink", "all") else {})


def results(leaves, grads, run):
    """Output, statistics and gradients of a call."""
    out, lse = run(leaves)
    loss = (out * grads[0]).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * grads[1]).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def prepare(world):
    """What one device computes in float64; and in float32, of several ways what errs most."""
    generator = torch.Generator().manual_seed(6)
    orders = [torch.randperm(N, generator=generator) for _ in range(2)]
    found = {}
    for name, mask in masks(world).items():
        for kind in kinds(world):
            leaves, grads = drawn(world, kind, name)

            def run(dtype, backend, order=None, kind=kind, mask=mask, leaves=leaves, grads=grads):
                call = functools.partial(on_one_device, mask=mask, kind=kind, backend=backend, order=order)
                own = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
                return results(own, [g.to(dtype) for g in grads], call)

            exact = run(torch.float64, "reference")
            ways = [run(torch.float32, *way) for way in (("reference",), *(("blocked", o) for o in (None, *orders)))]
            some = zip(zip(*ways, strict=True), exact, strict=True)
            found[name, kind] = exact, [max(ts, key=lambda t, r=r: worst(t, r)) for ts, r in some]
    return found


def on_one_device(x, mask, kind, backend, order):
    """The whole call; with an order its tokens are stored in that order, which rounds sums differently."""
    more = options(kind, x[3:])
    if order is None:
        return mh.attention(*x[:3], mask=mask, return_lse=True, backend=backend, **more)
    if "bias" in more:
        slopes, table, pair, key, block = x[3:8]
        pair = pair + block.repeat_interleave(12, 2).repeat_interleave(16, 3)[..., :N, :N]
        more["bias"] = mh.ALiBi(slopes) + mh.Relative(table) + mh.PerKey(key[..., order])
        more["bias"] += mh.Pair(pair[:, :, order][..., order])
    stored, back = [t[:, :, order] for t in x[:3]], order.argsort()
    at = (order, order)
    got = mh.attention(*stored, mask=mask, positions=at, return_lse=True, backend=backend, **more)
    return got.out[:, :, back], got.lse[:, :, back]


def worst(t, exact):
    """The largest error of a tensor."""
    return float((t - exact)[exact.isfinite()].abs().max())


def on_ranks(ranks, scheme, name, kind, shard):
    """The same on many devices in float32: results put together, and what was sent and planned."""
    mask = masks(ranks.world)[name]
    leaves, grads = drawn(ranks.world, kind, name)
    leaves, grads = [t.float() for t in leaves], [g.float() for g in grads]
    cp = context(ranks.group, **scheme, shard=shard, mask=mask, tokens=N)
    own = [cp.shard(t, 2) if i < 3 else t for i, t in enumerate(leaves)]
    own = [t.clone().requires_grad_() for t in own]

    def run(x):
        with cp:
            return mh.attention(*x[:3], mask=mask, return_lse=True, **options(kind, x[3:]))

    with counted() as sent:  # the backward runs after the context was left
        got = results(own, [cp.shard(g, 2) for g in grads], run)
    whole = [cp.unshard(t, 2) for t in got[:5]]
    for share in got[5:]:
        torch.distributed.all_reduce(share)
    sizes = Sizes(leaves[0].shape[1], leaves[1].shape[1], D, DV, B, 4)
    planned = plan(mask, cp.deal, sizes=sizes, **scheme)
    want = {"forward": int(planned.forward_bytes[ranks.rank]), "backward": int(planned.backward_bytes[ranks.rank])}
    others = planned.degree - 1  # the gradient of lse goes where that of the output goes
    want["backward"] += cp.deal.counts[ranks.rank] * B * sizes.heads // planned.degree * 4 * others
    return [*whole, *got[5:]], sent, want


def agrees(ranks, label, name):
    """One cell of the matrix, in every kind of call; the ways of dealing take turns."""
    mask = masks(ranks.world)[name]
    deals = [d for d in DEALS if d != "per_document" or any(isinstance(x, mh.Document) for x in mask.leaves())]
    deals = [d for d in deals if d != "per_document" or mask.shape == (1, 1)]
    for kind in kinds(ranks.world):
        shard = deals[zlib.crc32(f"{label}{name}{kind}".encode()) % len(deals)]
        got, sent, planned = on_ranks(ranks, schemes(ranks.world)[label], name, kind, shard)
        exact, plain = ranks.prepared[name, kind]
        results = ["out", "lse", "dq", "dk", "dv", *(f"gradient {i}" for i in range(len(got) - 5))]
        for what, g, r, s in zip(results, got, exact, plain, strict=True):
            assert_within_budget(g, r, s, what=f"{what} of {label}, {name}, {kind}, {shard}")
        for phase in ("forward", "backward"):
            assert sent[phase] == planned[phase], (label, name, kind, shard, phase, sent, planned)


def cases(world):
    """The matrix, one case for each scheme and mask."""
    return {f"{s}-{m}": functools.partial(agrees, label=s, name=m) for s in schemes(world) for m in masks(world)}


def found(world, factory):
    """How the cases of a world went."""
    return processes.outcomes(world, "tests.parallel.test_schemes", prepare, factory)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Outcomes of two processes."""
    return found(2, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Outcomes of four processes."""
    return found(4, tmp_path_factory)


@pytest.mark.parametrize("name", cases(2))
def test_two_processes_agree_with_one_device_and_send_what_was_planned(name, two):
    processes.judge(name, two)


@pytest.mark.parametrize("name", cases(4))
def test_four_processes_agree_with_one_device_and_send_what_was_planned(name, four):
    processes.judge(name, four)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 8])
def test_three_and_eight_processes_agree_with_one_device(world, tmp_path_factory):
    outcomes = found(world, tmp_path_factory)
    for name in cases(world):
        processes.judge(name, outcomes)
