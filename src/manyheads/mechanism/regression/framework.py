"""Test-time regression: a layer is a choice of weights, of a class of functions, and of an optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.common import checks
from manyheads.common.errors import UnsupportedError, unknown
from manyheads.engine import scan as engine
from manyheads.engine.scan.problem import starts_of
from manyheads.mask import Mask
from manyheads.mechanism import exact
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Spec, drawn, qkv

from .least_squares import least_squares, traffic
from .least_squares import reference as exact_reference
from .least_squares import step as exact_step
from .momentum import momentum_delta
from .momentum import reference as momentum_reference
from .momentum import step as momentum_step
from .polynomial import local_polynomial
from .polynomial import reference as local_reference

Kind = Literal["scan", "momentum", "exact", "kernel"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, as a way of fitting the values to the keys seen so far.

    Attributes:
        name: What callers write.
        weights: How much each pair counts: ``"uniform"``, ``"decay"`` or ``"kernel"`` (by distance to the query).
        functions: What is fitted: ``"linear"`` (in features of the keys), or around every query ``"constant"``,
            ``"local linear"``, ``"local quadratic"``.
        optimiser: ``"one step"`` of gradient descent from zero, ``"exact"``, or a step per token: ``"sgd"``,
            ``"implicit"``, ``"momentum"``.
        known_as: Names in the literature.
        formula: Its update or its estimate.
        needs: Gates that a call must give.
        takes: Gates that a call may give.
        kind: What runs it.
    """

    name: str
    weights: str
    functions: str
    optimiser: str
    known_as: str
    formula: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    kind: Kind = "scan"

    @property
    def recurrent(self) -> bool:
        """Whether a state of fixed size stands for all tokens so far."""
        return self.kind != "kernel"


LAYERS = MappingProxyType(
    {
        layer.name: layer
        for layer in (
            Layer("linear-attention", "uniform", "linear", "one step", "linear attention",
                  "M += b k v'", (), ("beta",)),
            Layer("decayed-linear-attention", "decay", "linear", "one step", "RetNet, GLA, Mamba-2",
                  "M = a M + b k v'", ("decay",), ("beta",)),
            Layer("delta", "uniform", "linear", "sgd", "DeltaNet", "M += b k (v - M'k)'", ("beta",)),
            Layer("gated-delta", "decay", "linear", "sgd", "Gated DeltaNet", "M = a M, then M += b k (v - M'k)'",
                  ("decay", "beta")),
            Layer("longhorn", "uniform", "linear", "implicit", "Longhorn",
                  "M += b / (1 + b |k|^2) k (v - M'k)'", ("beta",)),
            Layer("gated-longhorn", "decay", "linear", "implicit", "Longhorn with a decay",
                  "M = a M, then M += b / (1 + b |k|^2) k (v - M'k)'", ("decay", "beta")),
            Layer("momentum-delta", "uniform", "linear", "momentum", "Titans with a linear memory",
                  "S = h S + b k (v - M'k)', M += S", ("beta", "momentum"), ("decay",), "momentum"),
            Layer("least-squares", "uniform", "linear", "exact", "recursive least squares, mesa layer",
                  "M = (K'K + r I)^-1 K'V", kind="exact"),
            Layer("decayed-least-squares", "decay", "linear", "exact", "recursive least squares with forgetting",
                  "M = (K'GK + r a^t I)^-1 K'GV", ("decay",), kind="exact"),
            Layer("softmax", "kernel", "constant", "exact", "softmax attention, Nadaraya-Watson",
                  "sum_j p_j v_j", kind="kernel"),
            Layer("local-linear", "kernel", "local linear", "exact", "local linear attention",
                  "b of min sum_j p_j |v_j - b - W z_j|^2 + r |W|^2", kind="kernel"),
            Layer("local-quadratic", "kernel", "local quadratic", "exact", "local quadratic attention",
                  "the same on features (z, zz')", kind="kernel"),
        )
    }
)  # fmt: skip
"""Every layer by name; in formulas ``a`` is the decay, ``b`` beta, ``h`` the momentum, ``r`` the ridge."""


def find_layer(weights: str, functions: str = "linear", optimiser: str = "exact") -> Layer:
    """Looks a layer up by the three choices.

    Args:
        weights, functions, optimiser: As in :class:`Layer`.

    Returns:
        The layer.

    Raises:
        ValueError: A choice that no layer makes, or three that no layer makes together.

    Example:
        >>> find_layer("decay", optimiser="sgd").known_as
        'Gated DeltaNet'
    """
    chosen = {"weights": weights, "functions": functions, "optimiser": optimiser}
    for name, value in chosen.items():
        known = {getattr(layer, name) for layer in LAYERS.values()}
        if value not in known:
            raise unknown(f"{name} of a regression", str(value), known)
    for layer in LAYERS.values():
        if (layer.weights, layer.functions, layer.optimiser) == (weights, functions, optimiser):
            return layer
    raise ValueError(f"no layer has weights {weights!r}, functions {functions!r} and optimiser {optimiser!r}")


