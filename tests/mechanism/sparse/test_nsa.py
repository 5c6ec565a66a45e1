"""Native sparse attention: both loop orders, its limits, the scores of its blocks, and documents."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from manyheads import Causal, Document, attention
from manyheads.common.errors import UnsupportedError
from manyheads.common.rope import RoPE
from manyheads.engine.tiled import tiled
from manyheads.mask import TileLayout
from manyheads.mechanism.select import pairs
from manyheads.mechanism.sparse import Compression, NSAConfig, compress, nsa
from manyheads.mechanism.sparse.nsa import reference, selection
from manyheads.spec import Size, find

F64 = torch.float64
SMALL = NSAConfig(kernel=8, stride=4, block=16, keep=3, first=1, local=1, window=9, rope=RoPE())
BRANCHES = ("gate_compressed", "gate_selected", "gate_window")


def close(got, want, size=1e-9):
    torch.testing.assert_close(got, want, rtol=size, atol=size)


def draw(generator, n=75, heads=4, groups=2, width=8, batch=2, grad=False):
    """Queries, keys, values."""
    sizes = (heads, width), (groups, width), (groups, width + 2)
    return [torch.randn(batch, h, n, d, generator=generator, dtype=F64).requires_grad_(grad) for h, d in sizes]


def weights(generator, config=SMALL, groups=2, width=8):
    """A compression that is no average."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64) * 0.2

    key, value = normal(groups, config.kernel * width, width), normal(groups, config.kernel * (width + 2), width + 2)
    return Compression(key, value, normal(groups, config.kernel, width))


def only(branch, q):
    """Gates that leave one branch."""
    gate = torch.zeros(q.shape[:3], dtype=q.dtype)
    return {name: gate + (name == branch) for name in BRANCHES}


def with_grads(fn, qkv):
    """Output and the gradients of a fixed sum of it."""
    out = fn(*qkv)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)).sum()
    return out, *torch.autograd.grad(loss, qkv)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_key_outer_query_outer_and_a_dense_mask_agree(generator, group):
    qkv = draw(generator, 70, 2 * group, 2, grad=True)
    layout = selection(*qkv, config=dataclasses.replace(SMALL, rope=None))
    mask = layout.dense()
    want = with_grads(lambda q, k, v: attention(q, k, v, mask=mask, backend="reference"), qkv)
    for order in ("queries", "keys"):
        for got, exact in zip(with_grads(lambda *t, o=order: tiled(*t, layout, order=o), qkv), want, strict=True):
            close(got, exact)


@pytest.mark.parametrize("order", ["queries", "keys"])
def test_the_whole_mechanism_is_the_same_in_both_orders(generator, order):
    qkv = draw(generator, grad=True)
    gates = {name: torch.rand(2, 4, 75, generator=generator, dtype=F64) for name in BRANCHES}
    more = gates | {"compression": weights(generator), "config": SMALL}
    want = with_grads(lambda *t: reference(*t, **more), qkv)
    for got, exact in zip(with_grads(lambda *t: nsa(*t, **more, order=order), qkv), want, strict=True):
        close(got, exact)


def test_all_blocks_kept_is_causal_attention(generator):
    qkv = draw(generator, grad=True)
    config = dataclasses.replace(SMALL, keep=5, rope=None)
    want = with_grads(lambda *t: attention(*t, mask="causal"), qkv)
    got = with_grads(lambda *t: nsa(*t, config=config, **only("gate_selected", qkv[0])), qkv)
    for one, other in zip(got, want, strict=True):
        close(one, other)


def test_a_sequence_shorter_than_a_window_has_no_compressed_branch(generator):
    q, k, v = draw(generator, SMALL.kernel - 1)
    assert (nsa(q, k, v, config=SMALL, **only("gate_compressed", q)) == 0).all()
    turned = SMALL.rope(q, torch.arange(7)), SMALL.rope(k, torch.arange(7)), v
    for branch in BRANCHES[1:]:
        close(nsa(q, k, v, config=SMALL, **only(branch, q)), attention(*turned, mask="causal"))


def test_queries_before_the_end_of_the_first_window_get_nothing_from_it(generator):
    q, k, v = draw(generator)
    out = nsa(q, k, v, config=SMALL, **only("gate_compressed", q))
    assert (out[:, :, : SMALL.kernel - 1] == 0).all() and (out[:, :, SMALL.kernel - 1 :] != 0).all()


