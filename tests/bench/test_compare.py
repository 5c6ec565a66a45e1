"""Two files side by side: a change is what noise cannot explain, and times are compared on the same machine only."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyheads.bench.compare import compare
from manyheads.bench.row import Row
from manyheads.bench.store import Results, read
from manyheads.cli.compare import lines

RESULTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.jsonl"))
HERE = {"cpu_model": "this", "threads": 2, "torch": "2.13.0"}


def row(ms=10.0, provider="manyheads", case="causal-64", spread=0.01, **more):
    values = {"p20_ms": ms * (1 - spread), "p80_ms": ms * (1 + spread), "gate": "green", "error": 1e-7, "seed": 1}
    return Row("masks", case, provider, median_ms=ms, **{**values, **more})


def results(*rows, **env):
    return Results({"environment": {**HERE, **env}}, list(rows))


def only(old, new):
    (change,) = compare(results(old), results(new)).changes
    return change


@pytest.mark.parametrize(
    ("new", "spread", "verdict"),
    [
        (10.0, 0.01, "within noise"),
        (10.2, 0.0, "within noise"),
        (11.0, 0.01, "slower"),
        (9.0, 0.01, "faster"),
        (11.0, 0.10, "within noise"),
        (13.0, 0.05, "slower"),
    ],
)
def test_a_change_is_one_that_the_spreads_do_not_explain(new, spread, verdict):
    change = only(row(spread=spread), row(new, spread=spread))
    assert change.verdict == verdict
    assert change.times.middle == pytest.approx(new / 10)
    assert change.times.low <= change.times.middle <= change.times.high


def test_an_overlap_of_noisy_rows_is_told_apart():
    assert only(row(spread=0.3, noisy=True), row(12.0)).verdict == "noisy"


def test_the_drift_of_unchanged_peers_is_noise_for_all():
    def run(scale, ours):
        peers = [row(10 * scale, "sdpa", f"case-{i}", version="2.13") for i in range(6)]
        return results(*peers, row(ours, case="case-0"))

    quiet, drifting = compare(run(1.0, 10), run(1.0, 11)), compare(run(1.0, 10), run(1.15, 11))
    assert [c.new.provider for c in quiet.of("slower")] == ["manyheads"] and quiet.drift == 0.03
    assert drifting.drift == pytest.approx(0.15) and not drifting.of("slower")


def test_an_upgraded_peer_says_nothing_about_the_machine():
    old = [row(10, "x-transformers", f"c{i}", version="1") for i in range(9)]
    new = [row(20, "x-transformers", f"c{i}", version="2") for i in range(9)]
    found = compare(results(*old), results(*new))
    assert found.drift == 0.03 and len(found.of("slower")) == 9
    assert found.changes[0].remarks == ("version 1 -> 2",)


def test_between_machines_times_are_counted_in_units_of_a_peer():
    old = results(row(10), row(20, "sdpa"), row(8, case="alone"))
    new = results(row(3), row(6, "sdpa"), row(1, case="alone"), cpu_model="that")
    found = compare(old, new)
    assert not found.same_machine and found.environment == {"cpu_model": ("this", "that")}
    assert [(c.new.case, c.new.provider, c.verdict) for c in found.changes] == [
        ("causal-64", "manyheads", "within noise"),
        ("causal-64", "sdpa", "not timed"),
        ("alone", "manyheads", "not timed"),
    ]
    slower = compare(old, results(row(9), row(6, "sdpa"), threads=16)).of("slower")
    assert slower[0].times.middle == pytest.approx(3.0)
    assert any("absolute times do not compare" in line for line in lines(found))


def test_a_red_row_is_no_measure_between_machines():
    new = results(row(1, gate="red"), row(20, "sdpa"), cpu_model="that")
    assert not compare(results(row(10), row(20, "sdpa")), new).of("faster")


@pytest.mark.parametrize(
    ("old", "new", "remark"),
    [
        ({}, {"gate": "red"}, "gate was green, is red"),
        ({}, {"error": 1e-5}, "error 1.0e-07 -> 1.0e-05"),
        ({"peak_mib": 100.0}, {"peak_mib": 150.0}, "memory 100 -> 150 MiB"),
        ({}, {"status": "failed", "reason": "RuntimeError: no"}, "was measured, is failed (RuntimeError: no)"),
    ],
)
def test_what_else_changed_is_told(old, new, remark):
    assert only(row(**old), row(**new)).remarks == (remark,)


@pytest.mark.parametrize(("field", "old", "new"), [("error", 1e-7, 1.2e-7), ("peak_mib", 100.0, 95.0)])
def test_what_is_the_same_again_is_not_told(field, old, new):
    assert only(row(**{field: old}), row(**{field: new})).remarks == ()


def test_a_bar_is_known_by_its_words_and_tells_its_verdict():
    def bar(case, verdict, **more):
        return Row("targets", case, "manyheads", bar="dense forward", verdict=verdict, **more)

    (change,) = compare(results(bar("dense", "met")), results(bar("bar-dense", "missed", device="cpu"))).changes
    assert change.remarks == ("bar was met, is missed",)


def test_rows_that_came_and_went():
    found = compare(results(row(case="old"), row()), results(row(), row(case="new"), row(cache="cold")))
    assert [r.case for r in found.vanished] == ["old"]
    assert [(r.case, r.cache) for r in found.appeared] == [("new", None), ("causal-64", "cold")]


def test_rows_of_the_first_version_meet_their_successors():
    old = row(shape="1x8x64x64", dtype="float32")
    new = old.replace(device="cpu", threads=2, cache="warm", layout="mha", version="0.2")
    assert compare(results(old), results(new)).changes


@pytest.mark.parametrize(
    ("ours", "theirs", "limit", "status"),
    [
        (12.0, 10.0, None, 0),
        (12.0, 10.0, 10.0, 1),
        (12.0, 10.0, 30.0, 0),
        (10.0, 30.0, 10.0, 0),
        (8.0, 10.0, 0.0, 0),
    ],
)
def test_only_our_own_slowness_fails(ours, theirs, limit, status):
    found = compare(results(row(10), row(10, "sdpa")), results(row(ours), row(theirs, "sdpa")))
    assert found.status(limit) == status


def test_a_result_that_broke_fails_however_fast():
    broke = compare(results(row(10)), results(row(1, gate="red")))
    assert broke.status(50.0) == 1 and broke.status(None) == 0
    assert compare(results(row(10, gate="red")), results(row(10, gate="red"))).status(50.0) == 0


def test_the_lines_name_the_largest_changes_first_and_are_few():
    old = [row(10, case=f"case-{i}") for i in range(30)]
    new = [row(20 + i, case=f"case-{i}") for i in range(30)]
    text = lines(compare(results(*old), results(*new)), 5)
    assert text[0] == "compared: 30 rows by their times: 30 slower"
    assert text[1] == "slower: 30" and "case-29: manyheads; 4.90x the time" in text[2]
    assert text[-1] == "  and 25 more (--all lists them)"
    assert len(text) == 8


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_a_file_equals_itself(path):
    found = compare(read(path), read(path))
    assert len(found.changes) == len(read(path).rows)
    assert not found.appeared and not found.vanished and not found.environment
    assert not found.of("faster") and not found.of("slower")
    assert not any(change.remarks for change in found.changes)
