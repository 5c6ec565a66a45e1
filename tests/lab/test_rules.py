"""The rules of kernels: bad snippets are found, good ones pass, the package keeps them, and a lost guard is noticed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import manyheads
from manyheads.lab import rules

PACKAGE = Path(manyheads.__file__).parent
HEAD = "import triton\nimport triton.language as tl\n"


def found(body, decorator="@triton.jit", arguments="x, n_rows, sxh, BLOCK: tl.constexpr"):
    """Rules broken by a helper with this body."""
    source = f"{HEAD}{decorator}\ndef helper({arguments}):\n" + "\n".join(f"    {line}" for line in body.splitlines())
    return [f.rule for f in rules.check(source)]


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("h = n_rows // 2\nreturn x + h * sxh", "int64"),
        ("b, h = n_rows, n_rows\nreturn x + sxh * h", "int64"),
        ("h = tl.where(n_rows > 2, n_rows, 0)\nreturn x + h * sxh", "int64"),
        ("i = tl.arange(0, BLOCK)\nreturn tl.load(x + i)", "bounds"),
        ("i = tl.arange(0, BLOCK)\ntl.store(x + tl.minimum(i, 3), 1.0)", "bounds"),
        ("p = tl.make_block_ptr(x, (1,), (1,), (0,), (BLOCK,), (0,))\nreturn p", "pointers"),
        ("return tl.advance(x, (BLOCK,))", "pointers"),
        ("tl.atomic_add(x, 1.0)", "atomics"),
    ],
)
def test_a_bad_helper_is_found(body, rule):
    assert found(body) == [rule]


@pytest.mark.parametrize(
    "body",
    [
        "h = n_rows.to(tl.int64)\nreturn x + h * sxh",
        "return x + n_rows * tl.cast(sxh, tl.int64)",
        "i = tl.arange(0, BLOCK)\nreturn tl.load(x + i[:, None] * sxh, mask=i[:, None] < n_rows)",
        "i = tl.minimum(tl.arange(0, BLOCK), n_rows)\nreturn tl.load(x + i * sxh)",
        "i = n_rows % BLOCK\nreturn x + i * sxh",
        "return tl.load(x + n_rows)",
        "i = tl.arange(0, BLOCK)\ntl.store(x + i, 1.0, mask=i < n_rows)",
        "i = tl.arange(0, BLOCK)\ntl.store(x + i, 1.0, i < n_rows)",
    ],
)
def test_a_good_helper_passes(body):
    assert found(body) == []


def test_every_length_of_a_kernel_is_spared_from_specialising():
    body = "return tl.program_id(0)"
    assert found(body, arguments="x, nq, nk") == ["lengths", "lengths"]
    assert found(body, '@triton.jit(do_not_specialize=["nq"])', "x, nq, nk") == ["lengths"]
    assert found(body, '@triton.jit(do_not_specialize=["nq", "nk"])', "x, nq, nk") == []
    assert found("return nq", arguments="x, nq") == []
    assert found("return x", arguments="x, nq: tl.constexpr") == ["lengths"]


def test_a_list_of_another_file_may_name_the_lengths():
    source = f"{HEAD}@triton.jit(do_not_specialize=SPARED)\ndef kernel(x, nq):\n    return tl.program_id(0)\n"
    assert [f.rule for f in rules.check(source)] == ["lengths"]
    assert rules.check(source, lists={"SPARED": ["nq"]}) == []


def test_configurations_come_from_the_table(tmp_path):
    (tmp_path / "launch.py").write_text("kernel[(1,)](x, num_warps=4)\nkernel[(1,)](x, num_warps=config.warps)\n")
    (tmp_path / "kernels.py").write_text(
        f"{HEAD}@triton.autotune(configs=[triton.Config({{}}, num_stages=2)], key=[])\n"
        "@triton.jit\ndef helper(x):\n    return x\n"
    )
    found = rules.check_package(tmp_path)
    assert {(f.file, f.rule) for f in found} == {("launch.py", "table"), ("kernels.py", "table")}
    assert sum(f.file == "launch.py" for f in found) == 1


def test_the_package_keeps_the_rules():
    files = [p for p in PACKAGE.rglob("*.py") if rules.is_kernels(p)]
    assert len(files) >= 4
    assert [str(f) for f in rules.check_package(PACKAGE)] == []


def test_exceptions_are_still_needed():
    text = "".join(p.read_text() for p in PACKAGE.rglob("*.py") if rules.is_kernels(p))
    assert not [name for name in rules.SMALL if not re.search(rf"\* {name}\b", text)]
    assert not [place for place in rules.ATOMICS if place.split("::")[1] not in text]


def test_two_of_three_lost_casts_to_64_bits_are_noticed():
    folder = PACKAGE / "engine" / "tiled" / "kernels"
    sources = {p.name: p.read_text() for p in sorted(folder.glob("*.py"))}
    lists = {"UNSPECIALISED": ["nq", "nk", "total", "width", "row0", "strip", "n", "tokens"]}
    noticed = []
    for name, source in sources.items():
        for cast in re.finditer(r"\.to\(tl\.int64\)", source):
            mutant = source[: cast.start()] + source[cast.end() :]
            noticed.append(bool(rules.check(mutant, name, lists)))
    assert len(noticed) > 20
    assert sum(noticed) >= 2 / 3 * len(noticed)