@dataclass(frozen=True)
class Regression:
    """What a layer fits, and to what.

    Attributes:
        layer: A name out of ``LAYERS``.
        ridge: Of exact fits, above 0.
        features: A map of queries and keys, such as those of :mod:`manyheads.common.features`, on ``(..., D)``.
        shift: Give every value the key of the token before it (zero for the first), so that a query finds what
            followed a key like it.

    Raises:
        ValueError: A layer that does not exist.

    Example:
        >>> Regression("softmx")
        Traceback (most recent call last):
        ...
        ValueError: unknown layer 'softmx': did you mean 'softmax'? known: ...
    """

    layer: str = "least-squares"
    ridge: float = 0.01
    features: Callable[[Tensor], Tensor] | None = None
    shift: bool = False

    def __post_init__(self) -> None:
        if self.layer not in LAYERS:
            raise unknown("layer", str(self.layer), LAYERS)


_EXACT = Regression()


def regress(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    config: Regression = _EXACT,
    decay: Float[Tensor, "*gate"] | None = None,
    beta: Float[Tensor, "B Hq Nk"] | None = None,
    momentum: Float[Tensor, "*gate2"] | None = None,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    state: Any = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | tuple[Float[Tensor, "B Hq Nq Dv"], Any]:
    r"""Fits a function of the keys to the values seen so far, and evaluates it at the query: any layer of ``LAYERS``.

    $$m_t = \arg\min_m \sum_{i \le t} \gamma_i^{(t)} |v_i - m(k_i)|^2, \qquad o_t = m_t(q_t)$$

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        config: Which layer, its ridge, its features, and whether keys are shifted.
        decay: Log decay; shapes are those of the layer: (Hq,) or (B, Hq, N), of exact fits (Hkv,) or (B, Hkv, N).
        beta: Steps (B, Hq, N) in [0, 2]; of one-step layers a factor of the values.
        momentum: (Hq,) or (B, Hq, N) in [0, 1].
        mask: None for causal, ``"causal"``, or ``Document(lens) & Causal()``; of kernel layers any mask.
        scale: Multiplies the queries of linear layers, 1 by default; the scores of kernel layers, D ** -0.5 by default.
        state: What came before, of linear layers.
        return_state: Also return the state after all tokens.
        backend: ``"auto"``, ``"blocked"`` or ``"reference"``, where the layer has a choice.

    Returns:
        (B, Hq, Nq, Dv); with ``return_state`` also the state of the layer.

    Raises:
        ValueError: Gates that are missing or of no use to the layer, and what the layer itself refuses.
        UnsupportedError: Masks, states or backends that the layer does not have.

    Source:
        Wang et al., Test-time regression, arXiv 2501.12352.

    Example:
        >>> k = torch.eye(3).view(1, 1, 3, 3)
        >>> v = torch.tensor([[2.0], [3.0], [5.0]]).view(1, 1, 3, 1)
        >>> after = Regression("delta", shift=True)              # what followed a key like this one?
        >>> asked = k[:, :, [0, 0, 1]]
        >>> regress(asked, k, v, config=after, beta=torch.ones(1, 1, 3)).flatten().tolist()
        [0.0, 3.0, 5.0]
    """
    checks.attention_inputs(q, k, v)
    layer = LAYERS[config.layer]
    _gates(layer, decay=decay, beta=beta, momentum=momentum)
    if config.shift:
        if state is not None or return_state:
            raise UnsupportedError("test-time-regression: a state does not hold the key before it; shift keys yourself")
        k = shifted(k, order(exact.SPEC if layer.kind == "kernel" else SPEC, mask, q)[1])
    if config.features is not None:
        q, k = (config.features(t).to(v.dtype) for t in (q, k))
    more: dict[str, Any] = {"mask": mask, "scale": scale, "state": state, "return_state": return_state}
    if layer.kind in ("momentum", "exact") and backend != "auto":
        raise UnsupportedError(f"test-time-regression: layer {layer.name!r} has no choice of backends")
    if layer.kind == "kernel":
        if state is not None or return_state:
            raise UnsupportedError(f"test-time-regression: layer {layer.name!r} has no state; keep its keys and values")
        return _local(q, k, v, layer, config, mask, scale, backend)
    causal, lens = order(SPEC, mask, q)
    SPEC.check(q, k, v, causal=causal)
    if layer.kind == "exact":
        return least_squares(q, k, v, decay=decay, ridge=config.ridge, **more)
    if layer.kind == "momentum":
        assert beta is not None and momentum is not None
        return momentum_delta(q, k, v, beta=beta, momentum=momentum, decay=decay, **more)
    k, v, beta = _written(layer, k, v, beta, q.shape[1])
    more.pop("mask")
    return engine.scan(q, k, v, decay=decay, beta=beta, lens=lens, backend=backend, **more)


def step(
    q: Float[Tensor, "B Hq D"],
    k: Float[Tensor, "B Hkv D"],
    v: Float[Tensor, "B Hkv Dv"],
    state: Any = None,
    *,
    config: Regression = _EXACT,
    decay: Float[Tensor, "*gate"] | None = None,
    beta: Float[Tensor, "B Hq"] | None = None,
    momentum: Float[Tensor, "*gate2"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B Hq Dv"], Any]:
    """One token of :func:`regress`, in time that does not depend on how many came before: the recurrent form.

    Args:
        q: (B, Hq, D).
        k: (B, Hkv, D).
        v: (B, Hkv, Dv).
        state: What came before; nothing by default.
        config: As for :func:`regress`.
        decay, beta, momentum: Gates without the axis of tokens.
        scale: Multiplies the query.

    Returns:
        Output (B, Hq, Dv) and the new state.

    Raises:
        ValueError: Gates that are missing or of no use to the layer.
        UnsupportedError: Layers without a state, or shifted keys.

    Example:
        >>> one = torch.ones(1, 1, 2)
        >>> out, state = step(one, one, 3 * one, config=Regression("delta"), beta=torch.full((1, 1), 0.5))
        >>> out[0, 0].tolist()
        [3.0, 3.0]
    """
    layer = LAYERS[config.layer]
    _gates(layer, decay=decay, beta=beta, momentum=momentum)
    if not layer.recurrent or config.shift:
        what = "shifted keys" if layer.recurrent else f"layer {layer.name!r}"
        raise UnsupportedError(f"test-time-regression: {what} cannot be stepped")
    if config.features is not None:
        q, k = (config.features(t).to(v.dtype) for t in (q, k))
    if layer.kind == "exact":
        return exact_step(q, k, v, state, decay=decay, ridge=config.ridge, scale=scale)
    if layer.kind == "momentum":
        assert beta is not None and momentum is not None
        return momentum_step(q, k, v, state, beta=beta, momentum=momentum, decay=decay, scale=scale)
    k, v, beta = _written(layer, k[:, :, None], v[:, :, None], None if beta is None else beta[..., None], q.shape[1])
    beta = None if beta is None else beta[..., 0]
    return engine.step(q, k[:, :, 0], v[:, :, 0], state, decay=decay, beta=beta, scale=scale)


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    config: Regression = _EXACT,
    decay: Float[Tensor, "*gate"] | None = None,
    beta: Float[Tensor, "B Hq Nk"] | None = None,
    momentum: Float[Tensor, "*gate2"] | None = None,
    mask: Mask | str | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B Hq Nq Dv"]:
    """The formula of each linear layer token by token; exact, kernel and momentum layers by their own references."""
    layer = LAYERS[config.layer]
    seen = visible(mask, q)
    if config.shift:
        k = torch.cat([torch.zeros_like(k[:, :, :1]), k[:, :, :-1]], 2)
        same = torch.cat([seen[..., :1, 0] < 0, seen.diagonal(-1, -2, -1)], -1)
        k = k * same[..., None]
    if config.features is not None:
        q, k = (config.features(t).to(v.dtype) for t in (q, k))
    if layer.kind == "exact":
        return exact_reference(q, k, v, decay=decay, ridge=config.ridge, mask=mask, scale=scale)
    if layer.kind == "kernel":
        width = _DEGREES[layer.functions], None if scale is None else scale**-0.5
        return local_reference(q, k, v, degree=width[0], bandwidth=width[1], ridge=config.ridge,
                                    mask="causal" if mask is None else mask)  # fmt: skip
    if layer.kind == "momentum":
        assert beta is not None and momentum is not None
        return momentum_reference(q, k, v, beta=beta, momentum=momentum, decay=decay, mask=mask, scale=scale)
    wide, dtype, n = torch.promote_types(v.dtype, torch.float32), v.dtype, q.shape[2]
    q, k, v = (t.to(wide).repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (q, k, v))
    b = torch.ones_like(q[..., 0]) if beta is None else beta.to(wide)
    b = b / (1.0 + b * (k * k).sum(-1)) if layer.optimiser == "implicit" else b
    keep = torch.ones_like(b) if decay is None else decay.to(wide).exp()
    keep = keep[None, :, None].expand_as(b) if keep.dim() == 1 else keep
    M, rows = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for t in range(n):
        fresh = ~seen[:, :, t, t - 1] if t else torch.ones_like(seen[:, :, 0, 0])
        M = (keep[:, :, t, None, None] * M).masked_fill(fresh[..., None, None], 0.0)
        known = 0.0 if layer.optimiser == "one step" else k[:, :, t, None] @ M
        M = M + (b[:, :, t, None] * k[:, :, t])[..., None] * (v[:, :, t, None] - known)
        rows.append((q[:, :, t, None] @ M)[:, :, 0])
    return (torch.stack(rows, 2) * (1.0 if scale is None else scale)).to(dtype)


def shifted(k: Tensor, lens: Tensor | None = None) -> Tensor:
    """Gives every token the key of the one before it in its document, and the first token zero.

    Args:
        k: (B, H, N, D).
        lens: Lengths of packed documents, (n,) or (B, n), or None.

    Returns:
        (B, H, N, D).

    Example:
        >>> shifted(torch.arange(1.0, 4.0).view(1, 1, 3, 1)).flatten().tolist()
        [0.0, 1.0, 2.0]
    """
    before = torch.nn.functional.pad(k, (0, 0, 1, 0))[:, :, :-1]
    if lens is None:
        return before
    return before.masked_fill(starts_of(lens, k.shape[0], k.shape[2], k.device)[:, None, :, None], 0.0)


_DEGREES = {"constant": 0, "local linear": 1, "local quadratic": 2}


def _local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Layer,
    config: Regression,
    mask: Mask | str | Tensor | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: a kernel layer needs a positive scale, an inverse squared bandwidth; got {scale}")
    width = None if scale is None else scale**-0.5
    mask = "causal" if mask is None else mask
    degree = _DEGREES[layer.functions]
    return local_polynomial(
        q, k, v, degree=degree, bandwidth=width, ridge=config.ridge, mask=mask, backend=backend
    )


def _written(
    layer: Layer, k: Tensor, v: Tensor, beta: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys, values and beta of the delta rule that make the scan run a layer."""
    group = heads // k.shape[1]
    if layer.optimiser == "one step":
        if beta is None:
            return k, v, None
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))  # beta is a number of each query head
        return k, v * beta.to(v.dtype)[..., None], None
    assert beta is not None
    if layer.optimiser == "implicit":
        wide = torch.promote_types(k.dtype, torch.float32)
        beta = beta.to(wide)
        beta = beta / (1.0 + beta * k.to(wide).square().sum(-1).repeat_interleave(group, 1))
    return k, v, beta


def _gates(layer: Layer, **given: Tensor | None) -> None:
    for name, gate in given.items():
        if gate is None and name in layer.needs:
            raise ValueError(f"{name}: layer {layer.name!r} needs it ({layer.formula})")
        if gate is not None and name not in (*layer.needs, *layer.takes):
            uses = ", ".join((*layer.needs, *layer.takes)) or "no gates"
            raise ValueError(f"{name}: of no use to layer {layer.name!r}, which takes {uses}")


def flops(case: Case) -> int:
    """Counts the operations of a forward call of a linear layer in chunks.

    Args:
        case: The call.

    Returns:
        Products of a chunked scan over all heads.
    """
    (b, h, n, d), e = case.q.shape, case.v.shape[3]
    c = min(64, n)
    return b * h * n * (4 * c * d + 4 * c * e + 4 * d * e)


SPEC = Spec(
    "test-time-regression",
    fn=regress,
    reference=reference,
    paper="Wang et al., Test-time regression, arXiv 2501.12352",
    inputs=qkv(
        config=lambda size: Regression("gated-longhorn"),
        beta=drawn("BHN", torch.sigmoid),
        decay=drawn("BHN", lambda t: -0.1 * t.square(), salt=1),
        mask=lambda size: "causal" if size.causal else "full",
    ),
    gates={"beta": "BHN", "decay": "BHN"},
    step=step,
    backends=("reference", "blocked"),
    supports={"causal_self", "gqa", "value_width", "backward", "decode"},
    invariances=("packed", "batch", "heads", "split"),
    axes={"carrier": "causal", "kernel": "any", "estimator": "regression", "execution": "scan, chunks, tiles"},
    flops=flops,
    bytes=traffic,
    evidence={
        1: "regression/test_least_squares::test_recursive_and_closed_form_agree",
        2: "test_framework::test_orthonormal_keys_make_least_squares_linear_attention",
        3: "test_framework::test_orthonormal_keys_make_the_delta_rule_recall_exactly",
        4: "test_polynomial::test_degree_zero_is_softmax_attention",
        5: "test_polynomial::test_degree_one_with_a_strong_ridge_is_softmax_attention",
        6: "test_polynomial::test_polynomials_are_reproduced_up_to_the_degree",
        7: "test_framework::test_least_squares_recalls_after_interference_and_linear_attention_does_not",
    },
)
