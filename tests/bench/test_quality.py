"""The quality suite: equal terms, honest choices, resumable, and claims that can fail."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from manyheads.bench.display import Plain, summary, table
from manyheads.bench.row import Row
from manyheads.bench.runner import Run
from manyheads.bench.store import Store, read, resumable
from manyheads.bench.suite import ASIDE, Options
from manyheads.bench.suites import quality
from manyheads.bench.suites.quality import CLAIMS, MECHANISMS, PLAN, SEEDS, STEPS, Claim, verdict
from manyheads.bench.tasks import TASKS, crew, recall, text
from manyheads.bench.tasks.crew import Job, do_all
from manyheads.bench.tasks.train import Protocol, train
from manyheads.cli import plan
from manyheads.model import parse

QUICK = Options(level="quick")
SMALL = Protocol(3, batch=4, judged=64, width=16, heads=2, depth=1)


@pytest.fixture
def tiny(monkeypatch):
    """The suite with two mechanisms on one task for a few steps, in this process."""
    monkeypatch.setitem(PLAN, "quick", {"states": ("linear", "softmax", "gated-delta")})
    monkeypatch.setattr(quality, "protocol_of", lambda task, level: SMALL)
    monkeypatch.setattr(crew, "cores", lambda: 1)
    monkeypatch.setattr(quality.quality_needle, "MIXERS", {})


def run(path, cases, options=QUICK, earlier=None):
    """The rows of cases, through the runner and a file."""
    store = Store(path, {"options": {}}, earlier=earlier)
    rows = () if earlier is None else earlier.rows
    finished = () if earlier is None else sorted(earlier.finished)
    with Plain(cases, quiet=True) as shown:
        return Run(options, store, shown, rows=rows, finished=finished).all(cases)


def test_it_runs_only_when_it_is_named():
    assert "quality" in ASIDE
    assert not [case for case in plan.plan((), QUICK) if case.suite == "quality"]
    assert {case.suite for case in plan.plan(("quality",), QUICK)} == {"quality"}


@pytest.mark.parametrize("level", list(PLAN))
def test_every_name_in_the_protocol_exists(level):
    assert set(PLAN[level]) == set(STEPS[level]) <= set(TASKS)
    for names in PLAN[level].values():
        assert set(names) <= set(MECHANISMS)
    cases = quality.SUITE.cases(Options(level=level))
    assert len({case.key for case in cases}) == len(cases)
    for text_ in MECHANISMS.values():
        parse(text_)


def test_the_claims_of_the_task_are_judged_at_every_level():
    for level in PLAN:
        judged = {case.name for case in quality.SUITE.cases(Options(level=level)) if case.name.startswith("claims-")}
        assert {"claims-recall", "claims-regression", "claims-bytes"} <= judged
    assert {claim.task for claim in CLAIMS} <= set(TASKS)
    assert all({claim.better, claim.worse} <= set(MECHANISMS) for claim in CLAIMS)


def test_a_chosen_mechanism_leaves_out_claims_about_others():
    cases = plan.plan(("quality",), Options(level="quick", providers=("softmax", "linear")))
    names = [case.name for case in cases]
    assert "recall-softmax-seed-42" in names and not [name for name in names if "gated" in name]
    (claims,) = [case for case in cases if case.name == "claims-recall"]
    assert {case.providers for case in claims.needs} == {("softmax",), ("linear",)}


def test_models_of_a_task_differ_in_the_mixer_only():
    protocol = quality.protocol_of("recall", "quick")
    task = TASKS["recall"]()
    one, other = (protocol.decoder(task, MECHANISMS[name]) for name in ("softmax", "gated-delta"))
    assert one.replace(mixers=other.mixers) == other


def test_a_run_gives_one_score_a_seed_and_hides_those_of_other_rates(tiny, tmp_path):
    outcome = run(tmp_path / "run.jsonl", quality.SUITE.cases(QUICK))
    trained = [row for row in outcome.rows if row.phase == "train"]
    others = [row for row in outcome.rows if row.phase == "other rate"]
    claims = [row for row in outcome.rows if row.bar]
    assert len(trained) == 3 * SEEDS and len(others) == 3 and len(claims) == 1
    for row in trained:
        assert row.status == "measured" and 0 <= row.score <= 1 and row.better == "higher"
        assert row.seed in (42, 43, 44) and len(row.curve) == 3 and row.steps == 3
        assert f"{row.provider}: {row.score:.3g}"[:12] in summary(row)
    for name in ("linear", "softmax"):
        mine = [row for row in trained if row.provider == name]
        assert len({row.learning_rate for row in mine}) == 1
        assert len({row.score for row in mine}) > 1
        (other,) = [row for row in others if row.provider == name]
        assert other.score is None and other.learning_rate != mine[0].learning_rate
        # the rate was chosen on validation examples
        losses = [float(row.note.split()[-1]) for row in (mine[0], other)]
        assert losses[0] <= losses[1]
    assert "accuracy" in table(trained) and claims[0].verdict in ("met", "missed")


def test_with_one_rate_the_seeds_are_trained_together_and_written_one_by_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "protocol_of", lambda task, level: replace(SMALL, rates=(1e-3,)))
    together = []
    real = quality.do_all

    def counted(jobs, say):
        together.append([(job.seed, job.rate) for job in jobs])
        return real(jobs, say)

    monkeypatch.setattr(quality, "do_all", counted)
    cases = quality.models_of("states", "linear", QUICK)
    rows = run(tmp_path / "run.jsonl", cases).rows
    assert together == [[(seed, 1e-3) for seed in (42, 43, 44)]]
    assert [row.seed for row in rows] == [42, 43, 44] and {row.phase for row in rows} == {"train"}
    assert len(read(tmp_path / "run.jsonl").finished) == 3


def test_an_interrupted_run_goes_on_where_it_stopped_with_the_same_numbers(tiny, tmp_path, monkeypatch):
    cases = quality.SUITE.cases(QUICK)
    whole = run(tmp_path / "whole.jsonl", cases).rows
    half = tmp_path / "half.jsonl"
    run(half, [case for case in quality.SUITE.cases(QUICK) if case.name.endswith("42")])
    earlier = resumable(half, {"options": {}})
    trained = []
    real = quality.do_all

    def counted(jobs, say):
        trained.extend(job.seed for job in jobs)
        return real(jobs, say)

    monkeypatch.setattr(quality, "do_all", counted)
    resumed = run(half, quality.SUITE.cases(QUICK), earlier=earlier).rows
    assert sorted(trained) == [43, 43, 43, 44, 44, 44]
    assert sorted(row.to_json() for row in resumed) == sorted(row.to_json() for row in whole)
    assert sorted(row.to_json() for row in read(half).rows) == sorted(row.to_json() for row in whole)


def test_processes_change_no_result():
    protocol = Protocol(2, batch=4, judged=16, depth=1)
    jobs = [Job("states", "linear", protocol, seed, 1e-3) for seed in (1, 2)]
    said = []
    alone = do_all(jobs, workers=1)
    beside = do_all(jobs, said.append, workers=2)
    assert [each._replace(seconds=0) for each in alone] == [each._replace(seconds=0) for each in beside]
    assert alone[0].score != alone[1].score or alone[0].curve != alone[1].curve
    assert said


def test_a_small_model_learns_a_small_task_and_says_how_far_it_is():
    said = []
    task = recall.task(2, 4, 4)
    found = train(task, "softmax", Protocol(150, width=32, heads=2, judged=128), seed=0, rate=5e-3, say=said.append)
    assert found.score > 0.9 > 2 * task.chance - 0.2
    assert found.curve[-1] < 0.3 * found.curve[0]
    assert said[0].startswith("step 1 of 150, loss ") and said[0].endswith("s left")


def test_training_leaves_torch_as_it_was():
    torch.manual_seed(9)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    train(recall.task(2, 2, 4), "linear", Protocol(1, judged=4), seed=0, rate=1e-3)
    assert torch.random.get_rng_state().equal(before) and torch.get_num_threads() == threads


def test_a_model_that_diverges_is_a_failed_row(tiny, tmp_path, monkeypatch):
    found = train(TASKS["states"](), "linear", Protocol(4, judged=4), seed=0, rate=1e30)
    assert math.isnan(found.score) and math.isinf(found.validation)
    monkeypatch.setattr(quality, "protocol_of", lambda task, level: replace(SMALL, rates=(1e30, 1e35)))
    rows = run(tmp_path / "run.jsonl", quality.SUITE.cases(QUICK)).rows
    assert {row.status for row in rows if row.phase in ("train", "other rate")} == {"failed"}
    assert {row.verdict for row in rows if row.bar} == {"not measured"}


def test_what_cannot_be_trained_says_why(monkeypatch, tmp_path):
    (case, *_) = quality.models_of("recall", "linear", QUICK)
    (row,) = run(tmp_path / "a.jsonl", [case], Options(level="quick", device="cuda")).rows
    assert (row.status, row.reason) == ("refused", "models are trained on a CPU only")

    def missing():
        raise OSError("the sources of the standard library are not on this machine")

    monkeypatch.setattr(text, "standard_library", missing)
    (case, *_) = quality.models_of("bytes", "linear", QUICK)
    (row,) = run(tmp_path / "b.jsonl", [case]).rows
    assert row.status == "refused" and "not on this machine" in row.reason


def scored(*scores, better="higher"):
    return [Row("quality", "a", "a", score=s, score_unit="accuracy", better=better) for s in scores]


@pytest.mark.parametrize(
    ("first", "second", "better", "lead", "word"),
    [
        ((0.9, 0.8), (0.5, 0.7), "higher", 0.1, "met"),
        ((0.9, 0.7), (0.5, 0.7), "higher", 0.0, "missed"),
        ((0.9, 0.6), (0.5, 0.7), "higher", -0.1, "missed"),
        ((0.2, 0.3), (0.5, 0.7), "lower", 0.3, "met"),
        ((0.5, 0.7), (0.2, 0.3), "lower", -0.4, "missed"),
        ((1.0, 1.0), (1.0, 1.0), "higher", 0.0, "missed"),
    ],
)
def test_a_claim_holds_if_every_seed_is_ahead(first, second, better, lead, word):
    claim = Claim("recall", "a", "b", "a is better than b")
    row = verdict(claim, scored(*first, better=better), scored(*second, better=better))
    assert row.measured == pytest.approx(lead) and row.verdict == word
    assert row.target == ">= 0.01 accuracy" and "a is better than b" in row.bar


def test_a_claim_about_a_model_that_was_not_trained_is_not_judged():
    none = [row.replace(score=None) for row in scored(0.1)]
    assert verdict(Claim("recall", "a", "b", "words"), none, scored(0.1)).verdict == "not measured"


def test_rows_with_a_curve_come_back_as_they_went():
    row = Row("quality", "a", "softmax", score=0.5, score_unit="accuracy", curve=(1.0, 0.25))
    assert Row.from_dict(json.loads(row.to_json())) == row
    assert hash(row)
