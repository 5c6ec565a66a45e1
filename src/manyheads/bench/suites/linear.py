"""Suite ``linear``: recurrences and regressions against dense attention and against other packages.

Every case draws its inputs once and runs all sides interleaved on them. A recurrence is judged by float64 of the same
recurrence; dense attention stands beside it for its time only, because it computes something else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.bench import device
from manyheads.bench.environment import version
from manyheads.bench.measure import brief, compare
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.timing import interleave

OURS, DENSE, SDPA = "manyheads", "manyheads-dense", "sdpa"
HEADS, WIDTH = 4, 64
PREFIX = 512
"""Tokens of which Parallax is computed plainly, with all pairs."""
ALLOWED = 2.0
"""A result may err by this much more than the plain recurrence does, one token after the other in the same dtype."""
DENSE_UP_TO = 16_384
"""Tokens above which dense attention is not worth waiting for."""
LENGTHS = {"quick": (2048,), "default": (2048, 8192), "full": (512, 2048, 8192, 32_768)}
DECAYS = ("none", "head", "token", "channel", "delta", "mlstm")
COMPARED = ("token", "channel", "delta")
"""Decays that another package has too."""
PROVIDERS = (OURS, "fla", "performer", DENSE, SDPA)

Inputs = dict[str, Tensor]
Side = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Size and kind of one case.

    Attributes:
        tokens: N.
        heads: H.
        width: D of queries, keys and values.
        dtype: Name of the dtype.
        seed: Of the inputs.
        device: Where they are.
    """

    tokens: int
    heads: int = HEADS
    width: int = WIDTH
    dtype: str = "float32"
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        """As a row says it: batch, heads, tokens, width."""
        return f"1x{self.heads}x{self.tokens}x{self.width}"

    def drawn(self) -> Inputs:
        """Normal queries, keys, values and probes; log decays of mean about -0.05, gates, steps and slopes."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        rows = (1, self.heads, self.tokens)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=self.device)

        made = {name: normal(*rows, self.width) for name in ("q", "k", "v", "r")}
        made |= {"token": F.logsigmoid(normal(*rows) + 3.0), "gate": normal(*rows), "beta": normal(*rows).sigmoid()}
        made["channel"] = F.logsigmoid(normal(*rows, self.width) + 3.0)
        made["head"] = -torch.arange(1, self.heads + 1, device=self.device) / (4.0 * self.heads)
        made["unit"] = F.normalize(made["k"], dim=-1)
        wide = ("token", "gate", "beta", "channel", "head")
        return {n: t if n in wide else t.to(getattr(torch, self.dtype)) for n, t in made.items()}


def cases(options: Options) -> list[Case]:
    """Each kind of recurrence by length, then random features, regressions and single steps."""
    lengths = options.lengths or LENGTHS[options.level]
    made = [
        recurrence(kind, Shape(n, dtype=dtype, seed=options.seed, device=options.device))
        for dtype in options.pick(("float32",))
        for kind in DECAYS
        for n in (lengths if options.lengths or options.level == "full" or kind in COMPARED else lengths[-1:])
    ]
    if options.level == "quick":
        made = [case for case in made if case.name.startswith(("scan-token", "scan-delta"))]
    n = lengths[-1]
    shapes = [Shape(min(n, 4096), dtype=dtype, seed=options.seed, device=options.device) for dtype in ("float32",)]
    made += [favor(order, shape) for shape in shapes for order in ("causal", "full")]
    for dtype in options.pick(("float32",) if options.level == "quick" else ("float32", "bfloat16")):
        made.append(parallax(Shape(min(n, 4096), heads=8, dtype=dtype, seed=options.seed, device=options.device)))
    made.append(local_linear(Shape(min(n, 1024), seed=options.seed, device=options.device)))
    made.append(decoding(Shape(32_768 if options.level != "quick" else 4096, seed=options.seed, device=options.device)))
    return [case for case in made if not options.providers or set(options.providers) & set(case.providers)]


def recurrence(kind: str, shape: Shape) -> Case:
    """One kind of decay: ours, the chunked (or only) plain functions of flash-linear-attention, dense attention.

    Args:
        kind: One of ``DECAYS``.
        shape: Its size.

    Returns:
        The case.
    """
    who = [OURS] + (["fla"] if kind in COMPARED and shape.device == "cpu" else [])
    who += [DENSE, SDPA] if shape.tokens <= DENSE_UP_TO else []

    def sides(made: Inputs) -> dict[str, Callable[[], Side]]:
        return {OURS: lambda: functools.partial(ours, kind, made), "fla": lambda: _fla(kind, made), **dense(made)}

    def judge(made: Inputs) -> tuple[Tensor, float]:
        exact = ours(kind, {n: t.double() for n, t in made.items()})
        return exact, _limit(ours(kind, made, backend="reference"), exact)

    seconds = 2.0 + shape.tokens / 8192 * (3.0 if kind == "channel" else 1.5)
    return _case(f"scan-{kind}-{shape.tokens}-{shape.dtype}", shape, who, sides, judge, seconds)


def ours(kind: str, made: Inputs, *, backend: str = "auto") -> Tensor:
    """The engine on drawn inputs, with one kind of decay."""
    from manyheads.engine.scan import scan

    more: dict[str, Tensor | str | None]
    if kind == "mlstm":
        more = {"decay": made["token"], "gate": made["gate"], "normalise": "max1"}
    elif kind == "delta":
        more = {"decay": made["token"], "beta": made["beta"]}
    else:
        more = {"decay": None if kind == "none" else made[kind]}
    k = made["unit" if kind == "delta" else "k"]
    scale = made["q"].shape[-1] ** -0.5
    return only(scan(made["q"], k, made["v"], scale=scale, backend=backend, **more))  # type: ignore[arg-type]


def only(result: object) -> Tensor:
    """A result that is one tensor, as calls without ``return_...`` give."""
    assert isinstance(result, Tensor)
    return result


def favor(order: str, shape: Shape) -> Case:
    """Random features: ours and performer-pytorch with the same projection, as many features as it draws by itself."""
    from manyheads.mechanism.linear.favor import favor_attention, reference

    def projection(made: Inputs) -> Tensor:
        from manyheads.common.features import orthogonal

        count = int(shape.width * torch.tensor(float(shape.width)).log())
        generator = torch.Generator().manual_seed(shape.seed)
        return orthogonal(count, shape.width, generator=generator).to(made["q"])

    def sides(made: Inputs) -> dict[str, Callable[[], Side]]:
        w, (q, k, v) = projection(made), (made[n] for n in "qkv")
        return {
            OURS: lambda: lambda: favor_attention(q, k, v, projection=w, mask=order),
            "performer": lambda: _performer(made, w, causal=order == "causal"),
            **dense(made, causal=order == "causal"),
        }

    def judge(made: Inputs) -> tuple[Tensor, float]:
        w, qkv = projection(made), [made[n] for n in "qkv"]
        exact = only(reference(*(t.double() for t in qkv), projection=w.double(), mask=order))
        return exact, _limit(only(reference(*qkv, projection=w, mask=order)), exact)

    return _case(f"favor-{order}-{shape.tokens}", shape, (OURS, "performer", DENSE, SDPA), sides, judge, 4.5)


def parallax(shape: Shape) -> Case:
    """Parallax beside dense attention, causal."""
    from manyheads.mechanism.regression.parallax import parallax as ours_

    def sides(made: Inputs) -> dict[str, Callable[[], Side]]:
        q, k, v, r = (made[n] for n in "qkvr")
        return {OURS: lambda: lambda: ours_(q, k, v, r=r, mask="causal"), **dense(made)}

    def judge(made: Inputs) -> tuple[Tensor, float]:
        few = [made[n][:, :, :PREFIX] for n in "qkvr"]
        whole = [made[n].double() for n in "qkvr"]
        start = _parallax_plainly(*(t.double() for t in few))
        return only(ours_(*whole[:3], r=whole[3], mask="causal")), _limit(_parallax_plainly(*few), start)

    return _case(f"parallax-{shape.tokens}-{shape.dtype}", shape, (OURS, DENSE, SDPA), sides, judge, 5.0)


def _parallax_plainly(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    from manyheads.mechanism.regression.parallax import reference

    return only(reference(q, k, v, r=r, mask="causal"))


def local_linear(shape: Shape) -> Case:
    """Local linear attention beside dense attention, causal."""
    from manyheads.mechanism.regression.local_linear import local_linear_attention, reference

    def sides(made: Inputs) -> dict[str, Callable[[], Side]]:
        q, k, v = (made[n] for n in "qkv")
        return {OURS: lambda: lambda: local_linear_attention(q, k, v, mask="causal"), **dense(made)}

    def judge(made: Inputs) -> tuple[Tensor, float]:
        qkv = [made[n] for n in "qkv"]
        exact = only(reference(*(t.double() for t in qkv), mask="causal"))
        return exact, _limit(only(reference(*qkv, mask="causal")), exact)

    return _case(f"lla-{shape.tokens}-{shape.dtype}", shape, (OURS, DENSE, SDPA), sides, judge, 5.0)


def decoding(shape: Shape) -> Case:
    """One more token after ``shape.tokens``: a step of the recurrence, and dense attention over all keys."""

    def sides(made: Inputs) -> dict[str, Callable[[], Side]]:
        from manyheads.engine.scan import State, step

        q, k, v = (made[n][:, :, -1].contiguous() for n in "qkv")
        wide = made["v"].shape[-1]
        state = State(made["k"][:, :, :wide].mT @ made["v"][:, :, :wide])
        log, keys, values, row = made["token"][:, :, -1], made["k"], made["v"], q[:, :, None]
        factor = q.shape[-1] ** -0.5
        return {
            OURS: lambda: lambda: step(q, k, v, state, decay=log, scale=factor)[0],
            SDPA: lambda: lambda: F.scaled_dot_product_attention(row, keys, values),
            "products": lambda: lambda: torch.softmax(row @ keys.mT * factor, -1) @ values,
        }

    return _case(f"step-{shape.tokens}", shape, (OURS, SDPA, "products"), sides, None, 3.0)


def dense(made: Inputs, *, causal: bool = True) -> dict[str, Callable[[], Side]]:
    """Dense attention over the same tokens: ours, and torch's own."""
    from manyheads import attention

    q, k, v = (made[n] for n in "qkv")
    return {
        DENSE: lambda: lambda: attention(q, k, v, mask="causal" if causal else None),
        SDPA: lambda: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    }


