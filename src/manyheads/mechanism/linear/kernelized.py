"""Linear attention over any feature map: a scan when causal, two sums when not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.common import checks
from manyheads.common.features import FeatureMap, Pointwise, pair, wide
from manyheads.common.scopes import refuse_inside
from manyheads.engine import scan as engine
from manyheads.engine.scan import State
from manyheads.mask import Mask
from manyheads.mechanism import exact
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Spec, qkv

Features = FeatureMap | tuple[FeatureMap, FeatureMap]
Fn = TypeVar("Fn", bound=Callable[..., Any])


def precisely(fn: Fn) -> Fn:
    """Turns autocast off inside a function whose first argument is a tensor: features need float32.

    Args:
        fn: The function.

    Returns:
        A function of the same arguments.
    """

    @functools.wraps(fn)
    def run(q: Tensor, *args: Any, **options: Any) -> Any:
        if not torch.is_autocast_enabled(q.device.type):
            return fn(q, *args, **options)
        with torch.autocast(q.device.type, enabled=False):
            return fn(q, *args, **options)

    return run  # type: ignore[return-value]


_ROWS = 16_384  # features made at once outside of recording: large products, and memory that does not grow with N
_ELU = Pointwise("elu+1")


def linear_attention(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    features: Features = _ELU,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    normalise: bool = True,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    state: State | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B H Nq Dv"] | tuple[Float[Tensor, "B H Nq Dv"], State]:
    r"""Averages values with products of features for weights, in time linear in the number of tokens.

    $$o_i = \frac{\sum_j \phi_q(q_i) \cdot \phi_k(k_j)\; v_j}{\sum_j \phi_q(q_i) \cdot \phi_k(k_j)}$$

    Args:
        q: (B, H, Nq, D), any floating dtype.
        k: (B, Hkv, Nk, D); H is a multiple of Hkv.
        v: (B, Hkv, Nk, Dv).
        features: The map of queries and keys, or a pair of them; see :mod:`manyheads.common.features`.
        mask: None or ``"full"`` for every key, ``"causal"``, ``Document(lengths)``, ``Document(lengths) & Causal()``.
        scale: Multiplies the dot products that features stand for: each side takes the square root. 1 by default.
        normalise: Whether to divide by the sum of the weights, which takes positive features.
        key_padding: bool (B, Nk), True for real keys; the others may hold anything.
        state: What came before the first token of a causal call.
        return_state: Also return the state after a causal call.
        backend: ``"auto"``, ``"blocked"`` or ``"reference"``, of the scan; sums know one way.

    Returns:
        (B, H, Nq, Dv) in the dtype of ``v``; with ``return_state`` also the :class:`State`. A query without keys
        gives 0.

    Raises:
        ValueError: For shapes that do not fit, a state of a call that is not causal, or features of any sign whose
            sum should divide.
        TypeError: For wrong dtypes, or what is no feature map.
        UnsupportedError: For causal queries and keys of different lengths, or a mask other than those above.

    Conventions:
        Features and sums are float32 for inputs of half precision, and under autocast. A padded token's output is 0
        when causal.

    Source:
        Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236.

    Example:
        >>> q = k = torch.zeros(1, 1, 3, 2)
        >>> v = torch.tensor([0.0, 3.0, 6.0]).view(1, 1, 3, 1)
        >>> linear_attention(q, k, v).flatten().tolist(), linear_attention(q, k, v, mask="causal").flatten().tolist()
        ([3.0, 3.0, 3.0], [0.0, 1.5, 3.0])
    """
    checks.attention_inputs(q, k, v)
    causal, lens = order(SPEC, mask, q, default="full")
    SPEC.check(q, k, v, causal=causal)
    return attend(
        q,
        k,
        v,
        scaled(features, scale),
        causal=causal,
        lens=lens,
        normalise=normalise,
        key_padding=key_padding,
        state=state,
        return_state=return_state,
        backend=backend,
    )


@precisely
def step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B Hkv D"],
    v: Float[Tensor, "B Hkv Dv"],
    state: State | None = None,
    *,
    features: Features = _ELU,
    scale: float | None = None,
    normalise: bool = True,
) -> tuple[Float[Tensor, "B H Dv"], State]:
    """One token of the causal :func:`linear_attention`.

    Args:
        q, k, v: Of one token: (B, H, D), (B, Hkv, D), (B, Hkv, Dv).
        state: What came before; nothing by default.
        features, scale, normalise: As for :func:`linear_attention`.

    Returns:
        (B, H, Dv) in the dtype of ``v``, and the new state.

    Raises:
        ValueError: For shapes that do not fit.

    Example:
        >>> one = torch.ones(1, 1, 2)
        >>> _, state = step(one, one, one)
        >>> step(one, one, 3 * one, state)[0]
        tensor([[[2., 2.]]])
    """
    maps = scaled(features, scale)
    (read, read_log), (write, gate) = maps[0].scaled(q), maps[1].scaled(k)
    gate = _of_heads(gate, q.shape[1])
    out, state = engine.step(read, write, wide(v), state, gate=gate, normalise=_kind(normalise, maps))
    if read_log is not None and not normalise:
        out = out * read_log.exp()[..., None]
    return out.to(v.dtype), state


def reference(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    features: Features = _ELU,
    mask: Mask | str | None = None,
    scale: float | None = None,
    normalise: bool = True,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> Float[Tensor, "B H Nq Dv"]:
    """Every pair at once: products of features, masked, divided by their sums."""
    maps = scaled(features, scale)
    if key_padding is not None:
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return average(q, v, maps[0](q) @ maps[1](k).mT, mask, key_padding, normalise)


def average(
    q: Tensor,
    v: Tensor,
    weights: Tensor,
    mask: Mask | str | None,
    key_padding: Tensor | None,
    normalise: bool = True,
) -> Tensor:
    """For references: values under weights ``(B, H, Nq, Nk)`` where a mask allows, divided by their sums."""
    seen = weights.new_ones(weights.shape[-2:], dtype=torch.bool) if mask is None else visible(mask, q)
    if key_padding is not None:
        seen = seen & key_padding[:, None, None, :]
        if order(SPEC, mask, q, default="full")[0]:
            seen = seen & key_padding[:, None, :, None]
    weights = weights.masked_fill(~seen, 0.0)
    total = weights.sum(-1, keepdim=True) if normalise else weights.new_ones(())
    nothing = total == 0
    out = weights @ v.to(weights.dtype) / total.masked_fill(nothing, 1.0)
    return out.masked_fill(nothing, 0.0).to(v.dtype)


def scaled(features: Features, scale: float | None) -> tuple[FeatureMap, FeatureMap]:
    """The maps of queries and keys that take the square root of a scale each, queries its sign."""
    maps = pair(features)
    if scale is None:
        return maps
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    root = math.sqrt(abs(scale))
    return maps[0].times(math.copysign(root, scale)), maps[1].times(root)


@precisely
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: tuple[FeatureMap, FeatureMap],
    *,
    causal: bool,
    lens: Tensor | None = None,
    normalise: bool = True,
    key_padding: Tensor | None = None,
    state: State | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """:func:`linear_attention` with its mask read and its scale in the maps.

    Raises:
        ValueError: For a state of a call that is not causal, or features of any sign whose sum should divide.
        UnsupportedError: Inside a parallel context.
    """
    refuse_inside("linear_attention")
    kind = _kind(normalise, maps)
    if key_padding is not None:
        checks.key_padding(key_padding, k)
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    if not causal:
        if state is not None or return_state:
            raise ValueError("state: only a causal call has one; pass mask='causal'")
        if backend != "auto":
            engine.refuse(backend, q.device.type)  # which knows the names
        return _sums(q, k, v, maps, lens, normalise, key_padding).to(v.dtype)
    (read, read_log), (write, gate) = maps[0].scaled(q), maps[1].scaled(k)
    result = engine.scan(
        read,
        write,
        wide(v),
        gate=_of_heads(gate, q.shape[1]),
        normalise=kind,
        state=state,
        lens=lens,
        key_padding=key_padding,
        return_state=return_state,
        backend=backend,
    )
    out, end = result if isinstance(result, tuple) else (result, None)
    if read_log is not None and not normalise:
        out = out * read_log.exp()[..., None]
    return out.to(v.dtype) if end is None else (out.to(v.dtype), end)


def _sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: tuple[FeatureMap, FeatureMap],
    lens: Tensor | None,
    normalise: bool,
    real: Tensor | None,
) -> Tensor:
    """All keys for every query of a sequence or document, in the dtype of sums."""
    if lens is not None:
        return _within(q, k, wide(v), maps, lens, normalise, real)
    if not q.shape[2] * k.shape[2]:
        return wide(v).new_zeros(*q.shape[:3], v.shape[3])
    total, weight, peak = _written(k, v, maps[1], real)
    if peak is not None and not normalise:
        total = total * peak.exp()[..., None, None]
    group = q.shape[1] // k.shape[1]
    whole = total.sum(2, keepdim=True), weight.sum(2, keepdim=True)
    parts = _parts(q, v)
    out = total.new_empty(*q.shape[:3], v.shape[3]) if len(parts) > 1 else None
    for part in parts:
        read, floor, log = maps[0].floored(q[:, :, part])
        lead = read.shape[:3]
        if group > 1:  # query heads of a key head are rows of one product
            read = read.unflatten(1, (-1, group)).flatten(2, 3)
            floor = None if floor is None else floor.unflatten(1, (-1, group)).flatten(2, 3)
        row = read @ total
        if floor is not None:
            row = row + floor[..., None] * whole[0]
        if normalise:
            divisor = (weight.mT @ read.mT).mT
            if floor is not None:
                divisor = divisor + floor[..., None] * whole[1]
            row = over(row, divisor)
        row = row.view(*lead, -1)
        if log is not None and not normalise:
            row = row * log.exp()[..., None]
        if out is None:
            return row
        out[:, :, part] = row
    assert out is not None
    return out


def _written(k: Tensor, v: Tensor, fmap: FeatureMap, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over keys of features times values ``(B, Hkv, M, Dv)`` and of features ``(B, Hkv, M, 1)``.

    Both are divided by the exponential of the third result ``(B, Hkv)``, unless that is None.
    """
    total: Tensor | None = None
    weight: Tensor | None = None
    peak: Tensor | None = None
    for part in _parts(k, v):
        write, floor, log = fmap.floored(k[:, :, part])
        values = wide(v[:, :, part])
        share = values.new_ones(*values.shape[:-1], 1)
        if real is not None:
            share = share.masked_fill(~real[:, None, part, None], 0.0)
        if log is not None:
            if real is not None:
                log = log.masked_fill(~real[:, None, part], -torch.inf)
            new = log.amax(-1) if peak is None else torch.maximum(log.amax(-1), peak)
            shift = new.masked_fill(new == -torch.inf, 0.0)
            share = (log - shift[..., None]).exp()[..., None]
            if total is not None and weight is not None and peak is not None:
                less = (peak - shift).exp()[..., None, None]
                total, weight = total * less, weight * less
            peak = new
        if log is not None or real is not None:
            values = values * share
        now, seen = write.mT @ values, (share.mT @ write).mT  # a row: the same sum in a fraction of the time
        if floor is not None:
            now = now + (floor[..., None] * values).sum(2, keepdim=True)
            seen = seen + (floor[..., None] * share).sum(2, keepdim=True)
        total, weight = (now, seen) if total is None or weight is None else (total + now, weight + seen)
    assert total is not None and weight is not None
    return total, weight, peak


