"""Tables and progress: rich on a terminal, plain lines everywhere else."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from manyheads.bench.row import Row
from manyheads.bench.suite import Case, unfold

Column = tuple[str, Callable[[Row], str]]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that have something to say about these rows.

    Args:
        rows: Rows of one suite.

    Returns:
        Heading and cell function of each.
    """
    return [(head, cell) for head, cell in _COLUMNS if any(cell(row) for row in rows)]


def fitting(rows: Sequence[Row], width: int) -> list[Column]:
    """As many of the columns as a terminal has room for; the file keeps all.

    Args:
        rows: Rows of one suite.
        width: Characters on a line.

    Returns:
        The columns, the least important left out until the rest fits.

    Example:
        >>> row = Row("masks", "causal", "sdpa", median_ms=1.5, first_ms=90.0, gflops=100.0, gate="green")
        >>> [head for head, _ in fitting([row], 40)]
        ['case', 'provider', 'ms', 'gate']
    """
    shown = columns(rows)
    needed = {h: 3 + max(len(h), *(min(len(cell(r)), _FOLDED.get(h, 99)) for r in rows)) for h, cell in shown}
    for head in _DISPENSABLE:
        if sum(needed.values()) <= width:
            break
        needed.pop(head, None)
    return [(head, cell) for head, cell in shown if head in needed]


