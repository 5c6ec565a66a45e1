"""Needles can be answered from the inputs alone, recall counts what it says, and the protocol judges every seed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from manyheads.bench.row import Row
from manyheads.bench.suite import Options
from manyheads.bench.suites import quality_needle
from manyheads.bench.tasks import needle
from manyheads.bench.tasks.train import Protocol
from manyheads.model import Decoder
from tests.bench.test_suites import Context


def batch(count=5, seed=3):
    return needle.task().draw(count, torch.Generator().manual_seed(seed), False)


def test_every_question_is_answered_by_the_token_after_its_key():
    made = batch()
    place = needle.places(made.inputs)
    assert torch.equal(place >= 0, made.judged) and int(made.judged.sum()) == 5 * 64
    answer = made.inputs.gather(1, place.clamp(min=0)) - needle.SYMBOLS
    assert torch.equal(answer[made.judged], made.targets[made.judged])
    assert (place < 96).all(), "answers stand before the questions"


def test_needles_lie_anywhere_and_keys_are_asked_alike():
    made = batch(200)
    places = needle.places(made.inputs)[made.judged].reshape(200, 64)
    assert {int(p) // 16 for p in places.unique()} == set(range(6))
    assert all(len(row.unique()) == 8 for row in places[:20])
    assert all(int((row == p).sum()) == 8 for row in places[:5] for p in row.unique())


def test_recall_counts_the_blocks_that_hold_the_answer():
    made = batch()
    block, n = 4, made.inputs.shape[1]
    own = torch.arange(n) // block
    wanted = needle.places(made.inputs) // block
    ids = torch.stack([wanted, own.expand(5, -1)], -1)[:, None]
    assert needle.found(ids, block, made.inputs) == 1.0
    assert needle.found(torch.stack([ids[:, 0], ids[:, 0] * 0 - 1], 1), block, made.inputs) == 0.5
    assert needle.found(ids[..., 1:], block, made.inputs) == 0.0


def test_random_blocks_are_as_many_earlier_ones_and_the_own():
    ids = torch.randint(0, 3, (2, 2, 40, 3))
    ids[:, :, :4, 1:] = -1
    drawn = needle.at_random(ids, 4, torch.Generator().manual_seed(1))
    own = torch.arange(40) // 4
    assert torch.equal((drawn >= 0).sum(-1), torch.minimum((ids >= 0).sum(-1), own + 1))
    assert (drawn <= own[:, None]).all() and (drawn == own[:, None]).any(-1).all()
    assert all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in drawn[0, 0])


@pytest.mark.parametrize("name", quality_needle.MIXERS)
def test_an_untrained_selector_is_asked_at_a_tenth_of_the_blocks(name):
    torch.manual_seed(0)
    task = needle.task()
    model = Decoder(Protocol(1).decoder(task, quality_needle.MIXERS[name]))
    made = batch(3)
    kept = needle.chosen(model, made.inputs)
    assert len(kept) == 2 and len(needle.recall(model, made.inputs)) == 2
    for ids, block in kept:
        assert ids.shape[-1] / -(-task.length // block) == 0.1
        rate = needle.found(ids, block, made.inputs)
        chance = needle.found(needle.at_random(ids, block, torch.Generator().manual_seed(0)), block, made.inputs)
        assert rate < 0.4 and chance < 0.25
    assert all(not m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no layer selects"):
        needle.recall(Decoder(Protocol(1).decoder(task, "softmax")), made.inputs)


def test_too_many_needles_are_refused():
    with pytest.raises(ValueError, match="needles: expected 1 to 4, got 5"):
        needle.task(16, 5, 8)


@pytest.mark.parametrize("name", quality_needle.MIXERS)
def test_a_short_training_gives_the_three_rows_of_a_seed(name, monkeypatch):
    monkeypatch.setattr(quality_needle, "JUDGED", 2)
    base = Row("quality", "c", name, phase="train", task="needle")
    task = needle.task(64, 4, 16)
    protocol = dataclasses.replace(Protocol(2, batch=2), width=16, heads=2)
    rows = quality_needle.trained(base, name, task, protocol, 0, Context())
    assert [r.provider for r in rows] == [name, f"{name}-untrained", f"{name}-random"]
    assert all(0 <= r.score <= 1 for r in rows) and len(rows[0].curve) == 2
    again = quality_needle.trained(base, name, task, protocol, 0, Context())
    assert again == rows


def test_a_claim_holds_if_every_seed_finds_twice_as_many():
    assert quality_needle.verdict("nsa", "random", [0.4, 0.3, 0.9], [0.1, 0.15, 0.2]).verdict == "met"
    missed = quality_needle.verdict("nsa", "random", [0.4, 0.29, 0.9], [0.1, 0.15, 0.2])
    assert missed.verdict == "missed" and missed.measured == pytest.approx(0.29 / 0.15, abs=1e-4)
    assert quality_needle.verdict("nsa", "random", [0.4, None], [0.1, 0.1]).verdict == "not measured"


def test_each_layer_has_three_seeds_and_its_claims():
    cases = quality_needle.cases(Options(level="quick"))
    names = [case.name for case in cases]
    assert len(names) == 2 * (3 + 1) == len(set(names)) and sum(case.seconds for case in cases) < 600
    rows = [Row("quality", "x", p, score=s) for p, s in (("msa", 0.5), ("msa-untrained", 0.1), ("msa-random", 0.3))]

    class Known(Context):
        def rows(self, case):
            return rows

    claims = cases[-1].run(Known())
    assert [(r.verdict, r.baseline) for r in claims] == [("met", "msa-untrained"), ("missed", "msa-random")]
    assert len({r.bar for r in claims}) == 2
