"""The kernels of the gather engine, as the gate and the tuner see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manyheads.engine.configs import ARCHITECTURES, WIDTHS, Config, choose
from manyheads.lab.aot import Compiled
from manyheads.lab.estimate import RATES
from manyheads.lab.registry import EXACT, Case, Constant, Kernel
from manyheads.lab.targets import target_named

_INPUTS = {"q": "data", "k": "data", "v": "data"}
_BACKWARD = _INPUTS | {"dout": "data", "lse": "fp32", "delta": "fp32"}
_PATH = "manyheads.engine.gather.kernels"
_FLOATS, _STRIDES = frozenset({"scale", "softcap"}), r"s[qkvd][bhn]"

KERNELS = (
    Kernel(
        "gather.listed",
        f"{_PATH}:listed",
        _INPUTS | {"ids": "i32", "out": "data", "lse": "fp32", "sink": "fp32"},
        _FLOATS,
        _STRIDES,
    ),
    Kernel("gather.listed_rows", f"{_PATH}:listed_rows", _BACKWARD | {"ids": "i32", "dq": "data"}, _FLOATS, _STRIDES),
    Kernel(
        "gather.listed_keys",
        f"{_PATH}:listed_keys",
        _BACKWARD | {"dk": "data", "dv": "data", "queries": "i32", "starts": "i32"},
        _FLOATS,
        _STRIDES,
    ),
)
"""See ``registry.Kernel``."""

_OFF: dict[str, Constant] = {"SHARED": 0, "SOFTCAP": 0, "SINK": 0, "WHAT": 0, "PRECISION": "ieee"}
VARIANTS: dict[str, dict[str, Constant]] = {
    "plain": {},
    "few heads": {"ROWS": 16},
    "shared": {"SHARED": 1},
    "cap and sink": {"SOFTCAP": 1, "SINK": 1},
    "odd widths": {"odd": 1},
    "sums": {"WHAT": 1},
    "tf32": {"PRECISION": "tf32"},
}
"""What a case switches on."""

VARIANTS_OF = {
    "listed": [v for v in VARIANTS if v != "sums"],
    "listed_rows": [*VARIANTS],
    "listed_keys": ["plain", "cap and sink", "odd widths"],
}
"""Variants that the launcher can ask of each kernel."""

_NAMES = {
    "listed": {"D", "BD", "DV", "BDV", "ROWS", "BN", "SHARED", "SOFTCAP", "SINK", "PRECISION"},
    "listed_rows": {"WHAT", "D", "BD", "DV", "BDV", "ROWS", "BN", "SHARED", "SOFTCAP", "PRECISION"},
    "listed_keys": {"D", "BD", "DV", "BDV", "ROWS", "SOFTCAP"},
}


def constants(kernel: str, width: int, variant: str, config: Config) -> dict[str, Constant]:
    """Compile-time arguments of a kernel under a configuration.

    Args:
        kernel: One of the engine's kernels.
        width: Head width of queries, keys and values.
        variant: One of ``VARIANTS``.
        config: Heads, ids, warps and stages.

    Returns:
        A value for each constant of the kernel.

    Example:
        >>> found = constants("listed", 64, "few heads", Config(64, 32, 4, 2))
        >>> found["ROWS"], found["BN"], "WHAT" in found
        (16, 32, False)
    """
    on = dict(VARIANTS[variant])
    d, dv = (width - 24, width - 8) if on.pop("odd", 0) else (width, width)
    given = _OFF | {"D": d, "BD": width, "DV": dv, "BDV": width, "ROWS": config.bm, "BN": config.bn} | on
    return {name: value for name, value in given.items() if name in _NAMES[kernel]}


def variants(kernel: str, kind: str) -> list[str]:
    """What may run with a row of the table, the variant that stands for it first.

    Example:
        >>> variants("listed_keys", "lists")
        ['plain', 'cap and sink', 'odd widths']
    """
    return VARIANTS_OF[kernel]


def shapes(kernel: str, width: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Heads and ids that are worth compiling.

    Example:
        >>> list(shapes("listed_keys", 64, 2))
        [(16, 16), (32, 16), (64, 16)]
    """
    if kernel == "listed_keys":
        yield from ((rows, 16) for rows in (16, 32, 64))
    else:
        sizes = (16, 32) if itemsize == 4 else (32, 64, 128)
        yield from ((rows, ids) for rows in ((16, 32) if itemsize == 4 else (64,)) for ids in sizes)


