"""Suite ``sparse``: what mechanisms that choose their keys gain over dense attention, and what they lose.

A case is one kind of input. Dense attention, ours and torch's, and every mechanism at every setting run interleaved on
the same tensors; each result is compared with dense attention in float64 on sampled rows, and with float64 attention
over the keys that it chose, which tells what was lost from what is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads import attention
from manyheads.bench import device, loss, oracle
from manyheads.bench.environment import version
from manyheads.bench.measure import brief, compare
from manyheads.bench.row import Row
from manyheads.bench.structure import KINDS, Inputs, Shape, draw
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.suites import real
from manyheads.bench.timing import interleave
from manyheads.bench.workload import Problem
from manyheads.engine.tiled import tiled
from manyheads.mask import Causal, Mask, TileLayout, as_mask
from manyheads.mechanism import select
from manyheads.mechanism.sparse.hisa import HISA
from manyheads.mechanism.sparse.misa import MISA
from manyheads.mechanism.sparse.msa import MSAConfig
from manyheads.mechanism.sparse.nsa import NSAConfig
from manyheads.mechanism.sparse.pbs import PBS
from manyheads.spec import find

DENSE, SDPA = "manyheads-dense", "sdpa"
BLOCK = 128
"""Tokens of a block, for queries and keys."""
SINK = 4
KEPT = (0.05, 0.1, 0.25)
"""Shares of all key blocks that a row may keep."""
TAUS, MASSES, LAMBDA = (0.02, 0.1), (0.7, 0.9), 0.05
"""Settings of mechanisms that keep what is large enough: SALE, PBS, BLASST."""
ROWS = 64
"""Query rows of each head that are judged."""
ALLOWED = 4.0
"""A result may differ from exact attention over its own keys by this much more than torch's from dense attention."""
LENGTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "quick": {"document": (2048,)},
    "default": {"document": (6144,), "needles": (4096,), "video": (4096,)},
    "full": dict.fromkeys(KINDS, (4096, 16_384, 32_768)),
}
"""Tokens of each kind of input."""
REAL_TOKENS, REAL_LAYER = 4096, 3
SECONDS = 1.5e-8
"""Of a case for each pair of tokens and each setting, about; for the dry run and the progress bar."""


@dataclass(frozen=True)
class Way:
    """A mechanism at one setting.

    Attributes:
        name: As rows have it.
        setting: What it may keep, in words.
        fn: From q, k, v to the output.
        choose: From q, k, v to what ``fn`` visits, as in ``manyheads.bench.loss``; None for dense attention.
        attends: Whether the result is attention over the chosen keys and nothing else.
    """

    name: str
    setting: str
    fn: Callable[[Tensor, Tensor, Tensor], Any]
    choose: Callable[[Tensor, Tensor, Tensor], Any]
    attends: bool = True

    @property
    def key(self) -> str:
        """What tells it apart in a case."""
        return f"{self.name} {self.setting}"


def masked(name: str, setting: str, mask: Mask) -> Way:
    """Attention under a mask that no score decides: what every selector must beat."""

    def choose(q: Tensor, k: Tensor, v: Tensor) -> loss.Chosen:
        return mask.tiles(q.shape[2], k.shape[2], tile=(BLOCK, BLOCK), batch=q.shape[0], heads=q.shape[1])

    return Way(name, setting, lambda q, k, v: attention(q, k, v, mask=mask), choose)


def mechanism(
    slug: str,
    setting: str,
    *,
    name: str = "",
    attends: bool = True,
    given: Callable[[Tensor, Tensor, Tensor], dict[str, Any]] = lambda q, k, v: {},
    **options: Any,
) -> Way:
    """A mechanism of the registry with some options, causal.

    Args:
        slug: Its name.
        setting: What the options let it keep, in words.
        name: As rows have it, where it is not the slug.
        attends: As in :class:`Way`.
        given: From q, k and v to tensors that the mechanism takes beside them; made once for each input.
        **options: Other keyword arguments of the mechanism.
    """
    spec = find(slug)
    if spec.selection is None:
        raise ValueError(f"mechanism: {slug} chooses no keys")
    known: dict[int, dict[str, Any]] = {}

    def bound(fn: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor], Any]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
            if q.data_ptr() not in known:
                known[q.data_ptr()] = given(q, k, v)
            return fn(q, k, v, **known[q.data_ptr()], **options)

        return call

    return Way(name or slug, setting, bound(spec.fn), bound(spec.selection), attends)


