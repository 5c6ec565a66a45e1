"""What is generated is what is committed; the page on adding a mechanism keeps its word."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from manyheads import spec
from tests.conformance.harness import assert_conforms

ROOT = Path(__file__).resolve().parents[1]
_found = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(_found)
_found.loader.exec_module(build)


@pytest.mark.parametrize("name", build.OUTPUTS)
def test_committed_text_is_what_make_docs_writes(name):
    assert (ROOT / name).read_text(encoding="utf-8") == build.OUTPUTS[name](), f"{name}: run `make docs`"


def test_the_readme_has_one_generated_part():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(build.BEGIN) == text.count(build.END) == 1


@pytest.fixture
def made():
    """The mechanism of the page, as the page defines it."""
    text = (ROOT / "docs" / "add-a-mechanism.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    scope = {"__name__": "page"}
    exec(code, scope)
    return text, scope["SPEC"]


def test_adding_a_mechanism_takes_forty_lines(made):
    text, _ = made
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_the_mechanism_of_the_page_conforms(made, backend):
    _, declared = made
    size = spec.Size(queries=50, heads=4, kv_heads=2, deviation=4.0, causal=True)
    assert_conforms(declared, backend, declared.inputs(size))


TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_links_inside_the_repository_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert target.startswith(("http://", "https://")) or (path.parent / target).exists(), target
