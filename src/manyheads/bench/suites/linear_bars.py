"""The bars of recurrences and regressions for ``targets``, each at the shape it names and at a drawn one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options
from manyheads.bench.suites import bars, linear
from manyheads.bench.suites.bars import Bar
from manyheads.bench.suites.linear import DENSE, OURS, SDPA, Shape
from manyheads.bench.timing import interleave

FLAT = ((2048, 1.25), (4096, 1.15))
"""From this length on, the longest time per token over the shortest."""
FLAT_LENGTHS = (2048, 4096, 8192, 16_384, 32_768, 65_536)
OVER_DENSE = {512: (1.0, 1.0), 16_384: (18.0, 25.0)}
"""By length: times faster than our dense attention, and than torch's."""
OVER_FLA = {"token": {8192: 2.0, 2048: 2.0}, "delta": {8192: 1.8, 2048: 1.5}, "channel": {8192: 6.0, 2048: 6.0}}
OVER_PERFORMER = 2.0
PARALLAX = 2.5
"""Times the time of dense attention, at most."""
STEP = 30.0
"""Times faster than the best dense step."""
STEP_EVENNESS = 1.1
"""Time of a step late in a sequence over one early in it, at most: the same within the noise of a step."""
MEMORY_LENGTHS, MEMORY_GIB = (16_384, 32_768, 65_536), 1.0


def made(options: Options) -> list[Bar]:
    """Every bar of this suite for a CPU.

    Args:
        options: For the seed of drawn shapes.

    Returns:
        The bars, those with the drawn shapes after the others.
    """
    rng = bars.draw(options, "linear")
    n, heads, width = int(rng.integers(4097, 8192)), int(rng.integers(2, 9)), int(rng.choice([32, 48, 80, 128]))
    found = [_flat(options, FLAT_LENGTHS, 4, 64)]
    found += [_over_dense(Shape(length, seed=options.seed), target) for length, target in OVER_DENSE.items()]
    for kind, asked in OVER_FLA.items():
        found += [_over_fla(kind, Shape(length, seed=options.seed), target) for length, target in asked.items()]
        least = min(asked.values())
        found.append(_over_fla(kind, Shape(n, heads=heads, width=width, seed=options.seed), least))
    drawn = Shape(int(rng.integers(2049, 4096)), heads=heads, width=64, seed=options.seed)
    for shape in (Shape(4096, seed=options.seed), drawn):
        found += [_over_performer(order, shape) for order in ("causal", "full")]
    for dtype in options.pick(("float32", "bfloat16")):
        for shape in (Shape(4096, heads=8, dtype=dtype, seed=options.seed), Shape(n, heads=4, dtype=dtype, seed=1)):
            found.append(_parallax(shape))
    found += [_memory(name, lengths) for name, lengths in (("scan", MEMORY_LENGTHS), ("parallax", (4096, 8192, 16_384)),
                                                           ("lla", (4096, 8192, 16_384)))]  # fmt: skip
    return [*found, _step(options)]


def _promise(name: str, words: str, shape: Shape | None = None) -> Row:
    base = bars.promise(name, words)
    return base if shape is None else base.replace(dtype=shape.dtype, length=shape.tokens, shape=str(shape))