def test_packed_sequences_equal_separate_calls(generator):
    lengths = [5, 0, 41, 1, 28]
    qkv = draw(generator, sum(lengths), batch=1)
    more = {"compression": weights(generator), "config": SMALL}
    gate = torch.rand(1, 1, sum(lengths), generator=generator, dtype=F64)
    packed = nsa(*qkv, gate_selected=gate, mask=Document(lengths) & Causal(), **more)
    ends = list(itertools.accumulate(lengths, initial=0))
    alone = [
        nsa(*(t[:, :, a:b] for t in qkv), gate_selected=gate[..., a:b], **more)
        for a, b in itertools.pairwise(ends)
        if a < b
    ]
    close(packed, torch.cat(alone, 2))


def test_documents_may_differ_between_batch_entries(generator):
    qkv = draw(generator, 60)
    lengths = torch.tensor([[20, 40], [33, 27]])
    packed = nsa(*qkv, mask=Document(lengths) & Causal(), config=SMALL)
    for b, (first, _) in enumerate(lengths.tolist()):
        for part in (slice(first), slice(first, None)):
            close(packed[b : b + 1, :, part], nsa(*(t[b : b + 1, :, part] for t in qkv), config=SMALL))


def test_gates_of_zero_leave_the_selected_branch_alone(generator):
    q, k, v = draw(generator)
    config = dataclasses.replace(SMALL, rope=None)
    layout = selection(q, k, v, config=config)
    close(nsa(q, k, v, config=config, **only("gate_selected", q)), attention(q, k, v, mask=layout.dense()))


