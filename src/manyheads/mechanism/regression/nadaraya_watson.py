"""Nadaraya-Watson regression: attention whose weights are a classical kernel of the distance between query and key."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from manyheads.attention import Positions, attention
from manyheads.common import checks
from manyheads.common.errors import unknown
from manyheads.engine.result import Attn
from manyheads.engine.tiled import PerKey, tiled
from manyheads.engine.tiled.op import BACKENDS
from manyheads.mask import Mask, Window, as_mask
from manyheads.mechanism import exact
from manyheads.spec import Spec, qkv

Bandwidth = float | Tensor

_EDGE = 1e-9  # a squared distance so little above the edge of the boxcar lies on it


@dataclass(frozen=True, slots=True)
class Kernel:
    """A classical kernel.

    Attributes:
        name: What callers write.
        profile: The weight of a pair, from its squared distance in bandwidths and its dot product in squared
            bandwidths.
        weight: The weight of the tiled engine that computes it from a score, for kernels with an edge.
        edge: Whether pairs further apart than the bandwidth weigh nothing.
    """

    name: str
    profile: Callable[[Tensor, Tensor], Tensor]
    weight: str = "softmax"
    edge: bool = False


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("gaussian", lambda r, _: torch.exp(-0.5 * r)),
        Kernel("boxcar", lambda r, _: (r <= 1.0).to(r.dtype), "boxcar", edge=True),
        Kernel("epanechnikov", lambda r, _: (1.0 - r).clamp_min(0.0), "relu", edge=True),
        Kernel("triangular", lambda r, _: (1.0 - _root(r)).clamp_min(0.0), "cone", edge=True),
        Kernel("constant", lambda r, _: torch.ones_like(r)),
        Kernel("exponential", lambda _, s: torch.exp(s)),
    )
}
"""Every kernel by name, with ``u = |q - k| / h``: ``exp(-u^2 / 2)``, ``u <= 1``, ``1 - u^2`` and ``1 - u`` where
positive, 1, and ``exp(q.k / h^2)``, which is softmax attention."""


def kernel_named(name: str) -> Kernel:
    """Looks up a kernel.

    Args:
        name: One of ``KERNELS``.

    Returns:
        The kernel.

    Raises:
        ValueError: For an unknown name, with the nearest.

    Example:
        >>> kernel_named("boxcar").edge
        True
    """
    if name not in KERNELS:
        raise unknown("kernel", str(name), KERNELS)
    return KERNELS[name]


def nadaraya_watson(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    kernel: str = "gaussian",
    bandwidth: float | Float[Tensor, "*h"] | None = None,
    mask: Mask | str | Tensor | None = None,
    leave_one_out: bool = False,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""Averages values with weights that fall with the distance of their keys from the query.

    $$o_i = \frac{\sum_j K(|q_i - k_j| / h)\, v_j}{\sum_j K(|q_i - k_j| / h)}$$

    Attention is this estimator: with queries and keys of length one the Gaussian kernel *is* softmax attention of
    scale $1 / h^2$, and the kernel ``"exponential"``, $\exp(q \cdot k / h^2)$, is so for any.

    Args:
        q: (B, Hq, Nq, D): where the function is wanted.
        k: (B, Hkv, Nk, D): where it was seen.
        v: (B, Hkv, Nk, Dv): what was seen there.
        kernel: One of ``KERNELS``.
        bandwidth: h > 0 in units of the keys: a number, or a tensor (), (Hq,) or (Hq | 1, D), one per feature;
            differentiable. Default D ** 0.25, which makes ``"exponential"`` scale by D ** -0.5.
        mask: As for :func:`manyheads.attention`.
        leave_one_out: Hide from query i the key at its own position, so that a sample does not predict itself.
        positions: As for :func:`manyheads.attention`.
        key_padding: bool (B, Nk), True for real keys.
        return_lse: Also return the logarithm of the sum of the kernel weights.
        backend: As for :func:`manyheads.attention`, but for ``"sdpa"``.

    Returns:
        (B, Hq, Nq, Dv), or :class:`manyheads.Attn` with lse (B, Hq, Nq). ``lse.exp()`` is the sum of weights: for
        the boxcar a count of keys, for the Gaussian a density up to a factor. A query with no key within reach gives 0
        and minus infinity.

    Raises:
        ValueError: A kernel that does not exist, a bandwidth that is not positive or has another shape.
        TypeError: Tensors of the wrong type.

    Conventions:
        Distances are expanded into products; features that lie far from zero are centred first, which keeps their
        digits (not those of float16 and bfloat16, whose rounding is coarser). Boxcar and triangular kernels are
        computed in float64, for the jump of the one and the tip of the other; the other four also run on the Triton
        backend. The edge of the boxcar lies inside.

    Source:
        Nadaraya, On estimating regression, 1964; Watson, Smooth regression analysis, 1964.

    Example:
        >>> k = torch.arange(5.0).view(1, 1, 5, 1)
        >>> seen = nadaraya_watson(k, k, 10 * k, kernel="boxcar", bandwidth=1.5, return_lse=True)
        >>> seen.out.flatten().tolist(), seen.lse.exp().round().flatten().tolist()
        ([5.0, 10.0, 20.0, 30.0, 35.0], [2.0, 3.0, 3.0, 3.0, 2.0])
    """
    chosen = kernel_named(kernel)
    checks.attention_inputs(q, k, v)
    if backend not in ("auto", *BACKENDS):
        raise unknown("backend of nadaraya-watson", backend, ["auto", *BACKENDS])
    if leave_one_out:
        if positions is None and q.shape[2] != k.shape[2]:
            raise ValueError(f"leave_one_out: {q.shape[2]} queries are not the {k.shape[2]} samples; give positions")
        mask = _without_self(mask)
    precision = _precision(bandwidth, q)
    if key_padding is not None:
        checks.key_padding(key_padding, k)
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    dtype, stated = v.dtype, torch.promote_types(v.dtype, torch.float32)
    if chosen.edge or isinstance(precision, Tensor):
        wide = torch.float64 if chosen.weight in ("boxcar", "cone") else stated
        q, k, v = (t.to(wide) for t in (q, k, v))
        precision = precision.to(wide) if isinstance(precision, Tensor) else precision
    if chosen.name not in ("constant", "exponential") and q.dtype.itemsize > 2 and k.shape[2]:
        q, k = _centred(q, k, key_padding)
    run = _edged if chosen.edge else _soft
    out, lse = run(chosen, q, k, v, precision, mask, positions, key_padding, return_lse, backend)
    return Attn(out.to(dtype), lse.to(stated)) if lse is not None else out.to(dtype)


