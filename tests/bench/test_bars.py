"""Bars judge what was measured: met, missed, or not measured, and never on a red row."""

from __future__ import annotations

import pytest

from manyheads.bench.row import Row
from manyheads.bench.suite import Options, unfold
from manyheads.bench.suites import bars, targets

BASE = Row("targets", "t", "manyheads", bar="the bar")


def row(provider="manyheads", ms=1.0, **more):
    return Row("masks", "m", provider, **{"median_ms": ms, "gate": "green", "error": 1e-7, **more})


def verdicts(rows):
    return [(r.measured if r.measured is None else round(r.measured, 4), r.verdict) for r in rows]


@pytest.mark.parametrize(
    ("measured", "verdict"), [(1.9, "met"), (2.5, "met"), (1.89, "missed"), (None, "not measured")]
)
def test_at_least(measured, verdict):
    found = bars.at_least(BASE, measured, 1.9)
    assert (found.verdict, found.target) == (verdict, ">= 1.9x")


@pytest.mark.parametrize(("measured", "verdict"), [(30.0, "met"), (30.1, "missed"), (None, "not measured")])
def test_at_most(measured, verdict):
    found = bars.at_most(BASE, measured, 30, "ms")
    assert (found.verdict, found.target) == (verdict, "<= 30 ms")


def test_dense_takes_the_slowest_deviation():
    judge = bars.dense(BASE, 1.5)
    fast, slow = [row(ms=1.0), row("sdpa", 2.0)], [row(ms=1.0), row("sdpa", 1.4)]
    assert verdicts(judge([fast, fast])) == [(2.0, "met")]
    assert verdicts(judge([fast, slow])) == [(1.4, "missed")]


def test_a_red_row_counts_for_nothing_however_fast():
    red = [row(ms=0.1, gate="red", error=1.0, error_limit=0.5), row("sdpa", 2.0)]
    (found,) = bars.dense(BASE, 1.5)([red])
    assert (found.measured, found.verdict) == (None, "not measured")
    assert "error 1.00e+00 above 5.00e-01" in found.note


def test_a_verdict_on_noisy_rows_says_so():
    quiet = bars.dense(BASE, 1.5)([[row(ms=1.0), row("sdpa", 2.0)]])[0]
    noisy = bars.dense(BASE, 1.5)([[row(ms=1.0, noisy=True), row("sdpa", 2.0)]])[0]
    assert "noisy" not in (quiet.note or "") and "noisy" in noisy.note
    assert quiet.verdict == noisy.verdict == "met"


def test_a_refused_peer_is_named_as_the_reason():
    refused = Row("masks", "m", "flex", status="refused", reason="needs a C++ compiler")
    mean, worst = bars.against_flex(BASE, ["a"], 2.0, 1.0)([[row(), refused]])
    assert mean.verdict == worst.verdict == "not measured"
    assert "needs a C++ compiler" in mean.note


def test_many_masks_give_their_mean_and_their_worst():
    measured = [[row(ms=1.0), row("flex", 8.0)], [row(ms=1.0), row("flex", 2.0)]]
    mean, worst = bars.against_flex(BASE, ["easy", "hard"], 4.0, 2.5)(measured)
    assert verdicts([mean, worst]) == [(4.0, "met"), (2.0, "missed")]
    assert worst.note == "hard"


def test_cost_is_held_against_the_faster_dense_and_the_density():
    dense = [row(ms=10.0), row("sdpa", 8.0)]
    measured = [dense, [row(ms=2.0, density=0.2, area=0.15)], [row(ms=4.0, density=0.2, area=0.1)]]
    cheap, dear = bars.cost_follows_area(BASE, ["cheap", "dear"], 1.3, 0.03)(measured)
    assert verdicts([cheap, dear]) == [(0.25, "met"), (0.5, "missed")]
    assert cheap.target == "<= 0.29 of dense"
    assert (cheap.density, cheap.area, cheap.note) == (0.2, 0.15, "exact area 15.0%")


def test_backward_is_judged_on_speed_and_on_memory():
    measured = [[row(ms=1.0, peak_mib=10.0), row("sdpa", 9.5, peak_mib=95.0)]]
    assert verdicts(bars.backward(BASE, 9.0, 10.0)(measured)) == [(9.5, "met"), (9.5, "missed")]
    assert verdicts(bars.backward(BASE, 9.0, 10.0)([[row(), row("sdpa", 9.5)]])) == [
        (9.5, "met"),
        (None, "not measured"),
    ]


def test_layouts_are_judged_on_time_memory_and_unique_tiles():
    measured = [[row(ms=20.0, peak_mib=129.0, unique_tiles=2)]]
    assert verdicts(bars.layout(BASE, 30.0, 128.0)(measured)) == [
        (20.0, "met"),
        (129.0, "missed"),
        (2.0, "met"),
    ]
    assert len(bars.layout(BASE, 30.0, None)(measured)) == 2


def test_memory_must_grow_no_faster_than_the_tokens():
    def peaks(*mib):
        return [[row(peak_mib=m, process_mib=512.0 + m)] for m in mib]

    judge = bars.linear_memory(BASE, [100, 200, 400], 1.0)
    assert verdicts(judge(peaks(10.0, 20.0, 40.0))) == [(1.0, "met"), (round(552 / 1024, 4), "met")]
    assert verdicts(judge(peaks(10.0, 40.0, 160.0)))[0] == (4.0, "missed")
    assert verdicts(judge([[row()]] * 3)) == [(None, "not measured")] * 2


def test_overhead_is_judged_way_by_way():
    measured = [[row("delegated", overhead_us=4.0), row("engine op", overhead_us=25.0)]]
    judged = bars.overhead(BASE, {"delegated": 10.0, "engine op": 20.0, "with gradients": 40.0})(measured)
    assert verdicts(judged) == [(4.0, "met"), (25.0, "missed"), (None, "not measured")]


def test_packing_takes_the_better_packing_and_the_worse_agreement():
    def encoder(name, rate, **more):
        return Row("packing", "encoder-float32", name, rate=rate, **more)

    measured = [
        [
            encoder("padded", 10.0),
            encoder("sorted", 50.0),
            encoder("packed-spfhp", 60.0, gate="green", agreement=0.99999),
            encoder("packed-nnlshp", 55.0, gate="green", agreement=0.99995),
        ]
    ]
    assert verdicts(bars.packing(BASE, 4.0, 1.05, 0.9999)(measured)) == [
        (6.0, "met"),
        (1.2, "met"),
        (round(0.99995, 4), "met"),
    ]
    measured[0][2] = measured[0][2].replace(gate="red", agreement=0.5)
    given, by_length, cosine = bars.packing(BASE, 4.0, 1.05, 0.9999)(measured)
    assert given.measured == 5.5 and cosine.verdict == "missed"


def test_every_bar_stands_at_its_own_shape_and_at_a_drawn_one():
    names = [case.name for case in targets.cases(Options())]
    assert len(names) == len(set(names))
    for stem in ("dense", "flex", "area", "backward", "layout", "memory", "overhead", "packing"):
        assert sum(name.startswith(f"bar-{stem}") for name in names) >= 2, stem


def test_the_drawn_shapes_follow_the_seed():
    def drawn(seed):
        return [case.name for case in targets.cases(Options(seed=seed))]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert set(drawn(1)) & set(drawn(2))


def test_quick_keeps_what_takes_seconds():
    quick, default = (targets.cases(Options(level=level)) for level in ("quick", "default"))
    assert 0 < sum(c.seconds for c in unfold(quick)) < 60 < sum(c.seconds for c in unfold(default)) < 900
    assert {c.name for c in quick} < {c.name for c in default}
