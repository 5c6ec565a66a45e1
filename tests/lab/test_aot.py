"""Compiling ahead of time: what is reported of a kernel, and what happens when it cannot be compiled."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from manyheads.engine.configs import Config
from manyheads.lab import aot, pool, tiled
from manyheads.lab.memory import Memory, source_digest
from manyheads.lab.registry import Kernel, kernel_named, kernels
from manyheads.lab.targets import TARGETS, target_named

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
SMALL = Config(32, 32, 4, 2)


def small(arch="sm_90", dtype="bf16", variant="plain", **constants):
    """A case that compiles quickly."""
    case = tiled.case("forward", arch, dtype, 64, variant, SMALL)
    return replace(case, constants={**case.constants, **constants})


@needs_triton
def test_a_kernel_is_compiled_for_every_target_from_a_process_that_interprets(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = Config(64, 32, 4, 2)
    made = pool.compile_cases([tiled.case("forward", arch, "bf16", 64, "plain", wide) for arch in TARGETS])
    assert [m.case.target for m in made] == list(TARGETS)
    for m in made:
        target = TARGETS[m.case.target]
        assert m.compiled is not None, m.error
        assert m.compiled.instructions[target.matrix] > 0
        assert not {t.matrix for t in TARGETS.values()} - {target.matrix} & set(m.compiled.instructions)
        assert 16 < m.compiled.registers <= target.most_registers
        assert 0 < m.compiled.shared <= target.shared
        assert m.compiled.warnings == ()
        assert m.triton == pool.triton_version()
    by_target = {m.case.target: m.compiled for m in made}
    assert by_target["sm_80"].instructions["cp.async"] > 0
    assert by_target["sm_100"].tensor > 0 == by_target["sm_90"].tensor


@needs_triton
def test_a_kernel_that_holds_too_much_is_seen_to_spill():
    tight = replace(tiled.case("forward", "sm_80", "bf16", 128, "plain", Config(128, 128, 4, 2)))
    (made,) = pool.compile_cases([tight])
    assert made.compiled.registers == 255
    assert made.compiled.spilled > 100 and made.compiled.stack > 0


@needs_triton
def test_float32_products_use_no_matrix_instruction_unless_asked():
    exact, allowed = pool.compile_cases([small(dtype="fp32"), small(dtype="fp32", PRECISION="tf32")])
    assert not {"wgmma", "mma.sync"} & set(exact.compiled.instructions)
    assert {"wgmma", "mma.sync"} & set(allowed.compiled.instructions)


@needs_triton
def test_what_does_not_compile_is_reported_and_the_next_case_compiles():
    bad = small(BN=24)
    good = small()
    made = pool.compile_cases([bad, good], workers=1)
    assert made[0].compiled is None and made[0].error
    assert made[1].compiled is not None


@needs_triton
def test_a_compilation_that_takes_too_long_is_given_up_and_the_next_one_runs():
    slow, good = small(), small("sm_80")
    made = pool.compile_cases([slow], workers=1, limit_s=0.05)
    assert made[0].compiled is None and "longer than" in made[0].error
    assert pool.compile_cases([good], workers=1)[0].compiled is not None


def test_a_process_that_interprets_does_not_pretend_to_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        aot.compile_kernel(kernel_named("tiled.forward"), {}, "bf16", TARGETS["sm_90"], warps=4, stages=2)


def test_the_environment_of_a_compiler_has_no_variable_of_triton_but_its_cache(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_DEBUG", "1")
    env = pool.clean_environment("here", Path("elsewhere"))
    assert {k for k in env if k.startswith("TRITON_")} == {"TRITON_CACHE_DIR"}
    assert env["PYTHONPATH"].startswith("elsewhere")


def test_names_that_do_not_exist_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'sm_90'"):
        target_named("sm90")
    with pytest.raises(ValueError, match="did you mean 'tiled.forward'"):
        kernel_named("tiled.foward")
    with pytest.raises(ValueError, match="expected one of bf16, fp16, fp32, got 'int8'"):
        aot.compile_kernel(kernel_named("tiled.forward"), {}, "int8", TARGETS["sm_90"], warps=4, stages=2)


def test_a_description_that_does_not_fit_its_kernel_is_refused():
    kernel = Kernel("demo.copy", "demo:copy", {"x": "data"})
    with pytest.raises(ValueError, match="constant 'BLOK' is no argument of the kernel: x, n, BLOCK"):
        kernel.signature(["x", "n", "BLOCK"], {"BLOK": 1}, "bf16")
    with pytest.raises(ValueError, match="pointer 'x' is no argument"):
        kernel.signature(["y", "n"], {}, "bf16")


def test_only_strides_and_pointers_are_taken_for_multiples_of_16():
    kernel = Kernel("demo.copy", "demo:copy", {"x": "data", "y": "i32"}, aligned=r"s\w", unaligned=frozenset({"y"}))
    signature = kernel.signature(["x", "y", "n", "sn", "B"], {"B": 4}, "fp16")
    assert kernel.multiples_of_16(signature) == ["x", "sn"]


def test_an_assembler_that_says_nothing_is_an_error_and_its_complaints_are_kept():
    with pytest.raises(RuntimeError, match="did not say what the kernel needs; it said: nothing"):
        aot.nvidia_resources("", "", 0, 0)
    log = (
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function 'f'\n"
        "ptxas info : Used 90 registers\n"
    )
    found = aot.nvidia_resources(log, "", 0, 0)
    assert found.spilled == 8 and found.warnings[0].startswith("(C7510) Potential Performance Loss")
    with pytest.raises(RuntimeError, match="vgpr_spill_count"):
        aot.amd_resources(".vgpr_count: 12", 0)


def test_programs_of_a_multiprocessor_are_limited_by_registers_shared_memory_and_warps():
    target = TARGETS["sm_90"]
    assert target.resident(255, 0, 8) == 1
    assert target.resident(32, 100 * 1024, 4) == 2
    assert target.resident(16, 0, 4) == 16
    assert target.resident(32, 228 * 1024, 4) == 0


def test_results_are_remembered_until_the_source_changes(tmp_path, monkeypatch):
    seen = []

    def compiled(cases, *, progress, **_):
        for case in cases:
            seen.append(case.id)
            progress(pool.Made(case, aot.Compiled(100, 0, 0, 4096), "", "9.9"))

    monkeypatch.setattr("manyheads.lab.memory.compile_cases", compiled)
    monkeypatch.setattr("manyheads.lab.memory.triton_version", lambda where: "9.9")
    first = Memory(tmp_path / "m.jsonl")
    assert first.compile([small()])[0].compiled.registers == 100
    first.compile([small()])
    with open(tmp_path / "m.jsonl", "a") as file:
        file.write('{"key": "cut o')
    again = Memory(tmp_path / "m.jsonl")
    again.compile([small(), small("sm_80")])
    assert len(seen) == 2
    monkeypatch.setattr("manyheads.lab.memory.source_digest", lambda path: "changed")
    again.compile([small()])
    assert len(seen) == 3


def test_a_digest_covers_every_file_that_a_kernel_is_made_of():
    digests = {k.path.partition(":")[0]: source_digest(k.path) for k in kernels().values()}
    assert len(set(digests.values())) == len(digests) == 3
    with pytest.raises((ValueError, ModuleNotFoundError)):
        source_digest("manyheads.engine.tiled.nothing:forward")
