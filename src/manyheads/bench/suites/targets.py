"""Suite ``targets``: every promise of speed and memory with what was measured and a verdict.

Each bar is measured at the shape it names and at one more that the seed draws, so that nothing is tuned to
one shape. Rows of other suites in the same file are used again; what is missing is measured first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from manyheads.bench import device
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.suites import bars, gpu_targets, layouts, linear_bars, masks, overhead, parallel_bars, sparse_bars
from manyheads.bench.suites.bars import Bar
from manyheads.bench.workload import Problem
from manyheads.mask import as_mask
from manyheads.mask.longca import STATIC

DTYPES = ("float32", "bfloat16")
DENSE = {"float32": 1.4, "bfloat16": 1.9}
DEVIATIONS = (1.0, 8.0)
FLEX = {"float32": (1.3, 1.0), "bfloat16": (2.6, 1.8)}
"""Geometric mean over the masks, and the worst."""
AREA = {"float32": (1.3, 0.03), "bfloat16": (1.45, 0.03)}
"""Time over dense time is at most the first times density plus the second."""
BACKWARD = (9.0, 10.0)
"""Times faster, and times less peak memory."""
LAYOUTS: dict[int, dict[str, tuple[float, float | None]]] = {
    131_072: {"windowed": (30.0, None), "causal": (30.0, None), "unkeyed": (30.0, None)},
    1_048_576: {"windowed": (100.0, 128.0), "causal": (500.0, 256.0), "unkeyed": (800.0, 128.0)},
}
"""Milliseconds and MiB by length and way of compiling."""
MEMORY_LENGTHS, MEMORY_GIB = (65_536, 131_072, 262_144), 1.0
OVERHEAD = {"delegated": 10.0, "engine op": 20.0, "with gradients": 40.0}
PACKING = (4.0, 1.05, 0.9999)
"""Sentences per second over padded batches in the given order, over sorted ones; smallest cosine."""


def cases(options: Options) -> list[Case]:
    """One case for each bar, at its own shape and at a drawn one; ``--quick`` keeps what takes seconds.

    On a GPU these are the bars of the GPU; on a processor they stand at the end, not measured, with the reason.
    """
    if options.on_gpu:
        return [_case(bar) for bar in gpu_targets.made(options)]
    made = [*_dense(options), *_masks(options), *_backward(options), *_layouts(options)]
    made += [*_memory(options), *_overhead(options), *_packing(options), *linear_bars.made(options)]
    made += [*sparse_bars.made(options), *parallel_bars.made(options)]
    if options.level == "quick":
        return [_case(bar) for bar in made if bar.level == "quick"]
    return [*(_case(bar) for bar in made), *(_elsewhere(bar) for bar in gpu_targets.made(options))]


def _case(bar: Bar) -> Case:
    def run(context: Context) -> list[Row]:
        judged = bar.judge([context.rows(case) for case in bar.cases])
        where, threads = device.label(context.options.device), torch.get_num_threads()
        return [row.replace(case=bar.name, device=where, threads=threads) for row in judged]

    return Case("targets", bar.name, run, 0.01, (bars.OURS,), bar.cases)


def _elsewhere(bar: Bar) -> Case:
    """A bar for another device: nothing is measured, and nothing is missed."""

    def run(context: Context) -> list[Row]:
        reason = f"needs --device cuda: {device.no_gpu() or 'this run measures the processor'}"
        judged = bar.judge([[] for _ in bar.cases])
        return [row.replace(case=bar.name, status="refused", reason=reason, note=None) for row in judged]

    return Case("targets", bar.name, run, 0.0, (bars.OURS,))


def _dense(options: Options) -> list[Bar]:
    rng = bars.draw(options, "dense")
    drawn = (
        int(rng.integers(2049, 6144)),
        int(rng.integers(3, 13)),
        int(rng.choice([32, 48, 72, 80, 96, 128])),
    )
    made = []
    for n, heads, width in ((4096, 8, 64), drawn):
        for dtype in DTYPES:
            stem = f"dense-{heads}x{n}x{width}-{dtype}"
            problem = Problem(as_mask("full"), n, heads=heads, width=width, dtype=dtype, seed=options.seed)
            measured = tuple(
                bars.attention(f"{stem}-deviation{d:g}", 2.5, replace(problem, deviation=d)) for d in DEVIATIONS
            )
            words = f"dense forward (1,{heads},{n},{width}) {dtype} over SDPA"
            base = bars.promise(stem, words, dtype=dtype, length=n)
            made.append(Bar(f"bar-{stem}", measured, bars.dense(base, DENSE[dtype])))
    return made


def _masks(options: Options) -> list[Bar]:
    rng = bars.draw(options, "masks")
    drawn = (int(rng.integers(3073, 5120)), int(rng.integers(4, 10)), int(rng.choice([48, 64, 80])))
    dtypes = DTYPES if options.level == "full" else (str(rng.choice(DTYPES)),)  # compiling takes minutes
    # at the drawn shape also drawn masks, and the dense one that cost is a share of
    some = STATIC if options.level == "full" else _some(rng, STATIC)
    made = []
    for (n, heads, width), asked, names in (((8192, 8, 64), DTYPES, STATIC), (drawn, dtypes, some)):
        for dtype in asked:
            found = [masks.case(name, n, dtype, options, heads=heads, width=width) for name in names]
            where = f"N = {n}, {heads} heads, D {width}, {dtype}"
            stem = f"{n}x{heads}x{width}-{dtype}"
            base = bars.promise(f"flex-{stem}", f"static masks over FlexAttention, {where}", dtype=dtype, length=n)
            made.append(Bar(f"bar-flex-{stem}", tuple(found), bars.against_flex(base, names, *FLEX[dtype])))
            base = bars.promise(f"area-{stem}", f"cost follows area, {where}", dtype=dtype, length=n)
            whole = found[list(names).index("full")]
            judge = bars.cost_follows_area(base, names, *AREA[dtype])
            made.append(Bar(f"bar-area-{stem}", (whole, *found), judge))
    return made


def _some(rng: np.random.Generator, names: Sequence[str]) -> tuple[str, ...]:
    """A third of the masks, drawn, the dense one among them."""
    others = [name for name in names if name != "full"]
    return ("full", *sorted(rng.choice(others, size=len(names) // 3 - 1, replace=False).tolist()))


def _backward(options: Options) -> list[Bar]:
    rng = bars.draw(options, "backward")
    n = int(rng.integers(3073, 4608))
    made = []
    for tokens, window in ((8192, 512), (n, int(rng.integers(n // 20, n // 16)))):
        stem = f"backward-{tokens}-window{window}"

        mask = as_mask(f"causal & window({window})")
        problem = Problem(mask, tokens, phase="forward+backward", seed=options.seed)
        measured = bars.attention(stem, 3.0 + 22.0 * (tokens / 8192) ** 2, problem, memory=True)
        base = bars.promise(stem, f"forward + backward, causal window {window}, N = {tokens}", length=tokens)
        made.append(Bar(f"bar-{stem}", (measured,), bars.backward(base, *BACKWARD)))
    return made


def _layouts(options: Options) -> list[Bar]:
    rng = bars.draw(options, "layouts")
    builds = {build.name: build for build in layouts.BUILDS}
    made = []
    for length, asked in LAYOUTS.items():
        for name, (ms, mib) in asked.items():
            level = "quick" if length == min(LAYOUTS) else "default"
            made.append(_layout(builds[name], length, ms, mib, level))
    drawn = int(rng.integers(4096, 8192)) * 128
    mask = f"causal & window({int(rng.integers(1024, 8192))})"
    for name, (ms, mib) in LAYOUTS[max(LAYOUTS)].items():
        build = builds[name]
        if name != "causal":
            build = layouts.Build(f"drawn-{name}", mask, build.keyed)
        made.append(_layout(build, drawn, ms, mib, "default"))
    return made


def _layout(build: layouts.Build, length: int, ms: float, mib: float | None, level: str) -> Bar:
    words = f"layout {build.mask}{'' if build.keyed else ' without a tile key'}, N = {length:,}"
    base = bars.promise(f"layout-{build.name}-{length}", words, length=length, mask=build.mask)
    return Bar(
        f"bar-layout-{build.name}-{length}",
        (layouts.case(build, length),),
        bars.layout(base, ms, mib),
        level,
    )


def _memory(options: Options) -> list[Bar]:
    rng = bars.draw(options, "memory")
    last = int(rng.integers(180_001, 262_144))
    made = []
    for lengths, window in (
        (MEMORY_LENGTHS, 1024),
        ((last // 4, last // 2, last), int(rng.integers(512, 1536))),
    ):
        measured = tuple(_peak(n, window, options) for n in lengths)
        words = f"memory of forward, one head, window({window})"
        base = bars.promise(f"memory-{lengths[-1]}", words, length=lengths[-1])
        made.append(Bar(f"bar-memory-{lengths[-1]}", measured, bars.linear_memory(base, lengths, MEMORY_GIB)))
    return made


def _peak(length: int, window: int, options: Options) -> Case:
    """Memory only: timing a quarter of a million tokens would say nothing more."""
    name = f"memory-{length}-window{window}"

    def run(context: Context) -> list[Row]:
        from manyheads.bench.measure import with_peak

        problem = Problem(as_mask(f"window({window})"), length, heads=1, seed=options.seed)
        context.say(f"targets/{name}: peak memory")
        row = Row("targets", name, bars.OURS, shape=problem.shape, length=length, dtype=problem.dtype)
        return [with_peak(row.replace(mask=problem.mask.text, seed=options.seed), problem)]

    return Case("targets", name, run, 3.0, (bars.OURS,))


def _overhead(options: Options) -> list[Bar]:
    rng = bars.draw(options, "overhead")
    drawn = (1, int(rng.integers(2, 9)), int(rng.integers(17, 96)), int(rng.choice([32, 48, 64])))
    made = []
    for shape in (overhead.SHAPE, drawn):
        words = f"overhead of attention(), ({','.join(map(str, shape))}) causal"
        base = bars.promise("overhead-" + "x".join(map(str, shape)), words)
        case = overhead.case(shape, options)
        made.append(Bar(f"bar-{base.case}", (case,), bars.overhead(base, OVERHEAD), "quick"))
    return made


def _packing(options: Options) -> list[Bar]:
    from manyheads.bench.suites.packing import encoder_case

    rng = bars.draw(options, "packing")
    drawn = (int(rng.integers(64, 128)), int(rng.integers(1, 2**31)))
    made = []
    for documents, seed in ((512, None), drawn):
        case = encoder_case("float32", options, documents=documents, seed=seed)
        words = f"packing {documents} documents, float32, sentences/s"
        base = bars.promise(f"packing-{documents}", words, dtype="float32")
        made.append(Bar(f"bar-packing-{documents}", (case,), bars.packing(base, *PACKING)))
    return made


SUITE = Suite(
    "targets",
    "Every bar: target, measured, verdict; also at a shape drawn by seed.",
    cases,
    (bars.OURS, "sdpa", "flex"),
)