def _fla(kind: str, made: Inputs) -> Side:
    """Its plain functions take (B, N, H, D) and, but for the gated one, apply the scale by themselves."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule
        from fla.ops.gla.naive import naive_recurrent_gla
        from fla.ops.simple_gla.naive import naive_chunk_simple_gla
    names = {"token": "qkv", "channel": "qkv", "delta": ("q", "unit", "v")}[kind]
    q, k, v = (made[n].transpose(1, 2).contiguous() for n in names)
    gates = {n: made[n].transpose(1, 2).contiguous() for n in ("token", "channel", "beta")}
    run: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "token": lambda: naive_chunk_simple_gla(q, k, v, gates["token"]),
        "channel": lambda: naive_recurrent_gla(q, k, v, gates["channel"]),
        "delta": lambda: naive_chunk_gated_delta_rule(q, k, v, gates["token"], gates["beta"]),
    }
    return lambda: run[kind]()[0].transpose(1, 2)


def _performer(made: Inputs, projection: Tensor, *, causal: bool) -> Side:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its CUDA kernel is missing
        from performer_pytorch import FastAttention

        module = FastAttention(projection.shape[1], nb_features=projection.shape[0], causal=causal)
    module.projection_matrix.copy_(projection)
    q, k, v = (made[n] for n in "qkv")
    return lambda: module(q, k, v)


_PACKAGES = {"fla": "flash-linear-attention", "performer": "performer-pytorch", OURS: "manyheads", DENSE: "manyheads"}
_OTHER = {DENSE, SDPA, "products"}
"""Sides that compute dense attention: what they give is not compared."""


def _case(
    name: str,
    shape: Shape,
    who: tuple[str, ...] | list[str],
    sides: Callable[[Inputs], Mapping[str, Callable[[], Side]]],
    judge: Callable[[Inputs], tuple[Tensor, float]] | None,
    seconds: float,
) -> Case:
    """A case from what its sides are and how their results are judged."""

    def run(context: Context) -> list[Row]:
        with torch.no_grad():
            return _measured(context, name, shape, [n for n in who if n in context.options.chosen(who)], sides, judge)

    return Case("linear", name, run, seconds, tuple(who))


def _measured(
    context: Context,
    name: str,
    shape: Shape,
    who: list[str],
    sides: Callable[[Inputs], Mapping[str, Callable[[], Side]]],
    judge: Callable[[Inputs], tuple[Tensor, float]] | None,
) -> list[Row]:
    base = Row("linear", name, "-", phase="step" if judge is None else "forward", shape=str(shape), dtype=shape.dtype)
    base = base.replace(length=shape.tokens, seed=shape.seed, device=device.label(shape.device), input="normal")
    base = base.replace(threads=torch.get_num_threads(), cache=context.options.cache)
    made = shape.drawn()
    makers = sides(made)
    context.say(f"linear/{name}: float64")
    known = None if judge is None else judge(made)
    rows: dict[str, Row] = {}
    calls: dict[str, Side] = {}
    watch = device.stopwatch(shape.device)
    for provider in who:
        context.say(f"linear/{name}: {provider}, first call")
        row = base.replace(provider=provider, version=version(_PACKAGES.get(provider, "torch")))
        try:
            calls[provider] = makers[provider]()
            first_ms = watch.first(calls[provider])
            out = only(calls[provider]())
        except ImportError:
            calls.pop(provider, None)
            rows[provider] = row.replace(status="refused", reason=f"{_PACKAGES[provider]} is not installed")
            continue
        except Exception as error:  # a peer that breaks is a row, not the end of the benchmark
            calls.pop(provider, None)
            rows[provider] = row.replace(status="failed", reason=brief(error))
            continue
        rows[provider] = _judged(row.replace(first_ms=first_ms), out, known)
    if calls:
        context.say(f"linear/{name}: timing {', '.join(calls)}")
        inner = 100 if judge is None else 1  # a step takes microseconds, dense attention empties the caches
        times = interleave(calls, budget_s=context.options.seconds, inner=inner, warm=True, watch=watch)
        for provider, timing in times.items():
            rows[provider] = rows[provider].replace(**{**timing.fields(), "first_ms": rows[provider].first_ms})
    return compare(list(rows.values()))


def _judged(row: Row, out: Tensor, known: tuple[Tensor, float] | None) -> Row:
    """Error and gate of one result; dense attention computes something else, and is judged in its own suite."""
    if row.provider in _OTHER:
        return row.replace(gate="unchecked", note="dense attention: another result")
    if known is None:
        return row.replace(gate="unchecked")
    exact, limit = known
    wrong = out.double() - exact
    error, norm = float(wrong.abs().max()), float(wrong.norm() / exact.norm())
    if row.provider == "performer":  # its floor is added after a shift that differs: another estimate
        return row.replace(gate="lossy", error=error, error_norm=norm)
    return row.replace(gate="green" if error <= limit else "red", error=error, error_norm=norm, error_limit=limit)


def _limit(plain: Tensor, exact: Tensor) -> float:
    eps = torch.finfo(plain.dtype).eps
    return ALLOWED * (float((plain.double() - exact).abs().max()) + eps * float(exact.abs().max()))


SUITE = Suite(
    "linear",
    "Recurrences, random features and regressions against dense attention and other packages.",
    cases,
    (*PROVIDERS, "products"),
)
