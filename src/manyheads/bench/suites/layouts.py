"""Suite ``layouts``: time and memory of compiling masks to tiles, forward and transposed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from manyheads.bench import memory
from manyheads.bench.environment import version
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.suites.patterns import resolve
from manyheads.bench.timing import interleave
from manyheads.mask import Mask
from manyheads.mask.build import build
from manyheads.mask.layout import TileLayout

WINDOWED = "causal & window(4096)"
LENGTHS = {"quick": (131_072,), "default": (131_072, 1_048_576), "full": (8_192, 131_072, 1_048_576)}


@dataclass(frozen=True)
class Build:
    """One way of compiling: a mask, and whether its tile keys may be used.

    Attributes:
        name: Part of the case's name.
        mask: Text of the mask.
        keyed: Whether tiles with equal keys are evaluated once.
    """

    name: str
    mask: str
    keyed: bool = True


BUILDS = (
    Build("windowed", WINDOWED),
    Build("causal", "causal"),
    Build("unkeyed", WINDOWED, keyed=False),
)


def cases(options: Options) -> list[Case]:
    """One case for each length and way of compiling."""
    builds = BUILDS if not options.masks else tuple(Build(m, m) for m in options.masks)
    return [case(which, n, options.seed) for n in options.lengths or LENGTHS[options.level] for which in builds]


def case(which: Build, length: int, seed: int = 0) -> Case:
    """Compiles one mask at one length.

    Args:
        which: The mask and the way.
        length: Tokens.
        seed: Seed of what the mask draws, if it is one of the static masks.

    Returns:
        The case; its row has the time of both directions together, the peak memory of the same in a process
        of its own, and the number of unique tiles.
    """
    return Case("layouts", f"{which.name}-{length}", lambda c: _run(c, which, length, seed), 2.5, ("manyheads",))


def both_ways(mask: Mask, length: int, keyed: bool) -> TileLayout:
    """Compiles a mask and its transpose, past the cache.

    Args:
        mask: The mask.
        length: Tokens.
        keyed: Whether tiles with equal keys are evaluated once.

    Returns:
        The layout; its transpose stays with it.
    """
    layout = build(mask, length, length, cache=False, keyed=keyed)
    layout.transpose()
    return layout


def peak_of(mask: Mask, length: int, keyed: bool) -> memory.Peak:
    """Runs in the measuring process: the peak of compiling both ways."""
    both_ways(mask, 1024, keyed)
    return memory.peak_here(lambda: both_ways(mask, length, keyed))


def _run(context: Context, which: Build, length: int, seed: int) -> list[Row]:
    mask = resolve(which.mask, length, seed)
    row = Row(
        "layouts",
        f"{which.name}-{length}",
        "manyheads",
        phase="build",
        shape=f"{length}x{length}",
        length=length,
        mask=mask.text,
        device="cpu",
        threads=torch.get_num_threads(),
        version=version("manyheads"),
    )
    context.say(f"layouts/{row.case}: building")
    layout = both_ways(mask, length, which.keyed)
    found = interleave({"b": lambda: both_ways(mask, length, which.keyed)}, budget_s=context.options.seconds)["b"]
    row = row.replace(
        **found.fields(),
        density=layout.density,
        area=layout.area,
        pairs=layout.pairs,
        unique_tiles=len(layout.bits),
        note=f"{layout.nbytes / memory.MIB:.1f} MiB kept",
    )
    if (reason := memory.available()) is not None:
        return [row.replace(note=f"{row.note}; {reason}")]
    context.say(f"layouts/{row.case}: peak memory")
    with memory.Worker() as worker:
        peak = worker.ask("manyheads.bench.suites.layouts:peak_of", mask, length, which.keyed)
    return [row.replace(peak_mib=peak.beyond_mib, process_mib=peak.process_mib)]


SUITE = Suite(
    "layouts",
    "Compile masks to tiles at long lengths: time, peak memory, unique tiles.",
    cases,
    ("manyheads",),
)
