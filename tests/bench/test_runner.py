"""The runner records every case, keeps what it has when it is stopped, and says how it went."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import pytest

from manyheads.bench.display import Plain
from manyheads.bench.limits import Limits
from manyheads.bench.row import Row
from manyheads.bench.runner import Outcome, Run
from manyheads.bench.store import Store, read
from manyheads.bench.suite import Case, Options

HEADER = {"environment": {}, "options": {}}


def started(out, cases, **more):
    return Run(Options(), Store(out, HEADER), Plain(cases, quiet=True), machine=Limits(), **more)


def case(name, run=None):
    return Case("masks", name, run or (lambda c: [Row("masks", name, "manyheads", median_ms=1.0)]))


def test_all_cases_are_recorded_in_order(tmp_path):
    cases = [case(name) for name in "abc"]
    outcome = started(tmp_path / "x", cases).all(cases)
    assert [r.case for r in outcome.rows] == list("abc")
    assert read(tmp_path / "x").rows == outcome.rows
    assert outcome.status() == 0


def test_a_case_that_breaks_is_a_row_and_the_others_run(tmp_path):
    def broken(context):
        raise RuntimeError("no such op")

    cases = [case("a", broken), case("b")]
    outcome = started(tmp_path / "x", cases).all(cases)
    assert [(r.status, r.reason) for r in outcome.rows] == [
        ("failed", "RuntimeError: no such op"),
        ("measured", None),
    ]
    assert outcome.status() == 1


def test_a_case_asked_for_twice_is_run_once(tmp_path):
    ran = []
    inner = case("inner", lambda c: ran.append(1) or [Row("masks", "inner", "manyheads")])
    outer = [case("x", lambda c: c.rows(inner)), case("y", lambda c: c.rows(inner)), inner]
    started(tmp_path / "x", outer).all(outer)
    assert ran == [1]


def test_finished_cases_are_not_run_again(tmp_path):
    ran = []
    cases = [case(name, lambda c, name=name: ran.append(name) or [Row("masks", name, "manyheads")]) for name in "abc"]
    earlier = [Row("masks", "a", "manyheads"), Row("masks", "b", "manyheads")]
    outcome = started(tmp_path / "x", cases, rows=earlier, finished=[("masks", "a"), ("masks", "b")]).all(cases)
    assert ran == ["c"]
    assert [r.case for r in outcome.rows] == list("abc")


def test_a_finished_case_without_rows_is_finished(tmp_path):
    ran = []
    cases = [case("a", lambda c: ran.append(1) or [])]
    started(tmp_path / "x", cases, finished=[("masks", "a")]).all(cases)
    assert not ran


@pytest.mark.parametrize(("verdict", "status"), [("met", 0), ("missed", 1), ("not measured", 1)])
def test_only_a_bar_that_is_met_passes(verdict, status):
    outcome = Outcome([Row("targets", "dense", "manyheads", verdict=verdict)])
    assert outcome.status() == status
    assert outcome.status(verdict=False) == 0


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_keeps_its_rows(tmp_path, name, status):
    out = tmp_path / "run.jsonl"
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from manyheads.bench.display import Plain
        from manyheads.bench.row import Row
        from manyheads.bench.runner import Run
        from manyheads.bench.store import Store
        from manyheads.bench.suite import Case, Options
        from manyheads.bench.limits import Limits

        def quick(name):
            return Case("masks", name, lambda c: [Row("masks", name, "manyheads", median_ms=1.0)])

        def slow(context):
            print("waiting", flush=True)
            time.sleep(60)

        cases = [quick("a"), quick("b"), Case("masks", "slow", slow), quick("c")]
        store = Store(Path({str(out)!r}), {{}})
        run = Run(Options(), store, Plain(cases, quiet=True), machine=Limits())
        sys.exit(run.all(cases).status())
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(getattr(__import__("signal"), name))
    assert process.wait(timeout=60) == status
    process.stdout.close()
    found = read(out)
    assert [r.case for r in found.rows] == ["a", "b"]
    assert found.notes == ["interrupted after 2 of 4 cases"]
