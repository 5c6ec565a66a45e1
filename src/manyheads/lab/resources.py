"""The checked-in table of what every kernel needs, one row for each case and version of the compiler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from manyheads.lab.pool import Made
from manyheads.lab.targets import target_named

FILE = "resources.tsv"


@dataclass(frozen=True, slots=True)
class Need:
    """One row.

    Attributes:
        triton: Version of the compiler.
        kernel, target, dtype, width, variant: Which case.
        tile: Queries and keys of a tile, ``"128x64"``; see ``engine.configs`` for other kernels.
        warps, stages: Of the configuration.
        registers, spilled, shared, tensor: See ``aot.Compiled``.
        matrix: Matrix instructions of the target in the assembly.
        copies: Asynchronous copies (``cp.async`` and TMA) in the assembly.
    """

    triton: str
    kernel: str
    target: str
    dtype: str
    width: int
    variant: str
    tile: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    tensor: int
    matrix: int
    copies: int

    @property
    def id(self) -> str:
        """The same name as that of its case."""
        return f"{self.kernel} {self.target} {self.dtype} {self.width} {self.variant}"


COLUMNS = tuple(f.name for f in fields(Need))
_NUMBERS = {f.name for f in fields(Need) if f.type == "int"}
_CONFIGURED = ("tile", "warps", "stages")
_MEASURED = ("registers", "spilled", "shared", "tensor", "matrix", "copies")


def need_of(made: Made) -> Need:
    """The row of a case that compiled.

    Args:
        made: What became of the case.

    Returns:
        The row.

    Raises:
        ValueError: The case did not compile.
    """
    if made.compiled is None:
        raise ValueError(f"{made.case.id} did not compile: {made.error}")
    case, found, seen = made.case, made.compiled, made.compiled.instructions
    fixed = case.constants
    rows = next((fixed[name] for name in ("BM", "ROWS", "BD", "BX", "TILE") if name in fixed), 0)
    keys = next((fixed[name] for name in ("BN", "BV", "BZ") if name in fixed), 0)
    return Need(
        made.triton,
        case.kernel,
        case.target,
        case.dtype,
        case.width,
        case.variant,
        f"{rows}x{keys}" if keys else str(rows),
        case.warps,
        case.stages,
        found.registers,
        found.spilled,
        found.shared,
        found.tensor,
        seen.get(target_named(case.target).matrix, 0),
        seen.get("cp.async", 0) + seen.get("tma", 0),
    )


def read(path: Path | None = None) -> list[Need]:
    """Reads a table.

    Args:
        path: The file; the checked-in one by default.

    Returns:
        Its rows.

    Raises:
        ValueError: The file is not such a table; says which line.

    Example:
        >>> {need.target for need in read()} >= {"sm_80", "sm_90", "sm_100", "gfx942"}
        True
    """
    source = resources.files(__package__).joinpath(FILE) if path is None else path
    return parse(source.read_text(encoding="utf-8"), str(path or FILE))


def parse(text: str, name: str = FILE) -> list[Need]:
    """Reads the text of a table.

    Args:
        text: Tab-separated, the names of the columns first; lines that begin with ``#`` are left out.
        name: What to call it in errors.

    Returns:
        Its rows.

    Raises:
        ValueError: Other columns than ``COLUMNS``, a short line, or no number where one belongs.

    Example:
        >>> parse("a\\tb\\n")
        Traceback (most recent call last):
        ValueError: resources.tsv: expected the columns triton, kernel, ... got a, b
    """
    lines = [(n, line.split("\t")) for n, line in enumerate(text.splitlines(), 1) if line and line[0] != "#"]
    head = lines[0][1] if lines else []
    if tuple(head) != COLUMNS:
        raise ValueError(f"{name}: expected the columns {', '.join(COLUMNS)}, got {', '.join(head) or 'nothing'}")
    found = []
    for number, cells in lines[1:]:
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{name}, line {number}: expected {len(COLUMNS)} cells, got {len(cells)}")
        row: dict[str, Any] = dict(zip(COLUMNS, cells, strict=True))
        for column in _NUMBERS:
            try:
                row[column] = int(row[column])
            except ValueError:
                raise ValueError(f"{name}, line {number}: {column}: expected a number, got {row[column]!r}") from None
        found.append(Need(**row))
    return found


def render(needs: Iterable[Need]) -> str:
    """The text of a table, sorted, so that a change is a small difference.

    Args:
        needs: Its rows.

    Returns:
        Text that ``parse`` reads back.

    Example:
        >>> render([]).split()[:2]
        ['triton', 'kernel']
    """
    rows = sorted(needs, key=lambda n: (n.triton, n.kernel, n.target, n.dtype, n.width, n.variant))
    lines = ["\t".join(COLUMNS), *("\t".join(str(getattr(n, c)) for c in COLUMNS) for n in rows)]
    return "\n".join(lines) + "\n"


def differences(old: Iterable[Need], new: Iterable[Need], *, whole: bool = False) -> list[str]:
    """Says in words how measured needs differ from the table.

    Args:
        old: The table.
        new: What was measured.
        whole: Whether every case was measured, so that rows without one are out of date.

    Returns:
        One line a case that differs; nothing about versions of the compiler that the table does not know.

    Example:
        >>> a = Need("3.9.0", "tiled.forward", "sm_90", "bf16", 128, "plain", "128x64", 8, 2, 203, 0, 98304, 0, 12, 16)
        >>> from dataclasses import replace
        >>> differences([a], [replace(a, registers=214)])
        ['tiled.forward sm_90 bf16 128 plain: registers 214, the table has 203']
    """
    known = {(n.triton, n.id): n for n in old}
    versions = {n.triton for n in known.values()}
    said = []
    seen: Mapping[tuple[str, str], Need] = {(n.triton, n.id): n for n in new}
    for key, now in seen.items():
        if now.triton not in versions:
            continue
        before = known.get(key)
        if before is None:
            said.append(f"{now.id}: is not in the table")
            continue
        changed = [
            f"{name} {getattr(now, name)}, the table has {getattr(before, name)}"
            for name in (*_CONFIGURED, *_MEASURED)
            if getattr(now, name) != getattr(before, name)
        ]
        if changed:
            said.append(f"{now.id}: {'; '.join(changed)}")
    if whole:
        now_versions = {n.triton for n in seen.values()}
        said += [f"{n.id}: is in the table but no case any more" for key, n in known.items()
                 if key not in seen and n.triton in now_versions]  # fmt: skip
    return said
