"""Linear recurrences in chunked form: the engine of linear attention, gated and delta-rule memories."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common import checks
from ...common.errors import UnsupportedError, unknown
from ...common.scopes import refuse_inside
from ...mask.documents import Document
from .. import gpu
from . import check, launch, sharding
from .op import BACKENDS, op
from .problem import State, unpacked
from .step import step

__all__ = ["State", "refuse", "scan", "step"]

_CHUNK = 64


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    normalise: bool | str = False,
    state: State | None = None,
    lens: Document | Tensor | Sequence[int] | None = None,
    key_padding: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    r"""Reads a matrix state that every token decays and writes, in time linear in the number of tokens.

    Additive: ``S_t = exp(g_t) S_{t-1} + exp(i_t) k_t v_t^T``. With ``beta``, the delta rule, after the decay:
    ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`` with ``S' = exp(g_t) S_{t-1}`` (Gated DeltaNet, arXiv 2412.06464,
    with the state transposed). Then ``o_t = scale * S_t^T q_t``: a token sees itself.

    Args:
        q: ``(B, H, N, D)``, floating.
        k: ``(B, Hkv, N, D)``; ``H`` is a multiple of ``Hkv``. Each query head has its own state.
        v: ``(B, Hkv, N, Dv)``.
        decay: Log decay ``g``, at most 0 (``-inf`` forgets everything): per head ``(H,)``, per token ``(B, H, N)`` or
            per token and channel of the keys ``(B, H, N, D)``. Keep it in float32 for inputs in half precision.
        beta: Step of the delta rule ``(B, H, N)`` in [0, 2]; keys are usually normalised to length 1.
        gate: Log input gate ``i (B, H, N)``, of any sign: ``logsigmoid(x)``, or ``x`` for an exponential gate, which a
            running maximum keeps from overflowing. (Without ``normalise`` the result itself may be too large.)
        scale: Multiplies ``q``; 1 by default, because there is no softmax whose logits would need one. Gated DeltaNet
            and mLSTM use ``D ** -0.5``.
        normalise: What divides the output, with ``n_t = exp(g_t) n_{t-1} + exp(i_t) k_t``: ``"sum"`` is
            ``scale * q.n``, for features with ``q.k >= 0``; ``"abs"`` its magnitude; ``"max1"`` or True the larger of
            that and 1 (mLSTM); False nothing. Where the divisor is 0, so is the output.
        state: What came before the first token; nothing by default.
        lens: Lengths of packed documents, ``(n,)`` or ``(B, n)``, or a ``Document``. Nothing passes a border: ``state``
            enters the first document, and the state that is returned left the last one that is not empty.
        key_padding: bool ``(B, N)``, True for real tokens. The others may hold anything, NaN included; they neither
            write nor decay, and their output is 0.
        reverse: Run from the last token to the first; ``state`` then comes from behind the end.
        return_state: Also return the state after all tokens.
        chunk: Tokens computed together, rounded up to a power of two; the engine's choice by default. It changes no
            result.
        backend: ``"auto"``, ``"triton"``, ``"blocked"`` or ``"reference"``.

    Returns:
        ``(B, H, N, Dv)`` in the dtype of ``v``; with ``return_state`` also a :class:`State`.

    Raises:
        ValueError: For shapes that do not fit, or on a CPU for values out of range, naming the argument.
        TypeError: For wrong types or dtypes.
        UnsupportedError: For combinations without a meaning here: a decay per channel or an input gate with ``beta``,
            an input gate with a decay per channel, ``normalise`` with ``beta``; for DTensors that shard more than the
            batch and the heads; for an explicit backend that cannot take the call.

    Example:
        >>> q = k = v = torch.ones(1, 1, 5, 4)
        >>> scan(q, k, v)[0, 0, :, 0].tolist()
        [4.0, 8.0, 12.0, 16.0, 20.0]
        >>> scan(q, k, v, lens=[2, 3], normalise="sum")[0, 0, :, 0].tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    refuse_inside("scan")
    kind = check.normaliser(normalise)
    check.inputs(q, k, v, decay, beta, gate, kind, scale)
    total, m = check.packed_state(state, q, v, kind, gate is not None)
    borders = _lens(lens)
    sharded = sharding.seen(q, k, v, decay, beta, gate)
    if key_padding is not None:
        checks.key_padding(key_padding, k)
        if sharded:
            mesh = sharding.plan_of(q, k, v).mesh
            key_padding = sharding.replicated(key_padding, mesh)
            decay, beta, gate = (None if t is None else sharding.replicated(t, mesh) for t in (decay, beta, gate))
        q, k, v, decay, beta, gate = _without_padding(key_padding, q, k, v, decay, beta, gate)
    if reverse:
        q, k, v = (t.flip(2) for t in (q, k, v))
        decay = decay if decay is None or decay.dim() == 1 else decay.flip(2)
        beta, gate = (None if t is None else t.flip(2) for t in (beta, gate))
        borders = None if borders is None else borders.flip(-1)
    chosen = _backend(backend, q, v, decay, beta)
    factor = 1.0 if scale is None else float(scale)
    out, total, end, *_ = op(
        q, k, v, decay, beta, gate, total, m, borders, factor, kind, _chunk(chunk, chosen, q, v), chosen, False
    )
    if reverse:
        out = out.flip(2)
    if key_padding is not None:
        out = out.masked_fill(~key_padding[:, None, :, None], 0.0)
    return (out, unpacked(total, end if gate is not None else None, kind)) if return_state else out


