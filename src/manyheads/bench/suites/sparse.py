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
from manyheads.mask import Mask, as_mask
from manyheads.mask.longca import block_sparse
from manyheads.spec import find

DENSE, SDPA = "manyheads-dense", "sdpa"
BLOCK = 128
"""Tokens of a block, for queries and keys."""
SINK = 4
KEPT = (0.05, 0.1, 0.25)
"""Shares of all key blocks that a row may keep."""
ROWS = 64
"""Query rows of each head that are judged."""
ALLOWED = 4.0
"""A result may differ from exact attention over its own keys by this much more than torch's from dense attention."""
LENGTHS = {"quick": (2048,), "default": (8192,), "full": (4096, 16_384, 32_768)}
REAL_TOKENS, REAL_LAYER = 4096, 3
SECONDS = 3e-9
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


def mechanism(slug: str, setting: str, *, name: str = "", attends: bool = True, **options: Any) -> Way:
    """A mechanism of the registry with some options, causal.

    Args:
        slug: Its name.
        setting: What the options let it keep, in words.
        name: As rows have it, where it is not the slug.
        attends: As in :class:`Way`.
        **options: Keyword arguments of the mechanism.
    """
    spec = find(slug)
    if spec.selection is None:
        raise ValueError(f"mechanism: {slug} chooses no keys")
    fn, choose = (functools.partial(f, **options) for f in (spec.fn, spec.selection))
    return Way(name or slug, setting, fn, choose, attends)


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
    """Blocks drawn without looking, other ones for each head."""
    blocks = block_sparse(shape.tokens, ratio=kept, heads=shape.heads, block=BLOCK, seed=shape.seed)
    return masked("random-blocks", share(kept), blocks & as_mask("causal"))


def ways(shape: Shape) -> list[Way]:
    """Every mechanism at every setting.

    Args:
        shape: Of the inputs.

    Returns:
        The ways, those without a choice first.
    """
    found = [made(shape, kept) for made in (window, random_blocks) for kept in KEPT]
    blocks = -(-shape.tokens // BLOCK)
    for kept in KEPT:
        keep = max(1, round(kept * blocks))
        for name, shared in (("pooled-topk", "group"), ("pooled-topk-heads", "head")):
            found.append(mechanism("pooled-topk", share(kept), name=name, block=BLOCK, keep=keep, share=shared))
    return found


def cases(options: Options) -> list[Case]:
    """One case for each kind of input and each length; the encoder's layer at its own length."""
    lengths = options.lengths or LENGTHS[options.level]
    kinds = ("document",) if options.level == "quick" else tuple(KINDS)
    dtypes = options.pick(("bfloat16", "float32") if options.level == "full" else ("bfloat16",))
    found = []
    for dtype in dtypes:
        for n in lengths:
            shape = Shape(n, dtype=dtype, seed=options.seed)
            found += [plane("sparse", f"{kind}-{n}-{dtype}", kind, shape, options) for kind in kinds]
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
    work = SECONDS * shape.tokens**2 * shape.heads / 8 * (2 + 0.3 * len(made(shape)))
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


NAMES = (DENSE, SDPA, "window", "random-blocks", "pooled-topk", "pooled-topk-heads")
SUITE = Suite(
    "sparse",
    "Mechanisms that choose their keys: speed over dense attention against what is lost, by kind of input.",
    cases,
    NAMES,
)
