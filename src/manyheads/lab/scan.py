"""The kernels of the scan engine, as the gate and the tuner see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manyheads.engine.configs import ARCHITECTURES, WIDTHS, Config, choose
from manyheads.lab.aot import Compiled
from manyheads.lab.estimate import RATES
from manyheads.lab.registry import EXACT, Case, Constant, Kernel
from manyheads.lab.targets import target_named

_VECTORS = dict.fromkeys(("prefix", "reach", "peak", "maxima", "factor", "extra"), "fp32")
_STRIDES = r"s[xyzo][bhn]"
_PATH = "manyheads.engine.scan.kernels"

KERNELS = (
    Kernel("scan.sums", f"{_PATH}:sums", dict.fromkeys(("g", "gate", "prefix", "reach", "peak"), "fp32")),
    Kernel(
        "scan.carry",
        f"{_PATH}:carry",
        _VECTORS
        | dict.fromkeys(("x", "y"), "data")
        | {"states": "factor", **dict.fromkeys(("start", "norms", "end", "m_start", "m_end"), "fp32")},
        frozenset({"scale"}),
        _STRIDES,
    ),
    Kernel(
        "scan.mix",
        f"{_PATH}:mix",
        _VECTORS
        | dict.fromkeys(("x", "y", "z", "own", "out"), "data")
        | {"states": "factor", **dict.fromkeys(("norms", "g", "gate", "slope", "flow", "drop", "column"), "fp32")},
        frozenset({"scale"}),
        _STRIDES,
    ),
)
"""See ``registry.Kernel``."""

_WIDE = "float16 is too narrow for sums without a softmax, and tf32 operands fill twice the registers"

_TILE = {2: 64, 4: 32}
"""Tokens of a tile, as the launcher takes them."""

_OFF: dict[str, Constant] = {
    "DECAY": 0, "GATE": 0, "NORM": 0, "FACTOR": 0, "AUGMENT": 0, "NORMALISE": "", "SUMS": 0, "REVERSE": 0,
    "TRANSPOSED": 0,
}  # fmt: skip
_DECAY: dict[str, Constant] = {"DECAY": 1}
_GATED: dict[str, Constant] = {"DECAY": 1, "GATE": 1, "NORM": 1}
_DQ: dict[str, Constant] = {"TRANSPOSED": 1}
_DK: dict[str, Constant] = {"TRANSPOSED": 1, "REVERSE": 1}
_ALL: dict[str, Constant] = _GATED | {"FACTOR": 1}

VARIANTS: dict[str, dict[str, tuple[str, dict[str, Constant]]]] = {
    "carry": {
        "plain": ("forward", {}),
        "decay": ("forward", _DECAY),
        "gated": ("forward", _GATED),
        "odd widths": ("forward", _DECAY | {"odd": 1}),
        "gradient": ("backward", _DECAY | {"REVERSE": 1}),
        "gradient gated": ("backward", _ALL | {"REVERSE": 1}),
    },
    "mix": {
        "plain": ("forward", {}),
        "decay": ("forward", _DECAY),
        "gated": ("forward", _GATED | {"NORMALISE": "max1"}),
        "odd widths": ("forward", _DECAY | {"odd": 1}),
        "dq": ("backward", _DECAY | _DQ),
        "dk": ("backward", _DECAY | _DK),
        "dv": ("backward", _DECAY | {"REVERSE": 1}),
        "dq gated": ("backward", _ALL | _DQ | {"AUGMENT": 1}),
        "dk gated": ("backward", _ALL | _DK | {"AUGMENT": 2}),
        "dv gated": ("backward", _ALL | {"REVERSE": 1}),
        "dq sums": ("sums", _ALL | _DQ | {"AUGMENT": 1, "SUMS": 1}),
        "dk sums": ("sums", _ALL | _DK | {"AUGMENT": 2, "SUMS": 1}),
    },
}
"""For each kernel what a case switches on: the kind of configuration it runs with, and the constants that differ."""

MAIN = {
    "carry": {"forward": "gated", "backward": "gradient gated"},
    "mix": {"forward": "gated", "backward": "dk gated", "sums": "dq sums"},
}
"""For each kernel and kind the variant that stands for it."""

_NAMES = {
    "carry": {"D", "DV", "BD", "BV", "TILE", "DECAY", "GATE", "NORM", "FACTOR", "REVERSE", "PRECISION"},
    "mix": {"W", "WZ", "BX", "BZ", "TILE", "DECAY", "GATE", "FACTOR", "AUGMENT", "NORMALISE", "SUMS", "REVERSE",
            "TRANSPOSED", "LIMIT", "PRECISION"},
}  # fmt: skip


def constants(kernel: str, width: int, variant: str, config: Config, dtype: str = "bf16") -> dict[str, Constant]:
    """Compile-time arguments of a kernel under a configuration.

    Args:
        kernel: One of the engine's kernels.
        width: Width of keys and values.
        variant: One of the ``VARIANTS`` of the kernel.
        config: Blocks, warps and stages.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.

    Returns:
        A value for each constant of the kernel.

    Example:
        >>> found = constants("mix", 64, "dq", Config(64, 32, 4, 2))
        >>> found["BZ"], found["TRANSPOSED"], "BD" in found
        (32, 1, False)
    """
    size = 4 if dtype == "fp32" else 2
    if kernel == "sums":
        return {"TILE": _TILE[size], "GATE": int(variant == "gated")}
    on = dict(VARIANTS[kernel][variant][1])
    x, z = (width - 24, width - 8) if on.pop("odd", 0) else (width, width)
    given = _OFF | {"D": x, "DV": z, "BD": min(config.bm, width), "BV": min(config.bn, width), "TILE": _TILE[size]}
    given |= {"W": x, "WZ": z, "BX": min(config.bm, width), "BZ": min(config.bn, width)}
    given |= {"LIMIT": 0 if size == 4 else 64, "PRECISION": "tf32" if dtype == "fp16" else "ieee"} | on
    return {name: value for name, value in given.items() if name in _NAMES[kernel]}


def variants(kernel: str, kind: str) -> list[str]:
    """What may run with the configuration of a kind of call, the variant that stands for it first.

    Example:
        >>> variants("mix", "sums")
        ['dq sums', 'dk sums']
    """
    main = MAIN[kernel][kind]
    return [main, *(name for name, (of, _) in VARIANTS[kernel].items() if of == kind and name != main)]


def shapes(kernel: str, width: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Blocks that are worth compiling.

    Example:
        >>> list(shapes("carry", 64, 4))
        [(16, 16), (16, 32), (32, 16), (32, 32)]
    """
    some = [size for size in ((16, 32) if itemsize == 4 else (32, 64, 128)) if size <= width]
    yield from ((bm, bn) for bm in some for bn in some)


