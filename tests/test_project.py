"""The rules of the project that a machine can hold: sizes, direction of imports, what an import touches."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

import manyheads

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "manyheads"
FILES = sorted(p for part in ("src", "tests", "examples", "docs") for p in (ROOT / part).rglob("*.py"))

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_DUPLICATE = 600, 120, 12, 15

EXEMPT = {
    # "path" for the length of a file, "path::function" for a function: the reason, in words
    "src/manyheads/attention.py::attention": "the front door: each keyword is one independent meaning",
    "src/manyheads/dispatch.py::explain": "takes what the front door takes",
    "src/manyheads/engine/tiled/__init__.py::tiled": "the engine behind the front door",
    "src/manyheads/engine/scan/__init__.py::scan": "the engine of every recurrence: each keyword is one meaning",
    "src/manyheads/cli/app.py::bench": "each parameter is an option of the command line",
}
"""Every exemption from the budgets. A line here needs a reason that a reader would accept."""

RANK = {
    "common": 0,
    "testing": 0,
    "spec": 1,
    "mask": 2,
    "engine": 3,
    "cache": 4,
    "dispatch": 4,
    "attention": 5,
    "": 6,
    "mechanism": 7,
    "nn": 8,
    "parallel": 9,
    "vision": 9,
    "model": 9,
    "method": 10,
    "integration": 11,
    "catalog": 12,
    "bench": 13,
    "lab": 14,  # a tuner measures with the benchmark's clock
    "study": 14,
    "cli": 15,
    "__main__": 16,
}
"""Imports point to a smaller number; the empty name is the package itself with what it re-exports."""

EXTRAS = (
    "triton", "typer", "rich", "plotly", "matplotlib", "transformers", "safetensors", "timm", "torchvision",
    "faiss", "pennylane", "einops", "x_transformers", "performer_pytorch", "fla", "natten", "flash_attn",
    "flashinfer", "scipy", "psutil", "pytest", "hypothesis", "playwright", "sklearn",
    "beartype",
)  # fmt: skip


def short(path):
    """A path as people write it."""
    return path.relative_to(ROOT).as_posix()


def parse(path):
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree):
    """Every function of a file with its qualified name."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from walk(child, f"{prefix}{child.name}." if named else prefix)

    yield from walk(tree, "")


def test_files_can_be_read_in_one_sitting():
    long = {short(p): n for p in FILES if (n := len(p.read_text(encoding="utf-8").splitlines())) > MAX_FILE}
    assert not {name: n for name, n in long.items() if name not in EXEMPT}


def test_functions_fit_on_two_screens():
    long = {}
    for path in FILES:
        for name, node in functions(parse(path)):
            if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION:
                long[f"{short(path)}::{name}"] = lines
    assert not {name: n for name, n in long.items() if name not in EXEMPT}


def test_public_functions_take_few_parameters():
    many = {}
    for path in SOURCE.rglob("*.py"):
        if "kernels" in path.parts or path.name == "kernels.py":
            continue
        for name, node in functions(parse(path)):
            a = node.args
            names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
            public = not any(p.startswith("_") and p != "__init__" for p in name.split("."))
            if public and len(names) > MAX_PARAMETERS:
                many[f"{short(path)}::{name}"] = len(names)
    assert not {name: n for name, n in many.items() if name not in EXEMPT}


def code_lines(path):
    """Lines of code of a file with their numbers: no blanks, comments, docstrings or imports."""
    tree, lines = parse(path), path.read_text(encoding="utf-8").splitlines()
    skip = set()
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import | ast.ImportFrom) or (is_text and isinstance(node.value.value, str)):
            skip |= set(range(node.lineno, node.end_lineno + 1))
    for number, line in enumerate(lines, 1):
        if number not in skip and (text := line.strip()) and not text.startswith("#"):
            yield number, text


def test_no_block_of_code_stands_twice():
    seen, twice = {}, defaultdict(list)
    for path in FILES:
        lines = list(code_lines(path))
        for start in range(len(lines) - MAX_DUPLICATE):
            block = tuple(text for _, text in lines[start : start + MAX_DUPLICATE + 1])
            here = f"{short(path)}:{lines[start][0]}"
            if block in seen:
                twice[seen[block]].append(here)
            else:
                seen[block] = here
    assert not {a: b for a, b in twice.items() if a.split(":")[0] not in EXEMPT}


def test_every_exemption_is_still_needed():
    names = {short(p) for p in FILES}
    for name in EXEMPT:
        path, _, function = name.partition("::")
        assert path in names, name
        assert not function or function in dict(functions(parse(ROOT / path))), name


