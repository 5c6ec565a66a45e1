"""A model of how long one tile takes, to choose between configurations that nobody has measured.

A tile is matrix products, exponentials and other arithmetic on its scores, operands read from shared memory, and the
streamed tile fetched from the cache. Within a program these follow one another; programs that share a multiprocessor
fill each other's gaps. So with ``R`` resident programs a tile takes

    max(slowest unit, (sum of the phases + latency) / R)

cycles of a multiprocessor; the maximum is taken softly, for what is close to two limits is slower than either. It is a
model, not a measurement: ``manyheads tune`` replaces what it chose.
"""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.lab.aot import Compiled
from manyheads.lab.targets import Target, target_named


@dataclass(frozen=True, slots=True)
class Rates:
    """What a multiprocessor does in a cycle, from the vendors' published peaks.

    Attributes:
        matrix: Multiply-adds of 16-bit matrix instructions.
        plain: Multiply-adds, and other operations, on float32.
        special: Exponentials.
        shared: Bytes from shared memory.
        fetched: Bytes from the last-level cache.
        latency: Cycles of barriers and dependent instructions around a tile.
        far: Cycles until a load from the cache arrives; hidden when the pipeline has two stages or more.
        straight: Whether matrix instructions read their operands from shared memory.
        aside: Whether accumulators lie outside the registers, so that rescaling them moves them both ways.
    """

    matrix: int
    plain: int
    special: int
    shared: int
    fetched: int
    latency: int
    far: int
    straight: bool = False
    aside: bool = False


RATES = {
    "sm_80": Rates(1024, 64, 16, 128, 26, 400, 600),
    "sm_90": Rates(2048, 128, 16, 128, 24, 400, 700, straight=True),
    "sm_100": Rates(4096, 128, 16, 128, 32, 500, 800, straight=True, aside=True),
    "gfx942": Rates(1024, 128, 16, 128, 40, 500, 800),
}


@dataclass(frozen=True, slots=True)
class Work:
    """What a kernel does in a tile.

    Attributes:
        products: How often a product of tile by head width is taken.
        stored: How many of them accumulate over tiles into the rows that the program owns.
        operations: Arithmetic on each score besides the exponential.
        keys: Whether the program owns keys and streams queries.
    """

    products: int
    stored: int
    operations: int
    keys: bool = False


WORK = {"forward": Work(2, 1, 10), "rows_backward": Work(3, 1, 10), "keys_backward": Work(4, 2, 10, keys=True)}
_SOFTNESS = 4
_A_ROW, _A_LOAD, _A_TILE = 60, 8, 100  # instructions
_OPERATIONS = {"plain": 0, "general": 15, "heavy": 60}  # on each score: a bias, a cap or a hash; all of them


def cycles_of_pair(
    kernel: str, target: str, width: int, itemsize: int, kind: str, shape: tuple[int, int, int, int], found: Compiled
) -> float:
    """Modelled cycles of a multiprocessor for one pair of query and key.

    Args:
        kernel: One of ``WORK``.
        target: Name of the target.
        width: Head width of keys and values.
        itemsize: Bytes of an element: 2, or 4 for products on the plain units.
        kind: As in ``configs``.
        shape: Queries and keys of a tile, warps, stages.
        found: What the compiled kernel needs.

    Returns:
        Cycles; infinite if a multiprocessor cannot hold even one program.

    Example:
        >>> need = Compiled(203, 0, 0, 98304)
        >>> wide = cycles_of_pair("forward", "sm_90", 128, 2, "plain", (128, 64, 8, 2), need)
        >>> narrow = cycles_of_pair("forward", "sm_90", 128, 2, "plain", (128, 16, 8, 2), need)
        >>> wide < narrow
        True
    """
    bm, bn, warps, stages = shape
    machine = target_named(target)
    resident = machine.resident(found.registers, found.shared, warps)
    return _cycles(kernel, machine, width, itemsize, kind, (bm, bn, warps, stages), resident)


def most_resident(kernel: str, target: str, width: int, shape: tuple[int, int, int, int]) -> int:
    """An upper bound on resident programs before anything is compiled: accumulators and scores must find room.

    Args:
        kernel: One of ``WORK``.
        target: Name of the target.
        width: Head width.
        shape: Queries and keys of a tile, warps, stages.

    Returns:
        The bound; 0 if the accumulators alone exceed the registers.
    """
    machine, work, (bm, bn, warps, _) = target_named(target), WORK[kernel], shape
    own = bn if work.keys else bm
    held = bm * bn + (0 if RATES[target].aside else own * width * work.stored)
    registers = held // (warps * machine.lanes) + 24
    return 0 if registers > machine.most_registers else machine.resident(registers, 0, warps)


def bound_of_pair(
    kernel: str, target: str, width: int, itemsize: int, kind: str, shape: tuple[int, int, int, int]
) -> float:
    """Cycles that a configuration cannot go below whatever the compiler does; infinite if it must spill."""
    resident = most_resident(kernel, target, width, shape)
    return _cycles(kernel, target_named(target), width, itemsize, kind, shape, resident)


def _cycles(
    kernel: str,
    machine: Target,
    width: int,
    itemsize: int,
    kind: str,
    shape: tuple[int, int, int, int],
    resident: int,
) -> float:
    if resident < 1:
        return float("inf")
    (bm, bn, warps, stages), rates, work = shape, RATES[machine.name], WORK[kernel]
    own, stream = (bn, bm) if work.keys else (bm, bn)
    scores = bm * bn
    exact = itemsize == 4
    # rows below those of one instruction are padding
    rows = max(own, 16 * warps) if not exact and not rates.straight else max(own, 64 if rates.straight else 16)
    matrix = work.products * rows * stream * width / (rates.plain if exact else rates.matrix)
    operations = work.operations + _OPERATIONS[kind]
    special = scores / rates.special
    # running maxima and sums of the rows, addresses of the streamed tile, and the loop itself
    overhead = _A_ROW * own + _A_LOAD * 2 * stream * width * itemsize // 16 + _A_TILE * warps * machine.lanes
    if kernel == "forward":
        overhead += own * width  # rescaling
    if rates.aside:
        overhead += 2 * own * width * work.stored
    plain = (scores * operations + overhead) / rates.plain
    # every group of warps reads the streamed operand of each product, and its own rows again for the scores
    groups = max(1, own // 64) if rates.straight else max(1, min(warps, own // 16))
    read = groups * work.products * stream * width * itemsize
    if rates.straight:
        read += min(2, work.products - 1) * own * width * itemsize
    shared = read / rates.shared
    fetched = 2 * stream * width * itemsize / rates.fetched
    latency = rates.latency + (rates.far + fetched if stages < 2 else 0)
    together = max(matrix, shared) + special + plain + latency
    limits = (matrix, shared, special, plain, fetched, together / resident)
    return sum(x**_SOFTNESS for x in limits) ** (1 / _SOFTNESS) / scores
