"""Choosing blocks: against a plain sort of each row, whatever is visible, forced, tied or few."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.mechanism import select
from manyheads.mechanism.select import Forced, above, top_k, top_p

INF = float("inf")


def draw(generator, *shape, levels=0):
    """Normal scores, or whole ones of a few levels, which tie."""
    if levels:
        return torch.randint(levels, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def by_row(choose, width, scores, visible, forced):
    """What a plain function of one row keeps: lists of ``(score, block)`` in, blocks out."""
    visible, forced = visible.expand(scores.shape), forced.expand(scores.shape)
    ids = torch.full((*scores.shape[:3], width), -1, dtype=torch.int32)
    for row in itertools.product(*map(range, scores.shape[:3])):
        ranked = []
        for j, score in enumerate(scores[row].tolist()):
            score = INF if forced[row][j] else score
            if visible[row][j] and score > -INF:
                ranked.append((score, j))
        ranked.sort(key=lambda pair: (-pair[0], pair[1]))
        kept = sorted(j for _, j in choose(ranked, row)[:width])
        ids[row][: len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("levels", [0, 3], ids=["distinct", "tied"])
@pytest.mark.parametrize("keep", [1, 4, 9])
def test_top_k_is_the_head_of_a_sorted_row(generator, keep, levels, dtype):
    scores = draw(generator, 2, 3, 7, 9, levels=levels).to(dtype)
    visible = torch.rand(1, 3, 7, 9, generator=generator) < 0.7
    forced = torch.rand(2, 1, 7, 9, generator=generator) < 0.1
    got = top_k(scores, keep, visible=visible, force=forced)
    assert got.dtype == torch.int32
    assert torch.equal(got, by_row(lambda ranked, _: ranked, keep, scores, visible, forced))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_top_k_needs_no_exponential(data):
    """Any growing function of the scores of a row, the softmax among them, keeps the same blocks."""
    blocks = data.draw(st.integers(1, 12))
    keep = data.draw(st.integers(1, blocks))
    numbers = st.floats(-60, 60, width=32)
    row = data.draw(st.lists(numbers, min_size=blocks, max_size=blocks, unique=True))
    scores = torch.tensor(row, dtype=torch.float64).reshape(1, 1, 1, -1)
    visible = torch.ones(1, blocks).bool() if blocks < 3 else (torch.arange(blocks) < blocks - 1)[None]
    kept = top_k(scores, keep, visible=visible)
    for grown in (scores.masked_fill(~visible, -INF).softmax(-1).log(), 3 * scores + 1, scores / 1e3):
        if grown[..., : int(visible.sum())].unique().numel() == int(visible.sum()):  # rounding made no two equal
            assert torch.equal(top_k(grown, keep, visible=visible), kept)


@pytest.mark.parametrize(("nq", "nk"), [(21, 21), (6, 30), (30, 11)])
@pytest.mark.parametrize("share", ["group", "head"])
def test_raw_scores_choose_the_blocks_of_the_largest_softmax_weights(generator, nq, nk, share):
    q, k = (torch.randn(2, h, n, 8, generator=generator, dtype=torch.float64) for h, n in ((4, nq), (2, nk)))
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    scores = scores.unflatten(1, (2, 2)).mean(2) if share == "group" else scores
    seen = torch.ones(nq, nk).tril(nk - nq).bool()
    weights = scores.masked_fill(~seen, -INF).softmax(-1)
    weights = torch.stack([part.amax(-1) for part in weights.split(4, -1)], -1)
    visible = select.block_causal(nq, nk, 1, 4)
    for rows in (None, 5):
        raw = select.max_scores(q, k, k_block=4, share=share, rows=rows)
        assert torch.equal(raw > -INF, visible.expand_as(raw))
        assert torch.equal(top_k(raw, 2), top_k(weights.nan_to_num(), 2, visible=visible))
    both = select.max_scores(q, k, k_block=4, share=share, causal=False)
    torch.testing.assert_close(both, torch.stack([part.amax(-1) for part in scores.split(4, -1)], -1))


def test_equal_scores_go_to_the_lower_block_whatever_else_is_in_the_row(generator):
    scores = draw(generator, 1, 1, 40, 24, levels=2)
    visible = torch.arange(24) < torch.arange(1, 41)[:, None]
    short, long = top_k(scores[..., :16], 5, visible=visible[:, :16]), top_k(scores, 5, visible=visible)
    assert torch.equal(short[:, :, :16], long[:, :, :16])
    assert top_k(torch.tensor([[[[-0.0, 0.0, -1.0]]]]), 1).item() == 0


def test_both_ways_of_finding_the_best_agree(generator):
    for levels in (0, 2, 5):
        scores = draw(generator, 2, 2, 9, 33, levels=levels)
        scores[0, :, :, 20:] = -INF
        compiled = torch.compile(lambda s: top_k(s, 7), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(scores), top_k(scores, 7))


def test_budgets_are_what_each_head_keeps(generator):
    scores = draw(generator, 2, 3, 5, 8)
    for keep in (6, 8):
        got = top_k(scores, keep, budgets=torch.tensor([1, 6, 3]), force=Forced(first=1))
        for head, budget in enumerate((1, 6, 3)):
            force = torch.arange(8) == 0 if budget == 1 else Forced(first=1)
            alone = top_k(scores[:, head : head + 1], budget, force=force)
            if budget > 1:
                assert torch.equal(got[:, head : head + 1, :, :budget], alone)
            assert ((got[:, head] >= 0).sum(-1) == budget).all()


@pytest.mark.parametrize("levels", [0, 3], ids=["distinct", "tied"])
@pytest.mark.parametrize("mass", [0.3, 0.9, 1.0, 1e-6])
def test_top_p_is_the_smallest_prefix_that_reaches_the_mass(generator, mass, levels):
    scores = (4 * draw(generator, 1, 2, 8, 9, levels=levels)).double()
    visible = torch.rand(8, 9, generator=generator) < 0.8
    forced = torch.rand(8, 9, generator=generator) < 0.1

    def prefix(ranked, row):
        plain = sorted(((float(scores[row][j]), j) for _, j in ranked), key=lambda pair: (-pair[0], pair[1]))
        total = sum(torch.tensor(s).exp().item() for s, _ in plain)
        kept, reached = [], 0.0
        for s, j in plain:
            if reached / max(total, 1e-300) < mass - 1e-12 or mass == 1.0:
                kept.append(j)
            reached += torch.tensor(s).exp().item()
        return [pair for pair in ranked if pair[1] in kept or forced[row[2], pair[1]]]

    got = top_p(scores, mass, visible=visible, force=forced)
    assert torch.equal(got, by_row(prefix, 9, scores, visible[None, None], forced[None, None]))


def test_top_p_keeps_at_most_so_many_forced_ones_first():
    scores = torch.tensor([[[[5.0, 4.0, 3.0, 2.0]]]])
    assert top_p(scores, 1.0, 2).flatten().tolist() == [0, 1]
    force = torch.tensor([False, False, False, True])
    assert top_p(scores, 1.0, 2, force=force).flatten().tolist() == [0, 3]


def test_a_share_or_threshold_may_be_one_per_head(generator):
    scores = draw(generator, 2, 3, 5, 8)
    values = torch.tensor([0.2, 0.5, 0.9])
    for choose in (top_p, above):
        together = choose(scores, values)
        alone = [choose(scores[:, h : h + 1], float(v)) for h, v in enumerate(values)]
        assert torch.equal(together, torch.cat(alone, 1))


def test_above_keeps_what_reaches_the_threshold(generator):
    scores = draw(generator, 2, 2, 6, 9, levels=4)
    visible, forced = torch.ones(6, 9).tril(2).bool(), torch.zeros(6, 9).bool()
    forced[:, 3] = True
    got = above(scores, 2.0, 5, visible=visible, force=forced)
    kept = by_row(lambda ranked, _: [p for p in ranked if p[0] >= 2.0], 5, scores, visible[None, None], forced)
    assert torch.equal(got, kept)


@pytest.mark.parametrize(
    "choose",
    [lambda s, **o: top_k(s, 4, **o), lambda s, **o: top_p(s, 0.5, **o), lambda s, **o: above(s, 0.0, **o)],
    ids=["top_k", "top_p", "above"],
)
def test_a_row_that_sees_nothing_keeps_nothing(choose):
    visible = torch.tensor([[True] * 5, [False] * 5])
    got = choose(torch.ones(1, 2, 2, 5), visible=visible, force=Forced(first=1, local=1))
    assert (got[:, :, 1] == -1).all() and (got[:, :, 0, 0] == 0).all()
    lost = choose(torch.full((1, 2, 2, 5), -INF), visible=visible)
    assert (lost == -1).all()


@pytest.mark.parametrize(("first", "local", "own"), [(0, 0, True), (2, 0, False), (1, 3, True), (0, 2, False)])
def test_forced_blocks_are_the_first_and_last_visible_of_a_row(first, local, own):
    visible = select.block_documents(select.cut([9, 0, 17], torch.ones(1, 1, 26, 1), block=4), 4, 4)
    got = Forced(first, local, own).mask(visible)[0, 0]
    for row, seen in zip(got, visible[0, 0], strict=True):
        at = seen.nonzero().flatten().tolist()
        wanted = at[:first] + (at[-max(local, own) :] if max(local, own) else [])
        assert row.nonzero().flatten().tolist() == sorted(set(wanted))


def test_own_blocks_count_where_rows_look_both_ways():
    visible, own = torch.ones(6, 6).bool(), torch.eye(6).bool()
    assert torch.equal(Forced().mask(visible, own=own), own)
    local = Forced(first=1, local=2).mask(visible, own=own)
    assert local.int().tolist()[3] == [1, 0, 1, 1, 0, 0]
    wide = select.own_blocks(16, 16, 8, 4)
    causal = select.block_causal(16, 16, 8, 4)
    assert Forced(local=3).mask(causal, own=wide).int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("force", [Forced(first=1, local=2), Forced(own=True), Forced(first=3, own=False)])
def test_forced_blocks_are_always_kept(generator, force):
    scores, visible = draw(generator, 2, 3, 12, 12), torch.ones(12, 12).tril().bool()
    forced = force.mask(visible)
    for ids in (
        top_k(scores, 4, visible=visible, force=force),
        top_p(scores, 0.1, 4, visible=visible, force=force),
        above(scores, 9.0, visible=visible, force=force),
    ):
        kept = select.pairs(ids, torch.ones(2, 3, 12, 1), torch.ones(2, 3, 12, 1))
        assert (kept | ~forced).all() and (visible | ~kept).all()


def test_choosing_has_no_gradient(generator):
    scores = draw(generator, 1, 1, 4, 6).requires_grad_()
    assert not any(f(scores).requires_grad for f in (lambda s: top_k(s, 2), lambda s: top_p(s, 0.5)))


def test_choosing_compiles_to_one_graph(generator):
    def run(scores, budgets):
        visible = select.block_causal(24, 24, 4, 4)
        force = Forced(first=1, local=1)
        return (
            top_k(scores, 3, visible=visible, force=force, budgets=budgets),
            top_p(scores, 0.6, 4, visible=visible, force=force),
            above(scores, 0.1, 4, visible=visible, force=force),
        )

    scores, budgets = draw(generator, 2, 2, 6, 6), torch.tensor([2, 3])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(scores, budgets)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(scores, budgets), strict=True))


SCORES = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(SCORES, 0), "keep: expected at least 1 block"),
        (lambda: top_k(SCORES, 5), "keep: expected at most the Tk=4 blocks"),
        (lambda: top_k(SCORES, 2, force=Forced(first=2, local=1)), "keep: expected at least the 3 blocks"),
        (lambda: top_k(SCORES[0], 1), "scores: expected floating"),
        (lambda: top_k(SCORES.long(), 1), "scores: expected floating"),
        (lambda: top_k(SCORES, 2, visible=torch.ones(3, 5).bool()), "visible: expected bool"),
        (lambda: top_k(SCORES, 2, visible=torch.ones(3, 4)), "visible: expected bool"),
        (lambda: top_k(SCORES, 2, force=torch.ones(2, 4).bool()), "force: expected bool"),
        (lambda: top_k(SCORES, 2, budgets=torch.tensor([1, 2, 2])), r"budgets: expected integers \(H=2,\)"),
        (lambda: top_k(SCORES, 2, budgets=torch.tensor([1.0, 2.0])), "budgets: expected integers"),
        (lambda: top_k(SCORES, 2, budgets=torch.tensor([0, 2])), "budgets: expected numbers of blocks from 1"),
        (lambda: top_k(SCORES, 2, budgets=torch.tensor([1, 3])), "from 1 to keep=2, got 1 to 3"),
        (lambda: top_p(SCORES, 0.0), "mass: expected a share"),
        (lambda: top_p(SCORES, 1.5), "mass: expected a share"),
        (lambda: top_p(SCORES, 0.5, 5), "most: expected at most the Tk=4"),
        (lambda: top_p(SCORES, torch.ones(3)), r"mass: expected one number, or one per head \(H=2,\)"),
        (lambda: above(SCORES, 0.5, 0), "most: expected at least 1"),
        (lambda: above(SCORES, torch.ones(3)), "threshold: expected one number"),
        (lambda: select.max_scores(SCORES, SCORES, k_block=0), "k_block: expected at least 1"),
        (lambda: select.max_scores(SCORES, SCORES, k_block=2, rows=0), "rows: expected at least 1"),
        (lambda: select.max_scores(SCORES, SCORES, k_block=2, share="all"), "unknown share 'all'"),
        (lambda: Forced(first=-1), "first: expected a number of blocks >= 0"),
        (lambda: Forced(local=-1), "local: expected a number of blocks >= 0"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
