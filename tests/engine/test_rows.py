"""What the kernels read of a layout: every pair once, whoever owns the row, in whichever order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from manyheads import Causal, Document, Full, PerHead, Prefix, Window
from manyheads.common.errors import UnsupportedError
from manyheads.engine.tiled import rows
from manyheads.mask.evaluate import pack, unpack
from manyheads.mask.layout import TileLayout

NQ, NK = 45, 83
HOST = torch.device("cpu")
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & Window(9),
    "nothing": ~Prefix(NK),
    "documents": Document([20, 0, 25], [30, 33, 20]) & Causal(),
    "per head": PerHead([Causal(), Window(4), Full(), ~Prefix(NK)]),
}


def pairs_of(found: rows.Rows, size: tuple[int, int], heads: int, batch: int = 1) -> torch.Tensor:
    """What a kernel would visit, read the way a kernel reads: counts per pair, ``(B, H, own, other)``."""
    (own, other), (bm, bn) = size, found.tile
    tiles = -(-own // bm)
    seen = torch.zeros(batch, heads, tiles * bm, -(-other // bn) * bn, dtype=torch.int64)
    first, count, mask_id, start, index = (
        t.flatten().tolist() for t in (found.first, found.count, found.mask_id, found.rows, found.index)
    )
    words = found.bits.to(torch.int64)
    word = min(bn, 32)
    wide = torch.stack([words[..., j // word] >> (j % word) & 1 for j in range(bn)], -1)
    for b in range(batch):
        for h in range(heads):
            row_set = index[b * found.steps[0] + h * found.steps[1]]
            for row in range(tiles):
                if found.width:
                    lo = (row_set * tiles + row) * found.width
                    hi = lo + start[row_set * tiles + row]
                else:
                    lo, hi = start[row_set * (tiles + 1) + row], start[row_set * (tiles + 1) + row + 1]
                for x in range(lo, hi):
                    id = mask_id[x] if found.masked else 0
                    shape = wide[id - 1] if id else torch.ones(bm, bn, dtype=torch.int64)
                    for t in range(first[x], first[x] + (1 if found.width else count[x])):
                        seen[b, h, row * bm : row * bm + bm, t * bn : t * bn + bn] += shape
    return seen[:, :, :own, :other]


def chosen(generator, nq=NQ, nk=NK, tile=(16, 16), batch=1, heads=1, mask=None, kmax=None):
    """Ids in any order, some rows without any, padded by -1."""
    tq, tk = -(-nq // tile[0]), -(-nk // tile[1])
    kmax = kmax or tk
    ids = torch.rand(batch, heads, tq, tk, generator=generator).argsort(-1)[..., :kmax]
    keep = torch.rand(batch, heads, tq, kmax, generator=generator) < 0.6
    keep[..., 1, :] = False
    return TileLayout.from_ids(ids.masked_fill(~keep, -1), nq=nq, nk=nk, tile=tile, mask=mask)


LAYOUTS = {
    **{name: lambda g, m=mask: m.tiles(NQ, NK, tile=(16, 32), heads=4) for name, mask in MASKS.items()},
    "ids": lambda g: chosen(g),
    "ids per head": lambda g: chosen(g, heads=4),
    "ids per batch entry": lambda g: chosen(g, batch=2),
    "ids with bitmaps": lambda g: chosen(g, heads=4, mask=Causal()),
    "ids of one query": lambda g: chosen(g, tile=(1, 16), mask=Causal() & Window(30)),
    "ids of wide tiles": lambda g: chosen(g, tile=(8, 64), mask=Window(20)),
}
IDS = [name for name in LAYOUTS if name.startswith("ids")]


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_both_owners_read_every_visible_pair_once(make, generator):
    layout = make(generator)
    batch, heads = layout.batch, layout.heads
    want = layout.dense().expand(batch, heads, -1, -1).long()
    assert torch.equal(pairs_of(rows.by_queries(layout, HOST), (NQ, NK), heads, batch), want)
    by_keys = rows.by_keys(layout, HOST)
    assert by_keys.tile == layout.tile[::-1]
    assert torch.equal(pairs_of(by_keys, (NK, NQ), heads, batch), want.mT)


@pytest.mark.parametrize("name", IDS)
def test_inverting_ids_on_a_device_equals_the_transpose(name, generator):
    layout = LAYOUTS[name](generator)
    found = rows._inverted(layout, HOST)
    want = layout.dense().expand(layout.batch, layout.heads, -1, -1).long()
    assert torch.equal(pairs_of(found, (NK, NQ), layout.heads, layout.batch), want.mT)
    turned = layout.transpose()
    per_row = found.rows.diff(dim=1)
    sets = layout.index.flatten().long()
    spans = [[sum(n for _, n, _ in row) for row in turned.spans(int(s))] for s in sets]
    assert per_row[sets].tolist() == spans


def test_rows_stay_on_the_device_that_reads_them(device, generator):
    for name, make in LAYOUTS.items():
        place = torch.device(device, 0) if device == "cuda" else HOST
        layout = make(generator)
        layout = layout.to(place) if name in IDS else layout
        for found in (rows.by_queries(layout, place), rows.by_keys(layout, place)):
            tensors = (found.rows, found.first, found.count, found.mask_id, found.bits, found.index)
            assert {t.device for t in tensors} == {place}
            assert all(t.is_contiguous() for t in tensors)
            if device == "cuda":
                size = (NQ, NK) if found.tile == layout.tile else (NK, NQ)
                host = replace(found, **{n: getattr(found, n).cpu() for n in found.__slots__ if n not in _PLAIN})
                want = layout.dense().expand(layout.batch, layout.heads, -1, -1).long()
                read = pairs_of(host, size, layout.heads, layout.batch)
                assert torch.equal(read, want if size[0] == NQ else want.mT)


_PLAIN = ("tile", "width", "masked", "steps")


@pytest.mark.parametrize("tile", [(1, 16), (2, 32), (4, 64), (8, 8), (16, 128), (128, 16)], ids=str)
def test_turned_bitmaps_equal_turned_tiles(tile, generator):
    for number in (0, 1, 5):
        tiles = torch.rand(number, *tile, generator=generator) < 0.5
        bits = torch.zeros(number, tile[0], -(-tile[1] // 8), dtype=torch.uint8)
        if number:
            bits = torch.from_numpy(pack(tiles.numpy()))
        turned = rows._turned(bits, tile)
        assert turned.shape == (number, tile[1], -(-tile[0] // 8))
        assert np.array_equal(unpack(turned.numpy(), tile[0]), tiles.mT.numpy())


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32, 64, 128])
def test_words_hold_the_columns_in_order(width, generator):
    tiles = torch.rand(3, 16, width, generator=generator) < 0.5
    words = rows._as_words(torch.from_numpy(pack(tiles.numpy())), (16, width))
    size = min(width, 32)
    assert words.shape == (3, 16, width // size) and words.element_size() == max(1, min(4, width // 8))
    read = torch.stack([words[..., j // size].long() >> (j % size) & 1 for j in range(width)], -1)
    assert torch.equal(read.bool(), tiles)


def test_without_bitmaps_there_is_still_a_word_to_point_at():
    assert rows._as_words(torch.zeros(0, 4, 2, dtype=torch.uint8), (4, 16)).shape == (1, 4, 1)


@pytest.mark.parametrize("tile", [(48, 80), (24, 40), (20, 12), (3, 7)], ids=str)
@pytest.mark.parametrize("name", ["causal", "documents", "per head", "nothing"])
def test_odd_tiles_are_rearranged_exactly(name, tile):
    layout = MASKS[name].tiles(NQ, NK, tile=tile, heads=4)
    found = rows.fitting(layout, (32, 16), own=True)
    assert found.tile == (32, 16)
    assert torch.equal(found.dense(), layout.dense())
    assert rows.fitting(layout, (32, 16), own=True) is found


def test_the_callers_tiles_are_kept_where_they_fit_and_the_engines_own_are_not():
    layout = Causal().tiles(NQ, NK, tile=(8, 16))
    assert rows.fitting(layout, (32, 64), own=True) is layout
    assert rows.fitting(layout, (32, 64), own=False).tile == (32, 64)
    assert rows.fitting(Causal().tiles(NQ, NK, tile=(64, 16)), (32, 64), own=True).tile == (32, 16)


@pytest.mark.parametrize("tile", [(16, 16), (64, 16), (8, 32), (32, 32)], ids=str)
@pytest.mark.parametrize("mask", [None, Causal(), Causal() & Window(11)], ids=str)
def test_ids_of_large_tiles_are_cut_where_they_are(mask, tile, generator, monkeypatch):
    layout = chosen(generator, tile=(64, 64), nq=150, nk=170, heads=2, mask=mask)
    want = layout.dense()
    with monkeypatch.context() as patch:
        patch.setattr(TileLayout, "to_runs", lambda self: pytest.fail("went through the host"))
        found = rows.fitting(layout, tile, own=True)
        rows._inverted(found, HOST)
    assert found.ids is not None and found.tile == tile
    assert torch.equal(found.dense(), want)
    assert torch.equal(found.ids_count, (found.ids >= 0).sum(-1, dtype=torch.int32))
    assert found.visited <= layout.visited * (64 // tile[0]) * (64 // tile[1])
    if mask is not None:  # parts that see nothing are gone
        seen = torch.nn.functional.pad(want, (0, -170 % tile[1], 0, -150 % tile[0]))
        blocks = seen.unflatten(-1, (-1, tile[1])).unflatten(-3, (-1, tile[0])).any(-1).any(-2)
        assert found.visited == int(blocks.sum())


def test_skipped_tiles_cannot_be_cut():
    layout = Causal().tiles(NQ, NK, tile=(64, 64))
    with pytest.raises(UnsupportedError, match=r"powers of two up to 32 x 64.* got 64 x 64"):
        rows.fitting(layout, (32, 64), own=True, skips=True)


def test_skipped_ids_come_in_the_order_of_the_keys(generator):
    layout = chosen(generator, heads=2, mask=Window(40))
    found = rows.fitting(layout, (16, 16), own=True, skips=True)
    assert torch.equal(found.dense(), layout.dense())
    ids = torch.where(found.ids < 0, 999, found.ids)
    assert bool((ids.diff(dim=-1) >= 0).all())
    assert not bool((torch.where(layout.ids < 0, 999, layout.ids).diff(dim=-1) >= 0).all())


def test_no_choice_at_all_is_no_run():
    layout = TileLayout.from_ids(torch.zeros(1, 2, 3, 0, dtype=torch.int32), nq=NQ, nk=NK, tile=16)
    for found, size in ((rows.by_queries(layout, HOST), (NQ, NK)), (rows._inverted(layout, HOST), (NK, NQ))):
        assert not pairs_of(found, size, 2).any()
    assert rows.by_queries(layout, HOST).width == 1  # 0 would say runs


def test_heads_are_packed_while_the_query_tile_is_small():
    def layout(height, mask=Causal(), heads=6):  # noqa: B008
        return mask.tiles(NQ, NK, tile=(height, 16), heads=heads)

    assert [rows.packs(layout(n), 6) for n in (1, 8, 16, 64)] == [6, 6, 1, 1]
    assert [rows.packs(layout(1, heads=n), n) for n in (1, 2, 3, 7)] == [1, 2, 3, 7]
    assert rows.packs(layout(8, heads=34), 34) == 2  # 17 heads of 8 queries would be too many rows
    same = PerHead([Causal(), Causal(), Window(3), Window(3)])
    assert rows.packs(layout(1, same, 4), 2) == 2
    assert rows.packs(layout(1, same, 4), 4) == 1
    assert rows.packs(layout(1, PerHead([Causal(), Window(3)]), 2), 2) == 1


def test_packs_of_ids_need_ids_that_all_heads_share(generator):
    assert rows.packs(chosen(generator, tile=(1, 16)), 4) == 4
    assert rows.packs(chosen(generator, tile=(1, 16), heads=4), 4) == 1


@pytest.mark.parametrize("turn", [0, 3, 50])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("name", [*MASKS, *IDS])
def test_every_row_of_every_head_is_worked_on_once(name, keys, turn, generator):
    layout = LAYOUTS[name](generator)
    for heads in (1, 2, 4) if layout.heads in (1, 4) else (layout.heads,):
        if heads > layout.heads > 1:
            continue
        for key_bytes in (1, 20 << 20):  # one cache for all heads, one for each
            work = rows.work_of(layout, heads, 2, key_bytes, HOST, keys=keys, turn=turn)
            assert work.dtype == torch.int32
            assert work.sort().values.tolist() == list(range(2 * heads * layout.grid[keys]))


@pytest.mark.parametrize("keys", [False, True])
def test_rows_that_only_the_device_knows_are_worked_on_once(keys, generator):
    for layout in (chosen(generator), chosen(generator, heads=4), chosen(generator, batch=2, heads=4)):
        work = rows._counted(layout, 4, 2, HOST, keys)
        assert work.sort().values.tolist() == list(range(2 * 4 * layout.grid[keys]))
        if not keys:
            costs = layout.ids_count.expand(2, 4, -1).flatten()[work.long()]
            assert bool((costs.diff() <= 0).all())


def test_long_rows_come_first_and_heads_share_a_cache():
    layout = PerHead([Causal(), Window(4), Full(), Causal()]).tiles(64, tile=(16, 16), heads=4)
    costs = rows.row_costs(layout)[layout.index[0].long()]
    together = rows.work_of(layout, 4, 1, 1, HOST).long()
    assert (np.diff(costs.reshape(-1)[together]) <= 0).all()
    apart = rows.work_of(layout, 4, 1, 1 << 30, HOST).long().view(4, 4)
    assert (apart // 4).tolist() == [[h] * 4 for h in range(4)]
    assert (np.diff(costs.reshape(-1)[apart], axis=1) <= 0).all()


def test_rows_of_keys_cost_what_all_heads_of_their_group_visit():
    masks = PerHead([Window(1), Causal(), Full(), Full()])
    layout = masks.tiles(64, tile=(16, 16), heads=4)
    costs = rows.row_costs(layout.transpose())[layout.index[0].long()].reshape(2, 2, -1).sum(1).reshape(-1)
    work = rows.work_of(layout, 2, 1, 1, HOST, keys=True).long()
    assert (np.diff(costs[work]) <= 0).all()


def test_the_index_of_ids_is_made_where_it_is_needed(device, generator):
    place = torch.device(device, 0) if device == "cuda" else HOST
    layout = chosen(generator, batch=2, heads=3)
    assert rows._index(layout, place).flatten().tolist() == list(range(6))
    odd = replace(layout, index=torch.tensor([[0, 0, 1], [3, 3, 5]], dtype=torch.int32))
    assert rows._index(odd, place).tolist() == [[0, 0, 1], [3, 3, 5]]
