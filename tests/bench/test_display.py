"""What is shown: every row in every form, and nothing that a thread would have to draw while others measure."""

from __future__ import annotations

import io
import threading

import pytest

from manyheads.bench import display
from manyheads.bench.row import Row
from manyheads.bench.suite import Case

ROWS = [
    Row("masks", "causal-64", "manyheads", median_ms=1.0, gate="green", baseline="sdpa", ratio=2.5, density=0.51),
    Row("masks", "causal-64", "sdpa", median_ms=2.5, gate="green", baseline="sdpa", ratio=1.0, noisy=True),
    Row("masks", "causal-64", "wrong", median_ms=0.1, gate="red", error=1.0),
    Row("masks", "causal-64", "flex", status="refused", reason="needs a C++ compiler"),
    Row("masks", "causal-64", "new", status="failed", reason="RuntimeError: no kernel"),
]
BAR = Row("targets", "t", "manyheads", bar="dense", target=">= 1.9x", measured=2.0, verdict="met")
CASES = [Case("masks", "causal-64", lambda c: ROWS), Case("targets", "t", lambda c: [BAR])]


def test_the_plain_table_has_every_row_and_no_empty_column():
    lines = display.table(ROWS).splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert "2.50x sdpa" in lines[1] and "51%" in lines[1]
    assert "x sdpa" not in lines[2]
    assert "red" in lines[3]
    assert "refused: needs a C++ compiler" in lines[4]
    assert "waste" not in lines[0] and "verdict" not in lines[0]


def test_bars_have_a_table_of_their_own(capsys):
    display.show_tables([*ROWS, BAR])
    out = capsys.readouterr().out
    assert out.index("masks") < out.index("bars")
    assert "dense" in out and ">= 1.9x" in out and "met" in out


def test_progress_without_a_terminal_is_a_few_lines_a_case():
    stream = io.StringIO()
    with display.Plain(CASES, stream=stream) as shown:
        shown.say("not worth a line")
        shown.done(CASES[0], ROWS, 1.5)
        shown.done(CASES[1], [BAR], 0.1)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/2] masks/causal-64 (1.5 s)"
    assert "dense: 2.00 (target >= 1.9x): met" in lines[-1]
    assert len(lines) == 2 + len(ROWS) + 1


def test_the_bar_of_a_terminal_starts_no_thread():
    pytest.importorskip("rich")
    before = threading.active_count()
    with display.Rich(CASES) as shown:
        shown.say("masks/causal-64: timing")
        shown.done(CASES[0], ROWS, 1.5)
        assert threading.active_count() == before


def test_a_terminal_is_chosen_only_where_there_is_one():
    assert isinstance(display.choose(CASES), display.Plain)


def test_a_narrow_terminal_keeps_what_matters():
    wide = [head for head, _ in display.fitting(ROWS, 300)]
    narrow = [head for head, _ in display.fitting(ROWS, 40)]
    assert wide == [head for head, _ in display.columns(ROWS)]
    assert set(narrow) < set(wide)
    assert {"case", "provider", "ms", "gate", "ratio"} <= set(narrow)


def test_the_rich_table_has_the_cells_of_the_plain_one():
    console = pytest.importorskip("rich.console").Console(width=300, file=io.StringIO())
    console.print(display.rich_table(ROWS, 300))
    drawn = console.file.getvalue()
    for row in ROWS:
        for _, cell in display.columns(ROWS):
            assert cell(row) in drawn


def test_the_capability_table_lists_each_reason_once():
    text = display.capability_table(
        [("a", {"sdpa": "yes", "flex": "no g++"}), ("b", {"sdpa": "big", "flex": "no g++"})]
    )
    assert text.count("no g++") == 1 and text.count("no (1)") == 2 and "(2) big" in text


def test_numbers_keep_their_digits():
    assert [display.number(x) for x in (0, 0.5, 3.14159, 250.4, 12345.6, -2.5, 1e9, 1e-7, float(2**20))] == [
        "0", "0.500", "3.14", "250", "12346", "-2.50", "1.00e+09", "1.00e-07", "1.05e+06",
    ]  # fmt: skip
