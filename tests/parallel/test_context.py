"""What a context promises besides exact results: agreement, randomness, autograd, layers, losses, FSDP."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import manyheads as mh
import manyheads.parallel as parallel
from manyheads.common.rope import RoPE
from manyheads.engine.tiled import products
from manyheads.nn import Attention
from manyheads.testing import assert_within_budget
from tests.parallel import processes

CASES = {}
B, H, HKV, N, D = 2, 4, 2, 61, 8


def case(function):
    """Registers what all ranks run together."""
    CASES[function.__name__.lstrip("_")] = function
    return function


def cases(world):
    """Every case; a compiler costs seconds in every process, so it is asked in two."""
    return {name: function for name, function in CASES.items() if world == 2 or "compiled" not in name}


def qkv(seed=0, dtype=torch.float64, heads=H, kv_heads=HKV, n=N):
    """Queries, keys and values of the whole sequence, the same on all ranks."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [t.to(dtype) for t in (draw(B, heads, n, D), draw(B, kv_heads, n, D), draw(B, kv_heads, n, D))]


def everywhere(ranks, skip=()):
    """Every scheme that is not left out, with a deal each."""
    deals = ("balanced", "zigzag", "striped", "contiguous", "nearby", "zigzag")
    return [(s, d) for s, d in zip(parallel.SCHEMES, deals, strict=True) if s not in skip]


def compare(ranks, scheme, shard, tensors, want, build=None, **options):
    """Output and gradients on many devices are those of one device, to rounding."""
    cp = parallel.context(ranks.group, scheme=scheme, shard=shard, mask="causal", tokens=tensors[0].shape[2])
    leaves = [cp.shard(t, 2).requires_grad_() for t in tensors]
    with cp:
        out = mh.attention(*leaves, **options, **(build(cp) if build else {}))
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    for got, w in zip([out.detach(), *grads], want, strict=True):
        torch.testing.assert_close(cp.unshard(got, 2), w, rtol=1e-10, atol=1e-10)


