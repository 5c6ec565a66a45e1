"""The task on an image grid: the rule, the models, and what a neighbourhood gains on it."""

from __future__ import annotations

import pytest
import torch

from manyheads.bench.tasks.grid import LAYOUTS, SEEDS, GridModel, GridProtocol, task, train


def test_the_rule_is_that_of_the_game():
    batch = task(9, 2).draw(3, torch.Generator().manual_seed(4), False)
    for cells, wanted in zip(batch.inputs.view(3, 9, 9).tolist(), batch.targets.view(3, 9, 9).tolist(), strict=True):
        for _ in range(2):
            cells = [[lives(cells, x, y) for y in range(9)] for x in range(9)]
        assert cells == wanted


def lives(cells, x, y):
    """Whether a cell lives in the next generation, counted by hand."""
    near = [cells[a][b] for a in range(x - 1, x + 2) for b in range(y - 1, y + 2) if 0 <= a < 9 and 0 <= b < 9]
    around = sum(near) - cells[x][y]
    return int(around == 3 or (around == 2 and cells[x][y] == 1))


def test_chance_is_the_share_of_the_frequent_answer():
    asked = task(10)
    targets = asked.draw(200, torch.Generator().manual_seed(0), True).targets.double().mean()
    assert asked.chance == pytest.approx(float(max(targets, 1 - targets)), abs=0.01) and asked.chance < 0.75


@pytest.mark.parametrize("layout", ["neighborhood", "blocks", "global"])
def test_a_cell_sees_what_the_layout_says(layout):
    torch.manual_seed(0)
    model = GridModel(9, layout, GridProtocol(depth=1))
    cells = torch.zeros(1, 81, dtype=torch.long)
    other = cells.clone()
    other[0, 4 * 9 + 4] = 1
    changed = (model(cells) != model(other)).any(-1).view(9, 9)
    square = torch.zeros(9, 9, dtype=torch.bool)
    square[3:6, 3:6] = True  # neighbours of the middle, and its block of three
    assert torch.equal(changed, torch.ones_like(square) if layout == "global" else square)
    corner = cells.clone()
    corner[0, 3 * 9 + 3] = 1
    changed = (model(cells) != model(corner)).any(-1).view(9, 9)
    assert bool(changed[2, 2]) is (layout != "blocks")


def test_an_unknown_layout_and_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="unknown layout 'neighbourhood': did you mean 'neighborhood'"):
        train("neighbourhood", seed=0)
    with pytest.raises(ValueError, match="side, generations"):
        task(2)


def test_training_repeats_and_helps():
    small = GridProtocol(steps=40, judged=16, width=16, heads=2, depth=1)
    first, second = (train("neighborhood", small, seed=1, side=6) for _ in range(2))
    assert first.score == second.score and first.curve == second.curve
    assert first.curve[-1] < first.curve[0]
    assert train("untrained", small, seed=1, side=6).curve == ()


@pytest.mark.slow
def test_neighbours_learn_the_rule_and_blocks_of_as_many_cells_do_not():
    scores = {layout: [train(layout, seed=seed).score for seed in SEEDS] for layout in LAYOUTS}
    wrong = {layout: 1 - sum(found) / len(found) for layout, found in scores.items()}
    assert 2 * wrong["neighborhood"] <= min(wrong["blocks"], wrong["untrained"]), scores
    assert min(scores["neighborhood"]) > max(scores["blocks"]) + 0.1, scores
