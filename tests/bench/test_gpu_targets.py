"""The bars of a GPU: judged from rates where there is one, and honestly open where there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from manyheads.bench.display import Plain, summary
from manyheads.bench.limits import Limits
from manyheads.bench.row import Row
from manyheads.bench.runner import Run
from manyheads.bench.store import Store, read, resumable
from manyheads.bench.suite import Options, unfold
from manyheads.bench.suites import bars, gpu_linear, gpu_targets, targets
from manyheads.bench.suites.linear import Shape

OWN = gpu_targets.OWN
BASE = Row("targets", "t", "manyheads", bar="the bar")
HEADER = {"environment": {}, "options": {}}


def row(provider=OWN, tflops=600.0, **more):
    return Row("masks", "m", provider, **{"median_ms": 1.0, "gflops": tflops * 1e3, "gate": "green", **more})


def found(rows):
    return [(r.measured if r.measured is None else round(r.measured, 3), r.verdict) for r in rows]


def test_the_slowest_deviation_counts_for_a_rate():
    judge = bars.rate(BASE, OWN, 500.0)
    assert found(judge([[row()], [row(tflops=520)]])) == [(520.0, "met")]
    assert found(judge([[row()], [row(tflops=480)]])) == [(480.0, "missed")]
    assert judge([[row()]])[0].target == ">= 500 TFLOP/s"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row(gate="red", error=1.0, error_limit=0.1), "error 1.00e+00 above 1.00e-01"),
        (Row("masks", "m", OWN, status="refused", reason="needs a GPU"), "needs a GPU"),
        (row("sdpa"), "took no part"),
    ],
)
def test_a_rate_without_a_right_result_is_not_measured(bad, why):
    (judged,) = bars.rate(BASE, OWN, 500.0)([[row()], [bad]])
    assert (judged.measured, judged.verdict) == (None, "not measured")
    assert why in judged.note


def test_random_blocks_are_held_against_the_dense_rate():
    judge = bars.keeps_rate(BASE, ["few", "many"], OWN, 0.85)
    judged = judge([[row(tflops=600)], [row(tflops=480, density=0.1)], [row(tflops=540, density=0.5)]])
    assert found(judged) == [(0.8, "missed"), (0.9, "met")]
    assert [r.density for r in judged] == [0.1, 0.5]
    assert found(judge([[row(gate="red", error=1.0)], [row()], [row()]])) == [(None, "not measured")] * 2


def test_flex_is_beaten_by_the_own_kernel_and_not_by_what_auto_chose():
    measured = [[row("manyheads", median_ms=0.1), row(median_ms=1.0), row("flex", median_ms=1.3)]]
    (judged,) = bars.against_flex(BASE, ["causal"], 1.2, None, OWN)(measured)
    assert found([judged]) == [(1.3, "met")]
    assert judged.note == "worst 1.30x: causal"


def test_every_bar_stands_at_its_own_shape_and_at_a_drawn_one():
    names = [case.name for case in targets.cases(Options(device="cuda", level="full"))]
    assert len(names) == len(set(names))
    for stem, count in (("causal", 4), ("flex", 4), ("sparse", 2), ("scan", 24), ("orders", 6), ("blocks", 2)):
        assert sum(name.startswith(f"bar-gpu-{stem}") for name in names) == count
    others = {c.name for c in targets.cases(Options(device="cuda", level="full", seed=7))}
    assert len(set(names) & others) == 5 + 18 + 3 + 1


def test_the_bars_of_a_gpu_are_those_that_were_promised():
    cases = targets.cases(Options(device="cuda"))
    judged = [row for bar in gpu_targets.made(Options(device="cuda")) for row in bar.judge([[] for _ in bar.cases])]
    told = {(r.phase, r.target) for r in judged}
    assert {("forward", ">= 500 TFLOP/s"), ("backward", ">= 350 TFLOP/s")} <= told
    assert {("forward", ">= 1.2x"), ("backward", ">= 1.1x"), ("forward", ">= 0.85 of dense")} <= told
    measured = {case.name for case in unfold(cases)}
    assert {"causal-16384-bfloat16-64:8x128", "causal-16384-bfloat16-64:8x128-backward"} <= measured
    assert "gpu-causal-16x16384x128-backward-deviation8" in measured


def test_recurrences_are_judged_by_float64_and_a_peer_that_cannot_run_is_a_row():
    shape = Shape(20, 1, 16, "float32")
    lines = []
    context = SimpleNamespace(options=Options(budget_s=0.01), say=lines.append)
    mine, theirs = gpu_linear.measured("x", "mlstm", shape, "backward", context)
    assert (mine.provider, mine.gate, mine.phase) == (gpu_linear.OWN, "green", "backward")
    assert mine.median_ms > 0 and mine.error <= mine.error_limit
    assert theirs.status in ("failed", "refused") and theirs.reason
    assert "linear/x: float64" in lines


def test_recurrences_count_only_over_a_result_that_is_not_wrong():
    def rows(ours, theirs):
        return [row(gpu_linear.OWN, gate=ours), row(gpu_linear.PEER, median_ms=1.5, gate=theirs)]

    assert gpu_linear.ratio_of(rows("green", "green")) == (1.5, None)
    assert gpu_linear.ratio_of(rows("green", "unchecked")) == (1.5, None)
    for ours, theirs in (("red", "green"), ("green", "red")):
        ratio, reason = gpu_linear.ratio_of(rows(ours, theirs))
        assert ratio is None and "no speed-up counts" in reason
    assert "took no part" in gpu_linear.ratio_of([])[1]


def test_without_a_gpu_its_bars_are_open_with_the_reason_and_fail_nothing(tmp_path):
    cases = [case for case in targets.cases(Options()) if case.name.startswith("bar-gpu")]
    run = Run(Options(), Store(tmp_path / "x", HEADER), Plain(cases, quiet=True), machine=Limits())
    outcome = run.all(cases)
    assert len(outcome.rows) >= 10
    for judged in outcome.rows:
        assert (judged.status, judged.verdict, judged.measured) == ("refused", "not measured", None)
        assert "needs --device cuda" in judged.reason
        assert judged.bar in summary(judged)
    assert outcome.status() == 0 and not outcome.missed
    assert not any(case.needs for case in cases)


def test_verdicts_are_in_the_file_and_stay_there_when_it_is_continued(tmp_path):
    options = Options(level="quick", budget_s=0.0)
    cases = [case for case in targets.cases(options) if case.name.startswith("bar-overhead")][:1]
    Run(options, Store(tmp_path / "x", HEADER), Plain(cases, quiet=True), machine=Limits()).all(cases)
    first = read(tmp_path / "x")
    judged = [r for r in first.rows if r.verdict]
    assert len(judged) == 3 and {r.case for r in judged} == {cases[0].name}
    earlier = resumable(tmp_path / "x", HEADER)
    again = Run(
        options,
        Store(tmp_path / "x", HEADER, earlier=earlier),
        Plain(cases, quiet=True),
        rows=earlier.rows,
        finished=sorted(earlier.finished),
        machine=Limits(),
    ).all(cases)
    assert [r.to_json() for r in again.rows] == [r.to_json() for r in first.rows]
    assert [r.to_json() for r in read(tmp_path / "x").rows] == [r.to_json() for r in first.rows]
