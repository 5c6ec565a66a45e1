"""The layout cache finds equal calls, tells different ones apart, and stays within its bytes."""

from __future__ import annotations

import pytest
import torch

from manyheads.mask import Causal, Document, Window
from manyheads.mask.build import build, layouts
from manyheads.mask.cache import ByteCache


def test_equal_calls_share_one_layout():
    a = build(Causal() & Document([3, 6]), 9, 9, tile=(4, 4))
    assert build(Causal() & Document(torch.tensor([3, 6])), 9, 9, tile=(4, 4)) is a
    assert (Causal() & Document([3, 6])).tiles(9, tile=(4, 4)) is a


@pytest.mark.parametrize(
    "changes",
    [
        {"tile": (4, 8)},
        {"batch": 2},
        {"heads": 2},
        {"positions": (torch.arange(9), torch.arange(9))},
        {"positions": (None, torch.arange(9))},
        {"key_padding": torch.arange(9) < 5},
        {"cache": False},
    ],
)
def test_different_calls_do_not(changes):
    call = {"tile": (4, 4)}
    assert build(Causal(), 9, 9, **call) is not build(Causal(), 9, 9, **{**call, **changes})


def test_positions_changed_in_place_are_seen():
    pos = torch.arange(9)
    before = build(Causal(), 9, 9, tile=(4, 4), positions=(pos, pos)).pairs
    q_pos = pos.clone()
    q_pos[0] = 8
    assert build(Causal(), 9, 9, tile=(4, 4), positions=(q_pos, pos)).pairs == before + 8


class Blob:
    """A value of some bytes."""

    def __init__(self, size):
        self.held_bytes = size


def test_the_value_used_longest_ago_goes_first():
    cache = ByteCache(100)
    kept = cache.get("a", lambda: Blob(40))
    cache.get("b", lambda: Blob(40))
    assert cache.get("a", lambda: Blob(40)) is kept
    cache.get("c", lambda: Blob(40))
    assert cache.nbytes == 80
    assert cache.get("a", lambda: Blob(40)) is kept


def test_a_value_larger_than_the_cache_is_not_kept():
    cache = ByteCache(100)
    small = cache.get("a", lambda: Blob(10))
    assert cache.get("b", lambda: Blob(101)) is not cache.get("b", lambda: Blob(101))
    assert cache.get("a", lambda: Blob(10)) is small


def test_layouts_with_their_transposes_stay_within_the_limit(monkeypatch):
    monkeypatch.setattr(layouts, "limit", 200_000)
    for w in range(1, 60):
        layout = build(Causal() & Window(w), 4096, 4096, tile=(64, 64))
        layout.transpose()
        held = sum(x.nbytes + x.transpose().nbytes for x in layouts._held.values())
        assert held <= 200_000
    assert 0 < len(layouts) < 59
