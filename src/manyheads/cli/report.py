"""``manyheads report``, and the lines that end ``manyheads bench``."""

from __future__ import annotations

from pathlib import Path

from manyheads.bench import store, summary


def run(results: Path, out: Path | None) -> int:
    """Writes the report of a results file and says where it is.

    Args:
        results: The results file.
        out: The HTML file; beside the results by default.

    Returns:
        The exit status.

    Raises:
        ValueError: There are no results, or the report cannot be written there.
        ImportError: plotly is not installed.
    """
    from manyheads.bench import report

    print(report.write(results, out))
    return 0


def conclude(path: Path, *, html: bool = True) -> None:
    """Prints what a run came to in ten lines, writes its report and prints the path.

    Measuring took minutes or hours, so nothing that goes wrong here is an error of the run.

    Args:
        path: The results file.
        html: Whether to write the report.
    """
    try:
        lines = summary.lines(store.read(path))
    except ValueError as error:
        print(f"no summary: {error}")
        return
    print("\nIn short:", *(f"  {line}" for line in lines), sep="\n")
    if not html:
        return
    try:
        from manyheads.bench import report

        print(f"\nreport: {report.write(path)}")
    except Exception as error:  # the rows are safe; a report can be written later
        reason = str(error) or type(error).__name__
        print(f"\nno report: {reason}\nwrite it later with: manyheads report {path}")
