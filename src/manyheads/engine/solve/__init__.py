"""Estimates whose weights solve a small system for every query, and the solvers behind them."""

from __future__ import annotations

import sys

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ...common import checks
from ...common.errors import UnsupportedError, unknown
from ...common.scopes import refuse_inside
from ...mask.base import Mask
from ...mask.layout import TileLayout
from ..result import Attn
from ..tiled import mask_parts
from .conjugate import conjugate_gradient
from .inverse import newton_schulz
from .normal import Solver
from .op import BACKENDS, ops
from .result import ConvergenceError, Solution
from .triangular import triangular

__all__ = [
    "ConvergenceError",
    "Solution",
    "Solver",
    "conjugate_gradient",
    "local_linear",
    "newton_schulz",
    "probe",
    "refuse",
    "triangular",
]

Positions = tuple[Integer[Tensor, "... Nq"], Integer[Tensor, "... Nk"]]
Maskish = Mask | TileLayout | str


def probe(
    q: Float[Tensor, "B Hq Nq D"],
    r: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    mask: Maskish,
    *,
    scale: float | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    tile: tuple[int, int] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""A softmax average of values, corrected by how values and keys vary together along a probe.

    ``o_i = v_mean - Cov_p(v, k) r_i`` with ``p_ij = softmax_j(scale * q_i . k_j)`` over the allowed pairs, that is
    ``(1 + sum_j p_ij s_ij) sum_j p_ij v_j - sum_j p_ij s_ij v_j`` with ``s_ij = r_i . k_j``, which no scale touches.

    Args:
        q: ``(B, Hq, Nq, D)``, floating.
        r: Probes, as q.
        k: ``(B, Hkv, Nk, D)``; ``Hq`` is a multiple of ``Hkv``.
        v: ``(B, Hkv, Nk, Dv)``.
        mask: A mask, its text, or a layout that a selector made.
        scale: Multiplies ``q . k``; ``D ** -0.5`` by default.
        positions: Logical positions ``(q_pos, k_pos)`` of shapes ``(Nq,)`` or ``(B, Nq)``, ``(Nk,)`` or ``(B, Nk)``.
        key_padding: bool ``(B, Nk)``, True for real keys. The others may hold anything, NaN included.
        tile: Tile of the layout built for a mask, in tokens; the engine's choice by default.
        return_lse: Also return the log of the softmax's normaliser.
        backend: ``"auto"``, ``"blocked"`` or ``"reference"``.

    Returns:
        ``(B, Hq, Nq, Dv)`` in the dtype of ``v``, or :class:`Attn`. A row that may attend to nothing gives 0 and
        ``-inf``.

    Raises:
        ValueError: For shapes that do not fit, naming the argument.
        TypeError: For wrong types or dtypes.
        UnsupportedError: For DTensors.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
        >>> same = probe(q, torch.zeros_like(q), k, v, "causal")
        >>> plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> bool(torch.allclose(same, plain, atol=1e-6))
        True
    """
    _check_probe(q, r)
    rest = _call("probe", q, k, v, mask, scale, positions, key_padding, tile, backend)
    out, lse, *_ = ops["probe"](*rest[0], r, *rest[1], rest[2], "", *rest[3], 1 if return_lse else 0)
    return Attn(out, lse) if return_lse else out


def local_linear(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    mask: Maskish,
    *,
    ridge: float | Float[Tensor, " Hq"],
    scale: float | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    solver: Solver | str = "auto",
    tile: tuple[int, int] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""The local linear estimate of the value at every query, with kernel weights of a softmax.

    For every query the intercept of ``min_{b, W} sum_j p_j |v_j - b - W (k_j - q)|^2 + ridge |W|^2``, where ``p`` is
    ``softmax_j(scale * q . k_j)`` over the allowed pairs:
    ``o = v_mean + Cov_p(v, k) (Cov_p(k, k) + ridge I)^-1 (q - k_mean)``.

    Memory is linear in the tokens: the systems of some queries at a time are formed, or never formed at all, as
    ``solver`` says. The gradient takes one more solve. Half-precision inputs are computed in float32.

    Args:
        q: ``(B, Hq, Nq, D)``, floating.
        k: ``(B, Hkv, Nk, D)``; ``Hq`` is a multiple of ``Hkv``.
        v: ``(B, Hkv, Nk, Dv)``.
        mask: A mask, its text, or a layout that a selector made.
        ridge: At least 0, one number or one for each query head ``(Hq,)``, differentiable. It is relative to
            weights that sum to one: with weights ``exp(scale * q . k)`` left as they are, the same estimate has the
            ridge ``ridge * exp(lse)``. With 0, every query must see keys that span the space.
        scale: Multiplies the dot products; ``D ** -0.5`` by default.
        positions: Logical positions ``(q_pos, k_pos)`` of shapes ``(Nq,)`` or ``(B, Nq)``, ``(Nk,)`` or ``(B, Nk)``.
        key_padding: bool ``(B, Nk)``, True for real keys. The others may hold anything, NaN included.
        solver: ``"auto"``, ``"direct"``, ``"cg"``, or a :class:`Solver`. The reference backend does not read it.
        tile: Tile of the layout built for a mask, in tokens; the engine's choice by default.
        return_lse: Also return the log of the softmax's normaliser.
        backend: ``"auto"``, ``"blocked"`` or ``"reference"``.

    Returns:
        ``(B, Hq, Nq, Dv)`` in the dtype of ``v``, or :class:`Attn`. A row that may attend to nothing gives 0 and
        ``-inf``.

    Raises:
        ValueError: For shapes that do not fit, naming the argument; for a negative ridge; for a ridge of 0 where a
            system is singular.
        TypeError: For wrong types or dtypes.
        ConvergenceError: When iterations run out and the solver was told to raise.
        UnsupportedError: For DTensors.

    Example:
        >>> k = torch.randn(1, 1, 64, 4)
        >>> v = k @ torch.randn(4, 3) + 5.0                  # values that are linear in the keys
        >>> q = torch.randn(1, 1, 7, 4)
        >>> out = local_linear(q, k, v, "full", ridge=1e-6)
        >>> weights = torch.linalg.lstsq(torch.cat([k, torch.ones(1, 1, 64, 1)], -1), v).solution
        >>> bool(torch.allclose(out, torch.cat([q, torch.ones(1, 1, 7, 1)], -1) @ weights, atol=1e-3))
        True
    """
    chosen = solver if isinstance(solver, Solver) else Solver(solver)
    rest = _call("local_linear", q, k, v, mask, scale, positions, key_padding, tile, backend)
    out, lse, *_ = ops["local_linear"](*rest[0], _ridge(ridge, q), *rest[1], rest[2], chosen.text, *rest[3], 0)
    return Attn(out, lse) if return_lse else out


def refuse(backend: str, device: str) -> list[str]:
    """Why a backend of this engine cannot run on a device; empty when it can.

    Args:
        backend: ``"blocked"`` or ``"reference"``.
        device: A device type such as ``"cpu"``.

    Returns:
        Reasons in words.
    """
    if backend not in BACKENDS:
        raise unknown("backend of solve", backend, BACKENDS)
    return ["meta tensors hold no data"] if device == "meta" else []


_ANY_TILE = (0, 0)  # the engine chooses


def _call(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Maskish,
    scale: float | None,
    positions: Positions | None,
    key_padding: Tensor | None,
    tile: tuple[int, int] | None,
    backend: str,
) -> tuple[tuple[Tensor, ...], tuple[object, ...], float, tuple[object, ...]]:
    """What both operators take, checked: tensors, the mask with positions and padding, the scale, tile and backend."""
    refuse_inside(name)
    checks.attention_inputs(q, k, v)
    module = None if torch.compiler.is_compiling() else sys.modules.get("torch.distributed.tensor")
    if module is not None and any(isinstance(t, module.DTensor) for t in (q, k, v)):
        raise UnsupportedError(f"{name}: DTensors are not supported; call it on each rank's batch entries and heads")
    checks.options(q, k, scale=scale, softcap=None, sink=None, dropout_p=0.0)
    if q.shape[3] == 0:
        raise ValueError(f"q: expected a width D of at least 1, got shape {tuple(q.shape)}")
    if backend not in ("auto", *BACKENDS):
        raise unknown(f"backend of {name}", backend, ["auto", *BACKENDS])
    q_pos, k_pos = (None, None) if positions is None else checks.positions(positions, q, k)
    if key_padding is not None:
        checks.key_padding(key_padding, k)
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    text, data = mask_parts(mask, q, k, (q_pos, k_pos))
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    where = (text, data, q_pos, k_pos, key_padding)
    return (q, k, v), where, factor, (tile or _ANY_TILE, "blocked" if backend == "auto" else backend)


def _check_probe(q: Tensor, r: Tensor) -> None:
    if not isinstance(r, Tensor):
        raise TypeError(f"r: expected a tensor (B, Hq, Nq, D), got {type(r).__name__}")
    if isinstance(q, Tensor) and r.shape != q.shape:
        raise ValueError(f"r: expected the shape of q, {tuple(q.shape)}, got {tuple(r.shape)}")
    if isinstance(q, Tensor) and (r.dtype != q.dtype or r.device != q.device):
        raise TypeError(f"r: expected {q.dtype} on {q.device} as q, got {r.dtype} on {r.device}")


def _ridge(given: float | Tensor, q: Tensor) -> Tensor:
    """The ridge of every query head, on the device of the queries."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if not isinstance(given, Tensor):
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise TypeError(f"ridge: expected a number or a tensor (Hq={q.shape[1]},), got {type(given).__name__}")
        if not 0.0 <= given < float("inf"):
            raise ValueError(f"ridge: expected a finite number of at least 0, got {given}")
        return torch.full((q.shape[1],), float(given), dtype=wide, device=q.device)
    if not given.is_floating_point():
        raise TypeError(f"ridge: expected a floating tensor (Hq={q.shape[1]},), got {given.dtype}")
    if tuple(given.shape) not in ((), (q.shape[1],)):
        raise ValueError(f"ridge: expected a number or shape (Hq={q.shape[1]},), got {tuple(given.shape)}")
    if given.device != q.device:
        raise ValueError(f"ridge: expected the device of q, {q.device}, got {given.device}")
    checked = given.device.type == "cpu" and not torch.compiler.is_compiling()
    if checked and not bool(((given >= 0) & (given < float("inf"))).all()):
        raise ValueError(f"ridge: expected finite numbers of at least 0, got {given.detach().tolist()}")
    return given.to(wide).expand(q.shape[1])
