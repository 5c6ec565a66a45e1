"""Softmax attention as a sum of linear recurrences: its Taylor orders, and what may stand for its denominator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.attention import attention
from manyheads.common import checks
from manyheads.common.errors import UnsupportedError, unknown
from manyheads.common.features import FeatureMap, Taylor, wide
from manyheads.common.scopes import refuse_inside
from manyheads.engine import scan as engine
from manyheads.engine.scan import State
from manyheads.mask import Mask
from manyheads.mechanism import exact
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Spec, drawn, qkv

from . import kernelized as linear

DENOMINATORS = ("softmax", "sum", "none", "l2", "rms", "layer", "length")
FORMS = ("auto", "parallel", "recurrent")
Maps = tuple[FeatureMap, FeatureMap]
_MOST = 1 << 16  # features of a recurrence: a state of 16 MiB a head at 64 channels


@dataclass(frozen=True)
class Expansion:
    r"""Which part of softmax attention to compute.

    Args:
        orders: Orders n of the weights $\sum_n x^n / n!$, in any combination; None for all, the exponential itself.
        denominator: What divides: ``"softmax"`` the sum of exponentials, whatever the orders; ``"sum"`` the sum of
            the weights, which even highest orders keep positive; ``"length"`` the number of visible keys; ``"none"``
            nothing; or a norm of the sum of values: ``"l2"`` its length, ``"rms"`` its root mean square, ``"layer"``
            that after subtracting its mean.
        form: ``"parallel"`` for all pairs; ``"recurrent"`` for a state of symmetric powers, linear in the number of
            tokens; ``"auto"`` for the recurrence where it is cheaper or a state is asked for.

    Raises:
        ValueError: For orders below 0, named twice or none; an unknown denominator or form; or a recurrence of what
            has none: the exponential and the softmax denominator take infinitely many orders.

    Example:
        >>> Expansion((0, 1), "l2").width(4)
        5
    """

    orders: tuple[int, ...] | None = (0, 1, 2)
    denominator: Literal["softmax", "sum", "none", "l2", "rms", "layer", "length"] = "softmax"
    form: Literal["auto", "parallel", "recurrent"] = "auto"

    def __post_init__(self) -> None:
        if self.denominator not in DENOMINATORS:
            raise unknown("denominator", self.denominator, DENOMINATORS)
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        if self.orders is not None:
            Taylor(self.orders)  # which knows what orders may be
        if self.form == "recurrent" and not self.finite:
            raise ValueError(
                "form: 'recurrent' takes given orders and a denominator other than 'softmax'; "
                f"got orders={self.orders}, denominator={self.denominator!r}"
            )

    @property
    def finite(self) -> bool:
        """Whether a state of fixed size can hold it."""
        return self.orders is not None and self.denominator != "softmax"

    def width(self, channels: int) -> int:
        """Features of the recurrence for so many channels.

        Raises:
            ValueError: All orders have no width.
        """
        if self.orders is None:
            raise ValueError("orders: all orders of the exponential take infinitely many features")
        return Taylor(self.orders).width(channels)


class TaylorState(NamedTuple):
    """What the recurrence remembers.

    Attributes:
        memory: Sums of symmetric powers of keys times values; with ``"sum"``, the last column is the denominator.
        tokens: The number of tokens so far, with ``"length"``; else None.
    """

    memory: State | None
    tokens: State | None = None


def taylor_attention(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    config: Expansion = Expansion(),
    gate: Float[Tensor, "B H Nq"] | None = None,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    state: TaylorState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B H Nq Dv"] | tuple[Float[Tensor, "B H Nq Dv"], TaylorState]:
    r"""Attention with some orders of the exponential, over a denominator of choice: to see what each part is for.

    $$o_t = \frac{g_t}{G_t} \sum_n \frac{1}{n!} \bigl(q_t^{\otimes n}\bigr)^\top H^{(n)}_t, \qquad
    H^{(n)}_t = \sum_{s \le t} k_s^{\otimes n} v_s^\top$$

    with q k multiplied by ``scale``. Order 0 is the running sum of values, order 1 linear attention, all orders over
    ``"softmax"`` softmax attention. Each order is a linear recurrence; equal entries of its tensor powers are merged,
    so its state has $\binom{D+n-1}{n}$ rows. The exponential itself runs on the exact engine: norms do not see by how
    much a softmax has divided.

    Args:
        q: (B, H, Nq, D), any floating dtype.
        k: (B, Hkv, Nk, D); H is a multiple of Hkv.
        v: (B, Hkv, Nk, Dv).
        config: Orders, denominator and form.
        gate: Multiplies the result (B, H, Nq), such as the sigmoid of a projection.
        mask: None or ``"full"`` for every key, ``"causal"``, ``Document(lengths)``, ``Document(lengths) & Causal()``.
        scale: Multiplies the dot products; default D ** -0.5.
        key_padding: bool (B, Nk), True for real keys; the others may hold anything.
        state: What came before the first token of a causal recurrence.
        return_state: Also return the state after a causal recurrence.
        backend: ``"auto"``, ``"blocked"`` or ``"reference"``.

    Returns:
        (B, H, Nq, Dv) in the dtype of ``v``; with ``return_state`` also the :class:`TaylorState`. A query without
        keys gives 0.

    Raises:
        ValueError: For shapes that do not fit, a state without a causal recurrence, or too many features for one.
        UnsupportedError: For causal queries and keys of different lengths, or a mask other than those above.

    Conventions:
        Weights and sums are float32 for inputs of half precision. A gate goes after the denominator: before a norm it
        would cancel.

    Source:
        Mongaras and Larson, On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective,
        arXiv 2507.23632.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
        >>> many = taylor_attention(q, k, v, config=Expansion(tuple(range(25))), mask="causal")
        >>> torch.allclose(many, attention(q, k, v, mask="causal"), atol=1e-5)
        True
    """
    refuse_inside("taylor_attention")
    checks.attention_inputs(q, k, v)
    causal, lens = order(SPEC, mask, q, default="full")
    SPEC.check(q, k, v, causal=causal)
    if gate is not None and tuple(gate.shape) != tuple(q.shape[:3]):
        raise ValueError(f"gate: expected shape (B, H, Nq) = {tuple(q.shape[:3])}, got {tuple(gate.shape)}")
    if key_padding is not None:
        checks.key_padding(key_padding, k)
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    stateful = state is not None or return_state
    if stateful and not causal:
        raise ValueError("state: only a causal call has one; pass mask='causal'")
    if not _recurrent(config, q, stateful):
        if backend != "auto":
            engine.refuse(backend, q.device.type)  # which knows the names
        total = (_exponential if config.orders is None else _pairs)(q, k, v, config, mask, causal, scale, key_padding)
        return _gated(total, gate).to(v.dtype)

    def sums(q: Tensor, k: Tensor, v: Tensor, maps: Maps, start: State | None) -> tuple[Tensor, State | None]:
        found = linear.attend(
            q, k, v, maps, causal=causal, lens=lens, normalise=False, key_padding=key_padding,
            state=start, return_state=stateful, backend=backend,
        )  # fmt: skip
        return found if isinstance(found, tuple) else (found, None)

    before = TaylorState(None) if state is None else state
    total, memory = sums(q, k, _values(v, config), linear.scaled(Taylor(config.orders or ()), scale), before.memory)
    count = None
    if config.denominator == "length":
        rows, cols = (t.new_ones(t.shape[0], 1, t.shape[2], 1, dtype=torch.float32) for t in (q, k))
        seen, count = sums(rows, cols, cols, linear.scaled(Taylor((1,)), None), before.tokens)
        total = linear.over(total, seen)
    out = _gated(_divided(total, config), gate).to(v.dtype)
    return (out, TaylorState(memory, count)) if stateful else out


def step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B Hkv D"],
    v: Float[Tensor, "B Hkv Dv"],
    state: TaylorState | None = None,
    *,
    config: Expansion,
    gate: Float[Tensor, "B H"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H Dv"], TaylorState]:
    """One token of the causal recurrence of :func:`taylor_attention`.

    Args:
        q, k, v: Of one token: (B, H, D), (B, Hkv, D), (B, Hkv, Dv).
        state: What came before; nothing by default.
        config: Orders and denominator, which must have a recurrence.
        gate: (B, H).
        scale: As for :func:`taylor_attention`.

    Returns:
        (B, H, Dv) in the dtype of ``v``, and the new state.

    Raises:
        ValueError: For shapes that do not fit or too many features.
        UnsupportedError: For an expansion without a recurrence.

    Example:
        >>> one = torch.ones(1, 1, 2)
        >>> _, state = step(one, one, one, config=Expansion((0, 1), "sum"))
        >>> step(one, one, 3 * one, state, config=Expansion((0, 1), "sum"))[0]
        tensor([[[2., 2.]]])
    """
    _recurrent(config, q[:, :, None], True)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    features = Taylor(config.orders or ())
    start = None if state is None else state.memory
    total, memory = linear.step(
        q, k, _values(v, config), start, features=features, scale=scale, normalise=False
    )
    count = None
    if config.denominator == "length":
        one = q.new_ones(q.shape[0], 1, 1, dtype=torch.float32)
        seen, count = engine.step(one, one, one, None if state is None else state.tokens)
        total = linear.over(total, seen)
    return _gated(_divided(total, config), gate).to(v.dtype), TaylorState(memory, count)


def weights(scores: Float[Tensor, "*shape"], orders: tuple[int, ...] | None) -> Float[Tensor, "*shape"]:
    r"""The chosen orders of the exponential of scores, $\sum_n x^n / n!$; all of them for None.

    Args:
        scores: Any shape.
        orders: The orders.

    Returns:
        Same shape.

    Example:
        >>> weights(torch.tensor([2.0]), (0, 1, 2)), weights(torch.tensor([0.0]), None)
        (tensor([5.]), tensor([1.]))
    """
    if orders is None:
        return scores.exp()
    total, power = torch.zeros_like(scores), torch.ones_like(scores)
    for n in range(max(orders) + 1):
        power = power * scores / n if n else power
        total = total + power if n in orders else total
    return total


def reference(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    config: Expansion = Expansion(),
    gate: Float[Tensor, "B H Nq"] | None = None,
    mask: Mask | str | None = None,
    scale: float | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> Float[Tensor, "B H Nq Dv"]:
    """Every pair at once, from the definition."""
    if key_padding is not None:
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = wide(q) @ wide(k).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    seen = _seen(q, k, mask, key_padding)
    weight = scores.exp() if config.orders is None else sum(scores**n / float(math.factorial(n)) for n in config.orders)
    weight = torch.as_tensor(weight).masked_fill(~seen, 0.0)
    out = weight @ wide(v)
    if config.denominator in ("sum", "softmax"):
        weight = scores.exp().masked_fill(~seen, 0.0) if config.denominator == "softmax" else weight
        out = linear.over(out, weight.sum(-1, keepdim=True))
    elif config.denominator == "length":
        out = linear.over(out, seen.sum(-1, keepdim=True).to(out.dtype))
    elif config.denominator != "none":
        out = out - out.mean(-1, keepdim=True) if config.denominator == "layer" else out
        square = out.square().sum(-1, keepdim=True) / (1 if config.denominator == "l2" else out.shape[-1])
        out = linear.over(out, square.masked_fill(square == 0, 1.0).sqrt())
    return (out if gate is None else out * gate[..., None].to(out.dtype)).to(v.dtype)


def _recurrent(config: Expansion, q: Tensor, stateful: bool) -> bool:
    """Whether to run the recurrence.

    Raises:
        UnsupportedError: For a state of what has none.
        ValueError: For more features than a state should have.
    """
    if stateful and (not config.finite or config.form == "parallel"):
        raise UnsupportedError(
            "state: needs given orders, a denominator other than 'softmax' and a form other than 'parallel'; "
            f"got {config}"
        )
    if not config.finite or config.form == "parallel":
        return False
    features = config.width(q.shape[3])
    if stateful or config.form == "recurrent":
        if features > _MOST:
            raise ValueError(f"orders: {config.orders} of D={q.shape[3]} channels take {features} features > {_MOST}")
        return True
    return q.shape[2] > 2 * features


def _exponential(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Expansion,
    mask: Mask | str | Tensor | None,
    causal: bool,
    scale: float,
    key_padding: Tensor | None,
) -> Tensor:
    """All orders: softmax attention, multiplied by its own denominator where that matters."""
    if config.denominator not in ("none", "length"):
        out = attention(q, k, v, mask=mask, scale=scale, key_padding=key_padding)
        out = out if config.denominator in ("softmax", "sum") else _divided(wide(out), config)
    else:
        found = attention(q, k, v, mask=mask, scale=scale, key_padding=key_padding, return_lse=True)
        out = wide(found.out) * found.lse.exp()[..., None]
        if config.denominator == "length":
            out = linear.over(out, _seen(q, k, mask, key_padding).sum(-1, keepdim=True).to(out.dtype))
    return _hidden(out, causal, key_padding)


@linear.precisely
def _pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Expansion,
    mask: Mask | str | Tensor | None,
    causal: bool,
    scale: float,
    key_padding: Tensor | None,
) -> Tensor:
    """Given orders by all pairs."""
    group = q.shape[1] // k.shape[1]
    k, v = (wide(t).repeat_interleave(group, 1) for t in (k, v))
    scores = wide(q) @ k.mT * scale
    seen = _seen(q, k, mask, key_padding)
    weight = weights(scores, config.orders)
    if config.denominator == "softmax":  # both sides divided by the largest exponential, which may overflow
        scores = scores.masked_fill(~seen, -torch.inf)
        top = scores.detach().amax(-1, keepdim=True).clamp(min=0.0) if k.shape[2] else scores.new_zeros(())
        weight, total = weight * (-top).exp(), (scores - top).exp().sum(-1, keepdim=True)
    weight = weight.masked_fill(~seen, 0.0)
    out = weight @ v
    if config.denominator == "softmax":
        out = linear.over(out, total)
    elif config.denominator == "sum":
        out = linear.over(out, weight.sum(-1, keepdim=True))
    elif config.denominator == "length":
        out = linear.over(out, seen.sum(-1, keepdim=True).to(out.dtype))
    else:
        out = _divided(out, config)
    return _hidden(out, causal, key_padding)


def _seen(q: Tensor, k: Tensor, mask: Mask | str | Tensor | None, key_padding: Tensor | None) -> Tensor:
    """Pairs that count, ``(B|1, 1, Nq, Nk)``; a padded token of a causal call sees nothing, as in a recurrence."""
    assert not isinstance(mask, Tensor)
    seen = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    causal = False
    if mask is not None:
        seen, causal = visible(mask, q), order(SPEC, mask, q)[0]
    if key_padding is not None:
        seen = seen & key_padding[:, None, None, :]
        seen = seen & key_padding[:, None, :, None] if causal else seen
    return seen


def _hidden(out: Tensor, causal: bool, key_padding: Tensor | None) -> Tensor:
    """Results of padded tokens of a causal call as 0."""
    return out if key_padding is None or not causal else out.masked_fill(~key_padding[:, None, :, None], 0.0)


def _values(v: Tensor, config: Expansion) -> Tensor:
    """Values, with a column of ones where the sum of weights divides, in the dtype of sums."""
    v = wide(v)
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1) if config.denominator == "sum" else v


def _divided(total: Tensor, config: Expansion) -> Tensor:
    """Sums over what they hold themselves: their last column, or a norm of them."""
    if config.denominator == "sum":
        return linear.over(total[..., :-1], total[..., -1:])
    if config.denominator == "layer":
        total = total - total.mean(-1, keepdim=True)
    if config.denominator in ("l2", "rms", "layer"):
        length = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
        return linear.over(total, length if config.denominator == "l2" else length * total.shape[-1] ** -0.5)
    return total


def _gated(out: Tensor, gate: Tensor | None) -> Tensor:
    return out if gate is None else out * gate[..., None].to(out.dtype)


def flops(case: Case) -> int:
    """Counts the operations of the form that runs: products of features with the state, or of all pairs.

    Args:
        case: The call.

    Returns:
        ``2 * (rows of queries and keys) * M * Dv``, or ``2 * pairs * (D + Dv)``.
    """
    q, k, v, options = case
    config: Expansion = options.get("config", Expansion())
    if not _recurrent(config, q, False):
        return exact.flops(Case(q, k, v, {"mask": options.get("mask")}))
    rows = q.numel() // q.shape[3] + k.numel() // k.shape[3]
    return 2 * rows * config.width(q.shape[3]) * v.shape[3]


SPEC = Spec(
    "softmax-as-rnn",
    fn=taylor_attention,
    step=step,
    reference=reference,
    paper="Mongaras and Larson, On the Expressiveness of Softmax Attention, arXiv 2507.23632",
    inputs=qkv(
        mask=lambda size: "causal" if size.causal else None,
        config=Expansion((0, 1, 2), "sum", "recurrent"),
        gate=drawn("BHQ", torch.sigmoid),
    ),
    gates={"gate": "BHQ"},
    backends=("reference", "blocked"),
    supports=linear.SPEC.supports,
    invariances=linear.SPEC.invariances,
    axes={"carrier": "all or earlier tokens", "kernel": "powers", "estimator": "any norm", "execution": "scan, pairs"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_taylor::test_many_orders_approach_softmax_within_the_remainder",
        2: "test_taylor::test_the_recurrence_equals_the_parallel_form",
        3: "test_taylor::test_order_one_alone_is_linear_attention",
        4: "test_taylor::test_even_orders_are_never_negative",
        5: "test_taylor::test_merged_tensor_powers_give_powers_of_the_product",
    },
)
