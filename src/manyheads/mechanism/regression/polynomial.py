"""Local polynomial regression: around every query its own polynomial, fitted with kernel weights, read at the query."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.attention import Positions
from manyheads.common import checks
from manyheads.common.errors import UnsupportedError
from manyheads.engine.result import Attn
from manyheads.mask import Mask
from manyheads.mechanism import exact
from manyheads.mechanism.regression.nadaraya_watson import kernel_weights, nadaraya_watson
from manyheads.spec import Case, Spec, qkv

_LARGEST = 2**28  # numbers of the moments of one call: 2 GiB


def local_polynomial(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    degree: int = 1,
    kernel: str = "exponential",
    bandwidth: float | Float[Tensor, "*h"] | None = None,
    ridge: float = 1e-3,
    mask: Mask | str | Tensor | None = None,
    leave_one_out: bool = False,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"]:
    r"""Fits a polynomial around every query with kernel weights, and returns its value there.

    $$o_i = b_i, \qquad (b_i, W_i) = \arg\min_{b, W} \sum_j p_{ij} |v_j - b - W \psi(k_j - q_i)|^2 + \lambda |W|^2$$

    with the weights $p_{ij}$ of :func:`nadaraya_watson`, which sum to one, and
    $\psi(z) = z$ or $(z, \mathrm{vec}(z z^\top))$. Degree 0 is Nadaraya-Watson, and with the exponential kernel softmax
    attention; degree 1 is local linear attention; degree p reproduces polynomials of degree p as lambda goes to 0.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        degree: 0, 1 or 2. Degree 2 is for small D: its systems have D (D + 3) / 2 unknowns.
        kernel, bandwidth, mask, leave_one_out, positions, key_padding, backend: As for :func:`nadaraya_watson`.
        ridge: lambda >= 0, relative to weights that sum to one; the value b pays none. It may be 0 where every query
            sees enough keys.

    Returns:
        (B, Hq, Nq, Dv). A query with no key within reach gives 0.

    Raises:
        ValueError: Another degree, a negative ridge, a ridge of 0 with keys that do not determine the polynomial.
        UnsupportedError: A degree whose moments would not fit in memory.

    Conventions:
        The moments of every query are one call of :func:`nadaraya_watson` in float64, whose values are products of
        features: memory is linear in tokens. :mod:`manyheads.mechanism.regression.local_linear` solves degree 1 without
        moments, for large D.

    Source:
        Fan and Gijbels, Local Polynomial Modelling and Its Applications, 1996; Wang et al., Test-time regression,
        arXiv 2501.12352, section 5.

    Example:
        >>> k = torch.arange(6.0).view(1, 1, 6, 1)
        >>> fit = local_polynomial(k, k, k * k, degree=2, kernel="gaussian", bandwidth=2.0, ridge=0.0)
        >>> fit.round().int().flatten().tolist()
        [0, 1, 4, 9, 16, 25]
    """
    checks.attention_inputs(q, k, v)
    if isinstance(degree, bool) or degree not in (0, 1, 2):
        raise ValueError(f"degree: expected 0, 1 or 2, got {degree!r}")
    if not 0.0 <= ridge < math.inf:
        raise ValueError(f"ridge: expected a number of at least 0, got {ridge}")
    fit = {"kernel": kernel, "bandwidth": bandwidth, "mask": mask, "leave_one_out": leave_one_out,
           "positions": positions, "key_padding": key_padding, "backend": backend}  # fmt: skip
    if degree == 0:
        return nadaraya_watson(q, k, v, **fit)  # type: ignore[arg-type, return-value]
    dtype, wide = v.dtype, torch.float64
    if key_padding is not None:
        checks.key_padding(key_padding, k)
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    d, e = q.shape[3], v.shape[3]
    m = d if degree == 1 else d * (d + 3) // 2
    size = q.shape[0] * q.shape[1] * max(q.shape[2], k.shape[2]) * (m * (m + 1) // 2 + m * e)
    if size > _LARGEST:
        raise UnsupportedError(
            f"local-polynomial: degree {degree} of D={d} channels makes {m} features and {size:,} moments; "
            "use fewer channels or tokens, degree 1 or 0, or local linear attention"
        )
    q, k, v = (t.to(wide) for t in (q, k, v))
    middle = k.detach().mean(2, keepdim=True) if k.shape[2] else k.new_zeros(*k.shape[:2], 1, d)
    found = _features(k - middle, degree)
    row, column = torch.triu_indices(m, m, device=k.device)
    products = [found[..., row] * found[..., column], (found[..., None] * v[..., None, :]).flatten(3)]
    got = nadaraya_watson(q, k, torch.cat([v, found, *products], -1), return_lse=True, **fit)  # type: ignore[arg-type]
    assert isinstance(got, Attn)
    mean_v, mean, second, cross = got.out.split([e, m, row.shape[0], m * e], -1)
    place = torch.zeros(m, m, dtype=torch.int64, device=k.device)
    place[row, column] = place[column, row] = torch.arange(len(row), device=k.device)
    full = second[..., place]
    cross = cross.unflatten(-1, (m, e)) - mean[..., None] * mean_v[..., None, :]
    covariance = full - mean[..., None] * mean[..., None, :]
    turn, shift = _around(q - middle.repeat_interleave(q.shape[1] // k.shape[1], 1), degree)
    mean = (turn @ mean[..., None])[..., 0] + shift
    system = turn @ covariance @ turn.mT + ridge * torch.eye(m, dtype=wide, device=k.device)
    empty = (got.lse == -torch.inf)[..., None]
    root = _factor(system + torch.diag_embed(empty.to(wide).expand(mean.shape)), found)
    slopes = torch.cholesky_solve(turn @ cross, root)
    out = mean_v - (mean[..., None, :] @ slopes)[..., 0, :]
    return out.masked_fill(empty, 0.0).to(dtype)


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    degree: int = 1,
    kernel: str = "exponential",
    bandwidth: float | Float[Tensor, "*h"] | None = None,
    ridge: float = 1e-3,
    mask: Mask | str | Tensor | None = None,
    leave_one_out: bool = False,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> Float[Tensor, "B Hq Nq Dv"]:
    """The weighted normal equations of every query, value and slopes together."""
    p, lse = kernel_weights(q, k, kernel=kernel, bandwidth=bandwidth, mask=mask, leave_one_out=leave_one_out,
                            positions=positions, key_padding=key_padding)  # fmt: skip
    if key_padding is not None:
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    group, dtype = q.shape[1] // k.shape[1], v.dtype
    q, k, v = (t.to(p.dtype) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    z = k[:, :, None] - q[:, :, :, None]
    design = torch.cat([torch.ones_like(z[..., :1]), _features(z, degree)], -1)
    floor = torch.full(design.shape[-1:], ridge, dtype=p.dtype, device=p.device)
    floor[0] = 0.0
    empty = lse == -torch.inf
    system = torch.einsum("bhij,bhijc,bhijd->bhicd", p, design, design) + torch.diag(floor)
    system = system + torch.diag_embed(empty[..., None].to(p.dtype).expand(system.shape[:-1]))
    right = torch.einsum("bhij,bhijc,bhje->bhice", p, design, v)
    return torch.linalg.solve(system, right)[..., 0, :].to(dtype)


def _features(z: Tensor, degree: int) -> Tensor:
    """``z``, or ``z`` and its products of pairs, those of two channels times the root of two, as in ``vec(z z^T)``."""
    if degree < 2:
        return z if degree else z[..., :0]
    row, column, root = _pairs(z)
    return torch.cat([z, root * z[..., row] * z[..., column]], -1)


def _pairs(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row, column = torch.triu_indices(z.shape[-1], z.shape[-1], device=z.device)
    return row, column, torch.where(row == column, 1.0, math.sqrt(2.0)).to(z.dtype)


def _around(q: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """``T`` and ``t`` with ``psi(k - q) = T psi(k) + t``."""
    d = q.shape[-1]
    eye = torch.eye(d, dtype=q.dtype, device=q.device)
    if degree < 2:
        return eye, -q
    row, column, root = _pairs(q)
    mixed = -root[:, None] * (q[..., row, None] * eye[column] + q[..., column, None] * eye[row])
    below = torch.cat([mixed, torch.eye(len(row), dtype=q.dtype, device=q.device).expand(*mixed.shape[:-1], -1)], -1)
    above = torch.cat([eye, eye.new_zeros(d, len(row))], -1).expand(*q.shape[:-1], -1, -1)
    return torch.cat([above, below], -2), torch.cat([-q, root * q[..., row] * q[..., column]], -1)


def _factor(system: Tensor, features: Tensor) -> Tensor:
    """The Cholesky factor of a system that must have a solution; where reading it does not wait for a device."""
    root, failed = torch.linalg.cholesky_ex(system)
    if not torch.compiler.is_compiling() and system.device.type == "cpu" and system.numel():
        with torch.no_grad():
            left = root.diagonal(dim1=-2, dim2=-1).square()
            size = features.square().amax((0, 1, 2)) if features.numel() else left.new_zeros(())
            bad = (failed > 0) | (left <= 1e-14 * size).any(-1)
        if bool(bad.any()):
            raise ValueError(
                f"ridge: the keys near {int(bad.sum())} of {bad.numel()} queries do not determine a polynomial; use "
                "a larger ridge, a larger bandwidth or a lower degree"
            )
    return root


def flops(case: Case) -> int:
    """Counts the operations of a forward call: attention with the moments as values, and the solves.

    Args:
        case: The call.

    Returns:
        Operations over all heads.
    """
    degree, d, e = case.options.get("degree", 1), case.q.shape[3], case.v.shape[3]
    m = (0, d, d * (d + 3) // 2)[degree]
    moments = e + m + m * (m + 1) // 2 + m * e
    pairs = exact.flops(case) // (2 * (d + e))
    rows = case.q.shape[0] * case.q.shape[1] * case.q.shape[2]
    return 2 * pairs * (d + moments) + rows * (4 * m**3 + m**3 // 3 + 4 * m * m * e)


SPEC = Spec(
    "local-polynomial",
    fn=local_polynomial,
    reference=reference,
    paper="Fan and Gijbels, Local Polynomial Modelling and Its Applications, 1996; Wang et al., Test-time regression, "
    "arXiv 2501.12352",
    inputs=qkv(ridge=0.1, mask=lambda size: "causal" if size.causal else None),
    backends=("reference", "blocked"),
    supports={
        "noncausal_self",
        "causal_self",
        "noncausal_cross",
        "causal_cross",
        "mask",
        "gqa",
        "value_width",
        "positions",
        "key_padding",
        "backward",
    },
    invariances=("packed", "padding", "batch", "heads"),
    axes={"carrier": "any mask", "kernel": "classical", "estimator": "local polynomial", "execution": "tiles, solves"},
    flops=flops,
    bytes=exact.traffic,
)
