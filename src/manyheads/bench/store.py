"""Results files: JSON lines, appended to a temporary name and renamed when the run ends."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyheads.bench.row import SCHEMA, Row

PARTIAL = ".partial"


@dataclass
class Results:
    """The contents of a results file.

    Attributes:
        header: Schema, environment, machine limits, options and the command, from the first line.
        rows: All rows, in order.
        finished: ``(suite, case)`` of the cases that were run to their end.
        notes: What happened, such as an interruption.
        path: Where it was read from.
    """

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    finished: set[tuple[str, str]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    path: Path | None = None


def probe(path: Path) -> Path:
    """Finds out early whether results can be written to a place; missing folders are made.

    Args:
        path: Final name.

    Returns:
        The name under which a new file is begun, beside it.

    Raises:
        ValueError: The place cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"out: {path} is a folder; give the name of a file")
    fresh = path.with_name(path.name + PARTIAL + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.touch()
        fresh.unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write {path}: {_why(error)}") from None
    return fresh


def read(path: Path) -> Results:
    """Reads a results file, whole or interrupted.

    A last line that was cut off by a crash is dropped, and so are the rows of a case that did not finish.

    Args:
        path: The file.

    Returns:
        Its contents.

    Raises:
        ValueError: Missing, not a results file, or written by a newer version.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"results: cannot read {path}: {_why(error)}") from None
    parsed = list(_parsed(lines, path))
    if not parsed or parsed[0].get("kind") != "header":
        raise ValueError(f"results: {path} is not a results file of this benchmark: its first line is no header")
    header = parsed[0]
    if header.get("schema", 0) > SCHEMA:
        raise ValueError(f"results: {path} has schema {header['schema']}, this version reads up to {SCHEMA}")
    results = Results(header, path=path)
    pending: list[Row] = []
    for entry in parsed[1:]:
        if entry["kind"] == "row":
            pending.append(Row.from_dict(entry))
        elif entry["kind"] == "case":
            # rows say what they are about, which need not be the name of the case: the count says which are its own
            results.rows += pending[len(pending) - entry["rows"] :]
            results.finished.add((entry["suite"], entry["case"]))
            pending = []
        elif entry["kind"] == "note":
            results.notes.append(entry["text"])
    return results


class Store:
    """Writes one results file.

    Lines go to ``<path>.partial``, each flushed; ``close`` renames it. A reader therefore never sees half a
    file under the final name, and a crash or power cut leaves what was measured.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, earlier: Results | None = None) -> None:
        """Opens the file and writes the header.

        Args:
            path: Final name.
            header: First line.
            earlier: Results to continue; they are written again first.

        Raises:
            ValueError: The place cannot be written.
        """
        fresh = probe(path)
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        try:
            with open(fresh, "w", encoding="utf-8") as file:
                file.write(json.dumps({"kind": "header", "schema": SCHEMA, **header}) + "\n")
                for line in _again(earlier) if earlier is not None else ():
                    file.write(line + "\n")
            os.replace(fresh, self.partial)
            self._file = open(self.partial, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        except OSError as error:
            raise ValueError(f"out: cannot write {path}: {_why(error)}") from None

    def case(self, suite: str, name: str, rows: list[Row], seconds: float) -> None:
        """Appends the rows of a finished case, then the line that says it is finished."""
        end = {"kind": "case", "suite": suite, "case": name, "rows": len(rows), "seconds": round(seconds, 3)}
        self._append([*(row.to_json() for row in rows), json.dumps(end)])

    def note(self, text: str) -> None:
        """Appends a remark about the whole run."""
        self._append([json.dumps({"kind": "note", "text": text})])

    def close(self) -> Path:
        """Renames the file to its final name.

        Returns:
            The final name.
        """
        self._file.flush()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.partial, self.path)
        return self.path

    def _append(self, lines: list[str]) -> None:
        try:
            self._file.write("".join(line + "\n" for line in lines))
            self._file.flush()
        except OSError as error:
            raise ValueError(f"out: cannot write {self.partial}: {_why(error)}; it keeps the rows so far") from None


def resumable(path: Path, header: dict[str, Any]) -> Results | None:
    """Finds what an earlier run under the same name has measured already.

    Args:
        path: Final name; ``<path>.partial`` is preferred if it exists.
        header: Header of the run that wants to continue.

    Returns:
        The earlier results, ``None`` if there are none. Cases with a row that failed or was not measured are left
        out: they run again.

    Raises:
        ValueError: The earlier run was on another machine or software, or with other options, so that its
            rows do not belong in the same file.
    """
    partial = path.with_name(path.name + PARTIAL)
    found = next((p for p in (partial, path) if p.is_file()), None)
    if found is None:
        return None
    earlier = read(found)
    for part in ("environment", "options"):
        mine, theirs = header.get(part, {}), earlier.header.get(part, {})
        if differing := sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k)):
            name = differing[0]
            raise ValueError(
                f"resume: {found} was measured with another {part} ({name}: {theirs.get(name)!r} there, "
                f"{mine.get(name)!r} here); choose another --out"
            )
    again = {(r.suite, r.case) for r in earlier.rows if r.status == "failed" or r.verdict == "not measured"}
    earlier.finished -= again
    earlier.rows = [r for r in earlier.rows if (r.suite, r.case) in earlier.finished]
    return earlier


def _again(earlier: Results) -> Iterator[str]:
    order: dict[tuple[str, str], list[Row]] = {}
    for row in earlier.rows:
        order.setdefault((row.suite, row.case), []).append(row)
    for key in sorted(earlier.finished, key=lambda k: list(order).index(k) if k in order else -1):
        rows = order.get(key, [])
        yield from (row.to_json() for row in rows)
        yield json.dumps({"kind": "case", "suite": key[0], "case": key[1], "rows": len(rows)})


def _parsed(lines: list[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                return
            raise ValueError(f"results: {path}, line {number} is not JSON") from None
        if not isinstance(entry, dict) or "kind" not in entry:
            raise ValueError(f"results: {path}, line {number} has no kind")
        yield entry


def _why(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not text"
