"""The examples run, say something, and stay short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def blocks(path):
    """The Python blocks of a text."""
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


TEXTS = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks(p)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.stem)
def test_code_in_texts_runs(path):
    scope = {"__name__": "text"}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), scope)


def test_the_example_of_the_readme_is_ten_lines():
    first = blocks(ROOT / "README.md")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
