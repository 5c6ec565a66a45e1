"""The kernels of the tiled engine that put key tiles outermost, as the gate and the tuner see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manyheads.engine.configs import ARCHITECTURES, WIDTHS, Config, choose
from manyheads.lab.aot import Compiled
from manyheads.lab.estimate import RATES
from manyheads.lab.registry import EXACT, Case, Constant, Kernel
from manyheads.lab.targets import target_named

_LISTS = dict.fromkeys(("entry", "mask_id", "owner", "start", "stop", "bits"), "i32")
_INPUTS = _LISTS | dict.fromkeys(("q", "k", "v", "part"), "data")
_PATH = "manyheads.engine.tiled.kernels"
_FLOATS, _STRIDES = frozenset({"scale"}), r"s[qkvd][bhn]"

KERNELS = (
    Kernel("entries.entries_forward", f"{_PATH}:entries_forward", _INPUTS | {"stats": "fp32"}, _FLOATS, _STRIDES),
    Kernel(
        "entries.entries_backward",
        f"{_PATH}:entries_backward",
        _INPUTS | {"dout": "data"} | dict.fromkeys(("lse", "delta", "dk", "dv"), "fp32"),
        _FLOATS,
        _STRIDES,
    ),
    Kernel(
        "entries.merge_entries",
        f"{_PATH}:merge_entries",
        {"part": "data", "out": "data", "stats": "fp32", "lse": "fp32", "sink": "fp32", "counts": "i32"},
    ),
    Kernel("entries.total_pieces", f"{_PATH}:total_pieces", {"part": "fp32", "out": "data", "bounds": "i32"}),
)
"""See ``registry.Kernel``."""

_OFF: dict[str, Constant] = {"PACK": 4, "SPAN": 4, "IDS_MASKED": 1, "FAST": 1, "EXP": 0, "PRECISION": "ieee"}
VARIANTS: dict[str, dict[str, Constant]] = {
    "plain": {},
    "seven heads": {"PACK": 7, "SPAN": 8},
    "without bitmaps": {"IDS_MASKED": 0},
    "half the keys": {"half": 1},
    "odd widths": {"odd": 1},
    "polynomial": {"EXP": 4},
    "tf32": {"PRECISION": "tf32"},
}
"""What a case switches on."""

VARIANTS_OF = {
    "entries_forward": [*VARIANTS],
    "entries_backward": [v for v in VARIANTS if v != "polynomial"],
}
"""Variants that the launcher can ask of each kernel."""

SUMS: dict[str, dict[str, dict[str, Constant]]] = {
    "merge_entries": {
        "plain": {"ROWS": 16, "PACK": 4, "WEIGHTED": 1, "SINK": 0},
        "sink": {"ROWS": 16, "PACK": 4, "WEIGHTED": 1, "SINK": 1},
        "gradient": {"ROWS": 16, "PACK": 4, "WEIGHTED": 0, "SINK": 0},
    },
    "total_pieces": {"plain": {"BN": 64, "ADD": 0}, "in parts": {"BN": 64, "ADD": 1}},
}
"""Variants of the kernels that only add up, which have no row in the table of configurations."""

_NAMES = {"D", "BD", "DV", "BDV", "BN", "ROWS", "PACK", "SPAN", "IDS_MASKED", "FAST", "PRECISION"}


def constants(kernel: str, width: int, variant: str, config: Config) -> dict[str, Constant]:
    """Compile-time arguments of a kernel under a configuration.

    Args:
        kernel: One of the kernels.
        width: Head width of queries, keys and values.
        variant: One of ``VARIANTS``, or of the ``SUMS`` of the kernel.
        config: Rows, keys, warps and stages.

    Returns:
        A value for each constant of the kernel.

    Example:
        >>> found = constants("entries_backward", 64, "seven heads", Config(64, 32, 4, 2))
        >>> found["PACK"], found["BN"], "EXP" in found
        (7, 32, False)
    """
    if kernel in SUMS:
        return {"WIDTH": width, "PADDED": width} | SUMS[kernel][variant]
    on = dict(VARIANTS[variant])
    d, dv = (width - 24, width - 8) if on.pop("odd", 0) else (width, width)
    keys = max(16, config.bn // 2) if on.pop("half", 0) else config.bn
    given = _OFF | {"D": d, "BD": width, "DV": dv, "BDV": width, "ROWS": config.bm, "BN": keys}
    given |= {"EXP": config.exp} | on
    names = _NAMES | ({"EXP"} if kernel == "entries_forward" else set())
    return {name: value for name, value in given.items() if name in names}


def variants(kernel: str, kind: str) -> list[str]:
    """What may run with a row of the table, the variant that stands for it first.

    Example:
        >>> variants("entries_backward", "plain")[:2]
        ['plain', 'seven heads']
    """
    return VARIANTS_OF[kernel]


def shapes(kernel: str, width: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Rows and keys that are worth compiling.

    Example:
        >>> list(shapes("entries_backward", 64, 4))
        [(16, 16), (16, 32), (32, 16), (32, 32)]
    """
    rows, keys = ((16, 32), (16, 32)) if itemsize == 4 else ((32, 64, 128), (32, 64, 128))
    yield from ((r, n) for r in rows for n in keys)