class NadarayaWatson(nn.Module):
    """Nadaraya-Watson regression with learned bandwidths: a core for :class:`manyheads.nn.Attention`.

    Args:
        heads: Query heads, each with its own bandwidth.
        width: Width D of queries and keys, for one bandwidth per head and feature; else one per head.
        kernel: One of ``KERNELS``. The boxcar has no gradient in its bandwidth.
        bandwidth: Where all bandwidths start.

    Attributes:
        log_bandwidth: Parameter ``(heads,)`` or ``(heads, width)``: the logarithm keeps bandwidths positive.

    Raises:
        ValueError: A kernel that does not exist, or a bandwidth that is not positive.

    Example:
        >>> core = NadarayaWatson(heads=2, bandwidth=0.5)
        >>> q = k = torch.zeros(1, 2, 3, 1)
        >>> core(q, k, torch.tensor([1.0, 2.0, 6.0]).expand(1, 2, 3)[..., None])[0, 0].flatten().tolist()
        [3.0, 3.0, 3.0]
        >>> core.bandwidth.tolist()
        [0.5, 0.5]
    """

    def __init__(
        self, heads: int, width: int | None = None, *, kernel: str = "gaussian", bandwidth: float = 1.0
    ) -> None:
        super().__init__()
        self.kernel = kernel_named(kernel).name
        if not 0.0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth: expected a positive finite number, got {bandwidth}")
        shape = (heads,) if width is None else (heads, width)
        self.log_bandwidth = nn.Parameter(torch.full(shape, math.log(bandwidth)))

    @property
    def bandwidth(self) -> Tensor:
        """The bandwidths, differentiable."""
        return self.log_bandwidth.exp()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | str | Tensor | None = None,
        leave_one_out: bool = False,
        positions: Positions | None = None,
        key_padding: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | Attn:
        """Calls :func:`nadaraya_watson` with its bandwidths."""
        return nadaraya_watson(
            q,
            k,
            v,
            kernel=self.kernel,
            bandwidth=self.bandwidth,
            mask=mask,
            leave_one_out=leave_one_out,
            positions=positions,
            key_padding=key_padding,
            return_lse=return_lse,
        )


