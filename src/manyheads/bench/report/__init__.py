"""The report: one results file as one HTML page that needs nothing else, not even a network.

The rows stand in the page once, as the file has them; a small script builds the tables and plots from that one
source, so that no number can differ from the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from manyheads.bench import store
from manyheads.bench.report.page import build
from manyheads.bench.store import PARTIAL, Results

__all__ = ["build", "write"]


def write(results: Path | str | Results, out: Path | str | None = None) -> Path:
    """Writes the report of a results file.

    Args:
        results: A results file of the benchmark, or its contents. Where only ``<name>.partial`` exists, what a run
            that did not end has left, that is read.
        out: The HTML file; by default beside the results, with ``.html`` in place of ``.jsonl``.

    Returns:
        The path of the HTML file. It appears under its name only when it is whole.

    Raises:
        ValueError: There is no such file, it is not a results file, or the report cannot be written there.
        ImportError: plotly is not installed.

    Example:
        >>> import tempfile
        >>> from manyheads.bench.store import Store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Store(Path(folder) / "run.jsonl", {"command": "manyheads bench"}).close()
        ...     write(path).name
        'run.html'
    """
    found = results if isinstance(results, Results) else store.read(_existing(Path(results)))
    if out is None and found.path is None:
        raise ValueError("out: results without a file need the name of the report")
    target = _beside(found.path) if out is None and found.path is not None else Path(str(out))
    if target.is_dir():
        raise ValueError(f"out: {target} is a folder; give the name of a file")
    text = build(found)
    fresh = target.with_name(target.name + ".new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8", newline="\n")
        os.replace(fresh, target)
    except OSError as error:
        raise ValueError(f"out: cannot write {target}: {error.strerror or type(error).__name__}") from None
    return target


def _existing(path: Path) -> Path:
    partial = path.with_name(path.name + PARTIAL)
    return partial if partial.is_file() and not path.exists() else path


def _beside(path: Path) -> Path:
    plain = path.with_name(path.name.removesuffix(PARTIAL))
    return plain.with_suffix(".html") if plain.suffix == ".jsonl" else plain.with_name(plain.name + ".html")