def table(rows: Sequence[Row]) -> str:
    """Draws rows as plain text, columns aligned.

    Args:
        rows: Rows of one suite.

    Returns:
        A heading line, then one line a row.

    Example:
        >>> print(table([Row("masks", "causal", "sdpa", median_ms=1.5, p20_ms=1.4, p80_ms=1.6)]))
        case    provider  phase    ms    spread
        causal  sdpa      forward  1.50  1.40-1.60
    """
    shown = columns(rows)
    cells = [[head for head, _ in shown], *([cell(row) for _, cell in shown] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def capability_table(entries: Sequence[tuple[str, dict[str, str]]], versions: Mapping[str, str] | None = None) -> str:
    """Draws who can do what; reasons are numbered and listed once below, packages that are not here at the end.

    Args:
        entries: Name of a problem, and by provider ``"yes"`` or the reason for refusing.
        versions: By provider the version of its package.

    Returns:
        The table and its reasons.

    Example:
        >>> print(capability_table([("causal", {"sdpa": "yes", "flex": "no backward"})], {"sdpa": "torch 2.13.0"}))
        provider  version       causal
        sdpa      torch 2.13.0  yes
        flex                    no (1)
          (1) no backward
    """
    versions = versions or {}
    names = list(dict.fromkeys(name for _, answers in entries for name in answers))
    absent = [name for name in names if versions.get(name) == "not installed"]
    told = [answer for _, answers in entries for name, answer in answers.items() if name not in absent]
    numbered = [answer for answer in dict.fromkeys(told) if answer not in ("yes", "")]
    reasons = {answer: number for number, answer in enumerate(numbered, 1)}
    lines = [["provider", "version", *(problem for problem, _ in entries)]]
    for name in (name for name in names if name not in absent):
        found = [answers.get(name, "") for _, answers in entries]
        cells = [f"no ({reasons[answer]})" if answer in reasons else answer for answer in found]
        lines.append([name, versions.get(name, ""), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    drawn = ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    drawn += [f"  ({reasons[reason]}) {reason}" for reason in reasons]
    return "\n".join([*drawn, *([f"  not installed: {', '.join(absent)}"] if absent else [])])


class Plain:
    """Progress as lines: for logs, pipes and machines without rich."""

    def __init__(self, cases: Sequence[Case], *, stream: TextIO | None = None, quiet: bool = False) -> None:
        """Remembers how many cases there are and where to write."""
        self._stream = sys.stderr if stream is None else stream
        self._count, self._done, self._quiet = len(unfold(cases)), 0, quiet

    def say(self, text: str) -> None:
        """A line for each case is enough for a log."""

    def done(self, case: Case, rows: list[Row], seconds: float) -> None:
        """Writes one line for the case and one for each row."""
        self._done += 1
        if self._quiet:
            return
        print(f"[{self._done}/{self._count}] {case.suite}/{case.name} ({seconds:.1f} s)", file=self._stream)
        for row in rows:
            print(f"    {summary(row)}", file=self._stream)
        self._stream.flush()

    def __enter__(self) -> Plain:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to take down."""


class Rich:
    """A progress bar with the rows of the last cases above it.

    It is redrawn from the benchmark's own thread, and only between measurements: a second thread would be in
    the way of what is measured.
    """

    KEPT = 12

    def __init__(self, cases: Sequence[Case]) -> None:
        """Makes the bar; nothing is drawn yet."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,
        )
        self._seconds = {case.key: case.seconds for case in unfold(cases)}
        self._left = sum(self._seconds.values())
        self._task = self._progress.add_task("", total=len(self._seconds), left=self._estimate())
        self._rows: list[Row] = []
        self._live = Live(self._view(), console=self._console, auto_refresh=False, transient=True)

    def say(self, text: str) -> None:
        """Redraws with what is going on."""
        self._progress.update(self._task, description=text)
        self._live.update(self._view(), refresh=True)

    def done(self, case: Case, rows: list[Row], seconds: float) -> None:
        """Moves the bar and shows the rows."""
        self._rows = [*self._rows, *rows][-self.KEPT :]
        if case.key in self._seconds:
            self._left -= self._seconds.pop(case.key)
            self._progress.update(self._task, advance=1, left=self._estimate())
        self._live.update(self._view(), refresh=True)

    def _estimate(self) -> str:
        minutes = max(self._left, 0.0) / 60
        return f"about {minutes:.0f} min left" if minutes >= 1 else "under a minute left"

    def _view(self) -> Any:
        from rich.console import Group

        if not self._rows:
            return self._progress
        return Group(rich_table(self._rows, self._console.width), self._progress)

    def __enter__(self) -> Rich:
        """Starts drawing."""
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the bar down."""
        self._live.__exit__(kind, error, trace)


def rich_table(rows: Sequence[Row], width: int, title: str | None = None) -> Any:
    """The table of ``table`` for a terminal, red where a gate or a verdict is.

    Args:
        rows: Rows of one suite.
        width: Characters on a line.
        title: Heading.

    Returns:
        A rich renderable.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = fitting(rows, width)
    drawn = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for head, _ in shown:
        drawn.add_column(head, justify="right" if head in _RIGHT else "left", no_wrap=head not in _FOLDED)
    for row in rows:
        bad = row.gate == "red" or row.status == "failed" or row.verdict == "missed"
        style = "red" if bad else "dim" if row.status == "refused" else "green" if row.verdict == "met" else ""
        drawn.add_row(*(Text(cell(row)) for _, cell in shown), style=style)
    return drawn


def choose(cases: Sequence[Case], *, quiet: bool = False) -> Plain | Rich:
    """Rich on a terminal that has it, plain lines otherwise.

    Args:
        cases: What will run.
        quiet: No progress at all.
    """
    if not quiet and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        return Rich(cases)
    return Plain(cases, quiet=quiet)


def show_tables(rows: Sequence[Row]) -> None:
    """Prints one table for each suite to standard output; in ``targets``, the bars last."""
    fancy = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    measured = [row for row in rows if row.bar is None]
    for suite in dict.fromkeys(row.suite for row in measured):
        _show(suite, [row for row in measured if row.suite == suite], fancy)
    if bars := [row for row in rows if row.bar is not None]:
        _show("bars", bars, fancy)


def _show(title: str, rows: Sequence[Row], fancy: bool) -> None:
    if fancy:
        from rich.console import Console

        console = Console()
        console.print(rich_table(rows, console.width, title))
    else:
        print(f"\n{title}\n{table(rows)}")


def summary(row: Row) -> str:
    """One row on one line.

    Example:
        >>> summary(Row("masks", "causal", "flex", status="refused", reason="no compiler"))
        'flex: refused: no compiler'
    """
    if row.status != "measured":
        return f"{row.bar or row.provider}: {row.status}: {row.reason}"
    if row.bar is not None:
        return f"{row.bar}: {number(row.measured)} (target {row.target}): {row.verdict}"
    parts = [f"{cell(row)} {head}" for head, cell in _COLUMNS if head in _BRIEF and cell(row)]
    return f"{row.provider}: {', '.join(parts) or row.note or ''}"


def number(value: float | None, digits: int = 3) -> str:
    """Writes a number with some significant digits and no exponent where none is needed.

    Example:
        >>> [number(x) for x in (0.00001234, 0.01234, 1.5, 1234.5, None)]
        ['1.23e-05', '0.0123', '1.50', '1234', '']
    """
    if value is None:
        return ""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole == 0:
        leading = len(f"{abs(value):.10f}".split(".")[1]) - len(f"{abs(value):.10f}".split(".")[1].lstrip("0"))
        return f"{value:.{digits + leading}f}"
    return f"{value:.{max(digits - whole, 0)}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1f}%"


def _spread(row: Row) -> str:
    if row.p20_ms is None:
        return ""
    return f"{number(row.p20_ms)}-{number(row.p80_ms)}{' noisy' if row.noisy else ''}"


def _ratio(row: Row) -> str:
    if row.ratio is None or row.baseline == row.provider:
        return ""
    return f"{number(row.ratio)}x {row.baseline}"


def _score(row: Row) -> str:
    return "" if row.score is None else f"{number(row.score)} {row.score_unit or ''}".strip()


def _remark(row: Row) -> str:
    if row.status != "measured":
        return f"{row.status}: {row.reason}"
    return "; ".join(x for x in (row.note,) if x)


_COLUMNS: list[Column] = [
    ("bar", lambda r: r.bar or ""),
    ("target", lambda r: r.target or ""),
    ("measured", lambda r: number(r.measured)),
    ("verdict", lambda r: r.verdict or ""),
    ("case", lambda r: "" if r.bar else r.case),
    ("provider", lambda r: "" if r.bar else r.provider),
    ("phase", lambda r: "" if r.bar else r.phase),
    ("shape", lambda r: "" if r.bar else r.shape or ""),
    ("ms", lambda r: number(r.median_ms)),
    ("spread", _spread),
    ("first ms", lambda r: number(r.first_ms)),
    ("MiB", lambda r: number(r.peak_mib)),
    ("process MiB", lambda r: number(r.process_mib)),
    ("error", lambda r: number(r.error)),
    ("gate", lambda r: "" if r.gate == "unchecked" else r.gate),
    ("GFLOP/s", lambda r: number(r.gflops)),
    ("of limit", lambda r: _percent(r.of_matrix_rate)),
    ("density", lambda r: _percent(r.density)),
    ("overhead us", lambda r: "" if r.overhead_us is None else f"{r.overhead_us:+.1f}"),
    ("unique tiles", lambda r: "" if r.unique_tiles is None else str(r.unique_tiles)),
    ("rate", lambda r: f"{number(r.rate)} {r.rate_unit or ''}".strip() if r.rate is not None else ""),
    ("waste", lambda r: _percent(r.waste)),
    ("score", _score),
    ("chance", lambda r: number(r.chance)),
    ("rate of learning", lambda r: "" if r.learning_rate is None else f"{r.learning_rate:g}"),
    ("parameters", lambda r: "" if r.parameters is None else f"{r.parameters:,}"),
    ("agreement", lambda r: "" if r.agreement is None else f"{r.agreement:.6f}"),
    ("setting", lambda r: r.setting or ""),
    ("pairs", lambda r: "" if r.setting is None else _percent(r.area)),
    ("weight kept", lambda r: _percent(r.mass)),
    ("top keys", lambda r: _percent(r.recall)),
    ("choosing", lambda r: _percent(r.selection)),
    ("lost", lambda r: "" if r.speed is None else number(r.error_norm)),
    ("over dense", lambda r: "" if r.speed is None else f"{number(r.speed)}x"),
    ("ratio", _ratio),
    ("remark", _remark),
]
_RIGHT = {
    "ms",
    "first ms",
    "MiB",
    "process MiB",
    "error",
    "GFLOP/s",
    "of limit",
    "density",
    "measured",
    "waste",
}
_FOLDED = {"bar": 60, "remark": 40, "case": 44}
"""Columns that may be folded, and the characters that they are given."""
_DISPENSABLE = (
    "first ms",
    "process MiB",
    "shape",
    "phase",
    "spread",
    "error",
    "of limit",
    "GFLOP/s",
    "density",
    "remark",
    "waste",
    "MiB",
    "agreement",
    "chance",
    "parameters",
    "rate of learning",
)
"""What a narrow terminal does without, first to last."""
_BRIEF = {"ms", "MiB", "overhead us", "unique tiles", "rate", "score", "agreement", "gate", "ratio", "lost",
          "over dense"}  # fmt: skip