def kernel_weights(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    *,
    kernel: str = "gaussian",
    bandwidth: float | Float[Tensor, "*h"] | None = None,
    mask: Mask | str | Tensor | None = None,
    leave_one_out: bool = False,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> Attn:
    """The weights of :func:`nadaraya_watson`, every pair by the definition: to look at, not to compute with.

    Args:
        q, k, kernel, bandwidth, mask, leave_one_out, positions, key_padding: As there.

    Returns:
        ``out`` (B, Hq, Nq, Nk), rows that sum to one or are zero, and ``lse`` (B, Hq, Nq), the logarithm of the sums of
        the weights before they were divided; float32, or float64 for float64.

    Example:
        >>> k = torch.arange(3.0).view(1, 1, 3, 1)
        >>> kernel_weights(k, k, kernel="triangular", bandwidth=2.0).out[0, 0, 0].tolist()
        [0.6666666865348816, 0.3333333432674408, 0.0]
    """
    chosen = kernel_named(kernel)
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    precision = torch.as_tensor(_precision(bandwidth, q), dtype=wide, device=q.device)
    precision = precision.expand(1, 1, 1, 1) if precision.dim() == 0 else precision
    area = as_mask(_without_self(mask) if leave_one_out else mask)
    allowed = area.dense(q.shape[2], k.shape[2], positions=positions).to(q.device)
    if key_padding is not None:
        allowed = allowed & key_padding[:, None, None]
        k = k.masked_fill(~key_padding[:, None, :, None], 0.0)
    q = q.to(wide)
    dots = (q * precision) @ k.mT
    r = (_length(q, precision)[..., None] - 2.0 * dots + _length(k, precision)[..., None, :]).clamp_min(0.0)
    if chosen.weight == "softmax":  # exponentials, relative to their largest
        log = {"gaussian": -0.5 * r, "constant": 0.0 * r}.get(chosen.name, dots)
        log = log.masked_fill(~allowed, -torch.inf)
        empty = ~allowed.any(-1, keepdim=True).expand(*log.shape[:3], 1)
        lse = log.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
        return Attn((log - lse).exp(), lse.masked_fill(empty, -torch.inf)[..., 0])
    raw = chosen.profile(r, r).masked_fill(~allowed, 0.0)
    total = raw.sum(-1, keepdim=True)
    return Attn(raw / total.masked_fill(total == 0, 1.0), total[..., 0].log())


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    kernel: str = "gaussian",
    bandwidth: float | Float[Tensor, "*h"] | None = None,
    mask: Mask | str | Tensor | None = None,
    leave_one_out: bool = False,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """The distance of every query to every key, through the kernel, times the values."""
    weights, lse = kernel_weights(
        q, k, kernel=kernel, bandwidth=bandwidth, mask=mask, leave_one_out=leave_one_out, positions=positions,
        key_padding=key_padding,
    )  # fmt: skip
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    if key_padding is not None:
        v = v.masked_fill(~key_padding[:, None, :, None], 0.0)
    out = (weights.to(v.dtype).to(weights.dtype) @ v.to(weights.dtype)).to(v.dtype)
    return Attn(out, lse) if return_lse else out


# --- lowering ---------------------------------------------------------------------------------------------------


def _soft(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: float | Tensor,
    mask: Mask | str | Tensor | None,
    positions: Positions | None,
    key_padding: Tensor | None,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Exponential kernels as a softmax: of the Gaussian, what depends on the query alone cancels."""
    scale = 1.0 if isinstance(precision, Tensor) else precision
    bias = own = None
    if kernel.name == "gaussian" and q.shape[2] and k.shape[2]:
        bias = PerKey(-0.5 * _length(_by_query_head(k, q), precision))
        own = 0.5 * _length(q, precision) if return_lse else None
    if isinstance(precision, Tensor):
        q = q * precision
    scale = 0.0 if kernel.name == "constant" else scale
    got = attention(q, k, v, mask=mask, scale=scale, bias=bias, positions=positions, key_padding=key_padding,
                    return_lse=return_lse, backend=backend)  # fmt: skip
    if not isinstance(got, Attn):
        return got, None
    return got.out, got.lse if own is None else got.lse - own


def _edged(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: float | Tensor,
    mask: Mask | str | Tensor | None,
    positions: Positions | None,
    key_padding: Tensor | None,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Kernels with an edge: a score that is the squared distance, by channels for ``|q|^2`` and ``|k|^2``."""
    by_feature = isinstance(precision, Tensor) and precision.shape[-1] > 1
    own = _length(q, precision)[..., None]
    spread = precision * torch.ones_like(q if by_feature else own)
    squares = k * k if by_feature else (k * k).sum(-1, keepdim=True)
    k = torch.cat([k, k.new_ones(*k.shape[:3], 1), squares], -1)
    q = q * precision
    if kernel.weight == "relu":  # 1 - r
        q, scale = torch.cat([2.0 * q, 1.0 - own, -spread], -1), 1.0
    else:
        q, scale = torch.cat([-2.0 * q, own, spread], -1), 1.0
    if kernel.weight == "boxcar":
        scale = 1.0 - _EDGE
    area = as_mask(mask) if isinstance(mask, Tensor) else "full" if mask is None else mask
    got = tiled(q, k, v, area, scale=scale, weight=kernel.weight, positions=positions, key_padding=key_padding,
                return_lse=return_lse, backend=backend)  # fmt: skip
    return (got.out, got.lse) if isinstance(got, Attn) else (got, None)


def _precision(bandwidth: Bandwidth | None, q: Tensor) -> float | Tensor:
    """``1 / h^2``: a number, or a tensor (1, Hq | 1, 1, D | 1)."""
    heads, width = q.shape[1], q.shape[3]
    if bandwidth is None:
        return width**-0.5
    if not isinstance(bandwidth, Tensor):
        h = float(bandwidth)
        largest = torch.finfo(torch.promote_types(q.dtype, torch.float32)).max
        if not h > 0.0 or not h * h > 1.0 / largest:
            raise ValueError(f"bandwidth: expected a positive number whose inverse square is finite, got {bandwidth}")
        return h**-2
    if not bandwidth.is_floating_point():
        raise TypeError(f"bandwidth: expected a floating tensor, got {bandwidth.dtype}")
    if tuple(bandwidth.shape) not in ((), (heads,), (heads, width), (1, width)):
        raise ValueError(
            f"bandwidth: expected shape (), (Hq={heads},), (Hq={heads}, D={width}) or (1, D={width}), "
            f"got {tuple(bandwidth.shape)}"
        )
    if not torch.compiler.is_compiling() and bandwidth.device.type == "cpu" and not bool((bandwidth > 0).all()):
        raise ValueError(f"bandwidth: expected positive numbers, got {float(bandwidth.min()):.4g}")
    h_wide = bandwidth.to(torch.promote_types(bandwidth.dtype, torch.float32))
    return (h_wide.view(1, h_wide.shape[0], 1, -1) if h_wide.dim() else h_wide.view(1, 1, 1, 1)) ** -2


def _centred(q: Tensor, k: Tensor, key_padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and keys counted from the mean key, in channels that lie far from zero: no distance changes."""
    real = k.new_ones(1, 1, 1, 1) if key_padding is None else key_padding[:, None, :, None].to(k.dtype)
    count = (real * torch.ones_like(k[..., :1])).sum(2, keepdim=True).clamp_min(1.0)
    mean = (k.detach() * real).sum(2, keepdim=True) / count
    spread = ((k.detach() - mean).square() * real).sum(2, keepdim=True) / count
    mean = torch.where(mean.square() > 4.0 * spread, mean, 0.0)
    mean = torch.where(mean.isfinite(), mean, 0.0)
    return q - _by_query_head(mean, q), k - mean


def _by_query_head(t: Tensor, q: Tensor) -> Tensor:
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1) if t.shape[1] != q.shape[1] else t


def _length(t: Tensor, precision: float | Tensor) -> Tensor:
    """``sum_d t_d^2 / h_d^2`` of every token, in float32 or wider."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    return (t * t * precision).sum(-1)


def _root(r: Tensor) -> Tensor:
    """The square root, with slope 0 at 0."""
    return torch.where(r > 0, torch.where(r > 0, r, 1.0).sqrt(), 0.0)


def _without_self(mask: Mask | str | Tensor | None) -> Mask | str:
    if mask is None or isinstance(mask, str):
        return "~window(1)" if mask is None else f"({mask}) & ~window(1)"
    return as_mask(mask) & ~Window(1)


SPEC = Spec(
    "nadaraya-watson",
    fn=nadaraya_watson,
    reference=reference,
    paper="Nadaraya, On estimating regression, 1964; Watson, Smooth regression analysis, 1964",
    inputs=qkv(mask=lambda size: "causal" if size.causal else None),
    backends=("reference", "blocked"),  # the kernels too, for some of its kernels: see Conventions
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
        "lse",
        "backward",
    },
    invariances=("packed", "padding", "batch", "heads"),
    axes={"carrier": "any mask", "kernel": "classical", "estimator": "local constant", "execution": "tiles"},
    flops=exact.flops,
    bytes=exact.traffic,
)