def one_device(tensors, **options):
    """What one device computes."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = mh.attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]


@case
def _dropout_is_that_of_one_device(ranks):
    tensors = qkv()
    want = one_device(tensors, mask="causal", dropout_p=0.4, generator=torch.Generator().manual_seed(3))
    for scheme, shard in everywhere(ranks):
        # other ranks' generators differ: the first one's draw counts
        generator = torch.Generator().manual_seed(3 + ranks.rank)
        compare(ranks, scheme, shard, tensors, want, mask="causal", dropout_p=0.4, generator=generator)


@case
def _padded_keys_may_hold_anything(ranks):
    q, k, v = qkv(1)
    padding = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.7
    want = one_device((q, k, v), mask="window(30)", key_padding=padding)
    k, v = (t.masked_fill(~padding[:, None, :, None], torch.nan) for t in (k, v))
    for scheme, shard in everywhere(ranks):
        own = lambda cp: {"key_padding": cp.shard(padding)}  # noqa: E731
        compare(ranks, scheme, shard, (q, k, v), want, own, mask="window(30)")
    compare(ranks, "ring", "zigzag", (q, k, v), want, mask="window(30)", key_padding=padding)


@case
def _half_precision_partials_are_merged_in_float32(ranks):
    tensors = qkv(2, torch.bfloat16)
    sink = torch.randn(H, generator=torch.Generator().manual_seed(4))
    exact = mh.attention(*(t.double() for t in tensors), mask="causal", sink=sink.double(), return_lse=True)
    ways = [mh.attention(*tensors, mask="causal", sink=sink, return_lse=True, backend="reference")]
    for fused in (True, False):  # each process measures which is faster, and ranks may differ
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "fused_wins", lambda dtype, fused=fused: fused)
            ways.append(mh.attention(*tensors, mask="causal", sink=sink, return_lse=True, backend="blocked"))
    for scheme, shard in everywhere(ranks):
        with parallel.context(ranks.group, scheme=scheme, shard=shard, tokens=N) as cp:
            parts = [cp.shard(t, 2).requires_grad_() for t in tensors]
            got = mh.attention(*parts, mask="causal", sink=sink, return_lse=True)
            assert got.out.dtype == torch.bfloat16 and got.lse.dtype == torch.float32
            for g, e, *found in zip(got, exact, *ways, strict=True):
                worse = max(found, key=lambda t, e=e: float((t - e).abs().max()))
                assert_within_budget(cp.unshard(g.detach(), 2), e, worse, what=scheme)
            assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(got.out.sum(), parts))


@case
def _autocast_sends_its_own_dtype(ranks):
    q, k, v = qkv(3, torch.float32)
    cp = parallel.context(ranks.group, tokens=N)
    with torch.autocast("cpu", torch.bfloat16), cp, parallel.counted() as sent:
        out = mh.attention(*(cp.shard(t, 2) for t in (q, k, v)), mask="causal")
    assert out.dtype == torch.bfloat16
    moved = sum(n for r, n in enumerate(cp.deal.counts) if r != (ranks.rank + 1) % ranks.world)
    assert sent["forward"] == moved * B * HKV * 2 * D * 2


@case
def _fewer_tokens_than_ranks(ranks):
    for n in (1, ranks.world - 1):
        tensors = qkv(4, n=n)
        want = one_device(tensors, mask="causal")
        for scheme, _ in everywhere(ranks):
            compare(ranks, scheme, "contiguous", tensors, want, mask="causal")


@case
def _a_backward_after_the_context_uses_its_scheme(ranks):
    tensors = qkv(5)
    first, second = (parallel.context(ranks.group, scheme=s, tokens=N) for s in ("ring", "groupcast"))
    with first:
        leaves = [first.shard(t, 2).requires_grad_() for t in tensors]
        out = mh.attention(*leaves, mask="causal")
    with second, parallel.counted() as sent:
        grads = torch.autograd.grad(out.sin().sum(), leaves)
    want = one_device(tensors, mask="causal")
    for g, w in zip(grads, want[1:], strict=True):
        torch.testing.assert_close(first.unshard(g, 2), w)
    assert sent["backward"]


@case
def _recomputation_works_inside_and_is_caught_outside(ranks):
    from torch.utils.checkpoint import checkpoint

    tensors = qkv(6)
    want = one_device(tensors, mask="causal")
    cp = parallel.context(ranks.group, tokens=N)
    leaves = [cp.shard(t, 2).requires_grad_() for t in tensors]

    def run():
        with cp:
            return checkpoint(functools.partial(mh.attention, mask="causal"), *leaves, use_reentrant=False)

    out = run()
    with cp:
        grads = torch.autograd.grad(out.sin().sum(), leaves)
    for g, w in zip(grads, want[1:], strict=True):
        torch.testing.assert_close(cp.unshard(g, 2), w)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        run().sum().backward()


@case
def _a_compiled_function_breaks_around_it(ranks):
    tensors = qkv(14)
    want = one_device(tensors, mask="causal")
    compiled = torch.compile(lambda *x: mh.attention(x[0] * 2, *x[1:], mask="causal") + 1, backend="aot_eager")
    cp = parallel.context(ranks.group, tokens=N)
    leaves = [cp.shard(t, 2).requires_grad_() for t in (tensors[0] / 2, *tensors[1:])]
    with cp:
        out = compiled(*leaves) - 1
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    for g, w in zip((out.detach(), grads[0] / 2, *grads[1:]), want, strict=True):
        torch.testing.assert_close(cp.unshard(g, 2), w)


@case
def _tokens_come_back_with_their_gradients(ranks):
    x = torch.arange(3.0 * N, dtype=torch.float64).view(3, N)
    for shard in ("balanced", "striped", "zigzag"):
        with parallel.context(ranks.group, shard=shard):
            ids, flags = parallel.shard(x, x > 50)
            part = ids.clone().requires_grad_()
            whole = parallel.unshard(part)
            assert torch.equal(whole, x) and torch.equal(parallel.unshard(flags), x > 50)
            assert torch.equal(x[0, parallel.positions()], ids[0])
            (grad,) = torch.autograd.grad((whole * x).sum() * (ranks.rank + 1), part)
            torch.testing.assert_close(grad, ids * sum(range(1, ranks.world + 1)))


@case
def _a_layer_rotates_by_position_in_the_whole_sequence(ranks):
    torch.manual_seed(7)
    layer = Attention(32, H, kv_heads=HKV, batch_first=True, rope=RoPE(), qk_norm=True).double()
    x = torch.randn(B, N, 32, dtype=torch.float64)
    want = layer(x, mask="causal", need_weights=False)[0]
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad(want.sin().sum(), parameters)
    with parallel.context(ranks.group, scheme="hybrid"):
        out = layer(parallel.shard(x), mask="causal", need_weights=False)[0]
        torch.testing.assert_close(parallel.unshard(out), want)
        at = (parallel.positions(),) * 2
        torch.testing.assert_close(layer(parallel.shard(x), mask="causal", need_weights=False, positions=at)[0], out)
        with pytest.raises(mh.UnsupportedError, match="attention_weights: inside a parallel context"):
            layer(parallel.shard(x), mask="causal", need_weights=True)
        assert layer(parallel.shard(x), mask="causal")[1] is None
    for g, w in zip(torch.autograd.grad(out.sin().sum(), parameters), wanted, strict=True):
        torch.distributed.all_reduce(g)
        torch.testing.assert_close(g, w)


class Decoder(nn.Module):
    """One block and a head, for losses."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        self.attend = Attention(16, H, kv_heads=HKV, batch_first=True, rope=RoPE())
        self.head = nn.Linear(16, 17)

    def forward(self, ids, mask):
        """Logits of some tokens."""
        x = self.embed(ids)
        return self.head(x + self.attend(x, mask=mask, need_weights=False)[0])


