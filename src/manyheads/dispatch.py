"""Which backend takes a call, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .common import checks, scopes
from .common.errors import UnsupportedError, unknown
from .common.tracing import constant
from .engine.result import Attn
from .engine.tiled import Bias, Term, boxing, flash, launch, order, products, sharding
from .engine.tiled.op import call_plain, layout_for
from .mask import Causal, Full, Mask, as_mask, parse
from .mask.layout import TileLayout
from .mask.show import later_warning

BACKENDS = ("sdpa", "triton", "blocked", "reference")
"""Every backend, in the order in which ``auto`` asks them."""

Positions = tuple[Integer[Tensor, "... Nq"], Integer[Tensor, "... Nk"]]


class Call(NamedTuple):
    """One call of :func:`attention`, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    terms: tuple[Term, ...]
    plain: bool
    positions: bool
    key_padding: bool
    return_lse: bool
    needs_grad: bool
    sharded: bool

    @property
    def dense(self) -> bool:
        """Whether every pair is visible."""
        return isinstance(self.mask, Full) or (isinstance(self.mask, Causal) and self.q.shape[2] == 1)


@dataclass(frozen=True)
class Explanation:
    """Which backend takes a call, and why the others do not.

    Attributes:
        taken: The backend that runs.
        refusals: For every backend its reasons, empty for one that could run.
        notes: What else a reader of a profile should know: density, the way of multiplying, warnings.
    """

    taken: str
    refusals: dict[str, list[str]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for name, reasons in self.refusals.items():
            state = "taken" if name == self.taken else "refused" if reasons else "could run"
            lines.append(f"{name}: {state}" + "".join(f"\n    {r}" for r in reasons))
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def explain(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    mask: Mask | TileLayout | str | Tensor | None = None,
    scale: float | None = None,
    bias: Bias | Term | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " Hq"] | None = None,
    dropout_p: float = 0.0,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Says which backend would run a call, why the others would not, and what the mask costs.

    Args:
        q, k, v, mask, scale, bias, softcap, sink, dropout_p, positions, key_padding, return_lse, backend: As for
            :func:`attention`. ``mask`` may also be a layout, as the engine ``tiled`` takes it.

    Returns:
        An :class:`Explanation`; print it.

    Raises:
        ValueError: As :func:`attention` would.
        UnsupportedError: When a named backend refuses.

    Example:
        >>> import manyheads as mh
        >>> q = torch.ones(1, 2, 256, 16)
        >>> print(str(mh.explain(q, q, q, mask="window(8)")).splitlines()[0])
        sdpa: refused
    """
    if scopes.active:
        return scopes.active[-1].explain(
            q, k, v, mask=mask, scale=scale, bias=bias, softcap=softcap, sink=sink, dropout_p=dropout_p,
            positions=positions, key_padding=key_padding, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    layout = mask if isinstance(mask, TileLayout) else None
    mask = Full() if isinstance(mask, TileLayout) else mask
    call = checked(q, k, v, mask, scale, bias, softcap, sink, dropout_p, positions, key_padding, return_lse)
    if layout is not None:
        return _of_layout(call, layout, backend, not (call.terms or softcap or dropout_p))
    taken = choose(call, backend)
    refusals = {name: _refusals(name, call) for name in BACKENDS}
    if taken in ("blocked", "triton") and not refusals["sdpa"]:
        refusals["sdpa"] = _slower(call)
    notes = []
    plain = call.plain and not (call.positions or call.key_padding or call.mask.data)
    boxes = boxing.plan_for(call.mask.text, q, k, v) if taken == "blocked" and plain else None
    if boxes is not None:
        notes.append(str(boxes))
    elif taken != "sdpa":
        kind = launch.kind_of((t.kind for t in call.terms), softcap or 0.0, dropout_p, 0.0, "softmax")
        tile = launch.tile_of(q, v, kind, False) if taken == "triton" else None
        layout = layout_for(call.mask, q, k, positions, key_padding, tile)
        notes.append(
            f"visited tiles of {layout.tile[0]} x {layout.tile[1]}: {layout.density:.2%} of all, "
            f"{layout.area:.2%} of the pairs are visible"
        )
        notes.extend([layout.cost_note] if layout.cost_note else [])
    if taken == "blocked" and q.device.type == "cpu" and boxes is None:
        fused = call.plain and products.fused_wins(q.dtype)
        notes.append("pieces go to torch's fused kernel" if fused else "pieces go to separate products and passes")
        notes.extend([launch.describe(q, v, kind)] if taken == "triton" else [])
    notes.extend([str(sharding.plan_of(q, k, v))] if call.sharded else [])
    surprise = later_warning(call.mask, q.shape[2], k.shape[2], positions=positions)
    notes.extend([] if surprise is None else [surprise])
    return Explanation(taken, refusals, tuple(notes))


def _of_layout(call: Call, layout: TileLayout, backend: str, plain: bool) -> Explanation:
    """How the engine runs a layout: the backend, and which loop is the outer one."""
    refusals = {name: _refusals(name, call) for name in BACKENDS}
    refusals["sdpa"] = ["a layout is taken by the engine alone"]
    able = [name for name in BACKENDS if not refusals[name]]
    if backend not in ("auto", *BACKENDS):
        raise unknown("backend", backend, ["auto", *BACKENDS])
    if backend not in ("auto", *able):
        raise UnsupportedError(f"backend {backend!r} cannot take this call: " + "; ".join(refusals[backend]))
    default = "triton" if call.q.device.type != "cpu" and "triton" in able else "blocked"
    taken = default if backend == "auto" else backend
    note = order.describe(layout, taken, call.q.shape[1], call.k.shape[1], plain)
    return Explanation(taken, refusals, (note,))


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | str | Tensor | None,
    scale: float | None,
    bias: Bias | Term | None,
    softcap: float | None,
    sink: Tensor | None,
    dropout_p: float,
    positions: Positions | None,
    key_padding: Tensor | None,
    return_lse: bool,
) -> Call:
    """Checks the arguments of a call and reads its mask.

    Returns:
        The call.

    Raises:
        ValueError: For what does not fit, naming the argument.
        TypeError: For wrong types and dtypes.
    """
    checks.attention_inputs(q, k, v)
    checks.options(q, k, scale=scale, softcap=softcap, sink=sink, dropout_p=dropout_p)
    if positions is not None:
        checks.positions(positions, q, k)
    if key_padding is not None:
        checks.key_padding(key_padding, k)
    if sharding.seen(mask):
        raise TypeError("mask: expected a mask, its text, or a bool tensor that every rank holds whole, got a DTensor")
    value = _read(mask) if isinstance(mask, str) else as_mask(mask)
    _check_mask_shape(value, q)
    plain = bias is None and softcap is None and sink is None and not dropout_p
    grads = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    terms = bias.terms if isinstance(bias, Bias) else (bias,) if isinstance(bias, Term) else ()
    given = positions is not None, key_padding is not None
    return Call(q, k, v, value, terms, plain, *given, return_lse, grads, sharding.seen(q, k, v))


_read = constant(parse)  # a compiler keeps the mask that a text names


def _check_mask_shape(mask: Mask, q: Tensor) -> None:
    for size, want, what in ((mask.shape[0], q.shape[0], "batch"), (mask.shape[1], q.shape[1], "heads")):
        if size not in (1, want):
            raise ValueError(f"mask: its {what} size is {size}; q has {want} (shape {tuple(q.shape)})")


def choose(call: Call, backend: str) -> str:
    """The backend that runs a call.

    Raises:
        ValueError: For an unknown name, with the nearest.
        UnsupportedError: When a named backend refuses, with its reasons.
    """
    if backend == "auto":
        if not _refusals("sdpa", call) and not _slower(call):
            return "sdpa"
        return "triton" if call.q.device.type != "cpu" and not _refusals("triton", call) else "blocked"
    if backend not in BACKENDS:
        raise unknown("backend", backend, ["auto", *BACKENDS])
    reasons = _refusals(backend, call)
    if reasons:
        raise UnsupportedError(f"backend {backend!r} cannot take this call: " + "; ".join(reasons))
    return backend


def _refusals(backend: str, call: Call) -> list[str]:
    """Why a backend cannot give the right answer; empty when it can."""
    if backend == "triton":
        return launch.refuse(call.q.device.type) + launch.refuse_call(call.q, call.v, call.terms)
    if backend != "sdpa":
        return []
    reasons = []
    square_causal = isinstance(call.mask, Causal) and call.q.shape[2] == call.k.shape[2]
    if not (call.dense or square_causal):
        why = (
            "its causal mask is upper-left, so Nq must equal Nk"
            if isinstance(call.mask, Causal)
            else ("it takes a mask only as a tensor of Nq x Nk")
        )
        reasons.append(f"mask {call.mask.text!r}: {why}")
    if not call.plain:
        reasons.append("bias, softcap, sink and dropout here have meanings that it does not share")
    if call.positions:
        reasons.append("it knows no logical positions")
    if call.key_padding:
        reasons.append("padded keys that hold NaN would reach its output")
    if 0 in call.q.shape or 0 in call.k.shape or 0 in call.v.shape:
        reasons.append("a dimension is empty")
    if call.sharded:
        reasons.append("DTensors: its operators have rules of their own for shards, and on a CPU none")
    if call.return_lse and call.needs_grad:
        reasons.append("its lse is not differentiable")
    if call.return_lse and (call.q.device.type != "cpu" or call.q.shape[3] != call.v.shape[3]):
        reasons.append("it returns an lse only on a CPU and for Dv = D")
    return reasons


def _slower(call: Call) -> list[str]:
    """Why ``auto`` prefers the engine although SDPA could run."""
    pairs = call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.k.shape[2]
    if call.q.device.type == "cpu" and call.q.shape[3] != call.v.shape[3] and pairs >= _PROBE_PAIRS:
        return ["its fused kernel wants values as wide as keys; without it all scores are kept"]
    if call.q.device.type != "cpu" or pairs < _PROBE_PAIRS or call.q.dtype not in (torch.float32, torch.bfloat16):
        return []
    if torch.compiler.is_compiling() or products.fused_wins(call.q.dtype):
        return []  # a probe cannot run inside a trace
    return ["products and passes were measured to be faster on this processor"]


_PROBE_PAIRS = 1 << 22


# --- the short way -------------------------------------------------------------------------------------------------

Runner = Callable[[Tensor, Tensor, Tensor, float | None], "Tensor | Attn"]
runners: dict[tuple[object, ...], Runner] = {}


def key_of(q: Tensor, k: Tensor, v: Tensor, mask: object, return_lse: bool, backend: str) -> tuple[object, ...]:
    """What decides the backend of a call without options."""
    grads = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    types = q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, q.__class__, k.__class__, v.__class__
    return q.shape, k.shape, v.shape, types, grads, return_lse, mask, backend


def remember(key: tuple[object, ...], call: Call, chosen: str) -> Runner | None:
    """Keeps how to run calls like this one, so that the next costs a lookup; None where that would hoard memory."""
    if sum(t.nbytes for t in call.mask.data) > _SMALL_MASK:
        return None
    run = sdpa_runner(call) if chosen == "sdpa" else engine_runner(call, chosen)
    if len(runners) > 1024:
        runners.clear()
    runners[key] = run
    return run


_SMALL_MASK = 1 << 16


def engine_runner(call: Call, backend: str) -> Runner:
    """The shortest way to run a call without options on the engine."""
    text, data, default = call.mask.text, list(call.mask.data), call.q.shape[3] ** -0.5
    return_lse, grads = call.return_lse, call.needs_grad

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | Attn:
        factor = default if scale is None else float(scale)
        out, lse = call_plain(q, k, v, text, data, factor, backend, grads)
        return Attn(out, lse) if return_lse else out

    return run


def sdpa_runner(call: Call) -> Runner:
    """The shortest way to run a call that SDPA does not refuse."""
    causal = not call.dense
    groups = call.q.shape[1] // call.k.shape[1]
    if call.return_lse:
        return lambda q, k, v, scale: Attn(
            *flash.whole(q, k, v, causal, q.shape[3] ** -0.5 if scale is None else float(scale))
        )
    if call.q.shape[2] == 1 and groups > 1:
        return _rows_of_a_group
    if call.needs_grad and call.q.dtype.itemsize > 2:
        return _folded(causal, groups > 1)
    if groups > 1:
        return lambda q, k, v, scale: scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=True
        )
    return _causal if causal else _dense


def _folded(causal: bool, grouped: bool) -> Runner:
    """With gradients: the scale carried by the queries, for the sake of the fused kernel's rounding."""

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        q, rest = flash.folded(q, q.shape[3] ** -0.5 if scale is None else float(scale))
        return scaled_dot_product_attention(q, k, v, None, 0.0, causal, scale=rest, enable_gqa=grouped)

    return run


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=scale)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, scale=scale)


def _rows_of_a_group(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """One query token: the query heads of a key head become the rows of one product."""
    b, h, _, d = q.shape
    stacked = q.reshape(b, k.shape[1], h // k.shape[1], d)
    return scaled_dot_product_attention(stacked, k, v, scale=scale).reshape(b, h, 1, v.shape[3])
