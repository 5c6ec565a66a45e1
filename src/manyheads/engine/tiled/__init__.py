"""Weighted averages over a tile layout: the engine of dense, local, block-sparse and packed attention."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ...common import checks
from ...common.errors import UnsupportedError, unknown
from ...common.scopes import refuse_inside
from ...mask.base import Mask
from ...mask.deferred import Deferred
from ...mask.layout import TileLayout
from ..result import Attn
from . import bias as biases
from . import launch, lowbit, sharding
from .bias import ALiBi, Bias, Pair, PerBlock, PerKey, Relative, Term
from .op import BACKENDS, op
from .problem import ORDERS, PRECISIONS
from .weight import WEIGHTS, weight_named

__all__ = [
    "ALiBi",
    "Attn",
    "Bias",
    "Pair",
    "PerBlock",
    "PerKey",
    "Relative",
    "Term",
    "WEIGHTS",
    "refuse",
    "tiled",
]

Positions = tuple[Integer[Tensor, "... Nq"], Integer[Tensor, "... Nk"]]
Maskish = Mask | TileLayout | Deferred | str


def tiled(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    mask: Maskish,
    *,
    scale: float | None = None,
    bias: Bias | Term | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " Hq"] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    skip_threshold: float | None = None,
    weight: str = "softmax",
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    tile: tuple[int, int] | None = None,
    order: str = "auto",
    qk: str = "exact",
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """Averages values with weights that depend on scores, over the pairs that a mask or layout allows.

    ``out_i = sum_j w_ij v_j / sum_j w_ij`` with ``w_ij = exp(s_ij)`` (or another ``weight``) and
    ``s_ij = cap(scale * q_i . k_j) + bias_ij`` on allowed pairs.

    Args:
        q: ``(B, Hq, Nq, D)``, floating.
        k: ``(B, Hkv, Nk, D)``; ``Hq`` is a multiple of ``Hkv``.
        v: ``(B, Hkv, Nk, Dv)``.
        mask: A mask, its text, or a layout that a selector made.
        scale: Multiplies the dot products; ``D ** -0.5`` by default.
        bias: One term or a sum: ``ALiBi``, ``Relative``, ``Pair``, ``PerKey``, ``PerBlock``; differentiable.
        softcap: ``c`` in ``c * tanh(x / c)``, applied before the bias; None for none.
        sink: ``(Hq,)`` logit of one more key whose value is zero; differentiable. It counts in ``lse``, so a row
            that sees nothing else has ``lse = sink``.
        dropout_p: Share of weights dropped after normalisation; the pattern depends on the seed, the batch, the head
            and the logical positions only.
        seed: Integer, or int64 tensor of one element on the CPU (one on a GPU is waited for); drawn from torch's
            generator when missing.
        skip_threshold: In ``(0, 1)``: a tile is skipped when no row's best score in it comes within
            ``-log(skip_threshold)`` of that row's running maximum (BLASST, 2025). One-sided and dependent on the order
            of tiles; the skipped mass is not restored.
        weight: One of ``WEIGHTS``: the softmax, the sigmoid, or a classical kernel of the score.
        positions: Logical positions ``(q_pos, k_pos)`` of shapes ``(Nq,)`` or ``(B, Nq)``, ``(Nk,)`` or ``(B, Nk)``.
        key_padding: bool ``(B, Nk)``, True for real keys. The others may hold anything, NaN included.
        tile: Tile of the layout built for a mask, in tokens; the engine's choice by default, and the unit of skipping.
        order: Which loop is the outer one: ``"queries"``: each query tile visits its key tiles; ``"keys"``: each key
            tile is met by all the queries that chose it, whose partial results are merged at the end (FSA, 2025), for
            layouts with a few queries a tile; ``"auto"``: the engine's choice, see ``order.py``. Values are the same.
        qk: In what ``q k^T`` is computed: ``"exact"``, or from ``"int8"`` or ``"int4"`` copies of both, rounded token
            by token after their means over tokens were taken off (put back exactly). Gradients: of exact scores
            at these weights.
        return_lse: Also return the log of the normaliser.
        backend: ``"auto"``, ``"triton"``, ``"blocked"`` or ``"reference"``.

    Returns:
        ``(B, Hq, Nq, Dv)`` in the dtype of ``v``, or :class:`Attn` with ``lse (B, Hq, Nq)``. A row that may attend to
        nothing gives 0 and ``-inf``.

    Raises:
        ValueError: For shapes that do not fit, naming the argument.
        TypeError: For wrong types or dtypes.
        UnsupportedError: When an explicit backend refuses, with its reasons.

    Example:
        >>> import manyheads as mh
        >>> q = k = v = torch.ones(1, 2, 8, 4)
        >>> tiled(q, k, v, mh.Causal()).shape
        torch.Size([1, 2, 8, 4])
    """
    refuse_inside("tiled")
    checks.attention_inputs(q, k, v)
    checks.options(q, k, scale=scale, softcap=softcap, sink=sink, dropout_p=dropout_p, skip_threshold=skip_threshold)
    _check_how(order, qk)
    if return_lse and not weight_named(weight).normalised:
        raise UnsupportedError(f"weight {weight!r} is not normalised, so it has no lse; drop return_lse")
    if sink is not None and weight != "softmax":
        raise UnsupportedError(f"sink: a logit has no meaning under weight {weight!r}; use weight='softmax'")
    bias_text, bias_data = biases.flatten(bias)
    terms = biases.unflatten(bias_text, bias_data)
    for term in terms:
        if term.tensor.device != q.device:
            kind = type(term).__name__
            raise ValueError(f"bias {kind}: expected a tensor on the device of q, {q.device}, got {term.tensor.device}")
        term.check(q.shape[1], q.shape[0], q.shape[2], k.shape[2])
    q_pos, k_pos = (None, None) if positions is None else checks.positions(positions, q, k)
    sharded = sharding.seen(q, k, v)
    if key_padding is not None:
        checks.key_padding(key_padding, k)
        if sharded:
            key_padding = sharding.replicated(key_padding, sharding.plan_of(q, k, v).mesh)
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    chosen = _backend(backend, q, v, terms, weight_named(weight).name, qk)
    if order == "keys" and chosen == "reference":
        raise UnsupportedError("order 'keys': backend 'reference' computes every pair at once; use 'blocked'")
    mask_text, mask_data = mask_parts(mask, q, k, (q_pos, k_pos))
    out, lse = op(
        q,
        k,
        v,
        mask_text,
        mask_data,
        q_pos,
        k_pos,
        key_padding,
        bias_text,
        bias_data,
        sink,
        q.shape[3] ** -0.5 if scale is None else float(scale),
        float(softcap or 0.0),
        float(dropout_p),
        _seed(seed) if dropout_p else None,
        float(skip_threshold or 0.0),
        weight,
        f"{order} {qk}",
        tile or (_SKIP_TILE if skip_threshold and chosen != "triton" else _ANY_TILE),
        (0, 0),
        False,
        chosen,
    )
    return Attn(out, lse) if return_lse else out


_SKIP_TILE = (128, 128)
_ANY_TILE = (0, 0)  # the backend chooses


def refuse(backend: str, device: str) -> list[str]:
    """Why a backend of this engine cannot run on a device; empty when it can.

    Args:
        backend: ``"triton"``, ``"blocked"`` or ``"reference"``.
        device: A device type such as ``"cpu"``.

    Returns:
        Reasons in words.
    """
    if backend not in BACKENDS:
        raise unknown("backend of tiled", backend, BACKENDS)
    if device == "meta":
        return ["meta tensors hold no data"]
    return launch.refuse(device) if backend == "triton" else []


def _check_how(order: str, qk: str) -> None:
    for name, value, known in (("order", order, ORDERS), ("qk", qk, PRECISIONS)):
        if value not in known:
            raise unknown(name, str(value), known)


def _backend(name: str, q: Tensor, v: Tensor, terms: tuple[Term, ...], weight: str, qk: str) -> str:
    """The backend that a call gets: on a GPU the kernels where they can take it, else blocked."""
    if name not in ("auto", *BACKENDS):
        raise unknown("backend of tiled", name, ["auto", *BACKENDS])
    if name == "triton" or (name == "auto" and q.device.type == "cuda"):
        reasons = launch.refuse(q.device.type) + launch.refuse_call(q, v, terms, weight) + lowbit.refuse(qk)
        if not reasons:
            return "triton"
        if name == "triton":
            raise UnsupportedError("backend 'triton' cannot take this call: " + "; ".join(reasons))
    return "blocked" if name == "auto" else name


def mask_parts(
    mask: Maskish, q: Tensor, k: Tensor, positions: tuple[Tensor | None, Tensor | None]
) -> tuple[str, list[Tensor]]:
    """The text and tensors by which a mask or a layout crosses an operator.

    Raises:
        TypeError: For what is neither.
        ValueError: For a layout of other tokens, heads or batch entries than those of q and k.
    """
    if isinstance(mask, Mask):
        return mask.text, list(mask.data)
    if isinstance(mask, str):
        return mask, []
    if isinstance(mask, Deferred):
        return mask.text, mask.tensors
    if not isinstance(mask, TileLayout):
        raise TypeError(f"mask: expected a Mask or a TileLayout, got {type(mask).__name__}")
    if (mask.nq, mask.nk) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"mask: a layout of {mask.nq} x {mask.nk} tokens does not fit q and k of {q.shape[2]} x {k.shape[2]}"
        )
    for name, own, n in zip(("batch entries", "heads"), mask.index.shape, q.shape, strict=False):
        if own not in (1, n):
            raise ValueError(f"mask: a layout for {own} {name} does not fit the {n} of q")
    if positions[0] is not None:
        raise ValueError("positions: a layout carries its own; build it with them instead")
    text, data = mask.flatten()
    return text, list(data)


def _seed(seed: Tensor | int | None) -> Tensor:
    if seed is None:
        return torch.randint(2**62, (1,))
    return seed if isinstance(seed, Tensor) else torch.tensor([seed])