def cycles(
    kernel: str, target: str, width: int, itemsize: int, kind: str, shape: tuple[int, int, int, int],
    found: Compiled | None = None,
) -> float:  # fmt: skip
    """Modelled cycles of a multiprocessor for one token of one head; a model to sort by, not a measurement.

    Args:
        kernel: ``"carry"`` or ``"mix"``.
        target: Name of the target.
        width: Width of keys and values.
        itemsize: Bytes of an element: 2, or 4 for products on the plain units.
        kind: As in ``engine.configs``; it changes nothing here.
        shape: Blocks, warps, stages.
        found: What the compiled kernel needs; None for the best conceivable.

    Returns:
        Cycles; infinite if a multiprocessor cannot hold even one program.

    Example:
        >>> narrow, wide = (cycles("mix", "sm_90", 128, 2, "forward", (128, bn, 4, 1)) for bn in (32, 64))
        >>> wide < narrow
        True
    """
    (bm, bn, warps, stages), rates, tile = shape, RATES[target], _TILE[itemsize]
    resident = 4 if found is None else target_named(target).resident(found.registers, found.shared, warps)
    if resident < 1:
        return float("inf")
    if kernel == "carry":
        programs = -(-width // bm) * -(-width // bn)
        products, moved = tile * bm * bn, tile * (bm + bn) * itemsize
    else:
        programs = -(-width // bn)
        products = tile * (tile * (width + bn) + width * bn)
        moved = (2 * tile * width + (tile + width) * bn) * itemsize
    phases = products / (rates.plain if itemsize == 4 else rates.matrix), moved / rates.fetched
    wait = rates.latency + (rates.far if stages < 2 else 0)
    return programs * max(*phases, (sum(phases) + wait) / resident) / tile


bound = cycles
"""What a configuration cannot go below whatever the compiler does."""


def case(kernel: str, arch: str, dtype: str, width: int, variant: str, config: Config, **more: Any) -> Case:
    """A compilation under a given configuration.

    Args:
        kernel: One of the engine's kernels.
        arch: Name of the target.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        width: Width of keys and values.
        variant: One of the ``VARIANTS`` of the kernel.
        config: What to compile it with.
        **more: Further fields of the case.

    Returns:
        The case.
    """
    fixed = constants(kernel, width, variant, config, dtype)
    # the rows of the state's product are a block of the keys' width
    rows = fixed.get("BD", fixed["TILE"])
    matrix = kernel != "sums" and dtype != "fp32" and (arch in ("sm_80", "gfx942") or int(rows) >= 64)
    spills = {"fp32": EXACT, "fp16": _WIDE if kernel == "mix" else ""}.get(dtype, "")
    more = {"matrix": matrix, "may_spill": spills, **more}
    return Case(f"scan.{kernel}", arch, dtype, width, variant, fixed, config.warps, config.stages, **more)


def cases() -> Iterator[Case]:
    """Every shipped configuration: all variants for 90, the main ones elsewhere."""
    for kernel, variants in VARIANTS.items():
        for arch in ARCHITECTURES:
            for width in WIDTHS:
                for variant, (kind, _) in variants.items():
                    main = variant == MAIN[kernel][kind]
                    dtypes = ["bf16"] if main or arch == "sm_90" else []
                    dtypes += ["fp16", "fp32"] if main and arch == "sm_90" else []
                    for dtype in dtypes:
                        config = choose(kernel, arch, width, 4 if dtype == "fp32" else 2, kind)
                        quick = dtype == "bf16" and main and width == 128 and (arch == "sm_90" or variant == "gated")
                        yield case(kernel, arch, dtype, width, variant, config, quick=quick)
    for arch in ARCHITECTURES:
        for variant in ("decay", "gated"):
            yield case("sums", arch, "bf16", 64, variant, Config(64, 64, 4, 1), quick=arch == "sm_90")
