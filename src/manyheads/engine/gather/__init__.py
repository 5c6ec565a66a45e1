"""Softmax attention over a list of token ids for each query: the engine of token-level sparse attention."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ...common import checks
from ...common.errors import UnsupportedError, unknown
from ...common.scopes import refuse_inside
from ..result import Attn
from . import launch, sharding
from .op import BACKENDS, op

__all__ = ["Attn", "gather", "refuse"]


def gather(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    ids: Integer[Tensor, "_ _ Nq K"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " Hq"] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """Averages the values of the keys that each query lists, with the softmax of their scores as weights.

    ``out_i = sum_n w_in v_j / sum_n w_in`` over ``j = ids_in >= 0``, with ``w_in = exp(cap(scale * q_i . k_j))``.

    Nothing is masked but padding: which keys a query may see is the business of who makes the list. Time and memory
    grow with the number of ids, not with the number of keys. Query heads that share a key head and a list are the
    rows of one product, so lists that whole groups share are the fast ones; where ``v`` is a view of some columns of
    ``k`` (a latent read by all heads), each row is fetched once.

    Args:
        q: ``(B, Hq, Nq, D)``, floating.
        k: ``(B, Hkv, Nk, D)``; ``Hq`` is a multiple of ``Hkv``.
        v: ``(B, Hkv, Nk, Dv)``; may be a view of ``k``.
        ids: ``(B|1, 1|Hkv|Hq, Nq, K)``, int32 or int64: indices of keys in any order, -1 for none anywhere in a row.
            A key that is listed twice counts twice.
        scale: Multiplies the dot products; ``D ** -0.5`` by default.
        softcap: ``c`` in ``c * tanh(x / c)``; None for none.
        sink: ``(Hq,)`` logit of one more key whose value is zero; differentiable. It counts in ``lse``, so a row
            without ids has ``lse = sink``.
        return_lse: Also return the log of the normaliser.
        backend: ``"auto"``, ``"triton"``, ``"blocked"`` or ``"reference"``.

    Returns:
        ``(B, Hq, Nq, Dv)`` in the dtype of ``v``, or :class:`Attn` with ``lse (B, Hq, Nq)``, both differentiable. A row
        without ids gives 0 and ``-inf``, and takes no gradient. Keys that no query lists may hold anything, NaN
        included.

    Raises:
        ValueError: For shapes that do not fit, naming the argument; on a CPU for ids out of range (a GPU is not waited
            for: there such ids count as padding).
        TypeError: For wrong types or dtypes.
        UnsupportedError: When an explicit backend refuses, with its reasons; for DTensors that shard more than the
            batch and the heads.

    Example:
        >>> q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
        >>> v = torch.tensor([[[[1.0], [3.0], [8.0]]]])
        >>> ids = torch.tensor([[[[0, 1], [-1, 2]]]])
        >>> gather(q, k, v, ids).flatten().tolist()
        [2.0, 8.0]
    """
    refuse_inside("gather")
    checks.attention_inputs(q, k, v)
    checks.options(q, k, scale=scale, softcap=softcap, sink=sink, dropout_p=0.0)
    _check_ids(ids, q, k)
    sharding.seen(q, k, v)  # registers what the operator does on DTensors
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    out, lse = op(q, k, v, ids, sink, factor, float(softcap or 0.0), _backend(backend, q, v, ids))
    return Attn(out, lse) if return_lse else out


def refuse(backend: str, device: str) -> list[str]:
    """Why a backend of this engine cannot run on a device; empty when it can.

    Args:
        backend: ``"triton"``, ``"blocked"`` or ``"reference"``.
        device: A device type such as ``"cpu"``.

    Returns:
        Reasons in words.

    Example:
        >>> refuse("blocked", "cpu")
        []
    """
    if backend not in BACKENDS:
        raise unknown("backend of gather", backend, BACKENDS)
    if device == "meta":
        return ["meta tensors hold no data"]
    return launch.refuse(device) if backend == "triton" else []


def _backend(name: str, q: Tensor, v: Tensor, ids: Tensor) -> str:
    """The backend that a call gets: on a GPU the kernels where they can take it, else blocked."""
    if name not in ("auto", *BACKENDS):
        raise unknown("backend of gather", name, ["auto", *BACKENDS])
    if name == "triton" or (name == "auto" and q.device.type == "cuda"):
        reasons = launch.refuse(q.device.type) + launch.refuse_call(q, v, ids)
        if not reasons:
            return "triton"
        if name == "triton":
            raise UnsupportedError("backend 'triton' cannot take this call: " + "; ".join(reasons))
    return "blocked" if name == "auto" else name


def _check_ids(ids: Tensor, q: Tensor, k: Tensor) -> None:
    """Checks type, shape and device of ids; their values are checked by the operator."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids: expected an int32 or int64 tensor (B|1, 1|Hkv|Hq, Nq, K), got {got}")
    (b, h, nq, _), hkv, shape = q.shape, k.shape[1], tuple(ids.shape)
    if len(shape) != 4 or shape[0] not in (1, b) or shape[1] not in (1, hkv, h) or shape[2] != nq:
        heads = " or ".join(dict.fromkeys(map(str, (1, hkv, h))))
        raise ValueError(f"ids: expected shape (B={b} or 1, {heads} heads, Nq={nq}, K), got {shape}")
    if ids.device != q.device:
        raise ValueError(f"ids: expected the device of q, {q.device}, got {ids.device}")
