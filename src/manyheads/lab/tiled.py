"""The kernels of the tiled engine, as the gate and the tuner see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from manyheads.engine.configs import ARCHITECTURES, WIDTHS, Config, choose
from manyheads.engine.tiled.configs import KERNELS as NAMES
from manyheads.lab.estimate import bound_of_pair, cycles_of_pair
from manyheads.lab.registry import EXACT, Case, Constant, Kernel

_INDEX = dict.fromkeys(("work", "rows", "first", "count", "mask_id", "bits", "index", "q_pos", "k_pos"), "i32")
_INPUTS = {"q": "data", "k": "data", "v": "data"}
_TERMS = {"slopes": "fp32", "table": "fp32", "pair": "data", "block": "fp32"}
_SHARED = _INPUTS | _INDEX | _TERMS
_BACKWARD = _SHARED | {"dout": "data", "lse": "fp32", "delta": "fp32", "skipped": "u8"}
_FLOATS = frozenset({"scale", "softcap", "keep_scale", "floor"})
_STRIDES = r"s[qkvdx][bhn]"


def _kernel(name: str, pointers: Mapping[str, str], floats: frozenset[str] = _FLOATS) -> Kernel:
    return Kernel(f"tiled.{name}", f"manyheads.engine.tiled.kernels:{name}", pointers, floats, _STRIDES)


KERNELS = (
    _kernel("forward", _SHARED | {"out": "data", "lse": "fp32", "sink": "fp32"}),
    _kernel("rows_backward", _BACKWARD | {"dq": "data", "ds": "fp32"}),
    _kernel("keys_backward", _BACKWARD | {"dk": "data", "dv": "data"}),
    _kernel("row_products", {"x": "data", "y": "data", "out": "fp32"}, frozenset()),
)
"""See ``registry.Kernel``."""

EVERYTHING: dict[str, Constant] = {
    "FAST": 0, "SOFTCAP": 1, "ALIBI": 1, "RELATIVE": 1, "PAIR": 1, "BLOCK_Q": 64, "BLOCK_K": 64, "DROPOUT": 1,
    "SINK": 1, "SKIP": 1, "pair_k": 1,
}  # fmt: skip
"""All options at once, which no call wants: what compiles so without spilling does with any part of it. Neighbours in a
row of pair values lie side by side, so their stride is a constant to the compiler."""

_OFF: dict[str, Constant] = {
    **dict.fromkeys(EVERYTHING, 0),
    "FAST": 1, "PACK": 1, "IDS": 0, "IDS_MASKED": 0, "WEIGHT": "softmax", "EXP": 0, "RESCALE": 0, "PERSISTENT": 0,
    "WHAT": 0, "PRECISION": "ieee",
}  # fmt: skip
_BIASED: dict[str, Constant] = {"FAST": 0}

VARIANTS: dict[str, tuple[str, dict[str, Constant]]] = {
    "plain": ("plain", {}),
    "ids": ("plain", {"IDS": 1, "IDS_MASKED": 1}),
    "queries of 1": ("plain", {"IDS": 1, "IDS_MASKED": 1, "PACK": 8, "BM": 1, "ROWS": 16}),
    "odd widths": ("plain", {"odd": 1}),
    "sink": ("plain", {"SINK": 1}),
    "sums": ("plain", {"WHAT": 1}),
    "polynomial": ("plain", {"EXP": 4}),
    "rescale": ("plain", {"RESCALE": 8}),
    "persistent": ("plain", {"PERSISTENT": 1}),
    "tf32": ("plain", {"PRECISION": "tf32"}),
    "pair": ("general", _BIASED | {"PAIR": 2, "pair_k": 1}),
    "relative": ("general", _BIASED | {"RELATIVE": 1}),
    "skip": ("general", {"SKIP": 1}),
    "cap": ("general", _BIASED | {"SOFTCAP": 1}),
    "cap and alibi": ("general", _BIASED | {"SOFTCAP": 1, "ALIBI": 1}),
    "block": ("general", _BIASED | {"BLOCK_Q": 64, "BLOCK_K": 64}),
    "dropout": ("general", {"DROPOUT": 1}),
    "sigmoid": ("general", _BIASED | {"WEIGHT": "sigmoid"}),
    "gaussian": ("general", _BIASED | {"WEIGHT": "gaussian"}),
    "everything": ("heavy", EVERYTHING),
    "all sums": ("heavy", EVERYTHING | {"WHAT": 1}),
    "strip": ("heavy", EVERYTHING | {"WHAT": 2}),
}
"""What a case switches on: the kind of configuration it runs with, and the constants that differ from plain."""

MAIN = {"plain": "plain", "general": "pair", "heavy": "everything"}
"""The variant that stands for a kind."""

VARIANTS_OF = {
    "forward": [v for v in VARIANTS if v not in ("sums", "all sums", "strip")],
    "rows_backward": [v for v in VARIANTS if v not in ("sink", "polynomial", "rescale", "persistent")],
    "keys_backward": [
        v for v in VARIANTS
        if v not in ("ids", "queries of 1", "sink", "sums", "polynomial", "rescale", "persistent", "all sums", "strip")
    ],
}  # fmt: skip
"""Variants that the launcher can ask of each kernel."""

cycles, bound = cycles_of_pair, bound_of_pair
"""Modelled cycles of a configuration, and what it cannot go below."""

_QUICK_ON_90 = ("plain", "pair", "skip", "everything")


def constants(kernel: str, width: int, variant: str, config: Config) -> dict[str, Constant]:
    """Compile-time arguments of a kernel under a configuration.

    Args:
        kernel: One of the engine's kernels.
        width: Head width of queries, keys and values.
        variant: One of ``VARIANTS``.
        config: Tile, warps, stages and switches.

    Returns:
        A value for each constant of the kernel.

    Example:
        >>> found = constants("keys_backward", 64, "plain", Config(32, 128, 8, 2))
        >>> found["COLS"], found["BN"], "EXP" in found
        (32, 128, False)
    """
    if kernel == "row_products":
        return {"WIDTH": width, "PADDED": width, "ROWS": 64}
    on = dict(VARIANTS[variant][1])
    d, dv = (width - 24, width - 8) if on.pop("odd", 0) else (width, width)
    rows = max(16, config.bm)
    given = _OFF | {"D": d, "BD": width, "DV": dv, "BDV": width, "BM": config.bm, "BN": config.bn}
    given |= {"ROWS": rows, "COLS": rows, "EXP": config.exp, "RESCALE": config.rescale}
    given |= {"PERSISTENT": int(config.persistent > 0)} | on
    fixed = _NAMES[kernel] | ({"pair_k"} if on.get("PAIR") else set())
    return {name: value for name, value in given.items() if name in fixed}


_EVERYWHERE = {
    "PACK", "IDS", "IDS_MASKED", "WEIGHT", "SKIP", "D", "BD", "DV", "BDV", "BM", "BN", "FAST", "SOFTCAP", "ALIBI",
    "RELATIVE", "PAIR", "BLOCK_Q", "BLOCK_K", "DROPOUT", "PRECISION",
}  # fmt: skip
_NAMES = {
    "forward": _EVERYWHERE | {"ROWS", "SINK", "EXP", "RESCALE", "PERSISTENT"},
    "rows_backward": _EVERYWHERE | {"ROWS", "WHAT"},
    "keys_backward": _EVERYWHERE - {"IDS", "IDS_MASKED"} | {"COLS"},
}


def variants(kernel: str, kind: str) -> list[str]:
    """What may run with the configuration of a kind of call, the variant that stands for it first.

    Example:
        >>> variants("keys_backward", "heavy")
        ['everything']
    """
    return [MAIN[kind], *(v for v in VARIANTS_OF[kernel] if VARIANTS[v][0] == kind and v != MAIN[kind])]


def shapes(kernel: str, width: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Tiles that are worth compiling; products on the plain units are unrolled, large tiles compile for minutes.

    Example:
        >>> (128, 128) in shapes("forward", 128, 2), (128, 128) in shapes("forward", 128, 4)
        (True, False)
    """
    sizes = (16, 32, 64, 128)
    yield from ((bm, bn) for bm in sizes for bn in sizes if itemsize == 2 or bm * bn * width <= 64 * 64 * 128)


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
    # float32 products are exact only on the plain arithmetic units; fewer than 64 rows fill no warp group
    rows = fixed.get("BN" if kernel == "keys_backward" else "ROWS", 0)
    matrix = kernel != "row_products" and dtype != "fp32" and (arch in ("sm_80", "gfx942") or int(rows) >= 64)
    more = {"matrix": matrix, "may_spill": EXACT if dtype == "fp32" else "", **more}
    return Case(f"tiled.{kernel}", arch, dtype, width, variant, fixed, config.warps, config.stages, **more)


def cases() -> Iterator[Case]:
    """Every shipped configuration: all variants for 90, the main ones but for heavy calls elsewhere."""
    for kernel in NAMES:
        for arch in ARCHITECTURES:
            for width in WIDTHS:
                for variant in VARIANTS_OF[kernel]:
                    yield from _of_variant(kernel, arch, width, variant)
    for arch in ARCHITECTURES:
        yield case("row_products", arch, "bf16", 128, "plain", Config(64, 64, 4, 1), quick=arch == "sm_90")


def _of_variant(kernel: str, arch: str, width: int, variant: str) -> Iterator[Case]:
    if arch != "sm_90" and variant not in (MAIN["plain"], MAIN["general"]):
        return
    kind = VARIANTS[variant][0]
    dtypes = ["fp32"] if variant == "tf32" else ["bf16"]
    if variant == "plain" and arch == "sm_90":
        dtypes += ["fp16", "fp32"]
    for dtype in dtypes:
        config = choose(kernel, arch, width, 4 if dtype == "fp32" else 2, kind)
        quick = dtype == "bf16" and (variant == "plain" or (arch == "sm_90" and variant in _QUICK_ON_90))
        yield case(kernel, arch, dtype, width, variant, config, quick=quick)