def cycles(
    kernel: str, target: str, width: int, itemsize: int, kind: str, shape: tuple[int, int, int, int],
    found: Compiled | None = None,
) -> float:  # fmt: skip
    """Modelled cycles of a multiprocessor for one id of one query of 16 heads; to sort by, not a measurement.

    Args:
        kernel: One of the engine's kernels.
        target: Name of the target.
        width: Head width.
        itemsize: Bytes of an element: 2, or 4 for products on the plain units.
        kind: As in ``engine.configs``; it changes nothing here.
        shape: Heads, ids, warps, stages.
        found: What the compiled kernel needs; None for the best conceivable.

    Returns:
        Cycles; infinite if a multiprocessor cannot hold even one program.

    Example:
        >>> need = Compiled(registers=168, stack=0, spilled=0, shared=82176)
        >>> slow, fast = (cycles("listed", "sm_90", 128, 2, "lists", (64, 64, 4, n), need) for n in (1, 2))
        >>> fast < slow
        True
    """
    (rows, ids, warps, stages), rates = shape, RATES[target]
    resident = 8 if found is None else target_named(target).resident(found.registers, found.shared, warps)
    if resident < 1:
        return float("inf")
    if kernel == "listed_keys":
        steps, products, moved = rows / 16, 4 * rows * width / rates.plain, 2 * rows * width * itemsize
    else:
        rate = rates.plain if itemsize == 4 else rates.matrix
        steps, moved = float(ids), 2 * ids * width * itemsize
        products = (2 if kernel == "listed" else 3) * rows * ids * width / rate + rows * ids / rates.special
    phases = products, moved / rates.fetched
    # rows lie far apart, and where they lie is itself a load
    wait = rates.latency + (2 * rates.far if stages < 2 else 0)
    return max(*phases, (sum(phases) + wait) / resident) / steps


bound = cycles
"""What a configuration cannot go below whatever the compiler does."""


def case(kernel: str, arch: str, dtype: str, width: int, variant: str, config: Config, **more: Any) -> Case:
    """A compilation under a given configuration.

    Args:
        kernel: One of the engine's kernels.
        arch: Name of the target.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        width: Head width.
        variant: One of ``VARIANTS``.
        config: What to compile it with.
        **more: Further fields of the case.

    Returns:
        The case.
    """
    fixed = constants(kernel, width, variant, config)
    # one key is a vector; float32 products are exact only on the plain units; few heads fill no warp group
    products = kernel != "listed_keys" and dtype != "fp32"
    matrix = products and (arch in ("sm_80", "gfx942") or int(fixed["ROWS"]) >= 64)
    more = {"matrix": matrix, "may_spill": EXACT if dtype == "fp32" and kernel != "listed_keys" else "", **more}
    return Case(f"gather.{kernel}", arch, dtype, width, variant, fixed, config.warps, config.stages, **more)


def cases() -> Iterator[Case]:
    """Every shipped configuration: all variants for 90, the main one elsewhere."""
    for kernel, variants in VARIANTS_OF.items():
        for arch in ARCHITECTURES:
            for width in WIDTHS:
                for variant in variants if arch == "sm_90" else ["plain"]:
                    dtypes = ["fp32"] if variant == "tf32" else ["bf16"]
                    dtypes += ["fp16", "fp32"] if variant == "plain" and arch == "sm_90" else []
                    for dtype in dtypes:
                        config = choose(kernel, arch, width, 4 if dtype == "fp32" else 2, "lists")
                        quick = dtype == "bf16" and variant == "plain" and width == 128
                        yield case(kernel, arch, dtype, width, variant, config, quick=quick)
