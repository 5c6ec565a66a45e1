"""Searches all tiles for the configurations that compile well, by a rule that is written down here.

Of all tiles, warps and stages, those are legal whose kernel keeps the limits of its target: it does not spill, its
memory fits, its products are matrix instructions that do not wait for each other, and so for every variant that may
run with it. Of the legal ones the model of its engine picks the fastest; within 2 % of it the one with more stages up
to 3, then the smaller tile, which wastes less at the edges of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from manyheads.engine.configs import Config
from manyheads.lab.gate import rules_broken
from manyheads.lab.memory import Memory
from manyheads.lab.pool import Made
from manyheads.lab.registry import Case, engine_of

WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
TIE = 0.02
_STEP = 4


@dataclass(frozen=True, slots=True)
class Place:
    """A row of the configuration table to be filled.

    Attributes:
        kernel, arch, width, itemsize, kind: As in ``configs``.
    """

    kernel: str
    arch: str
    width: int
    itemsize: int
    kind: str

    @property
    def dtype(self) -> str:
        """The dtype it is compiled for."""
        return "bf16" if self.itemsize == 2 else "fp32"

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """The key of the configuration table."""
        return (self.kernel, self.arch, self.width, self.itemsize, self.kind)

    def __str__(self) -> str:
        """In words."""
        return f"{self.kernel} {self.arch} {self.width} {self.dtype} {self.kind}"


@dataclass(frozen=True)
class Found:
    """A legal configuration.

    Attributes:
        config: Tile, warps, stages.
        made: What its main variant needs.
        cycles: Modelled cycles for a pair; of the scan engine, for a token.
    """

    config: Config
    made: Made
    cycles: float


def candidates(place: Place) -> list[Config]:
    """Every configuration worth compiling, the most promising first.

    Args:
        place: For which row.

    Returns:
        Configurations whose accumulators can find room, by their best conceivable speed.

    Example:
        >>> len(candidates(Place("forward", "sm_90", 128, 2, "plain"))) > 20
        True
    """
    found = []
    for config in _every(place):
        bound = _bound(place, config)
        if bound != float("inf"):
            found.append((bound, -config.bm * config.bn, -min(config.stages, 3), config.stages, config))
    return [config for *_, config in sorted(found, key=lambda entry: entry[:-1])]


def variants(place: Place) -> list[str]:
    """What may run with a row: its variants, the main one first."""
    main, *some = engine_of(place.kernel).variants(place.kernel, place.kind)
    if place.arch != "sm_90":
        some = []  # elsewhere a variant may spill
    elif place.itemsize == 4:
        some = [v for v in some if v == "tf32"]
    else:
        some = [v for v in some if v != "tf32"]
    return [main, *some]


def case(place: Place, config: Config, variant: str = "", **more: Any) -> Case:
    """The compilation of a configuration; of the main variant by default."""
    engine = engine_of(place.kernel)
    variant = variant or engine.variants(place.kernel, place.kind)[0]
    made: Case = engine.case(place.kernel, place.arch, place.dtype, place.width, variant, config, **more)
    return made


def legal(made: Made) -> list[str]:
    """Why a configuration must not be used; empty when it may.

    Args:
        made: What became of it.

    Returns:
        Reasons in words: the rules of the gate, and spills on any target.
    """
    reasons = list(rules_broken(made))
    if not reasons and made.compiled is not None and made.compiled.spilled:
        reasons.append(f"{made.case.id}: spills {made.compiled.spilled} bytes a thread")
    return reasons


def legal_configs(
    place: Place,
    memory: Memory,
    *,
    among: Sequence[Config] | None = None,
    workers: int | None = None,
    progress: Callable[[Made], object] | None = None,
) -> list[Found]:
    """Compiles every candidate of a row and keeps those that may be used, fastest by the model first.

    Args:
        place: Which row.
        memory: Where results are kept.
        among: The candidates; all by default.
        workers: Processes that compile.
        progress: Called with each new result.

    Returns:
        The legal ones.
    """
    some = list(candidates(place) if among is None else among)
    made = memory.compile([case(place, c) for c in some], workers=workers, progress=progress)
    found = [_found(place, c, m) for c, m in zip(some, made, strict=True) if not legal(m)]
    return sorted(found, key=lambda f: f.cycles)


def best(place: Place, memories: Sequence[Memory], *, workers: int | None = None) -> tuple[Found | None, str]:
    """The configuration that the rule chooses for a row.

    Candidates are compiled from the most promising on, until none that is left could beat the best one found. Where no
    candidate is free of spills, the one that spills least is taken.

    Args:
        place: Which row.
        memories: One for each version of the compiler under which it must be legal; the first one's resources count.
        workers: Processes that compile.

    Returns:
        The configuration, None if nothing compiles within the limits; and a note, empty if all is well.
    """
    some = candidates(place)
    found: list[Found] = []
    spilling: list[Found] = []
    refused: list[Found] = []
    for start in range(0, len(some) + 1, _STEP):
        batch = some[start : start + _STEP]
        beaten = min((_bound(place, c) for c in batch), default=float("inf")) / (1 + TIE)
        for one in _by_rule(found):
            if one.cycles > beaten:
                break  # what is left may be better
            if all(not legal(m) for memory in memories for m in _others(place, one.config, memory, workers)):
                return one, ""
            found.remove(one)
            refused.append(one)
        fine = batch
        for memory in memories:
            made = memory.compile([case(place, c) for c in fine], workers=workers)
            if memory is memories[0]:
                spilling += [_found(place, c, m) for c, m in zip(fine, made, strict=True) if _only_spills(m)]
            fine = [c for c, m in zip(fine, made, strict=True) if not legal(m)]
        found += [f for f in spilling if f.config in fine]
    if refused:
        return _by_rule(refused)[0], "a variant of it spills"
    if spilling:
        one = min(spilling, key=lambda f: (_spilled(f), f.cycles))
        return one, f"every tile spills; this one least, {_spilled(one)} bytes"
    return None, "nothing compiles within the limits"


def _others(place: Place, config: Config, memory: Memory, workers: int | None) -> list[Made]:
    return memory.compile([case(place, config, v) for v in variants(place)[1:]], workers=workers)


def _by_rule(found: Sequence[Found]) -> list[Found]:
    left, ordered = sorted(found, key=lambda f: f.cycles), []
    while left:
        close = [f for f in left if f.cycles <= left[0].cycles * (1 + TIE)]
        close.sort(key=lambda f: (-min(f.config.stages, 3), f.config.bm * f.config.bn, f.config.stages, f.cycles))
        ordered.append(close[0])
        left.remove(close[0])
    return ordered


def _found(place: Place, config: Config, made: Made) -> Found:
    assert made.compiled is not None
    about = (place.kernel, place.arch, place.width, place.itemsize, place.kind, _shape(config))
    return Found(config, made, engine_of(place.kernel).cycles(*about, made.compiled))


def _spilled(found: Found) -> int:
    return 0 if found.made.compiled is None else found.made.compiled.spilled


def _only_spills(made: Made) -> bool:
    """Whether nothing but spills may be wrong with a result."""
    forgiven = replace(made, case=replace(made.case, may_spill="as an exception"))
    return made.compiled is not None and not list(rules_broken(forgiven))


def _bound(place: Place, config: Config) -> float:
    about = (place.kernel, place.arch, place.width, place.itemsize, place.kind, _shape(config))
    return float(engine_of(place.kernel).bound(*about))


def _shape(config: Config) -> tuple[int, int, int, int]:
    return config.bm, config.bn, config.warps, config.stages


def _every(place: Place) -> Iterator[Config]:
    for bm, bn in engine_of(place.kernel).shapes(place.kernel, place.width, place.itemsize):
        for warps in WARPS:
            for stages in STAGES if place.arch != "gfx942" else STAGES[:2]:
                yield Config(bm, bn, warps, stages)
