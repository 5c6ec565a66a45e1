"""Suite ``parallel``: results are judged before times count, and bars follow what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from manyheads.bench.row import Row
from manyheads.bench.suite import Options
from manyheads.bench.suites import parallel, parallel_bars, ranks
from manyheads.bench.suites.ranks import Found, Job
from manyheads.parallel import DEALS, SCHEMES


@dataclass
class Context:
    """A running benchmark without a file."""

    options: Options = field(default_factory=lambda: Options(level="quick", budget_s=0.0))

    def say(self, text):
        """Shows nothing."""


def row(provider="manyheads-ring", **more):
    """A measured row."""
    return Row("parallel", "c", provider, **more)


def test_the_ring_beside_another_package_with_slow_links():
    rows = {r.provider: r for r in parallel.forward("causal", 96, 2, Options(level="quick")).run(Context())}
    ring, ulysses = rows["manyheads-ring-zigzag"], rows["manyheads-ulysses"]
    for each in (ring, ulysses):
        assert each.status == "measured" and each.gate == "green" and each.rounds >= ranks.ROUNDS[0]
        assert each.ranks == 2 and each.imbalance == 1.0
    assert ring.sent_mib == 96 * 8 * 128 * 4 / 2**20  # one block of keys and values, once
    assert ring.overlap is not None and "delay" in ring.note and ulysses.overlap is None
    theirs = rows["yunchang"]
    assert theirs.gate == "green" or "yunchang" in theirs.reason
    assert rows["torch-context-parallel"].status == "refused"
    assert rows["torch-context-parallel"].reason.startswith("does not run on a CPU")


def test_a_process_that_breaks_is_a_failed_row(monkeypatch):
    def broken(job):
        raise RuntimeError("rank 1 of 2: it took too long or was killed")

    monkeypatch.setattr(ranks, "run", broken)
    rows = parallel.schemes("causal", 64, 2, Options(level="quick")).run(Context())
    assert {r.status for r in rows} == {"failed"} and "rank 1 of 2" in rows[0].reason


def test_processes_take_a_gpu_each_or_say_how_many_are_missing(monkeypatch):
    taken = []
    monkeypatch.setattr(ranks, "run", lambda job: taken.append(job) or {})
    context = Context(options=Options(level="quick", device="cuda"))
    for there in (1, 2):
        monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda there=there: there)
        monkeypatch.setattr(parallel.device, "label", lambda name: f"a {name}")
        rows = parallel.schemes("causal", 64, 2, context.options).run(context)
        assert all(r.reason == "takes 2 GPUs, one for each process; this machine has 1" for r in rows)
        assert bool(rows) == (there == 1)
    assert [job.device for job in taken] == ["cuda"]


def test_an_error_in_one_process_names_the_rank():
    problem = parallel._problem(parallel.Causal(), 20, Options())
    with pytest.raises(RuntimeError, match=r"rank \d of 2: ValueError: unknown scheme 'rings'"):
        ranks.run(Job(problem, 2, (("rings", "zigzag"),), seconds=0.0), timeout=120)


def test_a_red_result_has_no_ratio():
    job = Job(parallel._problem(parallel.Causal(), 20, Options()), 2, (("ring", "zigzag"),))
    verdict = {"error": 1.0, "error_norm": 1.0, "error_limit": 1e-6, "gate": "red"}
    made = parallel._row(parallel._base("c", job), ("ring", "zigzag"), Found(ms=(1.0, 2.0, 3.0), verdict=verdict), job)
    assert made.gate == "red" and made.median_ms == 2.0 and made.ratio is None


def test_balance_and_bytes_need_no_process():
    rows = {r.deal: r for r in parallel.balance(4, 600, mixes=2).run(Context())}
    assert set(rows) == set(DEALS) and rows["balanced"].imbalance <= 1.05 < rows["contiguous"].imbalance
    rows = {r.provider: r.sent_mib for r in parallel.volume("window-33", 4, 600).run(Context())}
    assert set(rows) == {f"manyheads-{scheme}" for scheme in SCHEMES}
    assert rows["manyheads-groupcast"] * 3 < rows["manyheads-ring"]


@pytest.mark.parametrize("level", ["quick", "default", "full"])
def test_cases_have_names_of_their_own(level):
    cases = parallel.cases(Options(level=level))
    assert len({case.key for case in cases}) == len(cases)
    if level == "default":
        assert sum(case.seconds for case in cases) <= 90


def test_bars_are_met_or_missed_by_what_was_measured():
    made = parallel_bars.made(Options())
    balance, bytes_, overlap = (next(b for b in made if word in b.name) for word in ("balance", "bytes", "overlap"))
    for value, verdict in ((1.05, "met"), (1.06, "missed")):
        (judged,) = balance.judge([[row(deal="balanced", imbalance=value), row(deal="zigzag", imbalance=2.0)]])
        assert judged.verdict == verdict and "zigzag: 2.00" in judged.note
    for value, verdict in ((10.0, "met"), (11.0, "missed")):
        rows = [row(sent_mib=30.0), row("manyheads-groupcast", sent_mib=value)]
        assert bytes_.judge([rows])[0].verdict == verdict
    for value, verdict in ((0.7, "met"), (0.69, "missed")):
        assert overlap.judge([[row(overlap=value)]])[0].verdict == verdict
    assert overlap.judge([[row(status="refused", reason="no gloo")]])[0].verdict == "not measured"
    assert bytes_.judge([[]])[0].verdict == "not measured"
