"""Attention on DTensors: four processes in one group agree with one, and what they cannot do is refused."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import textwrap
import traceback

import pytest
import torch
from torch import multiprocessing

import manyheads as mh
from manyheads.engine.gather import gather
from manyheads.engine.scan import State, scan
from manyheads.mask import PerBatch

WORLD, B, H, HKV, N, NK, D = 4, 7, 8, 4, 9, 13, 4
CASES = {}


def case(function):
    """Registers what all ranks run together, with a test of its name."""
    CASES[function.__name__.lstrip("_")] = function
    return function


# --- what every rank runs ---------------------------------------------------------------------------------------


class Ranks:
    """The meshes of one rank, and tensors that are the same on all."""

    def __init__(self):
        from torch.distributed.tensor import init_device_mesh

        self.line = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("line",))
        self.square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *shape):
        """Normal numbers in float64."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def qkv(self, kv_heads=HKV):
        """Queries, keys and values of the whole call."""
        return self.draw(B, H, N, D), self.draw(B, kv_heads, NK, D), self.draw(B, kv_heads, NK, D + 2)


def split(t, mesh, placements):
    """A leaf DTensor with a gradient."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, mesh, placements).requires_grad_()


def agree(ranks, mesh, placed, build=None, kv_heads=HKV, **options):
    """Values, statistics and gradients of a sharded call are those of the whole one, and lie where they should.

    ``placed`` are the placements of q and of k and v; ``build`` makes more keyword arguments from functions that
    make a leaf of a tensor, sharded as asked where the call is.
    """
    whole = ranks.qkv(kv_heads)
    dout, dlse = ranks.draw(B, H, N, D + 2), ranks.draw(B, H, N)
    state = ranks.generator.get_state()

    def run(place):
        ranks.generator.set_state(state)
        leaves = [place(t, p) for t, p in zip(whole, (placed[0], placed[1], placed[1]), strict=True)]

        def leaf(t, placements=None):
            leaves.append(place(t, placements))
            return leaves[-1]

        more = {} if build is None else build(leaf, ranks.draw)
        got = mh.attention(*leaves[:3], return_lse=True, **options, **more)
        lse = got.lse.masked_fill(got.lse == -torch.inf, 0.0)
        loss = (got.out * place(dout, placed[0])).sum() + (lse * place(dlse, placed[0])).sum()
        return leaves, [*got, *torch.autograd.grad(loss, leaves)]

    _, want = run(lambda t, p: t.clone().requires_grad_())
    leaves, got = run(lambda t, p: t.clone().requires_grad_() if p is None else split(t, mesh, p))
    axes = [a if a.is_shard() else b for a, b in zip(*placed, strict=True)]
    for where in (got[0].placements, got[1].placements):
        assert list(where) == axes, where
    for leaf, grad in zip(leaves, got[2:], strict=True):
        assert type(leaf) is type(grad)
        assert getattr(leaf, "placements", None) == getattr(grad, "placements", None)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.full_tensor() if hasattr(g, "full_tensor") else g, w, rtol=1e-11, atol=1e-11)


def everywhere(ranks, build=None, **options):
    """A call on every kind of sharding."""
    from torch.distributed.tensor import Replicate, Shard

    b, h, r = Shard(0), Shard(1), Replicate()
    for mesh, some in ((ranks.line, [(b,), (h,), (r,)]), (ranks.square, [(b, h), (h, b), (h, h), (r, h), (b, b)])):
        for placed in some:
            agree(ranks, mesh, (placed, placed), build and (lambda *a, p=placed: build(p, *a)), **options)


@case
def _a_plain_call(ranks):
    everywhere(ranks, mask="causal & window(7)")


@case
def _no_mask_at_all(ranks):
    everywhere(ranks)


@case
def _masks_of_each_head_and_batch_entry(ranks):
    heads = mh.PerHead([mh.Window(1 + i) for i in range(H)])
    batch = PerBatch([mh.Window(2 + i) | mh.Sink(1) for i in range(B)])
    everywhere(ranks, mask=heads | batch)


@case
def _biases_of_each_kind_and_a_sink(ranks):
    from torch.distributed.tensor import Replicate, Shard

    def build(placed, leaf, draw):
        by_head = [Shard(0) if p == Shard(1) else Replicate() for p in placed]
        bias = mh.ALiBi(leaf(draw(H).abs(), by_head)) + mh.PerKey(leaf(draw(B, H, NK), placed))
        bias = bias + mh.Pair(leaf(draw(B, 1, N, NK), [p if p == Shard(0) else Replicate() for p in placed]))
        bias = bias + mh.PerBlock(leaf(draw(1, H, 3, 4), [Replicate()] * len(placed)), (4, 4))
        return {"bias": bias, "sink": leaf(draw(H), by_head)}

    everywhere(ranks, build, mask="causal", softcap=3.0)


@case
def _plain_tensors_count_as_replicated(ranks):
    def build(placed, leaf, draw):
        bias = mh.Relative(leaf(draw(1, 7))) + mh.ALiBi(leaf(draw(H).abs()))
        return {"bias": bias, "sink": leaf(draw(H)), "key_padding": draw(B, NK) > -1}

    everywhere(ranks, build, mask="window(5)")


@case
def _every_batch_entry_has_its_own_positions(ranks):
    k_pos = torch.stack([torch.randperm(NK, generator=ranks.generator) for _ in range(B)])
    everywhere(ranks, mask="causal", positions=(k_pos[:, :N], k_pos))


@case
def _fewer_key_heads_than_ranks(ranks):
    from torch.distributed.tensor import Replicate, Shard

    h, r = Shard(1), Replicate()
    for heads in (1, 2):
        agree(ranks, ranks.line, ((h,), (r,)), kv_heads=heads, mask="causal")
    agree(ranks, ranks.square, ((h, h), (h, r)), kv_heads=2, mask="causal")
    agree(ranks, ranks.square, ((Shard(0), h), (Shard(0), r)), kv_heads=1, mask="causal")


@case
def _a_replicated_part_follows_the_others(ranks):
    from torch.distributed.tensor import Replicate, Shard

    agree(ranks, ranks.line, ((Replicate(),), (Shard(1),)), mask="causal")
    agree(ranks, ranks.square, ((Shard(0), Replicate()), (Replicate(), Shard(1))), mask="causal")


@case
def _layouts_are_cut_as_masks_are(ranks):
    from torch.distributed.tensor import Replicate, Shard

    q, k, v = ranks.qkv()
    order = torch.stack([torch.randperm(4, generator=ranks.generator)[:2] for _ in range(B * H * 3)])
    ids = mh.TileLayout.from_ids(order.view(B, H, 3, 2), nq=N, nk=NK, tile=(4, 4), mask=mh.Causal())
    shared = mh.TileLayout.from_ids(order[: H * 3].view(1, H, 3, 2), nq=N, nk=NK, tile=4, batch=B)
    runs = mh.PerHead([mh.Window(1 + i) for i in range(H)]).tiles(N, NK, tile=(4, 4), batch=B)
    for layout in (ids, ids.to_runs(), shared, runs):
        want = mh.engine.tiled.tiled(q, k, v, layout)
        for mesh, p in ((ranks.line, [Shard(1)]), (ranks.square, [Shard(0), Shard(1)]), (ranks.line, [Replicate()])):
            got = mh.engine.tiled.tiled(*(split(t, mesh, p) for t in (q, k, v)), layout)
            torch.testing.assert_close(got.full_tensor(), want)
            got.sum().backward()


@case
def _nothing_is_communicated_where_all_is_sharded_alike(ranks):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.debug import CommDebugMode

    for placements in ([Shard(0)], [Shard(1)]):
        leaves = [split(t, ranks.line, placements) for t in ranks.qkv()]
        dout = split(ranks.draw(B, H, N, D + 2), ranks.line, placements)
        with CommDebugMode() as seen:
            torch.autograd.grad(mh.attention(*leaves, mask="causal"), leaves, dout)
        assert seen.get_total_counts() == 0, seen.get_comm_counts()


@case
def _calls_without_gradients_and_in_half_precision(ranks):
    from torch.distributed.tensor import Shard

    whole = [t.bfloat16() for t in ranks.qkv()]
    want = mh.attention(*whole, mask="window(3)")
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            parts = [split(t, ranks.line, [Shard(1)]).detach() for t in whole]
            got = mh.attention(*parts, mask="window(3)")
            torch.testing.assert_close(got.full_tensor(), want)


@case
def _partial_sums_are_added_up_first(ranks):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    whole = ranks.qkv()
    parts = [DTensor.from_local(t / WORLD, ranks.line, [Partial()]).requires_grad_() for t in whole]
    torch.testing.assert_close(mh.attention(*parts, mask="causal").full_tensor(), mh.attention(*whole, mask="causal"))
    first = split(whole[0], ranks.line, [Shard(1)])
    got = mh.attention(first, *parts[1:], mask="causal")
    assert got.placements == (Shard(1),)
    (grad,) = torch.autograd.grad(got.sum(), parts[1])
    assert grad.placements == (Replicate(),)


@case
def _replicas_draw_one_dropout(ranks):
    from torch.distributed.tensor import Replicate

    torch.manual_seed(ranks.line.get_rank())
    q, k, v = (split(t, ranks.line, [Replicate()]) for t in ranks.qkv())
    out = mh.attention(q, k, v, dropout_p=0.5)
    (grad,) = torch.autograd.grad(out.sum(), v)
    for t in (out, grad):
        mine = t.to_local().clone()
        torch.distributed.broadcast(mine, 0)
        assert torch.equal(mine, t.to_local())
    assert not torch.equal(out.to_local(), mh.attention(*(t.to_local() for t in (q, k, v))))


@case
def _shards_drop_what_one_device_drops(ranks):
    for backend in ("blocked", "reference"):
        torch.manual_seed(0)
        state = torch.get_rng_state()

        def build(placed, leaf, draw, state=state):
            torch.set_rng_state(state)
            return {"dropout_p": 0.4}

        everywhere(ranks, build, mask="causal", backend=backend)


@case
def _explain_says_what_this_rank_computes(ranks):
    from torch.distributed.tensor import Shard

    parts = [split(t, ranks.square, [Shard(0), Shard(1)]) for t in ranks.qkv()]
    text = str(mh.explain(*parts, mask="causal"))
    assert "sdpa: refused" in text and "DTensors: its operators" in text, text
    if ranks.square.get_coordinate() == [1, 0]:
        assert "this rank computes batch entries 4 to 6 of 7 and heads 0 to 3 of 8" in text


@case
def _recurrences_of_each_kind(ranks):
    from torch.distributed.tensor import Replicate, Shard

    b, h, r = Shard(0), Shard(1), Replicate()
    kinds = {
        "decay of heads": ({"decay": (H,)}, {"normalise": "abs"}),
        "decay of tokens": ({"decay": (B, H, N)}, {"reverse": True}),
        "delta": ({"decay": (B, H, N), "beta": (B, H, N)}, {"lens": [4, 5]}),
        "gated": ({"gate": (B, H, N)}, {"normalise": "max1", "lens": torch.tensor([[i, N - i] for i in range(B)])}),
        "padded": ({"decay": (B, H, N)}, {"key_padding": ranks.draw(B, N) > -1}),
    }
    for mesh, placed in ((ranks.line, [b]), (ranks.line, [h]), (ranks.line, [r]), (ranks.square, [b, h])):
        for shapes, options in kinds.values():
            recur(ranks, mesh, placed, shapes, **options)


def recur(ranks, mesh, placed, shapes, **options):
    """A sharded recurrence and its gradients are those of the whole one, its state too; gates are sharded as q is."""
    from torch.distributed.tensor import Replicate, Shard

    q, k, v = ranks.draw(B, H, N, D), ranks.draw(B, HKV, N, D), ranks.draw(B, HKV, N, D + 2)
    given = {n: -ranks.draw(*s).sigmoid() if n == "decay" else ranks.draw(*s).sigmoid() for n, s in shapes.items()}
    by_head = [Shard(0) if p == Shard(1) else Replicate() for p in placed]
    dout, start = ranks.draw(B, H, N, D + 2), ranks.draw(B, H, D, D + 2)

    def run(place):
        leaves = [place(t, placed) for t in (q, k, v)]
        leaves += [place(t, by_head if t.dim() == 1 else placed) for t in given.values()]
        state = None
        if "normalise" not in options:
            leaves.append(place(start, placed))
            state = State(leaves[-1])
        gates = dict(zip(given, leaves[3:], strict=False))
        out, last = scan(*leaves[:3], **gates, state=state, return_state=True, **options)
        loss = (out * place(dout, placed)).sum() + last.S.square().sum()
        return leaves, [out, last.S, *torch.autograd.grad(loss, leaves)]

    _, want = run(lambda t, p: t.clone().requires_grad_())
    leaves, got = run(lambda t, p: split(t, mesh, p))
    for result in got[:2]:
        assert list(result.placements) == placed, result.placements
    for leaf, grad in zip(leaves, got[2:], strict=True):
        assert leaf.placements == grad.placements
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.full_tensor(), w, rtol=1e-10, atol=1e-10)


@case
def _recurrences_refuse_shards_of_tokens_and_communicate_nothing_else(ranks):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.debug import CommDebugMode

    q, k, v = ranks.qkv()
    with pytest.raises(mh.UnsupportedError, match="q: mesh dimension 'line' shards its tokens"):
        scan(*(split(t, ranks.line, [Shard(2)]) for t in (k, k, v)))
    leaves = [split(t, ranks.line, [Shard(1)]) for t in (k, k, v)]
    dout = split(torch.ones_like(v), ranks.line, [Shard(1)])
    with CommDebugMode() as seen:
        torch.autograd.grad(scan(*leaves), leaves, dout)
    assert seen.get_total_counts() == 0, seen.get_comm_counts()


@case
def _lists_of_ids_for_all_for_key_heads_and_for_query_heads(ranks):
    from torch.distributed.tensor import Replicate, Shard

    b, h, r = Shard(0), Shard(1), Replicate()
    calls = [(ranks.line, (b,)), (ranks.line, (h,)), (ranks.square, (b, h)), (ranks.square, (h, r))]
    for mesh, placed in calls:
        for batch, heads, kv_heads in ((1, 1, HKV), (B, HKV, HKV), (1, H, HKV), (B, 1, 1), (B, H, 2)):
            lists(ranks, mesh, placed, batch, heads, kv_heads)
    with pytest.raises(mh.UnsupportedError, match="q: mesh dimension 'line' shards its tokens"):
        q, k, v = (split(t, ranks.line, [Shard(2)]) for t in ranks.qkv())
        gather(q, k, v, torch.zeros(1, 1, N, 2, dtype=torch.int64))


def lists(ranks, mesh, placed, batch, heads, kv_heads):
    """A sharded call over lists of ids is the whole one; keys whose heads are too few for the ranks are replicated."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole, sink, dout = ranks.qkv(kv_heads), ranks.draw(H), ranks.draw(B, H, N, D + 2)
    ids = torch.randint(-1, NK, (batch, heads, N, 5), generator=ranks.generator)
    few = any(p.is_shard(1) for p in placed) and kv_heads % mesh.size()
    keys = tuple(Replicate() if few and p.is_shard(1) else p for p in placed)
    own = [Replicate()] * mesh.ndim

    def run(place, ids):
        leaves = [place(t, p) for t, p in zip((*whole, sink), (placed, keys, keys, own), strict=True)]
        out, lse = gather(*leaves[:3], ids, sink=leaves[3], return_lse=True)
        loss = (out * place(dout, placed)).sum() + lse.square().sum()
        return leaves, [out, lse, *torch.autograd.grad(loss, leaves)]

    _, want = run(lambda t, p: t.clone().requires_grad_(), ids)
    for given in (ids, distribute_tensor(ids, mesh, own)):
        leaves, got = run(lambda t, p: split(t, mesh, p), given)
        for leaf, grad in zip(leaves, got[2:], strict=True):
            assert leaf.placements == grad.placements
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.full_tensor(), w, rtol=1e-10, atol=1e-10)