LENS = (20, 1, 40)


def batch():
    """Token ids, labels made before sharding, and the mask of the documents."""
    ids = torch.randint(17, (B, N), generator=torch.Generator().manual_seed(8))
    labels = parallel.next_tokens(ids, lengths=LENS)
    labels[0, 5:23] = -100  # ranks hold different numbers of labels
    return ids, labels, mh.Causal() & mh.Document(LENS)


def loss_of_one_device():
    """The mean over all labels, and the gradients."""
    torch.manual_seed(9)
    model = Decoder().double()
    ids, labels, mask = batch()
    loss = nn.functional.cross_entropy(model(ids, mask).flatten(0, 1), labels.flatten())
    return model, loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@case
def _the_loss_is_the_mean_over_all_labels(ranks):
    model, want, wanted = loss_of_one_device()
    ids, labels, mask = batch()
    with parallel.context(ranks.group, shard="striped", mask=mask):
        own, targets = parallel.shard(ids, labels)
        loss = parallel.token_loss(model(own, mask), targets)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    loss = loss.detach()
    for got, w in zip((loss, *grads), (want, *wanted), strict=True):
        torch.distributed.all_reduce(got)
        torch.testing.assert_close(got, w)


@case
def _it_composes_with_fsdp_on_a_mesh_of_two_dimensions(ranks):
    from torch.distributed.fsdp import fully_shard

    replicas = ranks.world // 2
    mesh = init_device_mesh("cpu", (replicas, 2), mesh_dim_names=("dp_shard", "cp"))
    model, want, wanted = loss_of_one_device()
    both = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    fully_shard(model.attend, mesh=both)
    fully_shard(model, mesh=both)
    ids, labels, mask = batch()
    entry = mesh["dp_shard"].get_local_rank()
    mine = slice(entry, entry + 1) if replicas == B else slice(None)
    with parallel.context(mesh["cp"], scheme="ring", shard="balanced", mask=mask):
        own, targets = parallel.shard(ids[mine], labels[mine])
        logits = model(own, mask)
        groups = (mesh.get_group("dp_shard"),)
        loss = parallel.token_loss(logits, targets, groups=groups, averaged=ranks.world)
    loss.backward()
    mean = loss.detach() / ranks.world
    torch.distributed.all_reduce(mean)
    torch.testing.assert_close(mean, want)
    for p, w in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), w)


