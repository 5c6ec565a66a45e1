"""Other forms of a layout: transposed, retiled, restricted, chosen ids, text and tensors, pickles."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.engine.tiled import tiled
from manyheads.mask import Causal, Document, PerHead, Periodic, Prefix, TileLayout, Window
from manyheads.mask.build import build
from tests.mask.layout_cases import random_call, random_mask

SEEDS = st.integers(0, 1 << 40)
SIZES = st.sampled_from([1, 2, 5, 8, 16, 24, 48, 64, 128])


@given(SEEDS)
def test_transpose_is_the_transpose(seed):
    layout = random_call(seed).layout()
    turned = layout.transpose()
    assert torch.equal(turned.dense(), layout.dense().mT)
    assert (turned.pairs, turned.visited, turned.tile) == (layout.pairs, layout.visited, layout.tile[::-1])
    assert [p.tolist() for p in turned.positions] == [p.tolist() for p in layout.positions[::-1]]


def test_transpose_writes_out_positions_of_unequal_sides():
    turned = Causal().tiles(5, 9, tile=(4, 4)).transpose()
    assert turned.q_pos.tolist() == list(range(9))
    assert turned.k_pos.tolist() == [4, 5, 6, 7, 8]
    assert Causal().tiles(9, tile=(4, 4)).transpose().q_pos is None


def test_transpose_is_kept_and_leads_back():
    layout = Causal().tiles(100, tile=(16, 8))
    assert layout.transpose() is layout.transpose()
    assert layout.transpose().transpose() is layout


def test_transpose_touches_only_changes():
    layout = (Causal() & Window(512)).tiles(1 << 16, tile=(64, 64))
    assert len(layout.transpose().first) == len(layout.first)
    assert len(layout.transpose().bits) == len(layout.bits) == 2


@given(SEEDS, SIZES, SIZES)
def test_retile_equals_building_with_that_tile(seed, bm, bn):
    call = random_call(seed)
    layout = call.layout()
    other, built = layout.retile((bm, bn)), call.layout(tile=(bm, bn))
    assert other.tile == (bm, bn)
    assert torch.equal(other.dense(), layout.dense())
    assert (other.visited, len(other.bits), len(other.first)) == (built.visited, len(built.bits), len(built.first))


def test_retile_cuts_rows_that_are_full_only_in_part_at_a_ragged_edge():
    mask = Prefix(8, side="query")
    layout = mask.tiles(16, 28, tile=(8, 8), positions=(torch.arange(16), torch.arange(28)))
    coarse = layout.retile((16, 16))
    assert torch.equal(coarse.dense(), layout.dense())
    assert coarse.bits.sum(1).tolist() == [[255 * 8, 255 * 8], [255 * 8, 15 * 8]]


def test_retile_of_a_long_layout_stays_small():
    layout = (Causal() & Window(4096)).tiles(1 << 18)
    coarse, fine = layout.retile((256, 512)), layout.retile((64, 64))
    assert coarse.pairs == fine.pairs == layout.pairs
    assert len(fine.bits) == 2 and len(coarse.bits) <= 8


def test_retile_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="tile: expected two positive ints"):
        Causal().tiles(8).retile((0, 1))
    layout = (Causal() & Periodic(3)).tiles(1 << 16)
    with pytest.raises(ValueError, match="use larger tiles"):
        layout.retile((1, 1))


@given(SEEDS)
def test_and_with_a_mask_keeps_what_both_show(seed):
    call = random_call(seed)
    layout = call.layout()
    most = call.nq if call.positions is None else int(max(p.max() for p in call.positions)) + 1
    other = random_mask(random.Random(seed + 1), most)
    if "document" in other.text or call.positions is None or "block_map" not in other.text:
        both = layout & other
        want = layout.dense() & other.dense(call.nq, call.nk, positions=call.positions)
        assert torch.equal(both.dense().expand_as(want), want)
        assert set(both.mask_id.tolist()) - {0} == set(range(1, len(both.bits) + 1))


def chosen(seed, nq, nk, tile, batch=2, heads=3):
    """Random ids, counts, and what they show."""
    g = torch.Generator().manual_seed(seed)
    tq, tk = -(-nq // tile[0]), -(-nk // tile[1])
    ids = torch.rand(batch, heads, tq, tk, generator=g).argsort(-1)[..., : max(1, tk // 2)]
    counts = torch.randint(0, ids.shape[-1] + 1, (batch, heads, tq), generator=g)
    shown = torch.zeros(batch, heads, tq, tk + 1, dtype=torch.bool)
    keep = torch.arange(ids.shape[-1]) < counts[..., None]
    shown.scatter_(-1, torch.where(keep, ids, tk), True)
    plane = shown[..., :tk].repeat_interleave(tile[0], 2).repeat_interleave(tile[1], 3)
    return ids, counts, plane[:, :, :nq, :nk]


@pytest.mark.parametrize(("nq", "nk", "tile"), [(37, 37, (8, 8)), (5, 61, (1, 16)), (64, 40, (16, 12))])
def test_chosen_ids_round_trip(nq, nk, tile):
    ids, counts, want = chosen(1, nq, nk, tile)
    layout = TileLayout.from_ids(ids, counts, nq=nq, nk=nk, tile=tile)
    assert torch.equal(layout.dense(), want)
    assert layout.pairs == int(want.sum())
    assert torch.equal(layout.to_runs().dense(), want) and layout.to_runs().ids is None
    assert torch.equal(layout.transpose().dense(), want.mT)
    assert torch.equal(layout.retile((4, 24)).dense(), want)
    assert torch.equal(layout.ids_count, counts.to(torch.int32))
    assert layout.spans(4) == layout.to_runs().spans(4)


@given(SEEDS)
def test_ids_and_masks_are_exact_and_stay_padded(seed):
    r = random.Random(seed)
    n, tile = r.randint(1, 60), (r.choice([1, 4, 8]), r.choice([4, 8, 16]))
    ids, counts, want = chosen(seed, n, n, tile)
    first, second = random_mask(r, n), PerHead([random_mask(r, n) for _ in range(3)])
    layout = TileLayout.from_ids(ids, counts, nq=n, nk=n, tile=tile, mask=first)
    assert torch.equal(layout.dense(), want & first.dense(n))
    both = layout & second
    want = want & first.dense(n) & second.dense(n)
    assert torch.equal(both.dense(), want) and both.pairs == int(want.sum())
    assert both.ids.shape == ids.shape
    slot = torch.arange(ids.shape[-1])
    assert torch.equal(both.ids >= 0, slot < both.ids_count[..., None])


def test_ids_take_negative_padding_anywhere_and_one_tile_size():
    ids = torch.tensor([[[[-1, 2, -5, 0], [1, -1, -1, -1]]]])
    layout = TileLayout.from_ids(ids, nq=5, nk=10, tile=4)
    assert layout.ids.tolist() == [[[[2, 0, -1, -1], [1, -1, -1, -1]]]]
    assert layout.ids_count.tolist() == [[[2, 1]]]


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        (torch.zeros(1, 1, 2, 3), None, "ids: expected integers"),
        (torch.zeros(1, 1, 3, 3, dtype=torch.long), None, r"ids: expected integers \(B, H, 2, kmax\)"),
        (torch.tensor([[[[3], [0]]]]), None, "ids: expected key tiles 0 to 2, got 3"),
        (torch.tensor([[[[1, 0, 1], [0, 1, 2]]]]), None, "ids: a key tile is chosen twice"),
        (torch.tensor([[[[1], [0]]]]), torch.ones(2, dtype=torch.long), "counts: expected shape"),
    ],
)
def test_ids_are_checked(ids, counts, message):
    with pytest.raises(ValueError, match=message):
        TileLayout.from_ids(ids, counts, nq=8, nk=12, tile=4)


@given(SEEDS)
def test_text_and_tensors_round_trip(seed):
    call = random_call(seed)
    for layout in (call.layout(), TileLayout.from_ids(*chosen(seed, 20, 20, (4, 4))[:2], nq=20, nk=20, tile=4)):
        text, data = layout.flatten()
        copied = TileLayout.unflatten(text, [t.clone() for t in data])
        assert torch.equal(copied.dense(), layout.dense())
        assert (copied.pairs, copied.nbytes, copied.tile) == (layout.pairs, layout.nbytes, layout.tile)
        assert TileLayout.unflatten(text, data) is layout


def test_flat_text_holds_no_sizes_and_old_memory_is_not_mistaken():
    texts = {Causal().tiles(n, tile=(16, 16)).flatten()[0] for n in (33, 100, 1000)}
    assert len(texts) == 1
    layout = Causal().tiles(33, tile=(16, 16))
    text, data = layout.flatten()
    other = [t[None].squeeze(0) if t.dim() < 2 else t.flatten() for t in data]
    assert TileLayout.unflatten(text, other) is not layout
    for n in range(20, 60):
        layout = build(Causal() & Window(n), n, n, tile=(16, 16), cache=False)
        text, data = layout.flatten()
        want = layout.pairs
        del layout
        assert TileLayout.unflatten(text, data).pairs == want


def test_unflatten_refuses_what_flatten_did_not_make():
    text, data = Causal().tiles(8).flatten()
    with pytest.raises(ValueError, match="text: expected"):
        TileLayout.unflatten("causal", data)
    with pytest.raises(ValueError, match="text: expected"):
        TileLayout.unflatten(text, data[:-1])


def test_pickles_and_copies_show_the_same():
    layout = (Causal() & Document([40, 60])).tiles(100, tile=(16, 16))
    layout.transpose(), layout.spans(0), layout.pairs, layout.flatten()
    for twin in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), layout.to("cpu")):
        assert torch.equal(twin.dense(), layout.dense())
        assert torch.equal(twin.transpose().dense(), layout.dense().mT)


def test_shared_ids_spread_over_heads_when_a_mask_differs():
    ids = torch.tensor([[[[0, 1], [1, 2], [0, 2]]]])
    shared = TileLayout.from_ids(ids, nq=12, nk=12, tile=4, batch=2, heads=3)
    assert shared.pairs == 6 * 6 * 16
    mask = PerHead([Causal(), Window(2), Window(5)])
    both = shared & mask
    assert torch.equal(both.dense(), shared.dense() & mask.dense(12))
    assert both.pairs == 2 * int(both.dense().sum())
    with pytest.raises(ValueError, match="heads: expected 3 as in ids, or a multiple, got 4"):
        TileLayout.from_ids(ids.expand(1, 3, -1, -1), nq=12, nk=12, tile=4, heads=4)


def test_ids_of_key_heads_serve_their_query_heads():
    ids = torch.rand(2, 2, 3, 3).argsort(-1)[..., :2]
    shared = TileLayout.from_ids(ids, nq=12, nk=12, tile=4, heads=6, mask=Causal())
    each = TileLayout.from_ids(ids.repeat_interleave(3, 1), nq=12, nk=12, tile=4, mask=Causal())
    assert torch.equal(shared.dense(), each.dense()) and shared.sets == 4 and shared.ids.shape[1] == 2
    assert (shared.pairs, shared.visited, shared.heads) == (each.pairs, each.visited, 6)
    assert torch.equal(shared.transpose().dense(), shared.dense().mT)
    per_head = PerHead([Causal(), Window(2), Window(5), Causal(), Window(3), Window(4)])
    assert torch.equal((shared & per_head).dense(), each.dense() & per_head.dense(12))


def test_many_bitmaps_on_both_sides_are_combined_only_where_they_meet():
    n = 600
    first, second = (Document([size] * (n // size)) & Periodic(7) for size in (5, 6))
    ids = torch.arange(75).expand(1, 1, 75, 75)
    layout = TileLayout.from_ids(ids, nq=n, nk=n, tile=8, mask=first | Periodic(11)) & (second | Causal())
    want = (first | Periodic(11)).dense(n) & (second | Causal()).dense(n)
    assert torch.equal(layout.dense(), want)


def test_repr_is_one_line_of_sizes():
    layout = Causal().tiles(256, tile=(64, 64))
    assert repr(layout) == "TileLayout(256 x 256 in tiles of 64 x 64, 1 row sets, 7 runs, 1 bitmaps)"


def test_chosen_ids_compile_to_one_graph():
    def blocks(q, k, v, ids):
        layout = TileLayout.from_ids(ids, nq=q.shape[2], nk=k.shape[2], tile=(4, 8), mask=Causal(), heads=q.shape[1])
        return tiled(q, k, v, layout)

    ids = torch.rand(2, 2, 10, 5).argsort(-1)[..., :3]
    q, k, v = (torch.randn(2, heads, 40, 8, requires_grad=True) for heads in (4, 2, 2))
    graph = torch.compile(blocks, fullgraph=True, backend="aot_eager")
    want, got = (fn(q, k, v, ids) for fn in (blocks, graph))
    assert torch.equal(want, got)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (want, got)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="chosen twice"):
        graph(q, k, v, ids.clamp(max=0))


def test_padded_keys_are_hidden_from_layouts_of_either_storage():
    ids = torch.rand(2, 1, 5, 5).argsort(-1)[..., :3]
    real = torch.rand(2, 37) < 0.7
    chosen = TileLayout.from_ids(ids, nq=37, nk=37, tile=8, heads=2, mask=Causal())
    want = chosen.dense() & real[:, None, None]
    for layout in (chosen, chosen.to_runs()):
        assert torch.equal(layout.without(real).dense(), want)
        q, k, v = (torch.randn(2, 2, 37, 8, dtype=torch.float64) for _ in range(3))
        scores = (q @ k.mT * 8**-0.5).masked_fill(~want, -torch.inf)
        k[~real[:, None].expand(2, 2, 37)] = torch.nan
        for backend in ("reference", "blocked"):
            out = tiled(q, k, v, layout, key_padding=real, backend=backend)
            torch.testing.assert_close(out, scores.softmax(-1).nan_to_num() @ v)