@case
def _what_cannot_be_done_is_refused_by_every_rank(ranks):
    from torch.distributed.tensor import Replicate, Shard

    q, k, v = ranks.qkv()

    def place(*placements, mesh=ranks.line, tensors=(q, k, v)):
        return [split(t, mesh, p) for t, p in zip(tensors, placements, strict=True)]

    b, h, s, r = [Shard(0)], [Shard(1)], [Shard(2)], [Replicate()]
    few, odd, short = (q, k[:, :2], v[:, :2]), (q[:, :6], k[:, :3], v[:, :3]), (q[:3], k[:3], v[:3])
    half = [*place(r, r, r)[:1], *place(r * 2, r * 2, r * 2, mesh=ranks.square)[1:]]
    wrong_sink = split(torch.zeros(H), ranks.line, b)
    wrong = [
        (mh.UnsupportedError, r"q: mesh dimension 'line' shards its tokens .*Shard\(1\)", place(s, s, s), {}),
        (mh.UnsupportedError, "k: mesh dimension 'line' shards its tokens", place(r, s, s), {}),
        (mh.UnsupportedError, "v: mesh dimension 'line' shards its channels", place(h, h, [Shard(3)]), {}),
        (ValueError, "q on its heads, k on its batch entries, v on its batch entries", place(h, b, b), {}),
        (TypeError, "k: a plain tensor beside DTensors", [*place(h, h, h)[:1], k, v], {}),
        (TypeError, "q: a plain tensor beside DTensors", [q, *place(h, h, h)[1:]], {}),
        (ValueError, "k: mesh dimension 'line' has it as .* or Replicate", place(h, h, h, tensors=few), {}),
        (ValueError, "6 heads over 3 heads of k and v cannot be sharded over 4", place(h, r, r, tensors=odd), {}),
        (ValueError, "a batch of 3 leaves some of 4 ranks without", place(b, b, b, tensors=short), {}),
        (ValueError, "k: expected the mesh of q", half, {}),
        (ValueError, "sink: mesh dimension 'line' has it as", place(b, b, b), {"sink": wrong_sink}),
        (TypeError, "mask: .* that every rank holds whole, got a DTensor", place(b, b, b), {"mask": wrong_sink > 0}),
        (mh.UnsupportedError, "'sdpa' cannot take this call: .*DTensors", place(b, b, b), {"backend": "sdpa"}),
    ]
    for kind, message, tensors, options in wrong:
        with pytest.raises(kind, match=message):
            mh.attention(*tensors, **{"mask": "causal"} | options)
    with pytest.raises(mh.UnsupportedError, match="attention_weights: DTensors"):
        mh.attention_weights(*place(h, h, h)[:2])


# --- the processes, and a test for each case --------------------------------------------------------------------


def work(rank, folder):
    """One process: runs every case with the others and writes down how each went."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=20),
    )  # fmt: skip
    ranks, outcome = Ranks(), {}
    for name, function in CASES.items():
        try:
            function(ranks)
            outcome[name] = ""
        except (Exception, pytest.fail.Exception):
            outcome[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """How every case went in every process; all share one process group."""
    folder = tmp_path_factory.mktemp("ranks")
    # one process imports what takes seconds, the others are its forks
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "torch._dynamo"])
    multiprocessing.start_processes(work, (folder,), nprocs=WORLD, start_method="forkserver")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_in_four_processes(name, outcomes):
    for rank, outcome in enumerate(outcomes):
        assert not outcome[name], f"rank {rank}: {outcome[name]}"


def test_plain_calls_do_not_import_what_shards_tensors():
    code = """
    import sys, torch, manyheads
    q = torch.zeros(1, 1, 2, 4)
    manyheads.attention(q, q, q, mask="window(2)")
    sys.exit("torch.distributed.tensor" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env={**os.environ, "PYTHONPATH": "src"})