def refuse(backend: str, device: str) -> list[str]:
    """Why a backend of this engine cannot run on a device; empty when it can.

    Args:
        backend: ``"triton"``, ``"blocked"`` or ``"reference"``.
        device: A device type such as ``"cpu"``.

    Returns:
        Reasons in words.
    """
    if backend not in BACKENDS:
        raise unknown("backend of scan", backend, BACKENDS)
    if device == "meta":
        return ["meta tensors hold no data"]
    return gpu.refuse(device) if backend == "triton" else []


def _backend(name: str, q: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> str:
    """The backend that a call gets: on a GPU the kernels where they can take it, else blocked."""
    if name not in ("auto", *BACKENDS):
        raise unknown("backend of scan", name, ["auto", *BACKENDS])
    if name == "triton" or (name == "auto" and q.device.type == "cuda"):
        reasons = gpu.refuse(q.device.type) + launch.refuse_call(q, v, decay, beta)
        if not reasons:
            return "triton"
        if name == "triton":
            raise UnsupportedError("backend 'triton' cannot take this call: " + "; ".join(reasons))
    return "blocked" if name == "auto" else name


def _chunk(given: int | None, backend: str, q: Tensor, v: Tensor) -> int:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise ValueError(f"chunk: expected a positive number of tokens, got {given!r}")
        given = 1 << (given - 1).bit_length()
    return launch.chunk_of(q, v, given) if backend == "triton" else given or _CHUNK


def _lens(given: Document | Tensor | Sequence[int] | None) -> Tensor | None:
    """Document lengths as a tensor of integers."""
    if given is None:
        return None
    if isinstance(given, Document):
        if len(given.data) > 1:
            raise ValueError("lens: a recurrence has one token sequence; got a Document with k_lens of their own")
        return given.data[0]
    lens = given if isinstance(given, Tensor) else torch.tensor(given)
    if lens.is_floating_point() or lens.is_complex() or lens.dtype == torch.bool:
        raise TypeError(f"lens: expected integers, got {lens.dtype}")
    return lens


def _without_padding(
    real: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same tokens, with padding that writes nothing and forgets nothing."""
    pad = ~real[:, None]
    q, k, v = (t.masked_fill(pad[..., None], 0.0) for t in (q, k, v))
    if decay is not None:
        if decay.dim() == 1:
            decay = decay[None, :, None].expand(q.shape[:3])
        decay = decay.masked_fill(pad if decay.dim() == 3 else pad[..., None], 0.0)
    beta = None if beta is None else beta.masked_fill(pad, 0.0)
    gate = None if gate is None else gate.masked_fill(pad, -torch.inf)
    return q, k, v, decay, beta, gate