def _within(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    maps: tuple[FeatureMap, FeatureMap],
    lens: Tensor,
    normalise: bool,
    real: Tensor | None,
) -> Tensor:
    """The same inside packed documents: what comes before a token, what comes after it, and itself but once."""
    (read, read_log), (write, log) = maps[0].scaled(q), maps[1].scaled(k)
    if normalise:
        values = torch.cat([values, values.new_ones(*values.shape[:-1], 1)], -1)
    if real is not None:
        values = values.masked_fill(~real[:, None, :, None], 0.0)
    if log is not None:
        if real is not None:
            log = log.masked_fill(~real[:, None], -torch.inf)
        shift = _peaks(log, lens)
        values = values * (log - shift).exp()[..., None]
        if not normalise:
            values = values * shift.exp()[..., None]
    if read_log is not None and not normalise:
        read = read * read_log.exp()[..., None]
    before = engine.scan(read, write, values, lens=lens)
    after = engine.scan(read, write, values, lens=lens, reverse=True)
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    group = q.shape[1] // k.shape[1]
    write, values = (t.repeat_interleave(group, 1) if group > 1 else t for t in (write, values))
    total = before + after - (read * write).sum(-1, keepdim=True) * values
    return over(total[..., :-1], total[..., -1:]) if normalise else total