def test_blocks_are_scored_as_published(generator):
    # a window's weight counts once for every pair of a sub-stride of the block and one of the window that meet
    config = NSAConfig(kernel=12, stride=4, block=8, keep=3, first=0, local=0)
    q, k, v = draw(generator, 45, batch=1)
    ids = selection(q, k, v, config=config).ids
    windows = torch.stack([k[:, :, i : i + 12].mean(2) for i in range(0, 45 - 11, 4)], 2)
    scores = q.unflatten(1, (2, 2)) @ windows[:, :, None].mT * 8**-0.5
    for t in range(45):
        past = [i for i in range(windows.shape[2]) if 4 * i + 11 <= t]
        p = scores[0, :, :, t, past].softmax(-1).sum(1)
        for g in range(2):
            found = [0.0] * (t // 8 + 1)
            for b, m, n in itertools.product(range(t // 8 + 1), range(2), range(3)):
                at = 2 * b + m + n - 2
                found[b] += float(p[g, past.index(at)]) if at in past else 0.0
            order = sorted(range(len(found)), key=lambda b: (-found[b], b))[:3]
            assert sorted(order) == [i for i in ids[0, g, t].tolist() if i >= 0], t


def test_forced_blocks_are_always_selected_and_none_lies_ahead(generator):
    q, k, v = draw(generator, 130)
    config = dataclasses.replace(SMALL, keep=4, local=2)
    ids = selection(q, k, v, config=config).ids
    own = torch.arange(130) // 16
    for forced in (torch.zeros(130, dtype=torch.int64), own, (own - 1).clamp(min=0)):
        assert (ids == forced[:, None]).any(-1).all()
    assert (ids <= own[:, None]).all() and ids.shape == (2, 2, 130, 4)


def test_one_set_serves_the_heads_of_a_key_head_and_each_key_head_has_its_own(generator):
    q, k, v = draw(generator, 130)
    ids = selection(q, k, v, config=SMALL).ids
    assert ids.shape[1] == 2 and not torch.equal(ids[:, 0], ids[:, 1])
    table = pairs(selection(q, k, v, config=SMALL), q, k)
    assert torch.equal(table[:, 0], table[:, 1]) and torch.equal(table[:, 2], table[:, 3])


def test_the_choice_is_that_of_the_plain_rule(generator):
    lengths = [90, 0, 39, 71]
    q, k, v = draw(generator, 200, batch=1)
    more = {"compression": weights(generator), "config": SMALL}
    for mask in (None, Document(lengths) & Causal()):
        chosen = selection(q, k, v, mask=mask, **more)
        close(reference(q, k, v, mask=mask, chosen=chosen, **more), reference(q, k, v, mask=mask, **more), 0)


def test_the_last_queries_equal_those_of_the_whole_call(generator):
    q, k, v = draw(generator, 90)
    more = {"compression": weights(generator), "config": SMALL}
    close(nsa(q[:, :, -7:], k, v, **more), nsa(q, k, v, **more)[:, :, -7:])


def test_the_sliding_branch_is_a_window_and_can_be_left_out(generator):
    q, k, v = draw(generator)
    config = dataclasses.replace(SMALL, rope=None)
    close(nsa(q, k, v, config=config, **only("gate_window", q)), attention(q, k, v, mask="causal & window(9)"))
    without = nsa(q, k, v, config=dataclasses.replace(SMALL, window=0))
    gate = torch.zeros(2, 1, 75, dtype=F64)
    close(without, nsa(q, k, v, config=SMALL, gate_window=gate))


def test_compression_is_a_map_of_all_channels_of_a_window_and_learns(generator):
    config, (_, k, v) = SMALL, draw(generator, 30)
    made = weights(generator)
    want = torch.stack([
        torch.einsum("bgkd,gkde->bge", k[:, :, i : i + 8] + made.position, made.key.view(2, 8, 8, 8))
        for i in range(0, 30 - 7, 4)
    ], 2)  # fmt: skip
    close(compress(k, config, made.key, made.position), want)
    assert compress(v[:, :, :7], config, made.value).shape == (2, 2, 0, 10)
    q = torch.randn(1, 2, 13, 8, generator=generator, dtype=F64)
    leaves = [t.clone().requires_grad_() for t in made]

    def run(*leaves):
        return nsa(q, k[:1, :, :13], v[:1, :, :13], compression=Compression(*leaves), config=SMALL)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_slices_of_queries_change_nothing(generator, monkeypatch):
    from manyheads.mechanism.sparse import per_query

    qkv = draw(generator, 130)
    whole = selection(*qkv, config=SMALL).ids
    monkeypatch.setattr(per_query, "rows_at_once", lambda entries: 17)
    assert torch.equal(selection(*qkv, config=SMALL).ids, whole)


@pytest.mark.parametrize(("sizes", "name"), [
    ({"kernel": 9}, "kernel"), ({"block": 10}, "block"), ({"keep": 0}, "keep"), ({"keep": 1}, "keep"),
    ({"window": -1}, "window"), ({"stride": 0}, "stride"), ({"first": -1}, "first"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        dataclasses.replace(SMALL, **sizes)


def test_wrong_calls_say_what_is_wrong(generator):
    q, k, v = draw(generator, 20)
    with pytest.raises(ValueError, match="gate_selected: expected shape"):
        nsa(q, k, v, gate_selected=torch.ones(2, 3, 20), config=SMALL)
    with pytest.raises(TypeError, match="gate_window: expected a floating tensor"):
        nsa(q, k, v, gate_window=torch.ones(2, 4, 20, dtype=torch.int64), config=SMALL)
    with pytest.raises(ValueError, match="weight: expected shape"):
        nsa(q, k, v, compression=Compression(torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(1)), config=SMALL)
    with pytest.raises(UnsupportedError, match="fsa does not support mask"):
        nsa(q, k, v, mask="causal & window(5)", config=SMALL)
    with pytest.raises(UnsupportedError, match="documents whose 3 queries"):
        nsa(q[:1, :, :3], k[:1], v[:1], mask=Document([3]) & Causal(), config=SMALL)
    with pytest.raises(ValueError, match="unknown order 'rows'"):
        nsa(q, k, v, config=SMALL, order="rows")


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["fsa", "msa"])
def test_kernels_give_values_and_gradients_of_the_plain_mechanism(slug, device):
    pytest.importorskip("triton")
    spec = find(slug)
    case = spec.inputs(Size(batch=1, heads=4, kv_heads=2, queries=45, causal=True, device=device))
    chosen = spec.selection(*case[:3], **case.options)
    qkv = [t.requires_grad_() for t in case[:3]]
    ways = (spec.fn, {"backend": "triton"}), (spec.reference, {"chosen": chosen})
    got, want = (torch.autograd.grad((fn(*qkv, **case.options, **more) ** 2).sum(), qkv) for fn, more in ways)
    for one, other in zip(got, want, strict=True):
        close(one, other, 1e-4)


def test_a_layout_says_what_is_visited(generator):
    layout = selection(*draw(generator, 130), config=SMALL)
    assert isinstance(layout, TileLayout) and layout.tile == (1, 16) and layout.heads == 4
    assert layout.area < attention_area(130)


def attention_area(n):
    """Share of pairs that causal attention sees."""
    return (n + 1) / (2 * n)
