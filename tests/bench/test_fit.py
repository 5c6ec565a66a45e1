"""Efficiencies are fitted from rows that may be believed, and predictions from them are judged by other rows."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from manyheads.bench.limits import Limits
from manyheads.bench.planning.fit import error_table, fit, kind_of, validate, work_of
from manyheads.bench.planning.model import unit_times
from manyheads.bench.redraw import problem_of
from manyheads.bench.row import Row
from manyheads.bench.store import Results, read
from manyheads.bench.workload import Problem
from manyheads.mask import Causal, Full, Window, parse
from manyheads.mask.longca import longca

COMMITTED = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.jsonl"))
RATES = {"matrix": {"float32": 100.0, "bfloat16": 400.0}, "copy": 10.0, "exp_rate": 5.0, "threads": 2}


def row(mask, length, efficiency, provider="sdpa", **more):
    """A row whose time is that of a perfect kernel over an efficiency."""
    values = {"dtype": "float32", "phase": "forward", "gate": "green", "rounds": 9, "noisy": False, **more}
    values = {"shape": f"1x4x{length}x32", "mask": mask, "length": length, "status": "measured", **values}
    made = Row("masks", f"{mask}-{length}", provider, **values)
    problem = problem_of(made)
    work = work_of(provider, problem)
    perfect = max(unit_times(work, Limits.from_dict(RATES), values["dtype"]).values())
    return made.replace(median_ms=perfect / efficiency, pairs=work.pairs)


def results(*rows):
    """A results file in memory."""
    return Results({"limits": RATES, "started": "2026-01-02T03:04:05"}, list(rows))


def test_an_efficiency_is_the_median_share_of_the_perfect_speed_and_its_spread():
    made = results(*(row("causal", n, e) for n, e in ((100, 0.3), (200, 0.4), (300, 0.5), (400, 0.6), (500, 0.9))))
    found = fit(made).efficiency(["sdpa"], "float32", "forward", "whole")
    assert found.value == pytest.approx(0.5) and found.rows == 5
    assert (found.low, found.high) == (pytest.approx(0.38), pytest.approx(0.66))
    assert "5 rows of results (2026-01-02): sdpa, float32, forward, whole" in found.source


def test_few_rows_get_a_wide_range():
    found = fit(results(row("causal", 100, 0.5))).efficiency(["sdpa"], "float32", "forward", "whole")
    assert (found.value, found.low, found.high) == tuple(pytest.approx(x) for x in (0.5, 0.4, 0.625))


@pytest.mark.parametrize(
    "spoilt",
    [
        {"noisy": True},
        {"gate": "red"},
        {"gate": "unchecked"},
        {"status": "refused", "reason": "cannot"},
        {"cache": "cold"},
        {"threads": 1},
        {"device": "NVIDIA H200"},
        {"provider": "somebody"},
    ],
)
def test_rows_that_cannot_be_believed_are_left_out(spoilt):
    good = row("causal", 100, 0.5)
    bad = row("causal", 200, 0.1).replace(**spoilt)
    assert [s.row for s in fit(results(good, bad)).samples] == [good]


def test_coarser_groups_stand_in_and_say_so():
    known = fit(results(row("causal", 200, 0.5), row("causal & window(30)", 200, 0.2, "manyheads")))
    assert known.efficiency(["sdpa"], "bfloat16", "forward", "whole").value == pytest.approx(0.5)
    assert "any dtype" in known.efficiency(["sdpa"], "bfloat16", "forward", "whole").source
    assert "any kind" in known.efficiency(["sdpa"], "float32", "forward", "masked").source
    assert "any phase" in known.efficiency(["sdpa"], "float32", "backward", "whole").source
    assert known.efficiency(["flex"], "float32", "forward", "whole") is None
    first = known.efficiency(["manyheads-blocked", "manyheads"], "float32", "forward", "masked")
    assert first.value == pytest.approx(0.2)


def test_decoding_is_known_from_decoding_only():
    step = row("causal", 1, 0.5, shape="1x4x1:9000x32")
    known = fit(results(row("causal", 200, 0.5)))
    assert known.efficiency(["sdpa"], "float32", "forward", "decode") is None
    both = fit(results(row("causal", 200, 0.9), step))
    assert both.efficiency(["sdpa"], "float32", "forward", "decode").value == pytest.approx(0.5)
    assert both.efficiency(["sdpa"], "float32", "forward", "masked").value == pytest.approx(0.9)


def test_a_row_is_predicted_without_the_rows_of_its_mask_and_length():
    made = results(row("causal", 100, 0.5), row("causal", 100, 0.5, dtype="bfloat16"), row("causal", 300, 0.25))
    factors = {(c.row.length, c.row.dtype): c.factor for c in validate(made)}
    assert factors[100, "float32"] == pytest.approx(2.0)  # knows the row of 300 tokens only
    assert factors[300, "float32"] == pytest.approx(2.0)
    table = {what: (n, worst) for what, n, _, _, worst in error_table(validate(made))}
    assert table["all"] == (3, pytest.approx(2.0))


def test_a_perfectly_regular_machine_is_predicted_perfectly():
    masks = ("causal", "causal & window(40)", "window(9)", "full")
    made = results(*(row(m, n, 0.4, p) for m in masks for n in (150, 260) for p in ("manyheads", "sdpa", "flex")))
    assert {round(check.factor, 6) for check in validate(made)} == {1.0}


def test_problems_are_rebuilt_from_rows_and_drawn_masks_checked_by_their_pairs():
    case = longca("causal_document", 700, seed=5)
    made = Row("masks", "causal_document-700-float32", "sdpa", shape="2x6:3x700x32:16", dtype="float32",
               mask=case.mask.text, seed=5, pairs=12 * case.area)  # fmt: skip
    found = problem_of(made)
    assert found.mask == case.mask and (found.batch, found.heads, found.hkv, found.dv) == (2, 6, 3, 16)
    assert problem_of(made.replace(pairs=5)) is None
    assert problem_of(made.replace(seed=6)) is None
    assert problem_of(made.replace(case="other-700")) is None
    assert problem_of(made.replace(shape="unknown")) is None


def test_kinds_of_problems():
    assert kind_of(Problem(Full(), 9)) == kind_of(Problem(Causal(), 9)) == "whole"
    assert kind_of(Problem(Causal(), 9, 12)) == kind_of(Problem(Window(3), 9)) == "masked"
    assert kind_of(Problem(Causal(), 1, 9)) == "decode"


def test_providers_visit_what_they_visit():
    windowed, causal = Problem(parse("causal & window(64)"), 1024), Problem(Causal(), 1024)
    assert work_of("sdpa", windowed).computed == 8 * 1024 * 1024
    assert work_of("sdpa", causal).computed < 0.7 * 8 * 1024 * 1024
    ours, flex = (work_of(name, windowed).computed for name in ("manyheads", "flex"))
    assert windowed.mask.tiles(1024, heads=8).pairs < ours and flex < 8 * 1024 * 1024 / 3


def test_a_file_without_limits_is_refused():
    with pytest.raises(ValueError, match="holds no machine limits"):
        fit(Results({}, []))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_results_are_predicted_within_the_errors_that_the_docs_claim(path):
    checks = validate(read(path))
    if len(checks) < 20:
        pytest.skip("too few rows to judge a model by")
    factors = [check.factor for check in checks]
    assert statistics.median(factors) < 1.3
    assert statistics.quantiles(factors, n=10)[-1] < 2
