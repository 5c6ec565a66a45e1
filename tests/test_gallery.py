"""The gallery shows everything that works, in examples that run, and names everything that does not yet."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from manyheads import Neighborhood, catalog, spec
from manyheads.mechanism import exact

ROOT = Path(__file__).resolve().parents[1]
_found = importlib.util.spec_from_file_location("gallery_page", ROOT / "docs" / "gallery.py")
gallery = importlib.util.module_from_spec(_found)
_found.loader.exec_module(gallery)
TEXT = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def entry_of(slug):
    """What the page says about one system."""
    (found,) = re.findall(rf"^### {re.escape(slug)}\n(.*?)(?=^##+ )", TEXT, flags=re.MULTILINE | re.DOTALL)
    return found


WORKS = [*spec.registry(), *(e.slug for e in catalog.entries() if e.state == "works" and e.slug not in spec.registry())]


@pytest.mark.parametrize("slug", WORKS)
def test_everything_that_works_has_source_example_and_evidence(slug):
    text = entry_of(slug)
    assert "- source: " in text and "```python\n" in text
    assert re.search(r"^- check \d+|^- held by `tests/conformance`", text, re.MULTILINE)


@pytest.mark.parametrize("slug", WORKS)
def test_an_example_stands_alone_and_prints_what_it_claims(slug, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", entry_of(slug), flags=re.DOTALL)
    exec(code, {"__name__": "gallery"})
    claimed = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
    assert claimed and capsys.readouterr().out.splitlines() == claimed


def test_what_is_planned_is_listed_once_with_its_home():
    planned = [e for e in catalog.entries() if e.state != "works"]
    rows = re.findall(r"^\| ([\w-]+) \| (.*) \| (\d+) of (\d+) \| (.*) \|$", TEXT, flags=re.MULTILINE)
    assert sorted(slug for slug, *_ in rows) == sorted(e.slug for e in planned)
    for e in planned:
        part = TEXT[: TEXT.index(f"| {e.slug} |")]
        assert part[part.rindex("### ") :].startswith(f"### `{e.home}`")


def test_a_picture_is_the_support_of_the_reference():
    drawn = re.findall(r"What it weighs.*?```text\n(.*?)\n```", entry_of("neighborhood"), flags=re.DOTALL)[0]
    visible = Neighborhood((3, 7), (3, 6)).dense(21)[0, 0]
    assert [[cell == "#" for cell in row] for row in drawn.splitlines()] == visible.tolist()


def declared(fn, **more):
    """A declaration of a function, for what the page makes of it."""
    return spec.Spec("made", fn=fn, reference=fn, paper="none", inputs=spec.qkv(), supports={"value_width"}, **more)


def test_a_mechanism_without_an_example_is_refused():
    def silent(q, k, v):
        """Says nothing."""

    with pytest.raises(ValueError, match="needs an Example of 1 to 8 statements"):
        gallery.example(silent, "somewhere.silent")


def test_values_are_printed_as_an_interpreter_shows_them():
    def shown(q, k, v):
        """Something.

        Example:
            >>> torch.ones(2).tolist(), 3
            ([1.0, 1.0], 3)
        """

    assert gallery.example(shown, "somewhere.shown").splitlines()[1:-1] == [
        "import torch", "print((torch.ones(2).tolist(), 3))", "# ([1.0, 1.0], 3)",
    ]  # fmt: skip


def test_a_mechanism_that_weighs_everything_or_takes_no_other_values_has_no_picture():
    assert gallery.picture(declared(exact.reference)) == ""
    narrow = spec.Spec("n", fn=torch.sum, reference=torch.sum, paper="", inputs=spec.qkv(), supports=())
    assert gallery.picture(narrow) == ""