@case
def _meshes_of_one_and_two_dimensions(ranks):
    tensors = qkv(10)
    want = one_device(tensors, mask="causal")
    line = init_device_mesh("cpu", (ranks.world,), mesh_dim_names=("cp",))
    square = init_device_mesh("cpu", (ranks.world // 2, 2), mesh_dim_names=("ring", "heads"))
    for mesh, scheme, degree in ((line, "ring", 1), (square, "hybrid", 2), (square, "double_ring", 2)):
        cp = parallel.context(mesh, scheme=scheme, tokens=N)
        assert cp.degree == degree
        with cp:
            out = mh.attention(*(cp.shard(t, 2) for t in tensors), mask="causal")
        torch.testing.assert_close(cp.unshard(out, 2), want[0])


@case
def _explain_says_which_scheme_runs_and_what_this_rank_does(ranks):
    with parallel.context(ranks.group, scheme="ring", shard="zigzag", tokens=64):
        q = torch.zeros(1, 2, 64 // ranks.world, 8)
        text = str(mh.explain(q, q, q, mask="causal"))
    assert "blocked: taken" in text and "sdpa: refused" in text, text
    assert f"parallel: ring over {ranks.world} ranks, zigzag deal; this is rank {ranks.rank}" in text
    assert f"holds {64 // ranks.world} of 64 tokens, with {1 / ranks.world:.2%} of the visible pairs" in text


@case
def _what_differs_across_ranks_is_found_before_anything_is_sent(ranks):
    last = ranks.rank == ranks.world - 1
    wrong = {
        "mask differs": lambda t: (t, {"mask": "window(3)" if last else "causal"}),
        r"dtype differs.*float16": lambda t: ([x.half() if last else x for x in t], {}),
        "query heads differs": lambda t: ([t[0].repeat(1, 1 + last, 1, 1), *t[1:]], {}),
        "batch differs": lambda t: ([x[:1] if last else x for x in t], {}),
        "width differs": lambda t: ([x[..., :4] if last else x for x in t], {}),
        "scale differs": lambda t: (t, {"scale": 1.0 + last}),
        "bias differs": lambda t: (t, {"bias": mh.ALiBi(torch.ones(H))} if last else {}),
        "sink differs": lambda t: (t, {"sink": torch.ones(H, dtype=t[0].dtype)} if last else {}),
        rf"rank {ranks.world - 1}: q, k: this rank holds": lambda t: ([x[:, :, :3] if last else x for x in t], {}),
        r"rank \d: mask: document is for": lambda t: (t, {"mask": mh.Document([3, 4])}),
    }
    for message, change in wrong.items():
        cp = parallel.context(ranks.group, shard="contiguous", tokens=N)
        parts, options = change([cp.shard(t, 2) for t in qkv(11, torch.float32)])
        with cp, parallel.counted() as sent, pytest.raises(ValueError, match=message):
            mh.attention(*parts, **{"mask": "causal"} | options)
        assert not sent["forward"], message
    with parallel.context(ranks.group, shard="striped" if last else "zigzag", tokens=64):
        q = torch.zeros(1, 2, 64 // ranks.world, 8)
        with pytest.raises(ValueError, match="deal differs"):
            mh.attention(q, q, q)


@case
def _what_cannot_be_done_is_refused_with_its_reason(ranks):
    parts = [t.clone() for t in qkv(12, torch.float32)]

    def refused(message, kind=mh.UnsupportedError, scheme="ring", tensors=parts, **options):
        cp = parallel.context(ranks.group, scheme=scheme, shard="contiguous", tokens=N)
        own = [cp.shard(t, 2) for t in tensors]
        with cp, pytest.raises(kind, match=message):
            mh.attention(*own, **options)

    three = [t[:, :1].repeat(1, 3, 1, 1) for t in parts]
    refused("'ulysses': 3 query heads over 3 key heads cannot be divided", scheme="ulysses", tensors=three)
    refused("backend 'sdpa': inside a parallel context", backend="sdpa")
    refused("backend 'reference': inside a parallel context", backend="reference")
    refused("documents with two sets of lengths", mask=mh.Document([30, 31], [31, 30]))
    with parallel.context(ranks.group, shard="contiguous", tokens=N) as cp:
        own, other = [cp.shard(t, 2) for t in parts], (cp.positions() + 1,) * 2
        with pytest.raises(mh.UnsupportedError, match="positions: inside a parallel context they follow"):
            mh.attention(*own, positions=other)
    with parallel.context(ranks.group, tokens=N):
        with pytest.raises(mh.UnsupportedError, match="tiled: inside a parallel context"):
            mh.engine.tiled.tiled(*parts, mh.Causal())
        with pytest.raises(ValueError, match="it deals 61 tokens"):
            parallel.shard(torch.zeros(1, 60))
    with pytest.raises(ValueError, match=r"shard: expected to be called inside"):
        parallel.shard(parts[0])
    for options, message in (
        ({"scheme": "rign"}, "ring"), ({"scheme": "ring", "degree": 2}, "degree"),
        ({"shard": "even", "tokens": 9}, "shard"),
        ({"scheme": "double_ring", "window": 5}, "window"), ({"check": "never"}, "check"), ({"mesh": 3}, "mesh"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            parallel.context(**{"mesh": ranks.group} | options)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Outcomes of two processes."""
    return processes.outcomes(2, "tests.parallel.test_context", None, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Outcomes of four processes."""
    return processes.outcomes(4, "tests.parallel.test_context", None, tmp_path_factory)


@pytest.mark.parametrize("name", cases(2))
def test_in_two_processes(name, two):
    processes.judge(name, two)


@pytest.mark.parametrize("name", cases(4))
def test_in_four_processes(name, four):
    processes.judge(name, four)


def test_labels_are_shifted_inside_documents():
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    assert parallel.next_tokens(ids).tolist() == [[2, 3, 4, 5, -100]]
    assert parallel.next_tokens(ids, lengths=[2, 0, 3]).tolist() == [[2, -100, 4, 5, -100]]
    with pytest.raises(ValueError, match="lengths: expected a sum of 5"):
        parallel.next_tokens(ids, lengths=[2, 2])


def test_a_context_needs_process_groups():
    with pytest.raises(ValueError, match="torch.distributed is not initialised"):
        parallel.context(None)
