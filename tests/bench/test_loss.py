"""What is lost is what the definitions say, for tiles and for token ids, in chunks of any size."""

from __future__ import annotations

import pytest
import torch

from manyheads import Document, attention
from manyheads.bench import loss
from manyheads.bench.loss import lost
from manyheads.mask import TileLayout, as_mask
from manyheads.testing import sample_qkv

SPARSE = as_mask("causal & (window(11) | sink(3))")


def inputs(n=75, **more):
    return sample_qkv(2, 4, n, **{"kv_heads": 2, "deviation": 3.0, "seed": 5, **more})


def attend(q, k, v, *, mask=SPARSE, scale=None):
    return attention(q, k, v, mask=mask, scale=scale)


def tiles(q, k, v, *, mask=SPARSE, scale=None):
    return mask.tiles(q.shape[2], k.shape[2], tile=(8, 16))


def plainly(q, k, kept, mask="causal", top=5, scale=None):
    """Mass and recall of a dense choice, all rows at once."""
    group = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~as_mask(mask).dense(q.shape[2], k.shape[2]), -torch.inf)
    best = scores.topk(top, -1)
    real = best.values > -torch.inf
    kept = kept.expand(scores.shape)
    recall = (kept.gather(-1, best.indices) & real).double().sum() / real.sum()
    return float((scores.softmax(-1) * kept).sum(-1).mean()), float(recall)


@pytest.mark.parametrize("cells", [100, 1 << 22])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_mass_and_recall_are_those_of_the_definition(cells, scale, monkeypatch):
    monkeypatch.setattr(loss, "_CELLS", cells)
    q, k, v = inputs()
    found = lost(attend, q, k, v, selection=tiles, rows=None, budget_s=None, top=5,
                 options={"scale": scale, "mask": SPARSE})  # fmt: skip
    mass, recall = plainly(q, k, SPARSE.dense(75, 75), scale=scale)
    assert found.mass == pytest.approx(mass, rel=1e-9) and found.recall == pytest.approx(recall, rel=1e-9)
    assert found.lowest <= found.mass < 1 and found.rows == 75
    assert found.pairs == int(SPARSE.dense(75, 75).sum()) * 8 and found.area == pytest.approx(found.pairs / 8 / 2850)


def test_the_error_is_the_distance_from_dense_attention_in_float64():
    q, k, v = inputs()
    dense = attention(q.double(), k.double(), v.double(), mask="causal")
    found = lost(attend, q, k, v, selection=tiles, rows=None, budget_s=None, options={"mask": SPARSE})
    away = attend(q, k, v).double() - dense
    assert found.error == pytest.approx(float(away.norm() / dense.norm()), rel=1e-6)
    assert found.worst == pytest.approx(float(away.abs().max()), rel=1e-6)
    assert found.rounding < 1e-6 < found.error


def test_attending_to_other_keys_than_those_chosen_shows_in_the_rounding():
    q, k, v = inputs()
    other = as_mask("causal & window(5)")
    found = lost(attend, q, k, v, selection=tiles, rows=None, budget_s=None, options={"mask": other})
    assert found.rounding < 1e-6  # the selection follows the same mask
    wrong = lost(lambda q, k, v: attend(q, k, v, mask=other), q, k, v, selection=lambda q, k, v: tiles(q, k, v),
                 rows=None, budget_s=None)  # fmt: skip
    assert wrong.rounding > 1e-2


