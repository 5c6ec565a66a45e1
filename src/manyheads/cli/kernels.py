"""``manyheads kernels``: what every kernel needs, and whether it still needs that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources as package_files
from pathlib import Path

from manyheads.common.errors import unknown
from manyheads.lab import gate, resources, rules
from manyheads.lab.pool import Made
from manyheads.lab.registry import Case, cases, kernels
from manyheads.lab.resources import Need
from manyheads.lab.targets import TARGETS, target_named


@dataclass(frozen=True)
class Request:
    """What was asked.

    Attributes:
        kernel, arch, width: Only these; empty or 0 for all.
        check: Whether to compile and compare.
        full: Whether to compile every case and not only those of ``make test``.
        update: Whether to compile every case and write the table.
        triton: Folder that holds another Triton than the installed one.
        workers: Processes that compile; 0 for one a core.
    """

    kernel: str = ""
    arch: str = ""
    width: int = 0
    check: bool = False
    full: bool = False
    update: bool = False
    triton: Path | None = None
    workers: int = 0


def run(request: Request) -> int:
    """Prints the table, checks it, or writes it.

    Args:
        request: What was asked.

    Returns:
        The exit status: 1 if a rule is broken or the table is out of date.

    Raises:
        ValueError: A kernel or architecture that does not exist, or nothing left to do.
    """
    if request.kernel and not any(_named(request.kernel, name) for name in kernels()):
        raise unknown("kernel", request.kernel, kernels())
    if request.arch:
        target_named(request.arch)
    if request.update:
        return _update(request)
    if request.check or request.full:
        return _check(request)
    needs = [n for n in resources.read() if _wanted(request, n)]
    if not needs:
        raise ValueError("kernels: nothing in the table is so; see `manyheads kernels`")
    print(table(needs))
    return 0


def table(needs: Iterable[Need]) -> str:
    """The table for a reader.

    Args:
        needs: Its rows.

    Returns:
        Aligned text, a block for each kernel, target and compiler.
    """
    heads = ("width", "dtype", "variant", "tile", "warps", "stages", "registers", "spilled", "shared KiB", "programs",
             "matrix", "copies")  # fmt: skip
    blocks: dict[str, list[tuple[str, ...]]] = {}
    for n in sorted(needs, key=lambda n: (n.kernel, list(TARGETS).index(n.target), n.triton, n.width, n.dtype)):
        target = TARGETS[n.target]
        resident = target.resident(n.registers, n.shared, n.warps)
        shown = (n.width, n.dtype, n.variant, n.tile, n.warps, n.stages, n.registers, n.spilled or "", n.shared // 1024,
                 resident, f"{n.matrix} {target.matrix}" if n.matrix else "", n.copies or "")  # fmt: skip
        blocks.setdefault(f"{n.kernel} on {n.target}, Triton {n.triton}", []).append(tuple(map(str, shown)))
    return "\n\n".join(f"{title}\n{aligned([heads, *rows])}" for title, rows in blocks.items())


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns of equal width.

    Example:
        >>> print(aligned([("a", "bb"), ("ccc", "d")]))
        a    bb
        ccc  d
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _check(request: Request) -> int:
    chosen = [c for c in cases() if (c.quick or request.full) and _wanted(request, c)]
    if not chosen:
        raise ValueError("kernels: no case is so; try --full, or see `manyheads kernels`")
    findings = rules.check_package(_package())
    verdict = gate.run(chosen, workers=request.workers or None, triton=request.triton, progress=counter(len(chosen)))
    for finding in findings:
        print(f"rule: {finding}")
    if text := verdict.text():
        print(text)
    seconds = sum(m.compiled.seconds for m in verdict.made if m.compiled is not None)
    state = "green" if verdict.green and not findings else "red"
    print(f"{state}: {len(verdict.made)} kernels compiled in {seconds:.0f} s of compiler time")
    return 0 if state == "green" else 1


def _update(request: Request) -> int:
    if request.kernel or request.arch or request.width:
        raise ValueError("update: writes the whole table; leave --kernel, --arch and --width out")
    every = list(cases())
    verdict = gate.run(every, workers=request.workers or None, triton=request.triton, progress=counter(len(every)))
    needs = [resources.need_of(m) for m in verdict.made if m.compiled is not None]
    versions = {n.triton for n in needs}
    place = _package() / "lab" / resources.FILE
    kept = [n for n in (resources.read() if place.is_file() else []) if n.triton not in versions]
    try:
        place.write_text(resources.render([*kept, *needs]), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"update: cannot write {place}: {error.strerror}") from None
    for line in verdict.broken:
        print(f"broken: {line}")
    print("\n".join(verdict.changed) or "nothing changed")
    print(f"{len(needs)} rows for Triton {', '.join(sorted(versions))}: {resources.FILE}")
    return 1 if verdict.broken else 0


def counter(total: int) -> Callable[[Made], None]:
    """Says on a terminal how far compiling has come.

    Args:
        total: How many cases there are.

    Returns:
        What to call with each result.
    """
    done = 0

    def say(made: Made) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r\033[K{done}/{total} {made.case.id}", end=end, file=sys.stderr, flush=True)

    return say


def _wanted(request: Request, one: Case | Need) -> bool:
    return (
        (not request.kernel or _named(request.kernel, one.kernel))
        and request.arch in ("", one.target)
        and request.width in (0, one.width)
    )


def _named(asked: str, name: str) -> bool:
    return asked in (name, *name.split("."))


def _package() -> Path:
    return Path(str(package_files.files("manyheads")))
