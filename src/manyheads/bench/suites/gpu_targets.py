"""The bars of a GPU: rates of the own kernel, many masks over FlexAttention, random blocks over dense, recurrences."""

from __future__ import annotations

import functools
from dataclasses import replace

from manyheads.bench.suite import Case, Options
from manyheads.bench.suites import bars, gpu_linear, gpu_sparse, masks, patterns
from manyheads.bench.suites.bars import Bar
from manyheads.bench.workload import Problem
from manyheads.mask import as_mask
from manyheads.mask.longca import STATIC

OWN = "manyheads-triton"
"""The kernels themselves: ``auto`` may hand dense work to torch."""
PEERS = ("sdpa", "sdpa-flash", "sdpa-cudnn")
LENGTH, HEADS, WIDTH = 16_384, 16, 128
DENSE = {"forward": 500.0, "backward": 350.0}
"""1e12 operations per second, causal."""
DEVIATIONS = (1.0, 8.0)
FLEX = {"forward": 1.2, "backward": 1.1}
"""Geometric mean over the static masks."""
KEEPS, KEPT, BLOCKS = 0.85, (0.1, 0.2, 0.5), (64, 128)
"""Share of the dense rate, at shares of blocks kept and sizes of blocks."""


def made(options: Options) -> list[Bar]:
    """Every bar, at its own shape and at one that the seed draws.

    Args:
        options: Level, seed and device.

    Returns:
        The bars.
    """
    return [*_dense(options), *_flex(options), *_sparse(options), *gpu_linear.made(options), *gpu_sparse.made(options)]


def _dense(options: Options) -> list[Bar]:
    rng = bars.draw(options, "gpu-dense")
    drawn = (int(rng.integers(10_000, 20_000)), int(rng.integers(8, 25)))
    found = []
    for n, heads in ((LENGTH, HEADS), drawn):
        for phase, target in DENSE.items():
            stem = f"gpu-causal-{heads}x{n}x{WIDTH}-{phase}"
            problem = _problem("causal", n, heads, options, phase)
            measured = tuple(
                bars.attention(
                    f"{stem}-deviation{d:g}",
                    8.0,
                    replace(problem, deviation=d),
                    who=(OWN, *PEERS),
                )
                for d in DEVIATIONS
            )
            words = f"own kernel, causal {phase}, (1,{heads},{n},{WIDTH}) bfloat16"
            base = bars.promise(stem, words, dtype="bfloat16", length=n, phase=phase)
            found.append(Bar(f"bar-{stem}", measured, bars.rate(base, OWN, target)))
    return found


def _flex(options: Options) -> list[Bar]:
    rng = bars.draw(options, "gpu-flex")
    drawn = int(rng.integers(6_000, 14_000))
    heads = masks.GPU_GQA
    found = []
    for n in (LENGTH, drawn):
        # compiling FlexAttention takes minutes, so below --full the drawn length is measured forward
        for phase in FLEX if n == LENGTH or options.level == "full" else ("forward",):
            measured = [
                masks.case(
                    name,
                    n,
                    "bfloat16",
                    options,
                    heads=heads.heads,
                    kv_heads=heads.kv_heads,
                    width=heads.width,
                    phase=phase,
                )
                for name in STATIC
            ]
            stem = f"gpu-flex-{n}-{phase}"
            words = f"static masks over FlexAttention, {phase}, N = {n}, {heads.heads}:{heads.kv_heads} heads, bfloat16"
            base = bars.promise(stem, words, dtype="bfloat16", length=n, phase=phase, provider=OWN)
            found.append(Bar(f"bar-{stem}", tuple(measured), bars.against_flex(base, STATIC, FLEX[phase], None, OWN)))
    return found


def _sparse(options: Options) -> list[Bar]:
    rng = bars.draw(options, "gpu-sparse")
    drawn = int(rng.integers(80, 160)) * 128
    found = []
    for n in (LENGTH, drawn):
        chosen = [patterns.Sparse("uniform_block_sparse", kept, block) for block in BLOCKS for kept in KEPT]
        whole = _measured("full", n, options)
        measured = [_measured(each.text, n, options) for each in chosen]
        stem = f"gpu-sparse-{n}"
        base = bars.promise(stem, f"rate of random blocks, N = {n}, bfloat16", dtype="bfloat16", length=n)
        names = [f"{each.kept:.0%} of blocks of {each.block}" for each in chosen]
        judge = bars.keeps_rate(base, names, OWN, KEEPS)
        found.append(Bar(f"bar-{stem}", (whole, *measured), judge))
    return found


def _measured(mask: str, length: int, options: Options) -> Case:
    return bars.attention(
        f"gpu-rate-{mask}-{HEADS}x{length}x{WIDTH}",
        4.0,
        functools.partial(_problem, mask, length, HEADS, options, "forward"),
        who=(OWN,),
    )


def _problem(mask: str, length: int, heads: int, options: Options, phase: str) -> Problem:
    drawn = patterns.sparse(mask)
    return Problem(
        as_mask(mask) if drawn is None else drawn.mask(length, heads, options.seed),
        length,
        heads=heads,
        width=WIDTH,
        dtype="bfloat16",
        phase=phase,
        seed=options.seed,
        device=options.device,
    )
