"""Suite ``sparse``: every mechanism is measured beside dense attention, and bars judge what was measured."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention
from manyheads.bench.display import columns, table
from manyheads.bench.row import Row
from manyheads.bench.structure import Shape, draw
from manyheads.bench.suite import Options, load, unfold
from manyheads.bench.suites import sparse, sparse_bars, sparse_parts
from manyheads.bench.suites.sparse import DENSE, SDPA
from tests.bench.test_suites import Context

SHAPE = Shape(700, heads=4, kv_heads=2, width=16, seed=5)
OPTIONS = Options(level="quick", budget_s=0.0)


@pytest.fixture(scope="module")
def rows():
    return sparse.plane("sparse", "c", "document", SHAPE, OPTIONS).run(Context(OPTIONS))


def test_every_way_is_measured_at_every_setting_with_what_it_loses(rows):
    made = sparse.ways(SHAPE)
    assert {DENSE, SDPA, *(way.name for way in made)} == set(sparse.NAMES) == set(sparse.SUITE.providers)
    assert len(rows) == 2 + len(made) == len({(r.provider, r.setting) for r in rows})
    dense, ways = rows[:2], rows[2:]
    assert [r.provider for r in dense] == [DENSE, SDPA] and {r.gate for r in dense} == {"green"}
    whole = min(r.median_ms for r in dense)
    for row in ways:
        assert (row.status, row.gate) == ("measured", "lossy"), (row.provider, row.setting, row.reason, row.note)
        assert row.speed == pytest.approx(whole / row.median_ms) and 0 < row.selection <= 1
        assert 0 < row.mass <= 1 and 0 < row.recall <= 1 and 0 < row.area <= 1 and row.error_norm > 0
        if row.provider not in ("sale", "pbs", "blasst"):  # these keep all of what is short
            assert row.mass < 1 and row.area < 1
        assert row.ratio is None and Row.from_dict(__import__("json").loads(row.to_json())) == row


def test_more_kept_loses_less(rows):
    for name in ("window", "pooled-topk", "random-blocks"):
        some = [r for r in rows if r.provider == name]
        assert [r.setting for r in some] == ["5%", "10%", "25%"]
        assert some[0].mass <= some[1].mass <= some[2].mass and some[0].area <= some[2].area


def test_the_table_says_what_is_lost_and_leaves_it_out_elsewhere(rows):
    text = table(rows)
    for head in ("setting", "weight kept", "top keys", "choosing", "lost", "over dense"):
        assert head in text
    others = [Row("masks", "c", "sdpa", median_ms=1.0, gate="green", error_norm=0.1, area=0.5)]
    assert not {"setting", "lost", "over dense", "pairs"} & {head for head, _ in columns(others)}


def test_a_result_that_is_not_attention_over_the_chosen_keys_is_red_and_has_no_speed():
    def some(shape):
        right = sparse.pooled(shape, 0.25)
        return [sparse.Way("wrong", "25%", lambda q, k, v: attention(q, k, v, mask="causal & window(9)"), right.choose)]

    (row,) = sparse.plane("sparse", "c", "needles", SHAPE, OPTIONS, some).run(Context(OPTIONS))[2:]
    assert row.gate == "red" and row.speed is None and "its own keys" in row.note


def test_a_way_that_breaks_is_a_row():
    def breaks(q, k, v):
        raise RuntimeError("no kernel")

    def some(shape):
        return [sparse.Way("broken", "x", breaks, sparse.pooled(shape, 0.25).choose), sparse.window(shape, 0.1)]

    broken, window = sparse.plane("sparse", "c", "video", SHAPE, OPTIONS, some).run(Context(OPTIONS))[2:]
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: no kernel") and broken.speed is None
    assert window.speed > 0


def test_a_row_that_approximates_must_say_by_how_much():
    with pytest.raises(ValueError, match="speed: a row that approximates"):
        Row("sparse", "c", "w", speed=2.0)


def test_every_kind_of_input_and_a_captured_layer_are_cases():
    cases = load("sparse").cases(Options())
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    for kind in ("document", "needles", "video", "all-MiniLM-L6-v2"):
        assert any(name.startswith(kind) for name in names)
    assert sum(case.seconds for case in cases) <= 120
    quick = load("sparse").cases(Options(level="quick"))
    assert [c.name for c in quick] == ["document-2048-bfloat16"] and sum(c.seconds for c in quick) <= 15
    assert len(load("sparse").cases(Options(level="full"))) > 2 * len(cases)
    (one,) = load("sparse").cases(Options(level="quick", lengths=(300,), dtypes=("bfloat16",)))
    assert one.name == "document-300-bfloat16"


# --- bars -------------------------------------------------------------------------------------------------------


def named(start):
    (found,) = [bar for bar in sparse_bars.made(Options()) if bar.name.startswith(start)][:1]
    return found


def test_every_bar_has_words_of_its_own_and_stands_at_a_drawn_shape_too():
    made = sparse_bars.made(Options())
    judged = [row for bar in made for row in bar.judge([[] for _ in bar.cases])]
    assert {row.verdict for row in judged} == {"not measured"}
    assert len({row.bar for row in judged}) == len(judged)
    for stem in ("sparse-blocks", "sparse-indexers", "neighborhood-predicted", "blasst"):
        assert sum(bar.name.startswith(f"bar-{stem}") for bar in made) == 2, stem
    assert {b.name for b in made} != {b.name for b in sparse_bars.made(Options(seed=1))}
    assert sum(c.seconds for c in unfold([case for bar in made for case in bar.cases])) < 140


def way(name, **more):
    given = {"median_ms": 1.0, "gate": "lossy", "error_norm": 0.1, "area": 0.178, "speed": 4.6, "selection": 0.04}
    return Row("targets", "c", name, **{**given, **more})


def test_block_selectors_are_held_to_dense_and_to_the_cost_of_choosing():
    bar = named("bar-sparse-blocks-16384")
    rows = [way("pooled-topk"), way("pooled-topk-heads", speed=2.9), way("fsa-selected", selection=0.3)]
    found = bar.judge([rows])
    assert [r.verdict for r in found] == ["met", "met", "missed", "met", "met", "missed"]
    assert "17.8% of the causal pairs" in found[0].note
    red = [way("pooled-topk", gate="red", speed=None, note="differs"), *rows[1:]]
    assert [r.verdict for r in bar.judge([red])][:2] == ["not measured"] * 2


def test_indexers_are_held_to_the_fastest_flat_scan_and_report_their_recall():
    bar = named("bar-sparse-indexers-32768")
    some = [way("hisa", recall=0.99, median_ms=1.0), way("misa", recall=0.9, median_ms=1.0)]
    found = bar.judge([[way(sparse_parts.FLAT, median_ms=2.2), *some], [way("hisa", recall=0.5)]])
    assert [(r.verdict, round(r.measured, 2)) for r in found] == [("met", 2.2), ("missed", 2.2)]
    assert "recall of the flat choice 99.0%" in found[0].note and "50.0%" in found[0].note


def test_skipping_must_cost_nothing_save_time_and_stay_within_its_bound():
    bar = named("bar-blasst-8192")

    def judged(*times, over=0.5):
        levels = [way("blasst", setting=str(i), median_ms=t, density=1 - i / 4, measured=over)
                  for i, t in enumerate(times)]  # fmt: skip
        dense = [way(name, median_ms=10.0, gate="green", speed=None) for name in (DENSE, SDPA)]
        return [r.verdict for r in bar.judge([[*dense, *levels]])]

    assert judged(10.4, 9.0, 8.0, 7.0) == ["met", "met", "met"]
    assert judged(10.6, 9.0, 9.1, 7.0, over=1.1) == ["missed", "missed", "missed"]


def test_a_neighborhood_is_held_to_sdpa_flex_and_its_own_prediction():
    bar = named("bar-neighborhood-96x96-window13-forward")
    green = [way(who, gate="green", speed=None, median_ms=ms) for who, ms in (("manyheads", 1.0), ("sdpa", 13.5))]
    refused = Row("targets", "c", "flex", status="refused", reason="no compiler")
    assert [r.verdict for r in bar.judge([[*green, refused]])] == ["met", "not measured"]
    bar = named("bar-neighborhood-predicted-96x96")
    for foreseen, verdict in ((11.0, "met"), (10.0, "missed"), (17.0, "missed")):
        rows = [*green, way("predicted", measured=foreseen)]
        assert [r.verdict for r in bar.judge([rows])] == [verdict]


# --- what only bars measure, at tiny sizes ----------------------------------------------------------------------


def test_indexers_find_what_the_flat_scan_finds():
    rows = {r.provider: r for r in sparse_parts.indexers(1500, 64, OPTIONS).run(Context(OPTIONS))}
    assert set(rows) == {sparse_parts.FLAT, "hisa", "misa"} and all(r.median_ms > 0 for r in rows.values())
    assert rows["hisa"].recall == 1.0 and 0.3 < rows["misa"].recall <= 1.0  # 12 blocks are all candidates


def test_thresholds_skip_more_and_more_within_the_bound():
    rows = sparse_parts.skipping(Shape(1100, heads=2, kv_heads=1, width=32), OPTIONS).run(Context(OPTIONS))
    found = [r for r in rows if r.provider == "blasst"]
    assert found[0].density == 1.0 and found[0].error_norm < 1e-5
    assert [r.density for r in found] == sorted((r.density for r in found), reverse=True) and found[-1].density < 0.9
    assert all(r.measured <= 1.0 for r in found) and found[-1].measured > 0


def test_a_prediction_and_its_measurement_stand_side_by_side():
    rows = {r.provider: r for r in sparse_parts.predicted((20, 24), 7, 2, 16).run(Context(OPTIONS))}
    assert rows["predicted"].measured > 0 and rows["manyheads"].median_ms > 0 and rows[SDPA].median_ms > 0


def test_uneven_inputs_have_a_key_that_everybody_wants():
    q, k = draw("uneven", Shape(500, heads=2, kv_heads=1, width=16))[:2]
    scores = q @ k.mT / 4
    torch.testing.assert_close(scores[..., :4], torch.full_like(scores[..., :4], 14.0))


def test_tiles_with_and_without_the_permutation_are_compared_at_equal_weight():
    shape = Shape(1500, heads=2, kv_heads=1, width=32, seed=1)
    rows = sparse_parts.permuted("columns", shape).run(Context(OPTIONS))
    assert [r.provider for r in rows] == ["pbs", *["pbs-unpermuted"] * len(sparse_parts.GRID)]
    without = rows[1:]
    assert [r.mass for r in without] == sorted(r.mass for r in without) and without[-1].density <= 1.0
    bar = named("bar-pbs-columns-4096")
    with_it = [rows[0].replace(mass=without[1].mass, density=0.5 * without[1].density)]
    (met,) = bar.judge([[*with_it, *without]])
    assert (met.verdict, round(met.measured, 3)) == ("met", 0.5)
    (missed,) = bar.judge([[rows[0].replace(mass=without[1].mass, density=without[1].density), *without]])
    assert missed.verdict == "missed"
