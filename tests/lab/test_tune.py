"""Tuning: which configuration wins, what a run that was broken off keeps, and what the commands say."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace

import pytest

from manyheads.cli import main
from manyheads.cli import tune as command
from manyheads.engine import configs
from manyheads.engine.configs import Config
from manyheads.lab import search
from manyheads.lab.search import Place
from manyheads.lab.tune import HEAT, MARGIN, Journal, tune

PLACE = Place("forward", "sm_90", 64, 2, "plain")
KEYS = Place("keys_backward", "sm_90", 64, 2, "plain")
FIRST = Config(64, 64, 4, 2)
OTHERS = [Config(bm, bn, warps, 2) for bm in (32, 64, 128) for bn in (32, 64, 128) for warps in (4, 8)]


@dataclass
class Fake:
    """Times that a rule gives, and failures where it says so."""

    speed: dict = field(default_factory=dict)
    wrong: tuple = ()
    timed: list = field(default_factory=list)
    stop_after: int = 10**9

    def check(self, place, config):
        return "wrong: out" if config in self.wrong else ""

    def times(self, place, some, *, final=False):
        if len(self.timed) >= self.stop_after:
            raise KeyboardInterrupt
        self.timed.append((place, list(some), final))
        return [self.ms(config) for config in some]

    def ms(self, config):
        slower = 1.0
        for switch in ("exp", "rescale", "persistent"):
            if value := getattr(config, switch):
                slower *= self.speed.get((switch, value), 1.5)
        plain = replace(config, exp=0, rescale=0, persistent=0, source="resources")
        return self.speed.get(plain, 2.0) * slower


def tuned(bench, journal=None, places=(PLACE,), legal=OTHERS, incumbent=FIRST):
    return tune(
        places, bench, incumbents={p.key: incumbent for p in places}, legal=lambda place: legal,
        journal=journal or Journal(None, {}), source="a GPU",
    )  # fmt: skip


def test_the_fastest_wins_and_says_where_it_was_measured():
    fast = Config(128, 32, 8, 2)
    assert tuned(Fake({FIRST: 1.0, fast: 0.9}))[PLACE.key] == replace(fast, source="a GPU")


def test_a_gain_within_the_margin_changes_nothing():
    close = {FIRST: 1.0, Config(128, 32, 8, 2): 1.0 - MARGIN * 0.9}
    assert tuned(Fake(close))[PLACE.key] == replace(FIRST, source="a GPU")


def test_a_wrong_result_never_wins_however_fast():
    fast, right = Config(128, 32, 8, 2), Config(32, 64, 4, 2)
    bench = Fake({FIRST: 1.0, fast: 0.1, right: 0.8}, wrong=(fast,))
    assert tuned(bench)[PLACE.key] == replace(right, source="a GPU")
    assert not any(fast in some for _, some, _ in bench.timed)


def test_switches_are_kept_one_by_one_where_they_pay_and_only_forward():
    bench = Fake({FIRST: 1.0, ("exp", 4): 0.9, ("exp", 1): 0.95, ("rescale", 8): 0.99, ("persistent", 2): 0.5})
    assert tuned(bench)[PLACE.key] == replace(FIRST, exp=4, persistent=2, source="a GPU")
    assert tuned(bench, places=(KEYS,))[KEYS.key] == replace(FIRST, source="a GPU")


def test_assembly_of_nvidia_is_not_tried_on_amd():
    place = replace(PLACE, arch="gfx942")
    bench = Fake({("exp", 4): 0.1})
    tuned(bench, places=(place,))
    assert not any(c.exp == 4 for _, some, _ in bench.timed for c in some)


def test_every_heat_and_final_includes_the_incumbent_and_every_legal_one_is_timed():
    bench = Fake()
    tuned(bench)
    heats = [some for _, some, final in bench.timed if not final]
    assert all(some[0] == FIRST and len(some) <= HEAT + 1 for some in heats)
    assert {c for some in heats for c in some} == {*OTHERS}
    finals = [some for _, some, final in bench.timed if final]
    assert all(some[0] == FIRST for some in finals)


def test_an_incumbent_that_fails_is_replaced():
    bench = Fake({Config(32, 32, 4, 2): 0.5}, wrong=(FIRST,))
    assert tuned(bench)[PLACE.key] == replace(Config(32, 32, 4, 2), source="a GPU")


def test_a_run_goes_on_where_it_was_broken_off(tmp_path):
    path = tmp_path / "t.jsonl"
    fast = Config(128, 32, 8, 2)
    speed = {FIRST: 1.0, fast: 0.5}
    whole = Fake(speed)
    expected = tuned(whole, places=(PLACE, KEYS))
    for stop in range(1, len(whole.timed)):
        broken = Fake(speed, stop_after=stop)
        with pytest.raises(KeyboardInterrupt):
            tuned(broken, Journal(path, {"gpu": "x"}), places=(PLACE, KEYS))
        with open(path, "a") as file:
            file.write('{"kind": "tri')
            file.write("\n")
        rest = Fake(speed)
        assert tuned(rest, Journal(path, {"gpu": "x"}, resume=True), places=(PLACE, KEYS)) == expected
        assert len(rest.timed) <= len(whole.timed) - stop + 1


def test_a_run_on_another_device_is_not_continued(tmp_path):
    path = tmp_path / "t.jsonl"
    Journal(path, {"gpu": "x", "tokens": 8})
    with pytest.raises(ValueError, match=r"another gpu \('x' there, 'y' here\)"):
        Journal(path, {"gpu": "y", "tokens": 8}, resume=True)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="no journal"):
        Journal(path, {"gpu": "x"}, resume=True)


def test_a_measured_table_is_written_and_used(tmp_path, monkeypatch, capsys):
    fast = Config(32, 32, 4, 2)
    monkeypatch.setattr(search, "legal_configs", lambda place, memory: [search.Found(fast, None, 0.0)])
    monkeypatch.setattr(command, "Memory", lambda: None)
    request = command.Request(("keys_backward",), ("sm_90",), (64,), ("bfloat16",), ("plain",), out=tmp_path / "t.tsv")
    places = command.places_of(request)
    bench = Fake({fast: 0.5})
    assert command.measured(places, request, bench, {"gpu": "A GPU"}) == 0
    out = capsys.readouterr().out
    assert "1 rows measured, 1 changed" in out and configs.VARIABLE in out
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "t.tsv"))
    configs.table.cache_clear()
    try:
        assert configs.choose(*places[0].key) == replace(fast, source="A GPU")
    finally:
        configs.table.cache_clear()
    again = Fake({fast: 0.5})
    command.measured(places, replace(request, resume=True), again, {"gpu": "A GPU"})
    assert again.timed == []


def test_rows_stand_in_for_the_table_inside_the_block_only():
    key = KEYS.key
    before = configs.choose(*key)
    with configs.using({key: FIRST}):
        with configs.using({key: OTHERS[0]}):
            assert configs.choose(*key) == OTHERS[0]
        assert configs.choose(*key) == FIRST
    assert configs.choose(*key) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kernel", "foward"), "unknown kernel 'foward': did you mean 'forward'?"),
        (("--arch", "sm_91"), "unknown architecture 'sm_91'"),
        (("--width", "96"), "width: expected one of 64, 128, 256, got 96"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--kind", "plane"), "unknown kind 'plane': did you mean 'plain'?"),
        (("--resources",), "name the table to write with --out"),
    ],
)
def test_bad_input_is_one_clear_error(capsys, arguments, words):
    assert main(["tune", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_a_gpu_the_command_says_what_works_without_one(capsys, device):
    if device != "cpu":
        pytest.skip("there is a GPU")
    assert main(["tune"]) == 2
    assert "--dry-run and --resources need none" in capsys.readouterr().err


def test_a_dry_run_lists_legal_configurations_and_how_many(monkeypatch, capsys, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = [Config(64, 32, 4, 2), Config(128, 128, 4, 2)]
    monkeypatch.setattr(search, "candidates", lambda place: few)
    rows = ("--kernel", "forward", "--arch", "sm_80", "--width", "128", "--dtype", "bf16", "--kind", "plain")
    assert main(["tune", "--dry-run", *rows]) == 0
    out = capsys.readouterr().out
    assert "forward sm_80 128 bf16 plain: 1 legal of 2 compiled" in out
    assert "64x32" in out and "128x128" not in out
    assert (tmp_path / "manyheads" / "kernels.jsonl").read_text().count("\n") == 2


def test_candidates_whose_accumulators_find_no_room_are_not_compiled():
    shapes = {(c.bm, c.bn, c.warps) for c in search.candidates(Place("keys_backward", "sm_90", 256, 2, "plain"))}
    assert (64, 128, 4) not in shapes and (32, 64, 8) in shapes


def test_the_engine_is_checked_and_timed_with_the_configuration_that_is_asked_about(device, monkeypatch):
    if device != "cpu" or importlib.util.find_spec("triton") is None:
        pytest.skip("runs in the interpreter")
    from manyheads.cli.measure import Gpu
    from manyheads.engine.tiled import launch

    if not launch.interpreted():
        pytest.skip("runs in the interpreter")
    place = Place("forward", "sm_90", 64, 4, "plain")
    asked = []
    original = launch._Call.launch

    def noticed(self, kernel, programs, given):
        asked.append((self.config.bm, self.config.bn))
        return original(self, kernel, programs, given)

    monkeypatch.setattr(launch._Call, "launch", noticed)
    bench = Gpu("cpu", tokens=64, programs=1, budget_s=0.0)
    assert bench.check(place, Config(128, 64, 4, 1)) == ""
    assert set(asked) == {(128, 64)}
    times = bench.times(place, [Config(64, 64, 4, 1), Config(32, 32, 4, 1)])
    assert len(times) == 2 and all(t > 0 for t in times)
    assert {(64, 64), (32, 32)} <= set(asked)


def test_recurrences_are_checked_and_timed_with_the_configuration_that_is_asked_about(device, monkeypatch):
    if device != "cpu" or importlib.util.find_spec("triton") is None:
        pytest.skip("runs in the interpreter")
    from manyheads.cli.measure import Gpu
    from manyheads.engine.scan import launch

    asked = []
    original = launch.launch

    def noticed(kernel, programs, arguments, config=None):
        asked.append((kernel.fn.__name__, arguments.get("BX"), arguments.get("BZ")))
        return original(kernel, programs, arguments, config)

    monkeypatch.setattr(launch, "launch", noticed)
    place = Place("mix", "sm_90", 64, 4, "forward")
    bench = Gpu("cpu", tokens=256, programs=1, budget_s=0.0)
    assert bench.check(place, Config(64, 16, 4, 1)) == ""
    assert ("mix", 64, 16) in asked
    assert all(t > 0 for t in bench.times(place, [Config(32, 32, 4, 1)])) and ("mix", 32, 32) in asked


def test_rows_of_every_engine_are_found_with_the_kinds_that_they_have():
    found = command.places_of(command.Request(("carry", "forward"), ("sm_90",), (64,), ("bfloat16",)))
    assert {(p.kernel, p.kind) for p in found} == {
        ("carry", "forward"), ("carry", "backward"),
        ("forward", "plain"), ("forward", "general"), ("forward", "heavy"),
    }  # fmt: skip
    assert command.places_of(command.Request(("carry",), kinds=("sums",))) == []
    for place in (Place("carry", "sm_90", 128, 2, "backward"), Place("mix", "sm_80", 64, 2, "sums")):
        some = search.candidates(place)
        assert 4 < len(some) < 100 and all(config.bm <= place.width for config in some)
        assert {search.case(place, config).kernel for config in some} == {f"scan.{place.kernel}"}