def _peaks(log: Tensor, lens: Tensor) -> Tensor:
    """The largest logarithm of each token's document, ``(B, Hkv, N)``, finite."""
    batch, heads, tokens = log.shape
    ends = torch.atleast_2d(lens).to(log.device).cumsum(-1)
    at = torch.arange(tokens, device=log.device).expand(len(ends), -1).contiguous()
    own = torch.searchsorted(ends, at, right=True)[:, None].expand(batch, heads, tokens)
    peaks = log.new_full((batch, heads, ends.shape[1]), -torch.inf).scatter_reduce(2, own, log, "amax")
    return peaks.masked_fill(peaks == -torch.inf, 0.0).gather(2, own)


def over(total: Tensor, weight: Tensor) -> Tensor:
    """A quotient that is 0 where the divisor is."""
    nothing = weight == 0
    if not (total.requires_grad or weight.requires_grad or torch.compiler.is_compiling()):
        return (total / weight).masked_fill_(nothing, 0.0)
    return (total / weight.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _parts(t: Tensor, other: Tensor) -> list[slice]:
    """Tokens to make features of at once: all where the call is recorded or traced, else few."""
    tokens = t.shape[2]
    recorded = torch.is_grad_enabled() and (t.requires_grad or other.requires_grad)
    if recorded or torch.compiler.is_compiling() or not tokens:
        return [slice(0, tokens)]
    size = max(_ROWS // max(t.shape[0] * t.shape[1], 1), 64)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _of_heads(gate: Tensor | None, heads: int) -> Tensor | None:
    """A logarithm of key heads for every query head."""
    return gate if gate is None or gate.shape[1] == heads else gate.repeat_interleave(heads // gate.shape[1], 1)


def _kind(normalise: bool, maps: tuple[FeatureMap, FeatureMap]) -> bool | str:
    """What the engine calls the denominator."""
    if normalise and not all(m.positive for m in maps):
        names = " and ".join(type(m).__name__ for m in maps)
        raise ValueError(f"normalise: the sum of weights divides only for positive features, got {names}")
    return "sum" if normalise else False


def flops(case: Case) -> int:
    """Counts the operations of both products with the features of this map, one feature per channel.

    Args:
        case: The call.

    Returns:
        ``2 * B * (H * Nq + Hkv * Nk) * D * (Dv + 1)``.
    """
    return 2 * (case.q.numel() + case.k.numel()) * (case.v.shape[3] + 1)


SPEC = Spec(
    "linear-attention",
    fn=linear_attention,
    step=step,
    reference=reference,
    paper="Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236",
    inputs=qkv(mask=lambda size: "causal" if size.causal else None, scale=0.25),
    backends=("reference", "blocked"),
    supports={
        "noncausal_self",
        "causal_self",
        "noncausal_cross",
        "gqa",
        "value_width",
        "key_padding",
        "backward",
        "decode",
    },  # fmt: skip
    invariances=("packed", "padding", "batch", "heads", "split"),
    axes={"carrier": "all or earlier tokens", "kernel": "features", "estimator": "average", "execution": "scan, sums"},
    flops=flops,
    bytes=exact.traffic,
)
