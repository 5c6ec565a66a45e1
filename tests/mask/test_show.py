"""Drawings of masks, and the warning about later keys."""

from __future__ import annotations

import builtins

import pytest
import torch
from hypothesis import given

from manyheads.mask import (
    Block,
    Causal,
    Dense,
    Document,
    Full,
    Neighborhood,
    PerHead,
    Predicate,
    Prefix,
    Sink,
    Window,
    later_key,
    show,
)
from manyheads.mask.show import later_warning
from tests.mask import cases


def cells(text):
    """The cells of a drawing."""
    return [line.split(" ") for line in text.splitlines()[2:] if line[:1] in "·░▒▓█"]


@given(cases.sized_masks())
def test_a_small_drawing_is_the_mask(case):
    n, mask, _ = case
    text = mask.show(n)
    assert [[c == "█" for c in row] for row in cells(text)] == mask.dense(n)[0, 0].tolist()
    assert f"{mask.dense(n).float().mean():.1%} visible" in text


def test_a_cell_may_stand_for_many_pairs():
    text = Causal().show(256, size=8)
    assert "cells of 32 x 32" in text and "50.2% visible" in text and "about" not in text
    assert [row.count("█") for row in cells(text)] == list(range(8))
    assert all(row[r] == "▒" for r, row in enumerate(cells(text)))


def test_a_million_tokens_are_drawn():
    mask = Causal() & (Window(100_000) | Sink(4)) & Document([400_000, 600_000])
    rows = cells(show(mask, 10**6, size=20))
    assert rows[8][7] == "·" and rows[9][8] != "·" and rows[7][6] == "█" and rows[0][19] == "·"


def test_tiles_and_lengths_may_differ():
    rows = cells(Full().show(10, 30, tile=(5, 8)))
    assert len(rows) == 2 and len(rows[0]) == 4
    assert Causal().show(0).endswith("0.0% visible")


def test_one_head_is_drawn_at_a_time():
    mask = PerHead([Causal(), Full()])
    assert "head 1 of (1, 2)" in mask.show(3, head=1) and cells(mask.show(3, head=1))[0] == ["█"] * 3
    with pytest.raises(ValueError, match="batch, head"):
        mask.show(3, head=2)


def test_a_picture_is_saved(tmp_path):
    pytest.importorskip("matplotlib")
    for n in (9, 5000):
        path = tmp_path / f"{n}.png"
        Neighborhood(n, 5).show(n, png=path)
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"manyheads\[bench\]"):
        Causal().show(3, png=tmp_path / "x.png")


@given(cases.sized_masks())
def test_a_later_key_is_found_when_there_is_one(case):
    n, mask, _ = case
    later = mask.dense(n)[0, 0].triu(1)
    found = later_key(mask, n)
    assert (found is None) == (not later.any())
    assert found is None or later[found]


LATER = [
    (Causal() | Prefix(5), 100_000),
    (Causal() & Window(9) | Document([50_000, 50_000]), 100_000),
    (~Causal(), 1000),
    (Causal() | Block(Causal(), 64), 100_000),
    (PerHead([Causal(), Window(2)]), 1000),
]


@pytest.mark.parametrize(("mask", "n"), LATER, ids=lambda x: None)
def test_a_causal_mask_that_sees_later_keys_is_warned_of(mask, n):
    i, j = later_key(mask, n)
    assert j > i and "later key" in later_warning(mask, n, n) and "warning: contains causal" in mask.show(n)


NEVER = [
    (Causal() & Window(512) & Document([600_000, 400_000]), 10**6),
    (Causal() & Predicate(cases.odd), 10**6),
    (Causal() | Window(left=9, right=1), 10**6),
    (Causal() & Full() | Causal() & Sink(3), 10**5),
    (PerHead([Causal(), Causal() & Sink(2)]), 10**5),
    (Neighborhood(1000, 9, causal=True) | Causal(), 1000),
    (Causal() | Dense(torch.ones(300, 300).tril() > 0), 300),
]


@pytest.mark.parametrize(("mask", "n"), NEVER, ids=lambda x: None)
def test_a_causal_mask_that_does_not_is_left_alone(mask, n):
    assert later_warning(mask, n, n) is None


def test_positions_count_not_places():
    backwards = torch.arange(9).flip(0)
    assert later_key(Causal(), 9, positions=(backwards, backwards)) is None
    assert later_key(Full(), 1, positions=([3], [3])) is None
    assert later_key(Full(), 1, positions=([3], [4])) == (3, 4)


def test_without_causal_nothing_is_said():
    assert later_warning(Full(), 9, 9) is None and "warning" not in Full().show(9)
