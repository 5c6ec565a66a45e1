"""From coarse to fine, centroids, few bits, another order: each against its plain meaning."""

from __future__ import annotations

import pytest
import torch

from manyheads.common.kmeans import kmeans
from manyheads.mechanism import select

INF = float("inf")


def draw(generator, *shape):
    """Normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# From coarse to fine


@pytest.mark.parametrize("n", [32, 29])
def test_coarse_to_fine_is_the_best_of_what_lies_in_the_best_blocks(generator, n):
    coarse, fine = draw(generator, 2, 3, n, 8), draw(generator, 2, 3, n, n)
    at = torch.arange(n)
    visible = select.block_causal(n, n, 1, 4)
    force = select.Forced(first=1, local=1)

    def score(candidates):
        return fine.gather(-1, candidates.clamp(min=0).long())

    got = select.coarse_to_fine(coarse, score, 5, blocks=3, ratio=4, count=n, last=at, visible=visible, force=force)
    blocks = select.top_k(coarse, 3, visible=visible, force=force)
    chosen = select.pairs(blocks, fine, fine[:, :, :8]).repeat_interleave(4, 3)[..., :n] & (at <= at[:, None])
    assert torch.equal(got, select.top_k(fine.masked_fill(~chosen, -INF), 5))


def test_with_all_blocks_it_is_the_flat_choice(generator):
    coarse, fine = draw(generator, 1, 2, 6, 5), draw(generator, 1, 2, 6, 20)
    got = select.coarse_to_fine(
        coarse, lambda at: fine.gather(-1, at.clamp(min=0).long()), 7, blocks=5, ratio=4, count=20
    )
    assert torch.equal(got, select.top_k(fine, 7))


def test_refining_ignores_what_is_said_of_no_candidate():
    scores = torch.tensor([[[[INF, 1.0, 2.0]]]])
    assert select.refine(scores, torch.tensor([[[[-1, 8, 3]]]]), 3).flatten().tolist() == [3, 8, -1]


@pytest.mark.parametrize("sets", [2, 6])
def test_scores_at_are_those_of_the_listed_keys(generator, sets, monkeypatch):
    q, k = draw(generator, 2, 6, 9, 4), draw(generator, 2, 2, 15, 4)
    ids = torch.randint(-1, 15, (2, sets, 9, 5), generator=generator)
    full = q @ k.repeat_interleave(3, 1).mT * 0.5
    full = full if sets == 6 else full.unflatten(1, (2, 3)).mean(2)
    wanted = full.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -INF)
    torch.testing.assert_close(select.scores_at(q, k, ids), wanted)
    monkeypatch.setattr("manyheads.mechanism.select.coarse._NUMBERS", 300)
    torch.testing.assert_close(select.scores_at(q, k, ids), wanted)


# Centroids


def test_when_each_key_is_its_own_group_weights_are_those_of_the_softmax(generator):
    q, k = draw(generator, 1, 4, 5, 8), draw(generator, 1, 2, 12, 8)
    weights = select.centroid_weights(select.centroid_scores(q, k), torch.ones(1, 2, 12, dtype=torch.int64))
    torch.testing.assert_close(weights, (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).softmax(-1))


def test_weights_of_all_keys_add_up_to_one(generator):
    q, k = draw(generator, 2, 4, 5, 8), draw(generator, 2, 2, 40, 8)
    found = kmeans(k, 6, normalise=True, generator=generator)
    sizes = torch.cat((found.sizes, torch.zeros(2, 2, 1, dtype=torch.int64)), -1)
    centroids = torch.cat((found.means(k), 50 * torch.ones(2, 2, 1, 8, dtype=torch.float64)), 2)
    weights = select.centroid_weights(select.centroid_scores(q, centroids), sizes)
    held = sizes.repeat_interleave(2, 1)[:, :, None]
    torch.testing.assert_close((held * weights).sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    assert not weights[..., 6].any()
    nothing = select.centroid_weights(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3, dtype=torch.int64))
    assert not nothing.any()


def test_a_needle_is_in_the_groups_that_its_query_looks_for(generator):
    k = draw(generator, 1, 1, 60, 16)
    k[0, 0, 17:20] = 8 * torch.nn.functional.normalize(draw(generator, 16), dim=0)
    found = kmeans(k, 12, normalise=True, generator=generator)
    q = k[:, :, 18:19]
    near = select.nearest_centroids(q, found.means(k), 1, sizes=found.sizes)
    kept = torch.zeros(1, 1, 1, 12, dtype=torch.bool).scatter(3, near.long(), True)
    tokens = select.members(kept, found.labels).flatten().tolist()
    assert {17, 18, 19} <= set(tokens) and len([t for t in tokens if t >= 0]) < 60


def test_nearest_centroids_have_the_largest_products_and_hold_keys(generator):
    q, centroids = draw(generator, 2, 4, 5, 8), draw(generator, 2, 2, 7, 8)
    sizes = torch.randint(0, 3, (2, 2, 7), generator=generator)
    got = select.nearest_centroids(q, centroids, 3, sizes=sizes)
    held = sizes.repeat_interleave(2, 1)[:, :, None] > 0
    scores = (q @ centroids.repeat_interleave(2, 1).mT).masked_fill(~held, -INF)
    assert torch.equal(got, select.top_k(scores, 3))


@pytest.mark.parametrize("most", [None, 4])
def test_members_are_the_keys_of_the_kept_groups(generator, most):
    kept = torch.rand(2, 4, 3, 5, generator=generator) < 0.5
    labels = torch.randint(5, (2, 2, 13), generator=generator)
    got = select.members(kept, labels, most)
    for b in range(2):
        for h in range(4):
            for t in range(3):
                wanted = [j for j in range(13) if kept[b, h, t, labels[b, h // 2, j]]][:most]
                assert [j for j in got[b, h, t].tolist() if j >= 0] == wanted


# Few bits


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(("bits", "levels"), [(4, 7), (8, 127)])
def test_estimates_are_off_by_no_more_than_rounding_allows(generator, bits, levels, smooth):
    q, k = draw(generator, 2, 4, 9, 16), draw(generator, 2, 2, 11, 16) + 5
    keys = k.repeat_interleave(2, 1)
    got = select.low_bit_scores(q, k, bits, smooth=smooth, scale=1.0)
    centred = (q - q.mean(2, keepdim=True), keys - keys.mean(2, keepdim=True)) if smooth else (q, keys)
    tops = [x.abs().amax(-1) / levels / 2 for x in centred]  # half a step
    sums = [x.abs().sum(-1) for x in centred]
    bound = tops[0][..., None] * sums[1][:, :, None] + tops[1][:, :, None] * sums[0][..., None]
    bound = bound + 16 * tops[0][..., None] * tops[1][:, :, None]
    assert ((got - q @ keys.mT).abs() <= bound + 1e-9).all()


def test_smoothing_saves_what_a_common_offset_would_cost(generator):
    q, k = draw(generator, 1, 2, 30, 32), draw(generator, 1, 2, 30, 32) + 20
    exact = q @ k.mT * 32**-0.5
    errors = [(select.low_bit_scores(q, k, smooth=s) - exact).abs().mean() for s in (True, False)]
    assert errors[0] < errors[1] / 5


# Another order


@pytest.mark.parametrize("n", [3, 12, 14])
def test_reordering_sorts_each_complete_segment_and_can_be_undone(generator, n):
    scores, x = draw(generator, 2, 3, n), draw(generator, 2, 3, n, 5)
    order = select.reorder(scores, 4)
    select.check_permutation(order, segment=4)
    whole = n // 4 * 4
    moved = scores.gather(2, order)
    falling = moved[..., :whole].unflatten(2, (-1, 4)) if whole else moved.new_zeros(1, 1)
    assert (falling.diff(dim=-1) <= 0).all() and torch.equal(moved[..., whole:], scores[..., whole:])
    back = select.inverse(order)
    assert torch.equal(select.permute(select.permute(x, order), back), x)
    assert torch.equal(select.inverse(back), order)


def test_equal_scores_keep_their_order():
    assert select.reorder(torch.zeros(1, 1, 9), 4).flatten().tolist() == list(range(9))


def test_a_key_head_may_be_needed_in_the_order_of_each_query_head(generator):
    x, order = draw(generator, 1, 2, 6, 3), select.reorder(draw(generator, 1, 4, 6), 6)
    got = select.permute(x, order)
    assert all(torch.equal(got[0, h], x[0, h // 2, order[0, h]]) for h in range(4))
    shared = select.permute(x, order[:, :1])
    assert all(torch.equal(shared[0, h], x[0, h, order[0, 0]]) for h in range(2))
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: select.permute(x, order), leaf)


def test_softmax_attention_does_not_see_the_order_of_keys(generator):
    q, k, v = (draw(generator, 1, 2, 8, 4) for _ in range(3))
    order = select.reorder(draw(generator, 1, 2, 8), 8)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(sdpa(q, select.permute(k, order), select.permute(v, order)), sdpa(q, k, v))


def test_all_of_it_compiles_to_one_graph(generator):
    def run(q, k):
        order = select.reorder(k.sum(-1), 4)
        k = select.permute(k, order)
        coarse = select.pooled_scores(q, k, q_block=1, k_block=4)
        last = torch.arange(q.shape[2])
        visible = select.block_causal(12, 12, 1, 4)
        ids = select.coarse_to_fine(
            coarse, lambda at: select.scores_at(q, k, at), 3, blocks=2, ratio=4, count=12, last=last, visible=visible
        )
        sizes = torch.full((1, 2, 12), 2)
        weights = select.centroid_weights(select.centroid_scores(q, k), sizes)
        near = select.nearest_centroids(q, k, 2, sizes=sizes)
        return ids, weights, near, select.low_bit_scores(q, k), select.inverse(order), select.ids_of(weights > 0.05, 4)

    q, k = torch.randn(1, 4, 12, 8, generator=generator), torch.randn(1, 2, 12, 8, generator=generator)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k)
    for got, wanted in zip(compiled, run(q, k), strict=True):
        torch.testing.assert_close(got, wanted)


Q, K = torch.ones(1, 4, 6, 2), torch.ones(1, 2, 6, 2)
IDS = torch.zeros(1, 2, 6, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: select.coarse_to_fine(IDS.float(), lambda at: at.float(), 9, blocks=2, ratio=4, count=16),
            "keep: expected at most the 8",
        ),
        (lambda: select.expand(IDS, 0, 5), "ratio: expected at least 1"),
        (lambda: select.expand(IDS, 2, 5, last=torch.arange(5)), r"last: expected shape \(Tq=6,\)"),
        (lambda: select.refine(torch.ones(1, 2, 6, 2), IDS, 1), "candidates: expected the shape of scores"),
        (lambda: select.refine(torch.ones(1, 2, 6, 1), IDS, 2), "keep: expected at most"),
        (lambda: select.scores_at(Q, K, IDS[:, :, :5]), "ids: expected shape"),
        (lambda: select.scores_at(Q, K, IDS[:, :1]), "ids: expected shape"),
        (lambda: select.scores_at(Q[:, :3], K, IDS), "q: its 3 heads"),
        (lambda: select.centroid_weights(torch.ones(1, 4, 6, 3), torch.ones(1, 2, 4)), "sizes: expected"),
        (lambda: select.nearest_centroids(Q, K, 7), "keep: expected at most the Tk=6"),
        (lambda: select.members(torch.ones(1, 4, 6, 3).bool(), torch.ones(1, 3, 9).long()), "labels: expected"),
        (lambda: select.ids_of(torch.ones(1, 1, 1, 3).bool(), 4), "most: expected from 1 to the N=3"),
        (lambda: select.low_bit_scores(Q, K, 3), "bits: expected 8 or 4"),
        (lambda: select.reorder(torch.ones(1, 1, 4), 0), "segment: expected at least 1"),
        (lambda: select.reorder(torch.ones(1, 4), 2), "scores: expected floating"),
        (lambda: select.permute(K, torch.zeros(1, 3, 6).long()), "permutation: expected"),
        (lambda: select.permute(K, torch.zeros(1, 2, 5).long()), "permutation: expected"),
        (lambda: select.inverse(torch.tensor([0, 2, 2])), "each number from 0 to 2 once"),
        (lambda: select.inverse(torch.tensor([0, 1, 3])), "each number from 0 to 2 once"),
        (lambda: select.check_permutation(torch.tensor([[0, 1], [-1, 0]])), r"got \[-1, 0\]"),
        (lambda: select.check_permutation(torch.tensor([2, 1, 0]), segment=2), "left its segment of 2"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_permutation_is_of_integers():
    with pytest.raises(TypeError, match="permutation: expected integers"):
        select.check_permutation(torch.ones(3))
