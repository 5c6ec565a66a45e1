"""The gate: shipped kernels keep the limits of four targets and need what the table says."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manyheads.cli import main
from manyheads.engine import configs
from manyheads.engine.gather import launch as of_lists_launch
from manyheads.engine.tiled import tiled
from manyheads.lab import gate, resources, search
from manyheads.lab import gather as of_lists
from manyheads.lab import scan as of_recurrences
from manyheads.lab import tiled as described
from manyheads.lab.aot import Compiled
from manyheads.lab.estimate import bound_of_pair, cycles_of_pair
from manyheads.lab.pool import Made
from manyheads.lab.registry import cases, kernels
from manyheads.lab.resources import Need
from manyheads.lab.search import Place
from manyheads.testing import sample_qkv

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
NEED = Need("3.9.0", "tiled.forward", "sm_90", "bf16", 128, "plain", "128x64", 8, 2, 203, 0, 98304, 0, 12, 16)
CASE = next(c for c in cases() if c.id == NEED.id)
FINE = Compiled(203, 0, 0, 98304, instructions={"wgmma": 12, "cp.async": 16})


@needs_triton
def test_quick_cases_keep_the_rules_and_the_table():
    verdict = gate.run([case for case in cases() if case.quick])
    assert len(verdict.made) > 50
    assert verdict.green, verdict.text()


@needs_triton
@pytest.mark.slow
def test_every_case_keeps_the_rules_and_the_table():
    verdict = gate.run()
    assert verdict.green, verdict.text()


def test_nothing_in_the_table_spills_on_90_at_a_shipped_configuration():
    known = {c.id: c for c in cases()}
    shipped = [n for n in resources.read() if n.target == "sm_90"]
    assert {(n.kernel, n.width) for n in shipped} >= {
        (f"{engine}.{kernel}", width)
        for engine, some in (
            ("tiled", described.NAMES), ("scan", ("carry", "mix")), ("gather", of_lists_launch.KERNELS)
        )
        for kernel in some
        for width in configs.WIDTHS
    }
    assert not [n.id for n in shipped if n.spilled and not known[n.id].may_spill]


def test_exceptions_from_the_rule_against_spills_are_few_and_have_reasons():
    spared = [c for c in cases() if c.may_spill]
    assert not [c.id for c in spared if c.variant == "plain" and c.dtype != "fp32"]
    assert all(len(c.may_spill) > 20 for c in spared)


def test_the_table_has_every_case_and_nothing_else():
    ids = {c.id for c in cases()}
    for version in {n.triton for n in resources.read()}:
        assert {n.id for n in resources.read() if n.triton == version} == ids


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"shared": 300 * 1024}, "307200 bytes of shared memory, sm_90 has 232448"),
        ({"spilled": 16}, "spills 16 bytes a thread"),
        ({"tensor": 513}, "513 columns of tensor memory"),
        ({"registers": 300}, "300 registers, a thread has 255"),
        ({"instructions": {"mma.sync": 4}}, "has no wgmma instruction"),
        ({"warnings": ("(C7510) Potential Performance Loss: serialized",)}, "C7510"),
    ],
)
def test_each_rule_is_broken_by_what_it_forbids(changed, words):
    assert list(gate.rules_broken(Made(CASE, FINE))) == []
    (line,) = gate.rules_broken(Made(CASE, replace(FINE, **changed)))
    assert words in line and CASE.id in line


def test_a_kernel_that_does_not_compile_breaks_the_rules():
    (line,) = gate.rules_broken(Made(CASE, None, "it exploded"))
    assert line.endswith("did not compile: it exploded")


def test_a_spill_with_a_reason_and_a_spill_elsewhere_are_allowed():
    spilling = replace(FINE, spilled=8, instructions={**FINE.instructions, "mma.sync": 1})
    assert not list(gate.rules_broken(Made(replace(CASE, may_spill="because"), spilling)))
    assert not list(gate.rules_broken(Made(replace(CASE, target="sm_80", warps=4), replace(spilling, shared=1024))))


def test_changes_are_said_in_words():
    assert resources.differences([NEED], [NEED], whole=True) == []
    changed = replace(NEED, registers=214, spilled=8)
    assert resources.differences([NEED], [changed]) == [
        f"{NEED.id}: registers 214, the table has 203; spilled 8, the table has 0"
    ]
    new = replace(NEED, variant="new")
    assert resources.differences([NEED], [NEED, new]) == [f"{new.id}: is not in the table"]
    assert resources.differences([NEED, new], [NEED], whole=True) == [f"{new.id}: is in the table but no case any more"]
    assert resources.differences([NEED, new], [NEED]) == []
    assert resources.differences([NEED], [replace(changed, triton="3.6.0")]) == []


def test_a_table_reads_back_what_was_written_and_refuses_what_is_none():
    again = resources.parse(resources.render([replace(NEED, width=64), NEED]))
    assert again == [replace(NEED, width=64), NEED]
    with pytest.raises(ValueError, match="line 2: expected 15 cells, got 2"):
        resources.parse("\t".join(resources.COLUMNS) + "\na\tb\n")
    broken = resources.render([NEED]).replace("\t203\t", "\tmany\t")
    with pytest.raises(ValueError, match="line 2: registers: expected a number, got 'many'"):
        resources.parse(broken)


@needs_triton
def test_the_gate_compiles_the_arguments_that_the_launcher_gives(device, monkeypatch):
    from manyheads.engine.tiled import launch

    if device != "cpu" or not launch.interpreted():
        pytest.skip("reads arguments on their way into the interpreter")
    seen = {}
    original = launch._Call.launch

    def noticed(self, kernel, programs, given):
        seen[kernel.fn.__name__] = self._shared() | given
        return original(self, kernel, programs, given)

    monkeypatch.setattr(launch._Call, "launch", noticed)
    q, k, v = (t.requires_grad_() for t in sample_qkv(1, 2, 20, width=16, keys=40))
    tiled(q, k, v, "causal", backend="triton").sum().backward()
    types = {torch.float32: ("fp32", "data"), torch.int32: ("i32",), torch.uint8: ("u8",)}
    assert set(seen) == set(described.NAMES)
    for name, arguments in seen.items():
        kernel = kernels()[f"tiled.{name}"]
        for pointer, element in kernel.pointers.items():
            # what is switched off points at one float
            if arguments[pointer].numel() > 1:
                assert element in types[arguments[pointer].dtype], (name, pointer)
        fixed = described.constants(name, 64, "plain", configs.choose(name, "sm_90", 64, 2, "plain"))
        names = inspect.signature(getattr(importlib.import_module(kernel.path.partition(":")[0]), name).fn).parameters
        constant = {n for n, p in names.items() if "constexpr" in str(p.annotation)}
        assert set(fixed) == constant
        assert all(isinstance(arguments[n], float) for n in kernel.floats)


@needs_triton
def test_the_gate_compiles_the_arguments_that_the_launcher_of_recurrences_gives(device, monkeypatch):
    from manyheads.engine.scan import launch, scan

    if device != "cpu":
        pytest.skip("reads arguments on their way into the interpreter")
    seen = {}

    def noticed(kernel, programs, arguments, config=None):
        seen.setdefault(kernel.fn.__name__, []).append((kernel, arguments))
        return original(kernel, programs, arguments, config)

    original = launch.launch
    monkeypatch.setattr(launch, "launch", noticed)
    q, k, v = (t.requires_grad_() for t in sample_qkv(1, 2, 20, width=16))
    decay, gate = -torch.rand(1, 2, 20).requires_grad_(), torch.rand(1, 2, 20)
    scan(q, k, v, decay=decay, gate=gate, normalise="max1", backend="triton").sum().backward()
    assert {name: len(calls) for name, calls in seen.items()} == {"sums": 2, "carry": 3, "mix": 4}
    for name, calls in seen.items():
        described_kernel = kernels()[f"scan.{name}"]
        variant = {"sums": "gated", "carry": "gated", "mix": "dq"}[name]
        fixed = of_recurrences.constants(name, 64, variant, configs.Config(32, 32, 4, 1), "fp32")
        for kernel, arguments in calls:
            names = inspect.signature(kernel.fn).parameters
            assert set(fixed) == {n for n, p in names.items() if "constexpr" in str(p.annotation)}
            pointers = {n for n in names if isinstance(arguments[n], torch.Tensor)}
            assert pointers == set(described_kernel.pointers)
            assert all(arguments[n].dtype == torch.float32 for n in pointers)
            assert all(isinstance(arguments[n], float) for n in described_kernel.floats)


@needs_triton
def test_the_gate_compiles_the_arguments_that_the_launcher_of_lists_gives(device, monkeypatch):
    from manyheads.engine.gather import gather

    if device != "cpu":
        pytest.skip("reads arguments on their way into the interpreter")
    seen = []
    original = of_lists_launch.launch
    monkeypatch.setattr(of_lists_launch, "launch", lambda *call: [seen.append(call), original(*call)][1])
    q, k, v = (t.half().requires_grad_() for t in sample_qkv(1, 2, 5, width=16, keys=9))
    ids, sink = torch.randint(9, (1, 1, 5, 3)), torch.zeros(2, requires_grad=True)
    gather(q, k, v, ids, sink=sink, backend="triton").sum().backward()
    assert [kernel.fn.__name__ for kernel, *_ in seen] == ["listed", "listed_rows", "listed_rows", "listed_keys"]
    types = {torch.float32: "fp32", torch.int32: "i32", torch.float16: "data"}
    for kernel, _, arguments, config in seen:
        name = kernel.fn.__name__
        described_kernel = kernels()[f"gather.{name}"]
        names = inspect.signature(kernel.fn).parameters
        fixed = of_lists.constants(name, 64, "plain", config)
        assert set(fixed) == {n for n, p in names.items() if "constexpr" in str(p.annotation)}
        pointers = {n: arguments[n] for n in names if isinstance(arguments[n], torch.Tensor)}
        assert set(pointers) == set(described_kernel.pointers)
        for n, t in pointers.items():  # what is switched off points at one float
            assert t.numel() == 1 or types[t.dtype] == described_kernel.pointers[n], (name, n)
        assert all(isinstance(arguments[n], float) for n in described_kernel.floats)


def test_configurations_are_written_for_every_row_and_read_back():
    table = configs.table()
    assert set(table) == set(configs.every_key())
    assert len(configs.every_key()) == len(set(configs.every_key())) > 300
    assert configs.parse(configs.render(table)) == table


def test_a_table_of_ones_own_goes_before_the_shipped_one(tmp_path, monkeypatch):
    key = ("forward", "sm_90", 128, 2, "plain")
    mine = configs.Config(64, 32, 4, 1, source="here")
    (tmp_path / "own.tsv").write_text(configs.render({key: mine}, {key: "measured here"}))
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "own.tsv"))
    configs.table.cache_clear()
    try:
        assert configs.choose(*key) == mine
        assert configs.choose(*key[:3], 4, "plain").source == "resources"
    finally:
        configs.table.cache_clear()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("forward\tsm_90\t128\t2\tplain\t96\t64\t4\t2\t0\t0\t0\tme", "line 2: bm: expected a power of two"),
        ("forward\tsm_95\t128\t2\tplain\t64\t64\t4\t2\t0\t0\t0\tme", "line 2: arch: expected one of sm_80"),
        ("forward\tsm_90\t128\t2\tplain\t64\t64\t4\t2\t2\t0\t0\tme", "line 2: exp: expected one of 0, 1, 4"),
        ("forward\tgfx942\t128\t2\tplain\t64\t64\t4\t2\t4\t0\t0\tme", "line 2: exp: 4 is written in the assembly"),
        ("forward\tsm_90\t128\t2\tplain\t64", "line 2: zip"),
        ("forward\tsm_90\twide\t2\tplain\t64\t64\t4\t2\t0\t0\t0\tme", "line 2: invalid literal"),
    ],
)
def test_a_bad_row_of_a_table_is_refused_by_its_line(line, words):
    with pytest.raises(ValueError, match=words):
        configs.parse("\t".join(configs.COLUMNS) + "\n" + line)


def test_a_bound_is_never_above_the_modelled_time():
    rows = [n for n in resources.read() if n.kernel.partition(".")[2] in described.NAMES]
    found = [n for n in rows if n.variant in described.MAIN.values()]
    kinds = {variant: kind for kind, variant in described.MAIN.items()}
    for n in found:
        shape = (*map(int, n.tile.split("x")), n.warps, n.stages)
        need = Compiled(n.registers, 0, n.spilled, n.shared)
        about = (n.kernel.partition(".")[2], n.target, n.width, 4 if n.dtype == "fp32" else 2, kinds[n.variant], shape)
        if not n.spilled:
            assert bound_of_pair(*about) <= cycles_of_pair(*about, need) * 1.0001, n.id


def test_a_search_stops_when_nothing_left_can_be_better_and_refuses_what_spills(monkeypatch):
    place = Place("forward", "sm_90", 64, 2, "plain")

    class Memory:
        compiled = 0

        def compile(self, cases, **_):
            Memory.compiled += len(cases)
            return [self.one(case) for case in cases]

        def one(self, case):
            tile = case.constants["BM"] * case.constants["BN"]
            spilled = 100 if tile > 64 * 64 else 0
            return Made(case, Compiled(96, 0, spilled, 32768, instructions={"wgmma": 4}), "", "9.9")

    some, note = search.best(place, [Memory()])
    assert some.config.bm * some.config.bn <= 64 * 64 and not note
    assert Memory.compiled < len(search.candidates(place))


def test_kernels_prints_its_table_and_refuses_names_that_do_not_exist(capsys):
    assert main(["kernels", "--kernel", "forward", "--arch", "sm_90", "--width", "128"]) == 0
    out = capsys.readouterr().out
    assert "tiled.forward on sm_90" in out and "wgmma" in out and "gfx942" not in out
    assert main(["kernels", "--kernel", "froward"]) == 2
    assert "unknown kernel 'froward'" in capsys.readouterr().err
    assert main(["kernels", "--arch", "sm_99"]) == 2
    assert main(["kernels", "--update", "--width", "64"]) == 2
    assert Path(resources.FILE).suffix == ".tsv"