def _faster(base: Row, target: float, over: str, *, lossy: bool = False) -> Callable[[list[list[Row]]], list[Row]]:
    """Ours against one other side of a case; what that side computes need not be the same."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        (rows,) = measured or [[]]
        ratio, reason = _ratio(rows, over)
        if reason is not None:
            return [bars.at_least(base.replace(note=reason), None, target)]
        theirs = bars.one(rows, over)
        assert theirs is not None
        note = f"another floor: theirs differ by up to {theirs.error:.2g}" if lossy and theirs.error else None
        return [bars.at_least(bars.cautioned(base.replace(note=note), bars.one(rows, OURS), theirs), ratio, target)]

    return judge


def _ratio(rows: Sequence[Row], over: str) -> tuple[float | None, str | None]:
    """Their time over ours if ours is right, else the reason why there is none."""
    if reason := bars.doubt(rows, OURS):
        return None, reason
    mine, theirs = bars.one(rows, OURS), bars.one(rows, over)
    if theirs is None or theirs.median_ms is None or mine is None or mine.median_ms is None:
        stood = next((r for r in rows if r.provider == over), None)
        return None, f"{over}: {stood.reason if stood is not None else 'took no part'}"
    if theirs.gate == "red":
        return None, f"{over}: its result is wrong"
    return theirs.median_ms / mine.median_ms, None


def _over_dense(shape: Shape, targets: tuple[float, float]) -> Bar:
    name = f"scan-dense-{shape.tokens}"
    base = _promise(name, f"scan with a decay per token over dense causal attention, N = {shape.tokens}", shape)

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = []
        for over, target in zip((DENSE, SDPA), targets, strict=True):
            words = bars.worded(base, f"over {'ours' if over == DENSE else over}")
            rows += _faster(words, target, over)(measured)
        return rows

    return Bar(f"bar-{name}", (linear.recurrence("token", shape),), judge)


def _over_fla(kind: str, shape: Shape, target: float) -> Bar:
    name = f"scan-fla-{kind}-{shape.tokens}x{shape.heads}x{shape.width}"
    words = {"token": "simple decay", "delta": "gated delta rule", "channel": "decay per channel (GLA)"}[kind]
    base = _promise(name, f"{words} over flash-linear-attention's plain functions, N = {shape.tokens}", shape)
    return Bar(f"bar-{name}", (linear.recurrence(kind, shape),), _faster(base, target, "fla"))


def _over_performer(order: str, shape: Shape) -> Bar:
    name = f"favor-{order}-{shape.tokens}x{shape.heads}"
    words = f"random features, {'causal' if order == 'causal' else 'not causal'}, over performer-pytorch"
    base = _promise(name, f"{words}, N = {shape.tokens}", shape)
    judge = _faster(base, OVER_PERFORMER, "performer", lossy=True)
    return Bar(f"bar-{name}", (linear.favor(order, shape),), judge)


def _parallax(shape: Shape) -> Bar:
    name = f"parallax-{shape.tokens}x{shape.heads}-{shape.dtype}"
    base = _promise(name, f"time of Parallax over the faster dense attention, N = {shape.tokens}, {shape.dtype}", shape)

    def judge(measured: list[list[Row]]) -> list[Row]:
        (rows,) = measured or [[]]
        found = [_ratio(rows, over) for over in (DENSE, SDPA)]
        reasons = [reason for _, reason in found if reason]
        ratios = [ratio for ratio, _ in found if ratio is not None]
        if reasons or not ratios:
            return [bars.at_most(base.replace(note="; ".join(reasons) or None), None, PARALLAX)]
        return [bars.at_most(bars.cautioned(base, bars.one(rows, OURS)), 1.0 / min(ratios), PARALLAX)]

    return Bar(f"bar-{name}", (linear.parallax(shape),), judge)


def _flat(options: Options, lengths: Sequence[int], heads: int, width: int) -> Bar:
    """Time per token over lengths, all interleaved in one case."""
    name = f"scan-lengths-{heads}x{width}"

    def run(context: Context) -> list[Row]:
        inputs = {n: Shape(n, heads=heads, width=width, seed=options.seed).drawn() for n in lengths}
        context.say(f"targets/{name}: {len(lengths)} lengths, interleaved")
        with torch.no_grad():
            calls = {str(n): lambda made=made: linear.ours("token", made) for n, made in inputs.items()}
            times = interleave(calls, budget_s=2 * context.options.seconds, rounds=(7, 50))
        base = Row("targets", name, OURS, phase="forward", dtype="float32", gate="unchecked")
        base = base.replace(threads=torch.get_num_threads(), seed=options.seed)
        return [
            base.replace(length=int(n), shape=f"1x{heads}x{n}x{width}", **timing.fields())
            for n, timing in times.items()
        ]

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group in measured for row in group if row.median_ms and row.length]
        out = []
        for start, target in FLAT:
            base = _promise(f"scan-flat-{start}", f"scan: time per token from N = {start} to {max(lengths)}, even")
            per = {r.length: (r.median_ms or 0.0) / (r.length or 1) * 1e3 for r in rows if (r.length or 0) >= start}
            note = ", ".join(f"{n}: {us:.2f} us" for n, us in per.items())
            spread = max(per.values()) / min(per.values()) if per else None
            out.append(bars.at_most(bars.cautioned(base.replace(note=note or None), *rows), spread, target))
        return out

    case = Case("targets", name, run, 5.0, (OURS,))
    return Bar(f"bar-{name}", (case,), judge)


def _memory(what: str, lengths: Sequence[int]) -> Bar:
    """Peak memory of one call by length, each in a process of its own."""
    from manyheads.bench import memory

    def case(n: int) -> Case:
        def run(context: Context) -> list[Row]:
            context.say(f"targets/{what} memory at {n}")
            row = Row("targets", f"{what}-memory-{n}", OURS, length=n, dtype="float32", shape=str(Shape(n, heads=1)))
            if (reason := memory.available("cpu")) is not None:
                return [row.replace(note=reason)]
            with memory.Worker() as worker:
                peak = worker.ask("manyheads.bench.suites.linear_bars:peak_of", what, n)
            return [row.replace(peak_mib=peak.beyond_mib, process_mib=peak.process_mib)]

        return Case("targets", f"{what}-memory-{n}", run, 1.5, (OURS,))

    base = _promise(f"{what}-memory", f"memory of {what} forward, one head, grows like N")
    return Bar(f"bar-{what}-memory", tuple(case(n) for n in lengths), bars.linear_memory(base, lengths, MEMORY_GIB))


def peak_of(what: str, tokens: int) -> object:
    """Runs in the measuring process: the peak of one call beyond its inputs and its result."""
    from manyheads.bench import memory
    from manyheads.mechanism.regression.local_linear import local_linear_attention
    from manyheads.mechanism.regression.parallax import parallax

    def call(made: linear.Inputs) -> torch.Tensor:
        q, k, v = (made[n] for n in "qkv")
        if what == "scan":
            return linear.ours("token", made)
        if what == "parallax":
            return linear.only(parallax(q, k, v, r=made["r"], mask="causal"))
        return linear.only(local_linear_attention(q, k, v, mask="causal"))

    with torch.no_grad():
        call(Shape(256, heads=1).drawn())  # libraries and probes are no part of it
        made = Shape(tokens, heads=1).drawn()
        return memory.peak_here(lambda: call(made), results=lambda out: out.nbytes)


def _step(options: Options) -> Bar:
    """A step late in a sequence: as fast as one early in it, and much faster than dense attention's."""
    early, late = (linear.decoding(Shape(n, seed=options.seed)) for n in (1024, 32_768))

    def judge(measured: list[list[Row]]) -> list[Row]:
        base = _promise("step", "one step of a scan after 32768 tokens over the best dense step")
        even = _promise("step-even", "time of a step after 32768 tokens over one after 1024")
        first, rows = measured or [[], []]
        ours = [bars.one(found, OURS) for found in (first, rows)]
        dense = [r.median_ms for r in rows if r.provider != OURS and r.median_ms]
        if not dense or any(r is None or not r.median_ms for r in ours):
            return [bars.at_least(base, None, STEP), bars.at_most(even, None, STEP_EVENNESS)]
        times = [r.median_ms or 0.0 for r in ours if r is not None]
        base, even = (bars.cautioned(row, *ours) for row in (base, even))
        judged = bars.at_most(even, times[1] / times[0], STEP_EVENNESS)
        return [bars.at_least(base, min(dense) / times[1], STEP), judged]

    return Bar("bar-step", (early, late), judge)
