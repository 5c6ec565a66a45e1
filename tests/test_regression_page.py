"""The page on regression: its numbers are those that the library gives, and its pictures can be drawn again."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_found = importlib.util.spec_from_file_location("regression_page", ROOT / "docs" / "regression.py")
page = importlib.util.module_from_spec(_found)
sys.modules[_found.name] = page
_found.loader.exec_module(page)


@pytest.fixture(scope="module")
def committed():
    """From the name of an estimator to the numbers on the page: left out, held out, spread."""
    lines = page.PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "±" in line]
    return {name: [float(x) for x in re.findall(r"\d\.\d+", f"{alone} {held}")] for name, _, alone, held in cells}


def test_every_estimator_has_a_line_and_none_has_two(committed):
    names = [name for name, _ in page.kernels()] + [method.name for method in page.methods()]
    assert sorted(committed) == sorted(names)


def test_the_errors_of_leaving_one_out_are_those_of_the_page(committed):
    pytest.importorskip("sklearn")
    x, y = page.diabetes()
    for name, model in page.kernels():
        if "per feature" not in name:
            assert model.fit(x, y).score_ == pytest.approx(committed[name][0], abs=2e-3), name


@pytest.mark.parametrize("name", ["ridge regression", "linear attention (one gradient step)", "delta rule"])
def test_the_held_out_errors_are_those_of_the_page(name, committed):
    pytest.importorskip("sklearn")
    x, y = page.diabetes()
    (method,) = (m for m in page.methods() if m.name == name)
    held = page._held(lambda a, b, c: method.fit(page._choose(method, a, b)[0])(a, b, c), x, y)
    assert list(held) == pytest.approx(committed[name][-2:], abs=2e-3)


@pytest.mark.slow
def test_the_whole_table_is_that_of_the_page(committed):
    pytest.importorskip("sklearn")
    for row in page.rows():
        numbers = [row.alone, row.held, row.spread] if row.alone is not None else [row.held, row.spread]
        assert numbers == pytest.approx(committed[row.name], abs=5e-3), row.name


def test_the_table_goes_between_its_marks():
    text = page.written([page.Row("mean", "", 1.0, 1.0, 0.1)], page.PAGE.read_text(encoding="utf-8"))
    assert "| mean |  | 1.000 | 1.000 ± 0.100 |\n<!-- end of generated -->\n" in text
    assert text.count("±") == 1 and text.count("<!-- generated: errors -->") == 1


def test_pictures_are_drawn_small(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    made = page.pictures(tmp_path / "images")
    assert {p.name for p in made} == {p.name for p in page.IMAGES.glob("regression-*")}
    assert all(2_000 < p.stat().st_size < 150_000 for p in made)
