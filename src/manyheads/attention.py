"""The front door: one call for every mask, and why each backend would or would not take it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from .common import scopes
from .common.errors import UnsupportedError
from .dispatch import BACKENDS, Explanation, checked, choose, explain, key_of, remember, runners, sdpa_runner
from .engine.result import Attn
from .engine.tiled import Bias, Pair, Term, reference, tiled
from .engine.tiled.bias import Block, flatten, unflatten
from .engine.tiled.op import layout_for
from .engine.tiled.plan import visible_rows
from .engine.tiled.problem import Problem
from .engine.tiled.weight import WEIGHTS
from .mask import Mask
from .mask.layout import TileLayout

__all__ = ["BACKENDS", "Attn", "Explanation", "attention", "attention_weights", "explain"]

Positions = tuple[Integer[Tensor, "... Nq"], Integer[Tensor, "... Nk"]]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    mask: Mask | str | Tensor | None = ...,
    scale: float | None = ...,
    bias: Bias | Term | None = ...,
    softcap: float | None = ...,
    sink: Tensor | None = ...,
    dropout_p: float = ...,
    generator: torch.Generator | None = ...,
    positions: Positions | None = ...,
    key_padding: Tensor | None = ...,
    backend: str = ...,
) -> Attn: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    mask: Mask | str | Tensor | None = ...,
    scale: float | None = ...,
    bias: Bias | Term | None = ...,
    softcap: float | None = ...,
    sink: Tensor | None = ...,
    dropout_p: float = ...,
    generator: torch.Generator | None = ...,
    positions: Positions | None = ...,
    key_padding: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = ...,
    mask: Mask | str | Tensor | None = ...,
    scale: float | None = ...,
    bias: Bias | Term | None = ...,
    softcap: float | None = ...,
    sink: Tensor | None = ...,
    dropout_p: float = ...,
    generator: torch.Generator | None = ...,
    positions: Positions | None = ...,
    key_padding: Tensor | None = ...,
    backend: str = ...,
) -> Tensor | Attn: ...
def attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    bias: Bias | Term | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " Hq"] | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """Exact softmax attention under any mask.

    ``out_i = sum_j exp(s_ij - lse_i) v_j`` over the keys that the mask allows, with
    ``s_ij = cap(scale * q_i . k_j) + bias_ij`` and ``lse_i = log sum_j exp(s_ij)``.

    Args:
        q: Queries ``(B, Hq, Nq, D)``; float16, bfloat16, float32 or float64, any strides.
        k: Keys ``(B, Hkv, Nk, D)``. ``Hq`` must be a multiple of ``Hkv``; nothing is repeated in memory.
        v: Values ``(B, Hkv, Nk, Dv)``; ``Dv`` may differ from ``D``.
        mask: What may attend to what: a mask value, its text (``"causal & window(512)"``), a bool tensor that
            broadcasts to ``(B, H, Nq, Nk)`` with True for allowed, or None for everything.
        scale: Multiplies the dot products; ``D ** -0.5`` by default, 0.0 is legal.
        bias: ``ALiBi``, ``Relative``, ``Pair``, ``PerKey``, ``PerBlock`` or a sum of them; differentiable.
        softcap: ``c`` of ``c * tanh(x / c)``, applied to scaled scores before the bias.
        sink: ``(Hq,)`` logit of one more key with value zero; differentiable, part of ``lse``.
        dropout_p: Share of weights dropped after normalisation, the rest scaled by ``1 / (1 - p)``. The pattern
            depends on one draw from ``generator``, and then on batch, head and logical positions only.
        generator: Source of that draw; torch's default when missing.
        positions: Logical positions ``(q_pos, k_pos)``, integer, ``(N,)`` or ``(B, N)``. They decide masks and
            positional biases; storage order never does. By default queries are the last ``Nq`` of ``Nk`` positions.
        key_padding: bool ``(B, Nk)``, True for real keys. Padded keys may hold anything, NaN included.
        return_lse: Also return ``lse``.
        backend: ``"auto"`` takes the first backend without a reason to refuse; a name is used or raises.

    Returns:
        ``(B, Hq, Nq, Dv)`` in the dtype of the inputs, or :class:`Attn` with ``lse (B, Hq, Nq)`` in float32 (float64
        for float64), natural log, differentiable. A row that may attend to nothing gives 0 and ``-inf``.

    Raises:
        ValueError: For shapes, positions, masks or texts that do not fit, naming the argument.
        TypeError: For wrong types and dtypes.
        UnsupportedError: When a named backend cannot take the call, with every reason.

    Conventions:
        ``Causal`` is bottom-right aligned when ``Nq != Nk``; ``Window(W)`` counts the query itself; scores and
        statistics are float32 whatever the input dtype. DTensors sharded on batch or heads give DTensors sharded
        alike, each rank with its part of masks, biases, sinks and positions; shards of tokens are refused.

    Example:
        >>> import manyheads as mh
        >>> q = k = v = torch.ones(1, 2, 6, 4)
        >>> mh.attention(q, k, v, mask=mh.Causal() & mh.Window(2)).shape
        torch.Size([1, 2, 6, 4])
        >>> mh.attention(q, k, v, mask="causal", return_lse=True).lse[0, 0].exp().round().int().tolist()
        [7, 15, 22, 30, 37, 44]
    """
    key = None
    if scopes.active:
        return scopes.active[-1].attend(
            q, k, v, mask=mask, scale=scale, bias=bias, softcap=softcap, sink=sink, dropout_p=dropout_p,
            generator=generator, positions=positions, key_padding=key_padding, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    if (
        bias is None
        and softcap is None
        and sink is None
        and positions is None
        and key_padding is None
        and not (dropout_p or isinstance(mask, Tensor) or torch.compiler.is_compiling())
        and (scale is None or abs(scale) < math.inf)
    ):
        try:
            key = key_of(q, k, v, mask, return_lse, backend)
            run = runners.get(key)
        except (AttributeError, TypeError):  # something is not what it should be: the checks below say what
            run = None
        if run is not None:
            return run(q, k, v, scale)
    seed = torch.randint(2**62, (1,), generator=generator) if dropout_p else None
    call = checked(q, k, v, mask, scale, bias, softcap, sink, dropout_p, positions, key_padding, return_lse)
    chosen = choose(call, backend)
    run = remember(key, call, chosen) if key is not None else sdpa_runner(call) if chosen == "sdpa" else None
    if run is not None:
        return run(q, k, v, scale)
    return tiled(
        q,
        k,
        v,
        call.mask,
        scale=scale,
        bias=bias,
        softcap=softcap,
        sink=sink,
        dropout_p=dropout_p,
        seed=seed,
        positions=positions,
        key_padding=key_padding,
        return_lse=return_lse,
        backend=chosen,
    )


def attention_weights(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    *,
    mask: Mask | str | Tensor | None = None,
    rows: Sequence[int] | None = None,
    scale: float | None = None,
    bias: Bias | Term | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " Hq"] | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> Float[Tensor, "B Hq rows Nk"]:
    """The weights themselves, for some queries: to look at, not to compute with.

    Args:
        q, k: As for :func:`attention`.
        mask, scale, bias, softcap, sink, positions, key_padding: As for :func:`attention`.
        rows: Which queries, by storage index (negative ones count from the end); all by default.

    Returns:
        ``(B, Hq, len(rows), Nk)`` in float32 (float64 for float64); rows sum to 1, to less with a sink, or to 0 when
        nothing is visible.

    Raises:
        ValueError: For a row out of range, or what :func:`attention` would raise.
        UnsupportedError: For DTensors.

    Example:
        >>> import manyheads as mh
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> mh.attention_weights(q, k, mask="causal", rows=[1])[0, 0].tolist()
        [[0.5, 0.5, 0.0, 0.0]]
    """
    scopes.refuse_inside("attention_weights")
    call = checked(q, k, k, mask, scale, bias, softcap, sink, 0.0, positions, key_padding, False)
    if call.sharded:
        raise UnsupportedError("attention_weights: DTensors are not supported; gather q and k with full_tensor()")
    terms = unflatten(*flatten(bias))
    for term in terms:
        term.check(q.shape[1], q.shape[0], q.shape[2], k.shape[2])
    nq = q.shape[2]
    chosen = range(nq) if rows is None else rows
    if any(not -nq <= r < nq for r in chosen):
        raise ValueError(f"rows: expected indices of {nq} queries, got {list(chosen)}")
    index = [r % nq for r in chosen]
    layout = layout_for(call.mask, q, k, positions, key_padding)
    if key_padding is not None:
        k = k.masked_fill(~key_padding[:, None, :, None], 0.0)
    none = torch.empty(0, 0, dtype=torch.int64)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    added = tuple(_for_rows(term, layout, q, index) for term in terms)
    q = q[:, :, torch.tensor(index, dtype=torch.int64, device=q.device)]
    problem = Problem(q, k, k, layout, none, none, WEIGHTS["softmax"], factor, softcap or 0.0, added, sink)
    allowed = layout.dense() if rows is None else visible_rows(layout, index)
    return reference.weights(problem, allowed.to(q.device))[0]


def _for_rows(term: Term, layout: TileLayout, q: Tensor, rows: list[int]) -> Pair:
    """What a term adds to the scores of some queries."""
    q_pos, k_pos = (p.to(q.device).view(-1, p.shape[-1]) for p in layout.positions)
    cols = torch.arange(layout.nk, device=q.device)
    every = slice(0, q.shape[0]), slice(0, q.shape[1])
    added = []
    for first, after in _runs(rows):
        part = slice(first, after)
        added.append(term.values(Block(*every, part, cols, q_pos[:, part], k_pos)).expand(-1, -1, after - first, -1))
    return Pair(torch.cat(added, dim=2) if added else q.new_zeros(1, 1, 0, layout.nk))


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring rows as half-open intervals, in order."""
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[start], rows[i - 1] + 1
            start = i