def share(kept: float) -> str:
    """A share of the keys in words.

    Example:
        >>> share(0.05)
        '5%'
    """
    return f"{100 * kept:g}%"


def window(shape: Shape, kept: float) -> Way:
    """The last keys and the first four."""
    size = max(1, round(kept * shape.tokens) - SINK)
    return masked("window", share(kept), as_mask(f"causal & (window({size}) | sink({SINK}))"))


def random_blocks(shape: Shape, kept: float) -> Way:
    """As many blocks as a selector keeps, the first and the own one among them, drawn without looking."""
    blocks = -(-shape.tokens // BLOCK)
    scores = torch.rand(1, shape.heads, blocks, blocks, generator=shape.generator)
    seen = select.block_causal(shape.tokens, shape.tokens, BLOCK, BLOCK)
    ids = select.top_k(scores, blocks_kept(shape, kept), visible=seen, force=select.Forced(first=1))

    def choose(q: Tensor, k: Tensor, v: Tensor) -> TileLayout:
        n = q.shape[2]
        return TileLayout.from_ids(ids.to(q.device), nq=n, nk=n, tile=BLOCK, mask=Causal(), heads=q.shape[1])

    return Way("random-blocks", share(kept), lambda q, k, v: tiled(q, k, v, choose(q, k, v)), choose)


def blocks_kept(shape: Shape, kept: float, block: int = BLOCK) -> int:
    """How many blocks of keys a share of all is, at least two.

    Example:
        >>> blocks_kept(Shape(16_384), 0.1)
        13
    """
    blocks = -(-shape.tokens // block)
    return min(blocks, max(2, round(kept * blocks)))


def pooled(shape: Shape, kept: float, by: str = "group") -> Way:
    """Blocks by the product of means, chosen by a group of heads or by each head."""
    name = "pooled-topk" if by == "group" else "pooled-topk-heads"
    return mechanism("pooled-topk", share(kept), name=name, block=BLOCK, keep=blocks_kept(shape, kept), share=by)


def msa(shape: Shape, kept: float) -> Way:
    """MSA, its index the mean query of each group and the mean key: what a trained one is at least as good as."""
    config = MSAConfig(block=BLOCK, keep=blocks_kept(shape, kept))
    return mechanism("msa", share(kept), given=_group_index, config=config)


def nsa(shape: Shape, kept: float) -> Way:
    """The selected branch of NSA, its compressed keys the means of windows, as before training."""
    block = BLOCK // 2
    config = NSAConfig(block=block, keep=max(4, blocks_kept(shape, kept, block)))
    return mechanism("fsa", share(kept), name="fsa-selected", given=_selected_only, config=config)


def indexed(slug: str, shape: Shape, kept: float) -> Way:
    """DSA or one of its indexers: a token's own queries and the mean key as its index, all heads with weight 1.

    The cheaper indexers are asked even where a flat scan would be faster, to show what they lose.
    """
    keep = max(1, round(kept * shape.tokens))
    options: dict[str, Any] = {"keep": keep}
    if slug == "hisa":
        options["config"] = HISA(blocks=max(-(-keep // 128), -(-shape.tokens // 128 // 4)), flat_below=0)
    if slug == "misa":
        options["config"] = MISA(heads=max(1, shape.heads // 4), flat_below=0)
    return mechanism(slug, share(kept), given=_token_index, **options)


def ways(shape: Shape) -> list[Way]:
    """Every mechanism at every setting.

    Args:
        shape: Of the inputs.

    Returns:
        The ways, those that look at nothing first.
    """
    block_wise = (window, random_blocks, pooled, functools.partial(pooled, by="head"))
    found = [made(shape, kept) for made in block_wise for kept in KEPT]
    found += [made(shape, kept) for made in (msa, nsa) for kept in KEPT[1:]]
    found += [indexed(slug, shape, KEPT[1]) for slug in ("dsa", "hisa", "misa")]
    found += [mechanism("sale", f"{tau:g}", threshold=tau) for tau in TAUS]
    found += [mechanism("pbs", f"{mass:g}", config=PBS(mass=mass)) for mass in MASSES]
    return [*found, mechanism("blasst", f"{LAMBDA:g}", threshold=LAMBDA, mask="causal")]


def _group_index(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    queries = q.unflatten(1, (k.shape[1], -1)).float().mean(2).to(q.dtype)
    return {"index_q": queries, "index_k": k.float().mean(1).to(k.dtype)}


def _selected_only(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    off = torch.zeros(q.shape[0], 1, q.shape[2], dtype=q.dtype, device=q.device)
    return {"gate_compressed": off, "gate_selected": torch.ones_like(off), "gate_window": off}


def _token_index(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    weights = torch.ones(q.shape[:3], dtype=q.dtype, device=q.device)
    return {"index_q": q, "index_k": k.float().mean(1).to(k.dtype), "index_w": weights}


def cases(options: Options) -> list[Case]:
    """One case for each kind of input and each length; the encoder's layer at its own length."""
    lengths = {kind: options.lengths or some for kind, some in LENGTHS[options.level].items()}
    dtypes = options.pick(("bfloat16", "float32") if options.level == "full" else ("bfloat16",))
    found = []
    for dtype in dtypes:
        for kind, some in lengths.items():
            shapes = [Shape(n, dtype=dtype, seed=options.seed) for n in some]
            found += [plane("sparse", f"{kind}-{s.tokens}-{dtype}", kind, s, options) for s in shapes]
        if options.level != "quick" and not options.lengths:
            shape = Shape(REAL_TOKENS, heads=12, kv_heads=12, width=32, dtype=dtype, seed=options.seed)
            found.append(plane("sparse", f"{real.NAME}-{REAL_TOKENS}-{dtype}", "real", shape, options))
    return [case for case in found if not options.providers or set(options.providers) & set(case.providers)]


def plane(
    suite: str, name: str, kind: str, shape: Shape, options: Options, made: Callable[[Shape], Sequence[Way]] = ways
) -> Case:
    """One kind of input: dense attention and ways of choosing keys, interleaved.

    Args:
        suite: Name of the suite.
        name: Of the case.
        kind: One of ``structure.KINDS``, or ``"real"`` for a layer of the encoder.
        shape: Of the inputs.
        options: Budget, device, providers.
        made: The ways to choose.

    Returns:
        The case; rows of ways have what they lose and how many times as fast as the faster dense attention they are.
    """

    def run(context: Context) -> list[Row]:
        row = Row(suite, name, "-", shape=str(shape), length=shape.tokens, dtype=shape.dtype, seed=shape.seed)
        row = row.replace(input=kind, device=device.label(options.device), threads=torch.get_num_threads())
        row = row.replace(cache="warm", version=version("manyheads"))
        try:
            inputs, source = _inputs(kind, shape, options.device)
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            return [row.replace(provider=DENSE, status="refused", reason=reason)]
        with torch.no_grad():
            return _measured(context, row.replace(input=source), shape, inputs, made(shape))

    who = [DENSE, SDPA, *dict.fromkeys(way.name for way in made(shape))]
    work = SECONDS * shape.tokens**2 * shape.heads / 8 * (2 + 0.8 * len(made(shape)))
    return Case(suite, name, run, 1.0 + work, tuple(who))


def _inputs(kind: str, shape: Shape, where: str) -> tuple[Inputs, str]:
    if kind != "real":
        drawn = draw(kind, shape)
        return drawn._replace(**{name: getattr(drawn, name).to(where) for name in "qkv"}), kind
    layer = real.Layer(REAL_LAYER).read(shape.tokens)
    q, k, v = layer.tensors(shape.tokens, getattr(torch, shape.dtype), where)
    factor = layer.scale * shape.width**0.5  # ways use the usual scale
    return Inputs(q * factor, k, v), f"captured from {layer.source}, {layer.name}"


def _measured(context: Context, base: Row, shape: Shape, inputs: Inputs, some: Sequence[Way]) -> list[Row]:
    q, k, v = inputs[:3]
    chosen = context.options.chosen([DENSE, SDPA, *(way.name for way in some)])
    problem = Problem(as_mask("causal"), shape.tokens, heads=shape.heads, kv_heads=shape.kv_heads, width=shape.width,
                      dtype=shape.dtype, seed=shape.seed)  # fmt: skip
    known = oracle.truth(problem, q, k, v, rows=ROWS)
    norm = float((known.peer[0].double() - known.exact[0]).norm() / known.exact[0].norm())
    sides: dict[str, Callable[[], object]] = {
        DENSE: lambda: attention(q, k, v, mask="causal"),
        SDPA: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    rows: dict[str, Row] = {}
    for name, call in sides.items():
        out = call()
        assert isinstance(out, Tensor)
        verdict = oracle.judge((out[:, :, known.rows],), known)
        rows[name] = base.replace(provider=name, **verdict.fields())
    rows[SDPA] = rows[SDPA].replace(version=version("torch"))
    for way in some:
        if way.name not in chosen:
            continue
        context.say(f"{base.suite}/{base.case}: {way.key}")
        row = base.replace(provider=way.name, setting=way.setting)
        try:
            rows[way.key] = _lossy(row, loss.lost(way.fn, q, k, v, selection=way.choose, rows=ROWS, budget_s=None),
                                   ALLOWED * norm if way.attends else None)  # fmt: skip
        except Exception as error:  # a mechanism that breaks is a row, not the end of the benchmark
            rows[way.key] = row.replace(status="failed", reason=brief(error))
            continue
        sides[way.key] = functools.partial(way.fn, q, k, v)
        sides[f"choosing {way.key}"] = functools.partial(way.choose, q, k, v)
    context.say(f"{base.suite}/{base.case}: timing {len(sides)} calls")
    watch = device.stopwatch(context.options.device)
    budget = context.options.seconds / 2  # selections are short, and there are many settings
    times = interleave(sides, budget_s=budget, warm=True, watch=watch)
    whole = min(times[name].median_ms for name in (DENSE, SDPA) if rows[name].gate != "red")
    for key, row in rows.items():
        if key not in times:
            continue
        row = row.replace(**{**times[key].fields(), "first_ms": None})
        if row.setting is not None:
            row = row.replace(selection=min(1.0, times[f"choosing {key}"].median_ms / times[key].median_ms))
            row = row.replace(speed=whole / times[key].median_ms if row.gate != "red" else None)
        rows[key] = row
    dense = compare([rows[DENSE], rows[SDPA]])
    return [*dense, *(row for row in rows.values() if row.provider not in (DENSE, SDPA))]


def _lossy(row: Row, found: loss.Lost, limit: float | None) -> Row:
    """What was lost; red where the result is not attention over the keys that were chosen."""
    wrong = limit is not None and not found.rounding <= limit
    note = f"differs from attention over its own keys by {found.rounding:.1e}" if wrong else None
    return row.replace(
        gate="red" if wrong else "lossy",
        error=found.worst,
        error_norm=found.error,
        mass=found.mass,
        recall=found.recall,
        area=found.area,
        pairs=found.pairs,
        density=found.density,
        note=note,
    )


NAMES = (
    DENSE, SDPA, "window", "random-blocks", "pooled-topk", "pooled-topk-heads", "msa", "fsa-selected", "dsa", "hisa",
    "misa", "sale", "pbs", "blasst",
)  # fmt: skip
SUITE = Suite(
    "sparse",
    "Mechanisms that choose their keys: speed over dense attention against what is lost, by kind of input.",
    cases,
    NAMES,
)