def test_everything_kept_loses_nothing():
    q, k, v = inputs()
    for mask in ("causal", "full"):
        found = lost(attend, q, k, v, selection=tiles, mask=mask, budget_s=None)
        assert found.error < 1e-6 and found.density == found.area == 1.0
        assert found.mass == pytest.approx(1.0) and found.recall == 1.0


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_token_ids_are_read_per_head_group_or_shared(heads, generator):
    q, k, v = inputs()
    ids = torch.rand(2, heads, 75, 75, generator=generator).argsort(-1)[..., :9].int()
    ids = ids.masked_fill(ids > torch.arange(75)[:, None], -1)
    kept = torch.zeros(2, heads, 75, 76, dtype=torch.bool).scatter_(-1, torch.where(ids < 0, 75, ids).long(), True)
    kept = kept[..., :75].repeat_interleave(4 // heads, 1)
    found = lost(lambda q, k, v: attention(q, k, v, mask=kept), q, k, v, selection=lambda q, k, v: ids, rows=None,
                 budget_s=None, top=5)  # fmt: skip
    mass, recall = plainly(q, k, kept)
    assert found.recall == pytest.approx(recall) and found.tiles is None
    # a row that keeps nothing has no weight there, and counts
    assert found.mass == pytest.approx(mass, rel=1e-9) and found.pairs == int((ids >= 0).sum()) * 4 // heads
    assert found.rounding < 1e-6


@pytest.mark.parametrize("shared", [True, False])
def test_padded_ids_of_tiles_are_read_like_runs(shared, generator):
    q, k, v = inputs(70)
    ids = torch.rand(2, 2, 9, 5, generator=generator).argsort(-1)[..., :2].int()
    layout = TileLayout.from_ids(ids, nq=70, nk=70, tile=(8, 16), heads=4) & as_mask("causal")
    chosen = layout if shared else layout.to_runs()
    found = lost(attend, q, k, v, selection=lambda *_, **__: chosen, rows=None, budget_s=None,
                 options={"mask": as_mask(layout.dense())})  # fmt: skip
    assert found.mass == pytest.approx(plainly(q, k, layout.dense())[0], rel=1e-9)
    assert found.pairs == int(layout.dense().expand(2, 4, -1, -1).sum()) and found.rounding < 1e-6


def test_a_permuted_layout_stands_for_the_keys_in_its_order(generator):
    q, k, v = inputs(64)
    order = torch.rand(2, 4, 64, generator=generator).argsort(-1)
    layout = as_mask("window(left=20, right=1)").tiles(64, tile=(8, 8))
    kept = torch.zeros(2, 4, 64, 64, dtype=torch.bool)
    columns = order[:, :, None].expand(-1, -1, 64, -1)
    kept.scatter_(3, columns, layout.dense().expand(2, 4, -1, -1))
    kept &= as_mask("causal").dense(64, 64)
    found = lost(lambda q, k, v: attention(q, k, v, mask=kept), q, k, v, selection=lambda q, k, v: (layout, order),
                 rows=None, budget_s=None)  # fmt: skip
    assert found.mass == pytest.approx(plainly(q, k, kept)[0], rel=1e-9) and found.rounding < 1e-6


def test_documents_are_compared_with_dense_attention_inside_them():
    q, k, v = inputs()
    mask = as_mask("causal") & Document([30, 45])
    found = lost(attend, q, k, v, selection=tiles, mask=mask, budget_s=None)
    assert found.error < 1e-6 and found.area == 1.0


def test_sampled_rows_come_close_and_time_is_told_apart():
    q, k, v = inputs(600)
    whole = lost(attend, q, k, v, selection=tiles, rows=None, budget_s=None, options={"mask": SPARSE})
    some = lost(attend, q, k, v, selection=tiles, rows=200, budget_s=0.0, options={"mask": SPARSE})
    assert some.rows <= 200 and some.mass == pytest.approx(whole.mass, abs=0.05)
    assert some.selection_ms > 0 and 0 < some.selection == some.selection_ms / some.total_ms
    assert whole.selection is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": None}, "selection: a function needs one"),
        ({"mechanism": "exact", "selection": None}, "exact chooses no keys"),
        ({"mechanism": "exat", "selection": None}, "did you mean 'exact'"),
        ({"selection": lambda *a, **o: SPARSE.tiles(74, tile=(8, 8))}, "75 x 75 tokens, got 74 x 74"),
        ({"selection": lambda *a, **o: torch.zeros(2, 4, 7, 3, dtype=torch.int32)}, "ids \\(B, H, 75, K\\)"),
        ({"top": 0}, "top: expected a positive number"),
        ({"rows": 0}, "rows: expected a positive number"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v = inputs()
    given = {"mechanism": attend, "selection": tiles, **change}
    with pytest.raises(ValueError, match=message):
        lost(given.pop("mechanism"), q, k, v, **given)
    with pytest.raises(TypeError, match="expected a TileLayout or integer ids"):
        lost(attend, q, k, v, selection=lambda *a, **o: torch.ones(2, 4, 75, 3))
