"""Holds every kernel to the limits of its targets and to the checked-in table of resources, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from manyheads.lab import resources
from manyheads.lab.pool import Made, compile_cases
from manyheads.lab.registry import Case, cases
from manyheads.lab.resources import Need
from manyheads.lab.targets import TENSOR_COLUMNS, target_named

NO_SPILLS_ON = ("sm_90",)
"""Targets on which no shipped configuration may spill."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        made: What became of each case.
        broken: Rules that do not hold, in words; an error.
        changed: Differences from the table, in words; an error until the table is renewed.
        notes: What is worth knowing.
    """

    made: list[Made]
    broken: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def green(self) -> bool:
        """Whether everything holds."""
        return not (self.broken or self.changed)

    def text(self) -> str:
        """What to tell a reader, one finding a line."""
        parts = [*(f"broken: {line}" for line in self.broken), *(f"changed: {line}" for line in self.changed)]
        if self.changed:
            parts.append("if the changes are meant, write them down with `manyheads kernels --update`")
        return "\n".join([*parts, *(f"note: {line}" for line in self.notes)])


def run(
    chosen: Iterable[Case] | None = None,
    *,
    table: Iterable[Need] | None = None,
    workers: int | None = None,
    triton: Path | None = None,
    progress: Callable[[Made], object] | None = None,
) -> Verdict:
    """Compiles cases, holds them to the rules and compares them with the table.

    Args:
        chosen: The cases; every registered one by default.
        table: Rows to compare with; the checked-in ones by default.
        workers: Processes that compile.
        triton: Folder that holds another Triton than the installed one.
        progress: Called with each result as it comes.

    Returns:
        The verdict.
    """
    every = list(cases())
    todo = every if chosen is None else list(chosen)
    made = compile_cases(todo, workers=workers, triton=triton, progress=progress)
    rows = list(resources.read() if table is None else table)
    needs = [resources.need_of(m) for m in made if m.compiled is not None]
    whole = {case.id for case in every} <= {case.id for case in todo}
    verdict = Verdict(made, broken=[line for m in made for line in rules_broken(m)])
    verdict.changed.extend(resources.differences(rows, needs, whole=whole))
    for version in sorted({n.triton for n in needs} - {n.triton for n in rows}):
        known = ", ".join(sorted({n.triton for n in rows})) or "no version"
        verdict.notes.append(f"the table knows Triton {known}, not {version}: only the rules were held")
    spared = (m for m in made if m.case.may_spill and m.compiled is not None and m.compiled.spilled)
    verdict.notes.extend(f"{m.case.id}: may spill, for {m.case.may_spill}" for m in spared)
    return verdict


def rules_broken(made: Made) -> Iterator[str]:
    """Which limits a compiled kernel breaks.

    Args:
        made: What became of a case.

    Yields:
        One line for each limit: it must compile; shared and tensor memory must fit; no spills on the targets of
        ``NO_SPILLS_ON``; products must be matrix instructions that do not wait for each other.
    """
    case, found = made.case, made.compiled
    if found is None:
        yield f"{case.id}: did not compile: {made.error}"
        return
    target = target_named(case.target)
    if found.shared > target.shared:
        yield f"{case.id}: {found.shared} bytes of shared memory, {target.name} has {target.shared} for a program"
    if found.tensor > TENSOR_COLUMNS:
        yield f"{case.id}: {found.tensor} columns of tensor memory, there are {TENSOR_COLUMNS}"
    if found.registers > target.most_registers:
        yield f"{case.id}: {found.registers} registers, a thread has {target.most_registers}"
    if found.spilled and case.target in NO_SPILLS_ON and not case.may_spill:
        yield f"{case.id}: spills {found.spilled} bytes a thread ({found.registers} registers)"
    if case.matrix and not found.instructions.get(target.matrix):
        yield f"{case.id}: has no {target.matrix} instruction"
    for complaint in found.warnings:
        if "C75" in complaint:
            yield f"{case.id}: {complaint}"
