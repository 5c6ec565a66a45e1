"""Off the CPU nothing is waited for and nothing lies elsewhere: shown on tensors that have no values to wait for."""

from __future__ import annotations

import pytest
import torch

from manyheads.common.kmeans import kmeans
from manyheads.mechanism import select

N, FORCE = 40, select.Forced(first=1, local=1)


def run_blocks(q, k):
    parts = select.cut(None, q, block=8)
    visible = select.block_documents(parts, 8, 8)
    own = select.own_blocks(N, N, 8, 8, q.device)
    scores = select.pooled_scores(q, k, q_block=8, k_block=8)
    budgets = torch.full((2,), 2, device=q.device)
    yield select.pool(q, 8, "max")
    yield FORCE.mask(visible, own=own)
    yield select.top_k(scores, 2, visible=visible, force=FORCE, budgets=budgets)
    yield select.top_k(scores.double(), 2, visible=visible)
    yield select.top_p(scores, 0.9, 3, visible=visible, force=FORCE)
    yield select.above(scores, 0.5, 3, visible=visible, force=FORCE)


def run_finer(q, k):
    at = torch.arange(N, device=q.device)
    scores = select.pooled_scores(q, k, q_block=1, k_block=8)
    yield select.coarse_to_fine(
        scores, lambda ids: select.scores_at(q, k, ids), 5, blocks=2, ratio=8, count=N, last=at
    )
    yield select.low_bit_scores(q, k)
    yield select.max_scores(q, k, k_block=8)
    order = select.reorder(k.sum(-1), 8)
    yield select.permute(k, order)
    yield select.inverse(order)
    yield select.gated([q, q], torch.rand(1, 1, N, 2, device=q.device))
    yield select.straight_through(q)


def run_clusters(q, k):
    found = kmeans(k, 4, steps=2, normalise=True)
    weights = select.centroid_weights(select.centroid_scores(q, found.means(k)), found.sizes)
    yield select.members(weights > 0.1, found.labels, 7)
    yield select.nearest_centroids(q, found.centroids, 2, sizes=found.sizes)


def run_losses(q, k):
    index_q, index_k = q[:, :2].clone().requires_grad_(), k[:, :1].clone().requires_grad_()
    ids = torch.zeros(1, 2, N, 2, dtype=torch.int32, device=q.device)
    for some in (None, ids):
        loss = select.index_loss(q, k, index_q, index_k, some, block=8)
        yield loss
        yield from torch.autograd.grad(loss, (index_q, index_k))


@pytest.mark.parametrize("run", [run_blocks, run_finer, run_clusters, run_losses])
def test_nothing_is_waited_for(run):
    q, k = torch.empty(1, 4, N, 16, device="meta"), torch.empty(1, 2, N, 16, device="meta")
    results = list(run(q, k))
    assert len(results) > 1 and all(result.device.type == "meta" for result in results)


def test_documents_are_cut_from_lengths_on_the_host():
    """Their values are on the CPU and looked at there; what comes of them is where the tokens are."""
    real = torch.empty(1, 2, 30, 4, device="meta")
    parts = select.cut(torch.tensor([13, 17]), real, block=8)
    assert parts.length == 40 and parts.tensors[0].shape == (1, 2, 40, 4) and parts.lens.tolist() == [16, 24]
    assert {t.device.type for t in (parts.tensors[0], parts.place, parts.real, parts.document)} == {"meta"}


def test_a_wait_or_a_tensor_elsewhere_would_be_noticed():
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.empty(2, device="meta").any())
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(2, device="meta") + torch.empty(2)
