"""Suite ``linear``: sides agree with float64 before their time counts, and bars judge what was measured."""

from __future__ import annotations

import pytest
import torch

from manyheads.bench.row import Row
from manyheads.bench.suite import Options, load
from manyheads.bench.suites import linear, linear_bars
from manyheads.bench.suites.linear import DENSE, OURS, SDPA, Shape
from tests.bench.test_suites import Context

SMALL = Shape(130, heads=2, width=16, seed=5)


def row(provider=OURS, ms=1.0, **more):
    return Row("linear", "c", provider, **{"median_ms": ms, "gate": "green", "error": 1e-7, **more})


def named(bars_, start):
    (found,) = [bar for bar in bars_ if bar.name.startswith(start)][:1]
    return found


@pytest.mark.parametrize("kind", linear.DECAYS)
def test_every_recurrence_is_right_and_has_a_time(kind):
    case = linear.recurrence(kind, SMALL)
    rows = {r.provider: r for r in case.run(Context())}
    assert set(rows) == set(case.providers) and rows[OURS].gate == "green" and rows[OURS].median_ms > 0
    assert rows[SDPA].gate == "unchecked" and rows[SDPA].ratio is None
    if (fla := rows.get("fla")) is not None and fla.status == "measured":
        assert fla.gate == "green" and rows[OURS].baseline == "fla"


@pytest.mark.filterwarnings("ignore")  # a peer uses what torch has renamed
@pytest.mark.parametrize(
    "case",
    [
        linear.favor("causal", SMALL),
        linear.favor("full", SMALL),
        linear.parallax(SMALL),
        linear.parallax(Shape(130, heads=2, width=16, dtype="bfloat16")),
        linear.local_linear(SMALL),
    ],
    ids=lambda case: case.name,
)
def test_every_other_mechanism_is_right_and_has_a_time(case):
    rows = {r.provider: r for r in case.run(Context())}
    assert rows[OURS].gate == "green" and rows[OURS].median_ms > 0
    assert "performer" not in rows or rows["performer"].gate == "lossy" or rows["performer"].status == "refused"


def test_a_wrong_result_is_red_and_has_no_ratio(monkeypatch):
    right = linear.ours

    def wrong(kind, made, *, backend="auto"):
        out = right(kind, made, backend=backend)
        return out + 1e-3 if backend == "auto" and out.dtype == torch.float32 else out

    monkeypatch.setattr(linear, "ours", wrong)
    rows = linear.recurrence("token", SMALL).run(Context())
    assert next(r for r in rows if r.provider == OURS).gate == "red"
    assert linear_bars._ratio(rows, SDPA)[0] is None


def test_a_step_is_measured_beside_dense_decoding():
    rows = {r.provider: r for r in linear.decoding(SMALL).run(Context())}
    assert all(r.phase == "step" and r.median_ms > 0 for r in rows.values()) and set(rows) == {OURS, SDPA, "products"}


def test_what_is_not_installed_says_so(monkeypatch):
    def missing(kind, made):
        raise ImportError("fla")

    monkeypatch.setattr(linear, "_fla", missing)
    rows = {r.provider: r for r in linear.recurrence("token", SMALL).run(Context())}
    assert rows["fla"].status == "refused" and "flash-linear-attention is not installed" in rows["fla"].reason
    assert rows[OURS].median_ms > 0


def test_the_suite_has_each_kind_at_each_length():
    cases = load("linear").cases(Options(level="default"))
    assert len({case.name for case in cases}) == len(cases)
    for kind in linear.DECAYS:
        count = len(linear.LENGTHS["default"]) if kind in linear.COMPARED else 1
        assert sum(case.name.startswith(f"scan-{kind}-") for case in cases) == count


@pytest.mark.parametrize(("theirs", "verdict"), [(2.0, "met"), (1.9, "missed"), (None, "not measured")])
def test_a_peer_that_is_not_there_is_no_miss(theirs, verdict):
    bar = named(linear_bars.made(Options()), "bar-scan-fla-token-8192")
    fla = row("fla", theirs) if theirs else Row("linear", "c", "fla", status="refused", reason="not installed")
    (judged,) = bar.judge([[row(), fla]])
    assert judged.verdict == verdict and (theirs or "not installed" in judged.note)


def test_dense_is_judged_twice_and_red_counts_for_nothing():
    bar = named(linear_bars.made(Options()), "bar-scan-dense-16384")
    sides = [row(DENSE, 20.0, gate="unchecked"), row(SDPA, 24.0, gate="unchecked")]
    assert [r.verdict for r in bar.judge([[row(), *sides]])] == ["met", "missed"]
    assert {r.verdict for r in bar.judge([[row(gate="red", error_limit=1e-9), *sides]])} == {"not measured"}


def test_time_per_token_is_compared_over_lengths():
    bar = named(linear_bars.made(Options()), "bar-scan-lengths")
    times = {2048: 2.4, 4096: 4.0, 8192: 8.0}
    rows = [row(ms=ms, length=n) for n, ms in times.items()]
    early, late = bar.judge([rows])
    assert (early.verdict, late.verdict) == ("met", "met") and early.measured == pytest.approx(1.2)
    assert bar.judge([[*rows, row(ms=25.0, length=16_384)]])[0].verdict == "missed"


def test_parallax_is_held_to_the_faster_dense_attention():
    bar = named(linear_bars.made(Options()), "bar-parallax")
    found = bar.judge([[row(ms=2.4), row(DENSE, 1.0, gate="unchecked"), row(SDPA, 2.0, gate="unchecked")]])
    assert [(r.verdict, round(r.measured, 3)) for r in found] == [("met", 2.4)]


def test_a_step_must_be_fast_and_even():
    bar = named(linear_bars.made(Options()), "bar-step")
    late = [row(ms=1.0), row(SDPA, 31.0, gate="unchecked"), row("products", 40.0, gate="unchecked")]
    assert [r.verdict for r in bar.judge([[row(ms=1.0)], late])] == ["met", "met"]
    assert [r.verdict for r in bar.judge([[row(ms=0.5)], late])] == ["met", "missed"]


def test_peak_memory_is_measured_in_its_own_process():
    peak = linear_bars.peak_of("scan", 2048)
    assert 0 <= peak.beyond_mib < 64