def cycles(
    kernel: str, target: str, width: int, itemsize: int, kind: str, shape: tuple[int, int, int, int],
    found: Compiled | None = None,
) -> float:  # fmt: skip
    """Modelled cycles of a multiprocessor for one pair of a row and a key; to sort by, not a measurement.

    Args:
        kernel: ``"entries_forward"`` or ``"entries_backward"``.
        target: Name of the target.
        width: Head width.
        itemsize: Bytes of an element: 2, or 4 for products on the plain units.
        kind: As in ``engine.configs``; it changes nothing here.
        shape: Rows, keys, warps, stages.
        found: What the compiled kernel needs; None for the best conceivable.

    Returns:
        Cycles; infinite if a multiprocessor cannot hold even one program.

    Example:
        >>> slow, fast = (cycles("entries_forward", "sm_90", 128, 2, "plain", (n, 64, 4, 2)) for n in (16, 64))
        >>> fast < slow
        True
    """
    (rows, keys, warps, stages), rates = shape, RATES[target]
    resident = 8 if found is None else target_named(target).resident(found.registers, found.shared, warps)
    if resident < 1:
        return float("inf")
    backward = kernel == "entries_backward"
    rate = rates.plain if itemsize == 4 else rates.matrix
    filled = max(64 if rates.straight and itemsize == 2 else 16, keys if backward else rows)
    products = (5 if backward else 2) * filled * (rows if backward else keys) * width / rate
    special = rows * keys * (1 / rates.special + 10 / rates.plain)
    # what is read of each row and what is written for it
    moved = (3 if backward else 2) * rows * width * itemsize
    phases = products, special, moved / rates.fetched
    # rows lie far apart, and where they lie is itself a load
    wait = rates.latency + (2 * rates.far if stages < 2 else 0)
    return max(*phases, (sum(phases) + wait) / resident) / (rows * keys)


bound = cycles
"""What a configuration cannot go below whatever the compiler does."""


def case(kernel: str, arch: str, dtype: str, width: int, variant: str, config: Config, **more: Any) -> Case:
    """A compilation under a given configuration.

    Args:
        kernel: One of the kernels.
        arch: Name of the target.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        width: Head width.
        variant: One of ``VARIANTS``, or of the ``SUMS`` of the kernel.
        config: What to compile it with.
        **more: Further fields of the case.

    Returns:
        The case.
    """
    fixed = constants(kernel, width, variant, config)
    # float32 products are exact only on the plain units; fewer than 64 rows of a product fill no warp group
    own = 0 if kernel in SUMS else int(fixed["BN" if kernel == "entries_backward" else "ROWS"])
    matrix = kernel not in SUMS and dtype != "fp32" and (arch in ("sm_80", "gfx942") or own >= 64)
    more = {"matrix": matrix, "may_spill": EXACT if dtype == "fp32" and kernel not in SUMS else "", **more}
    return Case(f"entries.{kernel}", arch, dtype, width, variant, fixed, config.warps, config.stages, **more)


def cases() -> Iterator[Case]:
    """Every shipped configuration: all variants for 90, the main one elsewhere."""
    for kernel, some in VARIANTS_OF.items():
        for arch in ARCHITECTURES:
            for width in WIDTHS:
                for variant in some if arch == "sm_90" else ["plain"]:
                    dtypes = ["fp32"] if variant == "tf32" else ["bf16"]
                    dtypes += ["fp16", "fp32"] if variant == "plain" and arch == "sm_90" else []
                    for dtype in dtypes:
                        config = choose(kernel, arch, width, 4 if dtype == "fp32" else 2, "plain")
                        quick = dtype == "bf16" and variant == "plain" and width == 128
                        yield case(kernel, arch, dtype, width, variant, config, quick=quick)
    for kernel, sums in SUMS.items():
        for arch in ARCHITECTURES:
            for variant in sums:
                yield case(kernel, arch, "bf16", 128, variant, Config(64, 64, 4, 1), quick=arch == "sm_90")
