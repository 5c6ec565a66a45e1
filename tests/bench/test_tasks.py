"""The tasks: an oracle solves each from its inputs alone, seeds repeat, and no answer stands where it is asked for."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads.bench.tasks import TASKS, listops, passkey, recall, regression, states, text
from manyheads.bench.tasks.text import Text

SMALL = {
    "recall": lambda: recall.task(5, 10, 16),
    "passkey": lambda: passkey.task(30, 3),
    "states": lambda: states.task(3, 11),
    "regression": lambda: regression.task(40, 2),
    "bytes": lambda: text.task(24),
    "listops": lambda: listops.task(30),
}


def draw(task, count=40, seed=1, *, held_out=False):
    return task.draw(count, torch.Generator().manual_seed(seed), held_out)


def answers_of(batch, solve, classes):
    """What a model would return that gives the answers of an oracle."""
    found = torch.zeros(*batch.targets.shape, classes)
    for row in range(len(batch.inputs)):
        for at, answer in solve(batch.inputs[row].tolist()).items():
            found[row, at, answer] = 1.0
    return found


def solve_recall(tokens):
    known = dict(zip(tokens[:10:2], tokens[1:10:2], strict=True))
    return {at: known[tokens[at]] - 16 for at in range(10, len(tokens))}


def solve_passkey(tokens):
    at = tokens.index(26)
    return {len(tokens) - 3 + i: tokens[at + 1 + i] for i in range(3)}


def solve_states(tokens):
    import itertools

    every = list(itertools.permutations(range(3)))
    state, found = (0, 1, 2), {}
    for at, token in enumerate(tokens):
        state = tuple(every[token][i] for i in state)
        found[at] = every.index(state)
    return found


def solve_listops(tokens):
    words = {10: "min", 11: "max", 12: "med", 13: "total"}
    parts = []
    for token in tokens:
        if token in words:
            parts.append(f"{words[token]}([")
        elif token == 14:
            parts.append("]),")
        elif token < 10:
            parts.append(f"{token},")
    scope = {"med": lambda x: sorted(x)[(len(x) - 1) // 2], "total": lambda x: sum(x) % 10, "min": min, "max": max}
    return {len(tokens) - 1: eval("".join(parts).rstrip(","), scope)}


@pytest.mark.parametrize(
    ("name", "solve"),
    [("recall", solve_recall), ("passkey", solve_passkey), ("states", solve_states), ("listops", solve_listops)],
)
def test_an_oracle_that_sees_the_inputs_only_is_always_right(name, solve):
    task = SMALL[name]()
    batch = draw(task)
    answers = answers_of(batch, solve, task.outputs)
    assert task.score(answers, batch) == 1.0
    assert task.score(answers.roll(1, -1), batch) == 0.0


def test_local_least_squares_solves_the_regression_up_to_its_noise():
    task = regression.task(160, 2)
    batch = draw(task, 6)
    answers = torch.zeros_like(batch.targets)
    for row, inputs in enumerate(batch.inputs.double()):
        for at in range(160):
            start = at - at % 80
            past = inputs[start + 1 : at + 1]
            if len(past) > 10:
                known = torch.cat([past[:, :4], torch.ones(len(past), 1)], 1)
                fit = torch.linalg.lstsq(known, past[:, 4:6]).solution
                answers[row, at] = torch.cat([inputs[at, 6:], torch.ones(1)]).float() @ fit.float()
    late = batch.judged & (torch.arange(160) % 80 > 20)
    assert task.score(answers, batch._replace(judged=late)) < 0.01
    assert task.score(torch.zeros_like(answers), batch) == pytest.approx(1.0, abs=0.2)


def test_the_function_changes_where_it_says():
    task = regression.task(40, 2)
    batch = draw(task, 200)
    first = torch.cat([batch.inputs[:, 1:20, :4], torch.ones(200, 19, 1)], 2).double()
    fit = torch.linalg.lstsq(first, batch.inputs[:, 1:20, 4:6].double()).solution
    later = torch.cat([batch.inputs[:, 21:, :4], torch.ones(200, 19, 1)], 2).double()
    error = (later @ fit - batch.inputs[:, 21:, 4:6]).square().mean()
    assert error > 1.0


@pytest.mark.parametrize("name", list(SMALL))
def test_a_seed_repeats_and_another_one_does_not(name):
    task = SMALL[name]()
    one, same, other = draw(task), draw(task), draw(task, seed=2)
    assert all(a.equal(b) for a, b in zip(one, same, strict=True))
    assert not one.inputs.equal(other.inputs)


@pytest.mark.parametrize("name", list(SMALL))
def test_batches_have_the_shapes_that_the_task_declares(name):
    task = SMALL[name]()
    batch = draw(task)
    assert batch.inputs.shape[:2] == batch.taught.shape == batch.judged.shape == (40, task.length)
    assert bool(batch.judged.any(1).all()) and bool((batch.taught | ~batch.judged).all())
    if task.tokens:
        assert 0 <= int(batch.inputs.min()) <= int(batch.inputs.max()) < task.inputs
        assert 0 <= int(batch.targets.min()) <= int(batch.targets.max()) < task.outputs
    else:
        assert batch.inputs.shape[2] == task.inputs and batch.targets.shape[2] == task.outputs


@pytest.mark.parametrize("name", ["recall", "passkey", "listops"])
def test_the_token_where_an_answer_is_asked_for_does_not_tell_it(name):
    task = SMALL[name]()
    batch = draw(task, 3000)
    asked, wanted = batch.inputs[batch.judged], batch.targets[batch.judged]
    counts = torch.zeros(task.inputs, task.outputs)
    counts.index_put_((asked, wanted), torch.ones(len(asked)), accumulate=True)
    best = float(counts.amax(1).sum() / len(asked))
    assert best < 2 * max(task.chance, float(wanted.bincount().max() / len(wanted)))


def test_later_tokens_are_no_part_of_an_answer_in_regression_and_text():
    batch = draw(SMALL["regression"]())
    # the pair of a token comes in with the next one
    assert torch.equal(batch.inputs[:, 1:, 4:6], batch.targets[:, :-1])
    assert torch.equal(batch.inputs[:, 1:, :4], batch.inputs[:, :-1, 6:])
    batch = draw(SMALL["bytes"]())
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_held_out_text_is_other_text():
    made = Text(torch.full((100,), 1), torch.full((100,), 2), "two letters")
    task = text.task(8, text=made)
    assert set(draw(task).inputs.flatten().tolist()) == {1}
    assert set(draw(task, held_out=True).inputs.flatten().tolist()) == {2}
    assert task.chance == 0.0
    real = text.standard_library()
    assert len(real.held_out) > 50_000 and len(real.taught) > 4 * len(real.held_out)
    assert "sha256" in real.source and "/" not in real.source


def test_scores_have_their_units():
    task = SMALL["bytes"]()
    batch = draw(task)
    assert task.score(torch.zeros(40, 24, 256), batch) == pytest.approx(8.0)
    assert float(task.loss(torch.zeros(40, 24, 256), batch)) == pytest.approx(math.log(256))
    assert not task.higher and SMALL["recall"]().higher and SMALL["regression"]().regression


def test_permutations_form_a_group():
    for objects in (2, 3, 4):
        products = states.table(objects)
        identity = torch.arange(len(products))
        assert products[0].equal(identity) and products[:, 0].equal(identity)
        for row in products:
            assert row.sort().values.equal(identity)
        a, b, c = torch.randint(len(products), (3, 50), generator=torch.Generator().manual_seed(objects))
        assert products[products[a, b], c].equal(products[a, products[b, c]])
    assert not states.table(3).equal(states.table(3).mT)


def test_lists_fit_nest_and_have_every_operator():
    batch = draw(listops.task(48), 400)
    lengths = (batch.inputs != listops.PAD).sum(1)
    assert int(lengths.max()) <= 48 and int(lengths.min()) < 12
    opened = (batch.inputs >= 10) & (batch.inputs < listops.CLOSE)
    depth = (opened.int() - (batch.inputs == listops.CLOSE).int()).cumsum(1)
    assert int(depth.max()) == 3 and bool((depth[:, -1] == 0).all())
    assert batch.inputs[opened].bincount(minlength=14)[10:].min() > 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recall.task(9, 9, 8), "pairs: expected at most symbols=8"),
        (lambda: recall.task(4, 6, 8), "queries: expected a multiple"),
        (lambda: passkey.task(6, 3), "length: expected at least 8"),
        (lambda: states.task(6), "objects: expected 2 to 5"),
        (lambda: regression.task(10, 3), "segments: expected a divisor"),
        (lambda: listops.task(3), "length: expected at least 6"),
        (lambda: text.task(8, text=Text(torch.zeros(5), torch.zeros(5), "")), "no window of 9 bytes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_task_has_a_name_and_one_line():
    assert list(TASKS) == list(SMALL)
    for name, make in SMALL.items():
        task = make()
        assert task.name == name and task.description and "\n" not in task.description
