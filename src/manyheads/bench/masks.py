"""Suite ``masks``: the static masks of long-context training, by length and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyheads.bench import providers
from manyheads.bench.measure import attention_rows
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.workload import Captured, Problem, read_captured
from manyheads.common.errors import unknown
from manyheads.mask import Mask, as_mask
from manyheads.mask.longca import LONG, STATIC, longca

DTYPES = ("float32", "bfloat16")
LENGTHS = {"quick": (1024,), "default": (1024, 8192), "full": (1024, 2048, 4096, 8192, 16_384, 32_768)}
LONG_FROM = 2048
"""Tokens from which FlexAttention is worth its compilation, and a boolean mask no longer worth waiting for."""
COMPILE_S = 6.0
"""What compiling FlexAttention for one mask takes, roughly."""


def cases(options: Options) -> list[Case]:
    """Every mask, length and dtype; with ``--input`` on captured layers instead of drawn input."""
    for mask in options.masks:
        resolve(mask, 1024, options.seed)
    dtypes = options.pick(DTYPES)
    if options.input is not None:
        return _captured_cases(options, options.input, dtypes)
    return [
        case(mask, length, dtype, options)
        for length in options.lengths or LENGTHS[options.level]
        for mask in options.masks or STATIC
        for dtype in dtypes
    ]


def case(mask: str, length: int, dtype: str, options: Options, *, heads: int = 8, width: int = 64) -> Case:
    """One mask on drawn input, all providers.

    Args:
        mask: Name of a static mask, or the text of any.
        length: Tokens.
        dtype: Name of the dtype.
        options: Level, seed and chosen providers.
        heads: Query and key heads.
        width: Head width.

    Returns:
        The case. Below ``--full`` a long sequence goes through FlexAttention, which has to be compiled for each
        mask, and a short one through the quadratic providers.
    """
    who = options.chosen(providers.STANDARD if options.level == "full" else _worthwhile(mask, length))
    name = f"{mask}-{length}-{dtype}" + ("" if (heads, width) == (8, 64) else f"-{heads}x{width}")

    def run(context: Context) -> list[Row]:
        problem = Problem(
            resolve(mask, length, options.seed),
            length,
            heads=heads,
            width=width,
            dtype=dtype,
            seed=options.seed,
        )
        lasting = ("manyheads", "sdpa") if options.level == "full" else ()
        return attention_rows(context, Row("masks", name, "-"), problem, who, with_memory=lasting)

    return Case("masks", name, run, seconds(who, length, dtype, options), who)


def resolve(mask: str, length: int, seed: int) -> Mask:
    """Builds a mask from what stands on the command line.

    Args:
        mask: Name of a static mask (its documents and windows are drawn by the seed), or the text of any
            mask.
        length: Tokens.
        seed: Seed of what is drawn.

    Returns:
        The mask.

    Raises:
        ValueError: Neither a name nor a text that parses; the nearest name is suggested.

    Example:
        >>> resolve("causal & window(8)", 64, 0).text
        'causal & window(8)'
    """
    if mask in STATIC + LONG:
        return longca(mask, length, seed=seed).mask
    try:
        return as_mask(mask)
    except ValueError:
        if mask.isidentifier():
            raise unknown("mask", mask, STATIC + LONG) from None
        raise


def seconds(who: Sequence[str], length: int, dtype: str, options: Options) -> float:
    """A rough duration of one case, for the progress bar."""
    dense = (length / 8192) ** 2 * (1.0 if dtype == "float32" else 0.5)
    each = max(options.seconds, 3 * dense)
    return 1.0 + sum(each + (COMPILE_S if name == "flex" else 0.0) for name in who if name != "reference")


def _worthwhile(mask: str, length: int) -> tuple[str, ...]:
    """Who takes part where minutes count."""
    if length < LONG_FROM:
        return ("manyheads", "sdpa", "reference")
    return ("manyheads", "sdpa", "flex") if mask in ("full", "causal") else ("manyheads", "flex")


def _captured_cases(options: Options, path: Path, dtypes: Sequence[str]) -> list[Case]:
    layers = read_captured(path)
    picked = {"quick": [len(layers) // 2], "default": [0, len(layers) // 2, len(layers) - 1]}
    some = [layers[i] for i in dict.fromkeys(picked.get(options.level, range(len(layers))))]
    most = min(layer.q.shape[2] for layer in some)
    for length in options.lengths:
        if length > most:
            raise ValueError(f"length: {path.name} holds {most} tokens a layer, got {length}")
    return [
        _captured_case(layer, mask, length, dtype, options)
        for layer in some
        for length in options.lengths or (most,)
        for dtype in dtypes
        for mask in options.masks or STATIC
    ]


def _captured_case(layer: Captured, mask: str, length: int, dtype: str, options: Options) -> Case:
    own = providers.STANDARD if options.level == "full" else ("manyheads", "sdpa", "reference")
    who = options.chosen(own)
    name = f"{mask}-{layer.name}-{length}-{dtype}"

    def run(context: Context) -> list[Row]:
        problem = layer.problem(resolve(mask, length, options.seed), length, dtype, options.seed)
        inputs = layer.tensors(length, problem.torch_dtype)
        row = Row("masks", name, "-", input=f"captured from {layer.source}, {layer.name}")
        return attention_rows(context, row, problem, who, inputs=inputs)

    return Case("masks", name, run, seconds(who, length, dtype, options), who)


SUITE = Suite(
    "masks",
    "Attention under the 12 static masks of long-context training, by length and dtype.",
    cases,
    providers.names(),
)
