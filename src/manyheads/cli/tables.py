"""Small tables on the terminal: rich where there is one, aligned text everywhere else."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from manyheads.bench.workload import human


def draw(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Prints a table.

    Args:
        head: Headings.
        rows: Cells, as many in each row as there are headings.
        left: How many columns from the left are words; the others are numbers, aligned on the right.

    Example:
        >>> draw(["tile", "visited"], [["128x128", "36"], ["64x64", "136"]])
        tile     visited
        128x128       36
        64x64        136
    """
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(head):
            table.add_column(Text(name), justify="left" if i < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        words = [text.ljust(width) for text, width in zip(line[:left], widths, strict=False)]
        figures = [text.rjust(width) for text, width in zip(line[left:], widths[left:], strict=True)]
        print("  ".join([*words, *figures]).rstrip())


def duration(ms: float | None) -> str:
    """Writes milliseconds for people.

    Example:
        >>> duration(0.0123), duration(12.34), duration(45_678.0), duration(None)
        ('12.3 us', '12.3 ms', '45.7 s', '')
    """
    if ms is None:
        return ""
    for factor, unit in ((1e-3, "us"), (1.0, "ms"), (1e3, "s")):
        if ms < 1e3 * factor or unit == "s":
            value = ms / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    raise AssertionError("every time has a unit")


def size(count: int | None) -> str:
    """Writes bytes for people, nothing for ``None``."""
    return "" if count is None else human(count)