def imported(path):
    """Modules of this package that a file imports when it runs, each once, with the line."""
    package = (*path.relative_to(SOURCE).parent.parts,)

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    if alias.name.split(".")[0] == "manyheads":
                        yield child.lineno, alias.name.split(".")[1:]
            elif isinstance(child, ast.ImportFrom):
                base = (child.module or "").split(".") if child.module else []
                if child.level:
                    base = [*package[: len(package) - child.level + 1], *base]
                elif base[0] == "manyheads":
                    base = base[1:]
                else:
                    continue
                for alias in child.names:
                    submodule = SOURCE.joinpath(*base, alias.name)
                    is_module = submodule.is_dir() or submodule.with_suffix(".py").is_file()
                    yield child.lineno, [*base, alias.name] if is_module else base
            else:
                yield from walk(child)

    yield from walk(parse(path))


def test_imports_point_one_way():
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        own = "" if parts == ("__init__",) else parts[0]
        assert own in RANK, f"{short(path)}: give {own!r} a place in RANK"
        for line, target in imported(path):
            other = target[0] if target else ""
            if other != own and RANK[other] >= RANK[own]:
                wrong.append(f"{short(path)}:{line} imports {other or 'manyheads'!r}")
    assert not wrong


def fresh(code, *options):
    """Runs code in a new interpreter and returns what it prints, as JSON."""
    result = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_an_import_touches_no_extra_and_no_device():
    added, cuda = fresh(
        """
        import json, sys
        import torch
        before = set(sys.modules)
        import manyheads, manyheads.nn, manyheads.spec, manyheads.testing, manyheads.catalog
        manyheads.spec.registry()
        manyheads.catalog.entries()
        added = sorted({n.split(".")[0] for n in set(sys.modules) - before})
        print(json.dumps([added, torch.cuda.is_initialized()]))
        """
    )
    assert "manyheads" in added and not cuda
    assert not set(added) & set(EXTRAS)


def test_an_import_warns_of_nothing():
    assert fresh("import manyheads, manyheads.nn; print(1)", "-W", "error::UserWarning:manyheads") == 1


def modules():
    """Every importable module of the package, kernels apart."""
    for found in pkgutil.walk_packages([str(SOURCE)], "manyheads."):
        if not re.search(r"\.(kernels(\..*)?|__main__)$", found.name):
            yield importlib.import_module(found.name)


def undocumented(module):
    """Public things defined in a module that say nothing about themselves."""
    if not module.__doc__:
        yield module.__name__
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) and not inspect.getdoc(thing):
            yield f"{module.__name__}.{name}"
        elif inspect.isclass(thing):
            # dataclasses and named tuples write themselves a docstring that repeats the signature
            if not thing.__doc__ or thing.__doc__.startswith(f"{name}("):
                yield f"{module.__name__}.{name}"
            for method, member in vars(thing).items():
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                # a callable default of a dataclass is not a method
                if inspect.isfunction(function) and function.__name__ == method and method[0] != "_":
                    found = inspect.getdoc(getattr(thing, method))
                    if not found and not inspect.getdoc(function):
                        yield f"{module.__name__}.{name}.{method}"


def test_everything_public_is_documented():
    assert not [name for module in modules() for name in undocumented(module)]


@pytest.mark.parametrize("name", sorted(manyheads.__all__))
def test_public_names_exist_and_say_what_they_are(name):
    assert inspect.getdoc(getattr(manyheads, name))


@pytest.mark.slow
def test_a_wheel_holds_everything_and_imports_in_an_empty_environment(tmp_path):
    options = ("-q", "--no-deps", "--no-build-isolation")
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("manyheads-*.whl")
    assert manyheads.__version__ in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {"manyheads/py.typed", "manyheads/catalog/systems.tsv"} <= set(names)
        assert all(n.startswith(("manyheads/", "manyheads-")) for n in names)
        (scripts,) = (archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
        assert "manyheads = manyheads.cli:main" in scripts
        venv.create(tmp_path / "empty", with_pip=False)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = tmp_path / "empty" / "lib" / version / "site-packages"
        archive.extractall(packages)
    # torch, numpy and jaxtyping come from the environment of the tests; everything else is absent
    (packages / "torch.pth").write_text(sysconfig.get_paths()["purelib"])
    out = subprocess.run(
        [tmp_path / "empty" / "bin" / "python", "-I", "-c",
         "import manyheads, torch; from manyheads import catalog\n"
         "q = torch.ones(1, 1, 4, 8)\n"
         "manyheads.attention(q, q, q, mask='causal & window(2)')\n"
         "print(manyheads.__file__, len(catalog.entries()))"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout.split()  # fmt: skip
    assert Path(out[0]).is_relative_to(packages) and out[1] == "159"
