"""Structured inputs hold the structure that they promise, the same for the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads.bench.structure import ASKING, FRAME, KINDS, SPAN, Shape, draw

SHAPE = Shape(1600, heads=4, kv_heads=2, width=64, seed=7)


def weights(found, head=0):
    """Causal attention weights of one query head, in float64."""
    q, k = found.q[0, head].double(), found.k[0, head // 2].double()
    scores = q @ k.mT / math.sqrt(q.shape[1])
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_dtypes_round_the_same_numbers(kind):
    one, again = draw(kind, SHAPE), draw(kind, SHAPE)
    other = draw(kind, Shape(1600, heads=4, kv_heads=2, seed=8))
    half = draw(kind, Shape(1600, heads=4, kv_heads=2, dtype="bfloat16", seed=7))
    assert one.q.shape == (1, 4, 1600, 64) and one.k.shape == one.v.shape == (1, 2, 1600, 64)
    for a, b, c, d in zip(one[:3], again[:3], other[:3], half[:3], strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(a.bfloat16(), d)
        assert a.isfinite().all()


def test_queries_that_look_for_a_needle_give_it_their_weight():
    found = draw("needles", SHAPE)
    assert len(found.needles) == SHAPE.tokens // 512
    asking = torch.nonzero(found.wanted >= 0)[:, 0]
    assert len(asking) > 500
    start = found.needles[found.wanted[asking]]
    assert (start + SPAN <= asking // ASKING * ASKING).all()
    for head in range(4):
        own = torch.stack([weights(found, head)[asking, start + i] for i in range(SPAN)]).sum(0)
        assert own.mean() > 0.8
    idle = torch.nonzero(found.wanted < 0)[:, 0]
    assert weights(found)[idle[idle > 800]].amax(-1).mean() < 0.1


def test_documents_have_a_sink_topics_and_near_neighbours():
    w = weights(draw("document", SHAPE))[800:]
    rows = torch.arange(800, 1600)
    assert 0.01 < w[:, :SPAN].sum(-1).mean() < 0.9
    near = torch.stack([w[torch.arange(800), rows - d] for d in range(1, 33)]).mean()
    far = torch.stack([w[torch.arange(800), rows - d] for d in range(600, 632)]).mean()
    assert near > 5 * far
    far_mass = w[:, SPAN:400].sort(-1, descending=True).values  # topics come back: heavy keys far away too
    assert (far_mass[:, :40].sum(-1) / far_mass.sum(-1)).mean() > 0.2


def test_videos_fall_off_along_every_axis():
    w = weights(draw("video", SHAPE))
    rows = torch.arange(1300, 1590)
    frame = math.prod(FRAME)

    def at(distance):
        return float(w[rows, rows - distance].mean())

    for axis, far in ((1, 8), (FRAME[1], 8 * FRAME[1]), (frame, 5 * frame)):
        assert at(axis) > 10 * at(far), axis


def test_odd_sizes_and_wrong_ones():
    for kind in KINDS:
        assert draw(kind, Shape(77, heads=3, kv_heads=1, width=10)).v.shape == (1, 1, 77, 10)
    with pytest.raises(ValueError, match="did you mean 'needles'"):
        draw("needle", SHAPE)
    with pytest.raises(ValueError, match="multiple of the key heads"):
        Shape(10, heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="even number"):
        Shape(10, width=9)
