"""A layout shows exactly what its mask shows, stores it once, and refuses what makes no sense."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.mask import (
    Block,
    BlockMap,
    Causal,
    Dense,
    Document,
    Leaf,
    Neighborhood,
    PerBatch,
    PerHead,
    Periodic,
    Predicate,
    Prefix,
    Rectangles,
    Sink,
    TileLayout,
    Window,
)
from manyheads.mask import evaluate as evaluation
from manyheads.mask.build import build
from tests.mask.layout_cases import odd_product, random_call, random_mask

SEEDS = st.integers(0, 1 << 40)


@given(SEEDS)
def test_layout_shows_what_the_mask_shows(seed):
    call = random_call(seed)
    layout, want = call.layout(), call.dense()
    assert torch.equal(layout.dense().expand_as(want), want)
    assert layout.pairs == int(layout.dense().sum()) * (layout.batch * layout.heads // layout.index.numel())


@given(SEEDS)
def test_no_visited_tile_is_empty_and_no_bitmap_is_full_or_double_or_unused(seed):
    call = random_call(seed)
    layout = call.layout()
    (bm, bn), dense = layout.tile, layout.dense()
    for place, s in np.ndenumerate(layout.index.numpy()):
        plane = dense[place]
        for i, row in enumerate(layout.spans(int(s))):
            for first, count, mask_id in row:
                for j in range(first, first + count):
                    tile = plane[i * bm : (i + 1) * bm, j * bn : (j + 1) * bn]
                    assert tile.any() and bool(tile.all()) == (mask_id == 0)
                    assert not mask_id or torch.equal(layout.tile_mask(mask_id)[: tile.shape[0], : tile.shape[1]], tile)
    assert len({tile.tobytes() for tile in layout.bits.numpy()}) == len(layout.bits)
    assert set(layout.mask_id.tolist()) - {0} == set(range(1, len(layout.bits) + 1))


@given(SEEDS)
def test_runs_are_sorted_disjoint_and_merged(seed):
    layout = random_call(seed).layout()
    for form in (layout, layout.transpose()):
        for s in range(form.sets):
            for row in form.spans(s):
                for (first, count, mask_id), (then, _, other) in zip(row[:-1], row[1:], strict=True):
                    assert first + count < then or (first + count == then and mask_id != other)


@given(SEEDS)
def test_keys_change_only_how_many_tiles_are_evaluated(seed):
    call = random_call(seed)
    with_keys, without = call.layout(keyed=True), call.layout(keyed=False)
    assert torch.equal(with_keys.dense(), without.dense())
    assert len(with_keys.bits) == len(without.bits)
    assert torch.equal(with_keys.first, without.first)


@settings(max_examples=10)
@given(SEEDS)
def test_many_partial_tiles_are_looked_at_in_pieces_exactly(seed):
    r = random.Random(seed)
    n = r.randint(1000, 1500)
    mask = random_mask(r, n)
    for tile in ((64, 64), (16, 128), (24, 72)):
        layout = build(mask, n, n, tile=tile, cache=False, keyed=False)
        assert torch.equal(layout.dense(), mask.dense(n))


class Product(Leaf):
    """A rule with keys that reads places, not distances."""

    __slots__ = ()
    relative = False

    def __init__(self):
        self._finish((1, 1), ())

    def _write(self, name):
        return "product"

    def _allows(self, q, k):
        return q["position"] * k["position"] % 5 == 1

    def _classify(self, q, k):
        return np.True_, np.False_


@pytest.mark.parametrize(
    "mask",
    [
        Product(),
        Causal() & Product() | Sink(9),
        Periodic(3, of="key"),
        Periodic(5, 2, of="query"),
        Prefix(3, lens=[7, 12, 4, 22]),
        Prefix(11, side="query") | Sink(13),
        Block(Periodic(2, of="key"), 3),
        Rectangles([[0, 10], [20, 33]], [[0, 10], [20, 30]], [0, 1]),
    ],
)
def test_masks_of_places_are_not_told_by_distance(mask):
    for tile in ((8, 8), (4, 16), (16, 4)):
        assert torch.equal(build(mask, 45, 45, tile=tile, cache=False).dense(), mask.dense(45))


def test_rules_from_elsewhere_compute_in_int64():
    pos = torch.arange(100_000, 100_040)
    for mask in (Product(), Predicate(odd_product), Product() & Causal()):
        layout = build(mask, 40, 40, tile=(8, 8), positions=(pos, pos), cache=False)
        assert torch.equal(layout.dense(), mask.dense(40, positions=(pos, pos)))


def test_a_mask_of_key_places_is_looked_at_once_per_key_tile():
    n = 1 << 16
    layout = build(Causal() & Periodic(3, of="key"), n, n, cache=False)
    assert layout.pairs == sum(n - j for j in range(0, n, 3))
    assert len(layout.bits) == 6


def test_equal_hashes_of_different_tiles_do_no_harm(monkeypatch):
    calls = [random_call(seed) for seed in range(40)]
    monkeypatch.setattr(evaluation, "mixed", lambda words: words & np.zeros(1, words.dtype))
    for call in calls:
        want = call.dense()
        assert torch.equal(call.layout().dense().expand_as(want), want)


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(
    ("mask", "unique"),
    [
        (Causal() & Window(4096), 2),
        (Causal(), 1),
        (Causal() & (Window(4096) | Sink(4)), 4),
        (Causal() & (Window(1024) | Periodic(256)), 4),
    ],
)
def test_long_masks_have_few_unique_tiles_and_exact_counts(mask, unique, keyed):
    n = 16384
    layout = build(mask, n, n, tile=(128, 128), cache=False, keyed=keyed)
    assert len(layout.bits) <= unique
    rows = mask.dense(128, n)[0, 0]
    assert rows.any(0).reshape(-1, 128).any(1).sum() == sum(c for _, c, _ in layout.spans(0)[-1])
    assert layout.transpose().pairs == layout.pairs


def test_counts_of_a_million_tokens_are_exact():
    n, w = 1 << 20, 4096
    window, causal = (build(m, n, n, cache=False) for m in (Causal() & Window(w), Causal()))
    assert window.pairs == n * w - w * (w - 1) // 2
    assert causal.pairs == n * (n + 1) // 2
    assert causal.visited == 8192 * 8193 // 2
    assert len(causal.transpose().first) == len(causal.first) == 2 * 8192 - 1
    assert causal.area == causal.pairs / n**2
    assert causal.tile_speedup == 1 / causal.density < causal.ideal_speedup == 1 / causal.area


def test_heads_and_batches_with_equal_masks_share_a_row_set():
    mask = PerHead([Causal(), Window(3), Causal()]) & PerBatch([Causal(), Document([5, 8])])
    layout = build(mask, 13, 13, tile=(4, 4), cache=False)
    assert layout.index.tolist() == [[0, 1, 0], [2, 3, 2]]
    assert torch.equal(layout.dense(), mask.dense(13))


def test_pairs_count_every_batch_entry_and_head():
    layout = build(Causal(), 10, 10, tile=(4, 4), batch=3, heads=5, cache=False)
    assert layout.index.shape == (1, 1)
    assert layout.pairs == 15 * 55
    assert (layout.density, layout.area) == (6 / 9, 0.55)


def test_equal_rows_of_padding_and_positions_are_built_once():
    real = torch.ones(4, 20, dtype=torch.bool)
    real[1, 15:] = real[3, 15:] = False
    pos = torch.arange(20).expand(4, 20)
    layout = build(Causal(), 20, 20, tile=(8, 8), key_padding=real, positions=(pos, pos), cache=False)
    assert layout.index.reshape(-1).tolist() == [0, 1, 0, 1]
    assert layout.q_pos is None and layout.k_pos is None


def test_negation_never_reveals_padding():
    real = torch.arange(20)[None] < torch.tensor([[20], [11]])
    layout = build(~Causal(), 20, 20, tile=(8, 8), key_padding=real, cache=False)
    assert not layout.dense()[1, :, :, 11:].any()
    assert layout.dense()[1, 0, 0, 1:11].all()


def test_a_wholly_padded_batch_entry_is_empty():
    layout = build(Causal(), 9, 9, tile=(4, 4), key_padding=torch.zeros(1, 9, dtype=torch.bool), cache=False)
    assert (layout.pairs, layout.visited, layout.area) == (0, 0, 0.0)
    assert layout.ideal_speedup == layout.tile_speedup == float("inf")


@pytest.mark.parametrize(("nq", "nk"), [(0, 5), (5, 0), (0, 0)])
def test_no_tokens_make_an_empty_layout(nq, nk):
    layout = build(Window(3), nq, nk, tile=(4, 4), cache=False)
    assert layout.dense().shape == (1, 1, nq, nk)
    assert layout.transpose().pairs == layout.pairs == 0


def test_document_positions_of_unequal_sides_are_carried():
    mask = Causal() & Document([3, 2], [4, 3])
    layout = build(mask, 5, 7, tile=(2, 2), cache=False)
    assert layout.q_pos.tolist() == [1, 2, 3, 5, 6]
    assert layout.k_pos is None
    assert torch.equal(layout.dense(), mask.dense(5, 7))


def test_one_query_per_tile():
    mask = Neighborhood((6, 7), (3, 3))
    layout = build(mask, 42, 42, tile=(1, 8), cache=False)
    assert torch.equal(layout.dense(), mask.dense(42))


def test_blocks_of_any_size_become_bitmaps_at_their_edges():
    q_sizes, k_sizes = [5, 1, 10, 3], [7, 2, 9]
    bits = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    layout = TileLayout.from_blocks(bits, q_sizes=q_sizes, k_sizes=k_sizes, tile=(4, 4))
    want = bits.repeat_interleave(torch.tensor(q_sizes), 0).repeat_interleave(torch.tensor(k_sizes), 1)
    assert torch.equal(layout.dense()[0, 0], want)


def test_a_large_block_map_is_looked_at_block_by_block():
    bits = torch.rand(1500, 1500, generator=torch.Generator().manual_seed(3)) < 0.05
    layout = build(Causal() & BlockMap(bits, block=24), 36000, 36000, tile=(48, 48), cache=False)
    assert layout.cost_note is None
    assert layout.pairs == int(bits.tril(-1).sum()) * 24 * 24 + int(bits.diagonal().sum()) * 24 * 25 // 2


def test_cost_note_names_masks_without_structure():
    assert build(Causal(), 4096, 4096, cache=False).cost_note is None
    note = build(Predicate(odd_product), 2048, 2048, tile=(64, 64), cache=False).cost_note
    assert note is not None and "1024 of 1024" in note


@pytest.mark.parametrize("mask", [Predicate(odd_product), Causal() & Predicate(odd_product)])
def test_absurd_sizes_are_refused_with_advice(mask):
    n = 1 << 19
    with pytest.raises(ValueError, match="no coarse structure.*Order the tokens"):
        build(mask, n, n, tile=(256, 256), cache=False)


def test_scrambled_positions_are_refused_when_absurd():
    pos = torch.randperm(1 << 19, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="no coarse structure"):
        build(Causal() & Window(64), len(pos), len(pos), tile=(512, 512), positions=(pos, pos), cache=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": (0, 4)}, "tile: expected two positive ints"),
        ({"tile": (4,)}, "tile: expected two positive ints"),
        ({"tile": 4}, "tile: expected two positive ints"),
        ({"key_padding": torch.ones(2, 9)}, "key_padding: expected bool"),
        ({"key_padding": torch.ones(2, 8, dtype=torch.bool)}, "key_padding: expected bool"),
        ({"key_padding": torch.ones(2, 9, dtype=torch.bool), "batch": 3}, "key_padding: expected batch size"),
        ({"positions": (torch.arange(8), None)}, "q_pos"),
        ({"mask": PerHead([Causal(), Window(2)]), "heads": 4}, "mask: expected 1 or 4 heads"),
        ({"mask": Dense(np.eye(8, dtype=bool))}, "dense"),
        ({"nq": -1}, "nq: expected"),
        ({"mask": "causal"}, "mask: expected a Mask"),
    ],
)
def test_errors_name_the_argument(changes, message):
    call = {"mask": Causal(), "nq": 9, "nk": 9, "tile": (4, 4), "cache": False, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        build(call.pop("mask"), call.pop("nq"), call.pop("nk"), **call)


def test_unknown_tile_ids_and_huge_dense_forms_are_refused():
    layout = build(Causal(), 1 << 18, 1 << 18, cache=False)
    with pytest.raises(ValueError, match="id: expected 0 to 1, got 2"):
        layout.tile_mask(2)
    with pytest.raises(ValueError, match="dense: .* would not fit"):
        layout.dense()
