"""What only the bars of sparse attention measure: indexers, skipped tiles, a neighbourhood against its prediction."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads import attention
from manyheads.bench import device, loss
from manyheads.bench.environment import version
from manyheads.bench.oracle import visible
from manyheads.bench.row import Row
from manyheads.bench.structure import Shape, draw
from manyheads.bench.suite import Case, Context, Options
from manyheads.bench.suites import real
from manyheads.bench.suites.sparse import DENSE, SDPA, Way, mechanism
from manyheads.bench.timing import interleave
from manyheads.mask import Neighborhood, as_mask
from manyheads.mechanism.sparse.hisa import HISA
from manyheads.mechanism.sparse.indexer import (
    TUNINGS,
    Index,
    PooledKeys,
    clustered_index,
    flat_scan_of,
    index_of_heads,
    index_tokens,
    recall,
)
from manyheads.mechanism.sparse.misa import MISA
from manyheads.mechanism.sparse.pbs import PBS, visited_tiles

FLAT = "flat-tuned"
QUERIES = 64
"""Queries that are indexed together, the last of the keys."""
INDEX_HEADS = 64
SPREAD = 1.0
"""Deviation of clustered index keys around their centres, in units of that of the centres."""
NOTHING, LAMBDAS = 1e-30, (1e-3, 1e-2, 1e-1)
"""A threshold that skips nothing and those that skip more and more."""
ROWS = 128


def _row(name: str, provider: str, where: str, **more: object) -> Row:
    row = Row("targets", name, provider, device=device.label(where), threads=torch.get_num_threads())
    return row.replace(version=version("torch" if provider == SDPA else "manyheads"), **more)


def indexers(position: int, keep: int, options: Options) -> Case:
    """The flat indexer at every tuning, HISA and MISA on clustered index keys, at the end of so many tokens.

    Args:
        position: Tokens up to the last query.
        keep: Tokens to choose.
        options: Budget and seed.

    Returns:
        The case: one row for the fastest flat scan, one for each other indexer with its recall of the flat choice.
    """
    name = f"indexers-{position}-{keep}"

    def run(context: Context) -> list[Row]:
        seed = options.seed
        index = clustered_index(
            position, QUERIES, heads=INDEX_HEADS, spread=SPREAD, dtype=torch.bfloat16, seed=seed
        )
        source = f"clustered index keys, spread {SPREAD:g}"
        return _indexed(context, name, index, keep, source, tuned=True)

    return Case("targets", name, run, 3.0 + 6.0 * position / 32_768, (FLAT, "hisa", "misa"))


def captured_indexers(options: Options) -> Case:
    """The indexers on what a layer of the encoder receives: its scores, rectified and averaged over heads."""
    tokens, keep = 4096, 256
    name = f"indexers-{real.NAME}-{tokens}-{keep}"

    def run(context: Context) -> list[Row]:
        try:
            layer = real.Layer(3).read(tokens)
        except (ImportError, OSError, ValueError) as error:
            return [_row(name, FLAT, "cpu").replace(status="refused", reason=str(error).splitlines()[0])]
        q, k, _ = layer.tensors(tokens, torch.bfloat16)
        index = index_of_heads(q[:, :, -QUERIES:].contiguous(), k)
        return _indexed(context, name, index, keep, f"captured from {layer.source}, {layer.name}", tuned=False)

    return Case("targets", name, run, 2.0, (FLAT, "hisa", "misa"))


def _indexed(context: Context, name: str, index: Index, keep: int, source: str, *, tuned: bool) -> list[Row]:
    tokens, heads = index.k.shape[1], index.q.shape[1]
    # at least a quarter of the blocks, as the card has them from 32K on, and never fewer tokens than are kept
    blocks = max(64 if tuned else 1, -(-tokens // 128 // 4), -(-keep // 128))
    methods: dict[str, HISA | MISA] = {"hisa": HISA(blocks=blocks, flat_below=0)}
    methods["misa"] = MISA(heads=min(8, heads), flat_below=0)
    calls: dict[str, Callable[[], Tensor]] = {}
    for rows, piece in TUNINGS if tuned else TUNINGS[:1]:
        calls[f"flat {rows} {piece}"] = functools.partial(_flat, index, keep, rows, piece)
    pooled = PooledKeys(128).append(index.k)  # kept as keys come, so made outside the clock
    for who, method in methods.items():
        calls[who] = functools.partial(index_tokens, index, keep=keep, method=method, pooled=pooled)
    context.say(f"targets/{name}: {len(calls)} indexers")
    with torch.no_grad():
        wanted = index_tokens(index, keep=keep)
        recalls = {who: recall(wanted, calls[who]()) for who in methods}
        times = interleave(calls, budget_s=context.options.seconds / 2, warm=True)
    flat = min((who for who in calls if who not in methods), key=lambda who: times[who].median_ms)
    base = functools.partial(_row, name, where="cpu", input=source, length=tokens, seed=context.options.seed)
    found = [base(FLAT).replace(note=f"fastest of {len(calls) - 2}: {flat}", **times[flat].fields())]
    for who, share in recalls.items():
        found.append(base(who).replace(recall=share, gate="lossy", **times[who].fields()))
    return [row.replace(shape=f"1x{heads}x{QUERIES}:{tokens}x{index.q.shape[3]}", dtype="bfloat16") for row in found]


def _flat(index: Index, keep: int, rows: int, piece: int) -> Tensor:
    with flat_scan_of(rows, piece):
        return index_tokens(index, keep=keep)


def skipping(shape: Shape, options: Options) -> Case:
    """BLASST at thresholds that skip nothing and more and more, beside dense attention; and its error bound.

    Args:
        shape: Of the inputs, ``uneven`` ones.
        options: Budget.
    """
    name = f"blasst-{shape.tokens}-{shape.dtype}"

    def run(context: Context) -> list[Row]:
        q, k, v = draw("uneven", shape)[:3]
        some = [mechanism("blasst", f"{t:g}", threshold=t, mask="causal") for t in (NOTHING, *LAMBDAS)]
        calls: dict[str, Callable[[], object]] = {
            DENSE: lambda: attention(q, k, v, mask="causal"),
            SDPA: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        }
        calls |= {way.setting: functools.partial(way.fn, q, k, v) for way in some}
        base = functools.partial(_row, name, where="cpu", shape=str(shape), length=shape.tokens, dtype=shape.dtype)
        found = {who: base(who) for who in (DENSE, SDPA)}
        with torch.no_grad():
            for way, threshold in zip(some, (NOTHING, *LAMBDAS), strict=True):
                context.say(f"targets/{name}: threshold {way.setting}")
                lost = loss.lost(way.fn, q, k, v, selection=way.choose, rows=ROWS, budget_s=None)
                over = _over_bound(way, threshold, q, k, v)
                row = base("blasst", setting=way.setting, gate="lossy", error=lost.worst, error_norm=lost.error)
                found[way.setting] = row.replace(density=lost.density, area=lost.area, mass=lost.mass, measured=over)
            times = interleave(calls, budget_s=context.options.seconds / 2, warm=True)
        return [row.replace(**times[who].fields()) for who, row in found.items()]

    return Case("targets", name, run, 2.0 + 6e-8 * shape.tokens**2, (DENSE, SDPA, "blasst"))


def _over_bound(way: Way, threshold: float, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The largest error over its bound ``2 n lambda / l max|v|``, in float64 over the kept keys, rows sampled."""
    heads, n = q.shape[1], q.shape[2]
    layout = way.choose(q, k, v)
    rows = torch.arange(n - 1, -1, -max(1, n // 32)).flip(0)
    seen = visible(as_mask("causal"), rows.numpy(), n, n)[0, 0]
    worst = 0.0
    for h in range(0, heads, max(1, heads // 2)):
        keys, values = (t[0, h * t.shape[1] // heads].double() for t in (k, v))
        scores = (q[0, h, rows].double() @ keys.mT / math.sqrt(q.shape[3])).masked_fill(~seen, -torch.inf)
        kept = loss.seen(layout, 0, h, rows, n, heads) & seen
        inside = scores.masked_fill(~kept, -torch.inf)
        away = (scores.softmax(-1) @ values - inside.softmax(-1) @ values).abs().amax(-1)
        total = (inside - inside.amax(-1, keepdim=True)).exp().sum(-1)
        bound = 2 * (seen & ~kept).sum(-1) * threshold / total * values.abs().max()
        worst = max(worst, float((away / bound.clamp(min=1e-300)).where(bound > 0, 0.0).max()))
    return worst


def predicted(grid: tuple[int, ...], window: int, heads: int, width: int) -> Case:
    """A neighbourhood against plain attention: as the simulator predicts it here, and as it is.

    Args:
        grid: Sizes of the grid.
        window: Keys along each axis.
        heads: Heads.
        width: Head width.
    """
    mask = Neighborhood(grid, window)
    n = math.prod(grid)
    name = f"prediction-{'x'.join(map(str, grid))}-window{window}"

    def run(context: Context) -> list[Row]:
        from manyheads.bench.planning.neighborhood import predict

        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, heads, n, width, generator=generator) for _ in range(3))
        calls: dict[str, Callable[[], object]] = {
            SDPA: lambda: F.scaled_dot_product_attention(q, k, v),
            "manyheads": lambda: attention(q, k, v, mask=mask),
        }
        context.say(f"targets/{name}: small calls, from which the large one is predicted")
        foreseen = predict(mask, heads=heads, width=width)
        with torch.inference_mode():
            times = interleave(calls, budget_s=context.options.seconds)
        base = functools.partial(_row, name, where="cpu", shape=f"1x{heads}x{n}x{width}", dtype="float32", length=n)
        found = [base(who, **timing.fields()) for who, timing in times.items()]
        return [*found, base("predicted", median_ms=foreseen.near_ms, measured=foreseen.speedup)]

    return Case("targets", name, run, 3.0 + 4e-8 * n**2 * heads / 4, ("manyheads", SDPA))


MASS = 0.7
"""What the selector of PBS is told to keep."""
GRID = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97)
"""What it is told to keep without the permutation, to find as much weight."""


def permuted(kind: str, shape: Shape) -> Case:
    """PBS, and how many tiles it takes to keep as much weight without its permutation.

    Args:
        kind: One of ``structure.KINDS``.
        shape: Of the inputs.

    Returns:
        The case: a row with the permutation, then one for each setting without.
    """
    name = f"pbs-{kind}-{shape.tokens}"

    def run(context: Context) -> list[Row]:
        q, k, v = draw(kind, shape)[:3]
        whole = as_mask("causal").tiles(shape.tokens, tile=(PBS().block,) * 2, heads=shape.heads).visited
        settings = [("pbs", PBS(mass=MASS)), *(("pbs-unpermuted", PBS(mass=m, permute=False)) for m in GRID)]
        found = []
        for who, config in settings:
            context.say(f"targets/{name}: {who} at {config.mass:g}")
            lost = loss.lost("pbs", q, k, v, options={"config": config}, rows=ROWS, budget_s=None)
            row = _row(name, who, "cpu", shape=str(shape), length=shape.tokens, dtype=shape.dtype, input=kind)
            row = row.replace(setting=f"{config.mass:g}", gate="lossy", mass=lost.mass)
            row = row.replace(density=visited_tiles(q, k, config=config) / whole)
            found.append(row.replace(error=lost.worst, error_norm=lost.error, recall=lost.recall, seed=shape.seed))
        return found

    return Case("targets", name, run, 0.5 + 1.2e-7 * shape.tokens**2, ("pbs",))


def tiles_at(mass: float, rows: Sequence[Row]) -> float | None:
    """The share of tiles at which some rows keep so much weight, interpolated; None where they never do.

    Args:
        mass: Share of dense attention's weight.
        rows: With mass and density, from less to more.

    Example:
        >>> rows = [Row("targets", "c", "p", mass=m, density=d) for m, d in ((0.5, 0.2), (0.7, 0.4))]
        >>> round(tiles_at(0.6, rows), 3), tiles_at(0.9, rows)
        (0.3, None)
    """
    known = [(row.mass, row.density) for row in rows if row.mass is not None and row.density is not None]
    for (less, few), (more, many) in itertools.pairwise([(0.0, 0.0), *known]):
        if less <= mass <= more:
            return few + (many - few) * (mass - less) / (more - less) if more > less else few
    return None
