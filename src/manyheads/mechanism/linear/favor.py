"""Performers: softmax attention estimated with positive orthogonal random features (FAVOR+)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from manyheads.common import checks
from manyheads.common.directions import Norms, gaussian, orthogonal
from manyheads.common.errors import unknown
from manyheads.common.features import FeatureMap, Positive, Rectified
from manyheads.engine.scan import State
from manyheads.mask import Mask
from manyheads.mechanism import exact
from manyheads.mechanism.carrier import order
from manyheads.spec import Case, Size, Spec, qkv

from . import kernelized as linear

KERNELS = ("positive", "hyperbolic", "relu")
"""Features that a Performer can use: of the softmax kernel, of both signs, or generalised."""


def favor_attention(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    projection: Float[Tensor, "m D"] | None,
    kernel: str = "positive",
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    eps: float | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    state: State | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B H Nq Dv"] | tuple[Float[Tensor, "B H Nq Dv"], State]:
    r"""Estimates softmax attention with random features, in time linear in the number of tokens.

    $$o_i = \frac{\sum_j \phi(q_i) \cdot \phi(k_j)\; v_j}{\sum_j \phi(q_i) \cdot \phi(k_j)}, \qquad
    \phi(x)_r = \tfrac{1}{\sqrt m}\left(e^{w_r \cdot x - |x|^2/2} + \epsilon\right), \quad
    E\,\phi(q) \cdot \phi(k) \approx e^{\mathrm{scale}\; q \cdot k}$$

    with q and k multiplied by the square root of ``scale`` first. Causal calls are a scan that carries its largest
    exponent along; others are two sums over keys, shifted by the largest exponent of all. Neither shift changes a
    result, so later keys and padded ones have no influence, and pieces of a sequence add up.

    Args:
        q: (B, H, Nq, D), any floating dtype.
        k: (B, Hkv, Nk, D); H is a multiple of Hkv.
        v: (B, Hkv, Nk, Dv).
        projection: Random directions (m, D), from :func:`~manyheads.common.features.orthogonal`; None, which only
            ``"relu"`` takes, uses the channels themselves.
        kernel: ``"positive"``; ``"hyperbolic"``, which also uses the negative directions; or ``"relu"``, which
            estimates no softmax.
        mask: None or ``"full"`` for every key, ``"causal"``, ``Document(lengths)``, ``Document(lengths) & Causal()``.
        scale: Multiplies the dot products; default D ** -0.5.
        eps: A floor for every feature; default 1e-4, of ``"relu"`` 1e-3.
        key_padding: bool (B, Nk), True for real keys; the others may hold anything.
        state: What came before the first token of a causal call.
        return_state: Also return the state after a causal call.
        backend: ``"auto"``, ``"blocked"`` or ``"reference"``.

    Returns:
        (B, H, Nq, Dv) in the dtype of ``v``; with ``return_state`` also the :class:`State`.

    Raises:
        ValueError: For shapes that do not fit, an unknown kernel, or a state of a call that is not causal.
        TypeError: For wrong dtypes.
        UnsupportedError: For causal queries and keys of different lengths, or a mask other than those above.

    Conventions:
        Features and sums are float32 for inputs of half precision. The published code adds ``eps`` after it has
        subtracted the largest exponent, so that its floor rises with the largest key, even a later one; with
        ``eps=0`` both agree. Trigonometric features are in :mod:`manyheads.common.features`; their sums can be
        negative, and nothing can be divided by them.

    Source:
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794.

    Example:
        >>> from manyheads import attention
        >>> q = k = v = 0.5 * torch.eye(4)[None, None]
        >>> w = orthogonal(4096, 4, generator=torch.Generator().manual_seed(0))
        >>> bool((favor_attention(q, k, v, projection=w) - attention(q, k, v)).abs().max() < 0.01)
        True
    """
    checks.attention_inputs(q, k, v)
    causal, lens = order(SPEC, mask, q, default="full")
    SPEC.check(q, k, v, causal=causal)
    maps = linear.scaled(features_of(projection, kernel, eps), q.shape[3] ** -0.5 if scale is None else scale)
    return linear.attend(
        q,
        k,
        v,
        maps,
        causal=causal,
        lens=lens,
        key_padding=key_padding,
        state=state,
        return_state=return_state,
        backend=backend,
    )


def step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B Hkv D"],
    v: Float[Tensor, "B Hkv Dv"],
    state: State | None = None,
    *,
    projection: Float[Tensor, "m D"] | None,
    kernel: str = "positive",
    scale: float | None = None,
    eps: float | None = None,
) -> tuple[Float[Tensor, "B H Dv"], State]:
    """One token of the causal :func:`favor_attention`.

    Args:
        q, k, v: Of one token: (B, H, D), (B, Hkv, D), (B, Hkv, Dv).
        state: What came before; nothing by default.
        projection, kernel, scale, eps: As for :func:`favor_attention`.

    Returns:
        (B, H, Dv) in the dtype of ``v``, and the new state.

    Raises:
        ValueError: For shapes that do not fit or an unknown kernel.

    Example:
        >>> one, w = torch.ones(1, 1, 2), torch.ones(3, 2)
        >>> _, state = step(one, one, one, projection=w)
        >>> step(one, one, 3 * one, state, projection=w)[0]
        tensor([[[2., 2.]]])
    """
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return linear.step(q, k, v, state, features=features_of(projection, kernel, eps), scale=scale)


def reference(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    projection: Float[Tensor, "m D"] | None,
    kernel: str = "positive",
    mask: Mask | str | None = None,
    scale: float | None = None,
    eps: float | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> Float[Tensor, "B H Nq Dv"]:
    """Every pair at once: weights are products of features, written out, and normalised row by row."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    root = (q.shape[3] ** -0.5 if scale is None else scale) ** 0.5
    if key_padding is not None:
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    x, y = q.to(wide) * root, k.to(wide) * root
    if kernel == "relu":
        floor, m = 1e-3 if eps is None else eps, 1 if projection is None else projection.shape[0]
        x, y = (t if projection is None else t @ projection.to(wide).mT for t in (x, y))
        weights = (x.relu() * m**-0.5 + floor) @ (y.relu() * m**-0.5 + floor).mT
    else:
        assert projection is not None
        floor = 1e-4 if eps is None else eps
        w = projection.to(wide)
        w = torch.cat([w, -w]) if kernel == "hyperbolic" else w
        rows, cols = (t @ w.mT - t.square().sum(-1, keepdim=True) / 2 for t in (x, y))
        rows = _with_floor(rows, rows.amax(-1, keepdim=True).detach(), floor)  # constants that the division cancels
        cols = _with_floor(cols, cols.amax((-2, -1), keepdim=True).detach(), floor)
        weights = rows @ cols.mT
    return linear.average(q, v, weights, mask, key_padding)


def _with_floor(exponents: Tensor, shift: Tensor, floor: float) -> Tensor:
    """``(exp(exponents) + floor) / exp(shift)``, the shift raised to what the floor needs."""
    if floor:
        shift = shift.clamp(min=math.log(floor))
    return (exponents - shift).exp() + floor * (-shift).exp()


class Performer(nn.Module):
    """The core of a Performer: :func:`favor_attention` with directions of its own, drawn anew in training.

    Put it into :class:`manyheads.nn.Attention` as ``core=`` for the layer with projections. The directions are a
    buffer, so they are saved with the model. Call :meth:`advance` once per training step.

    Args:
        width: Channels D of a head.
        features: Random directions m; default ``D * ln(D)``, rounded down, at least 1.
        kernel: As for :func:`favor_attention`.
        causal: What no mask means.
        eps: As for :func:`favor_attention`.
        norms: Lengths of the directions, ``"chi"`` or ``"constant"``; see :mod:`manyheads.common.features`.
        iid: Draw directions independently instead.
        redraw_every: Training steps between draws; None keeps the first.
        generator: Source of the first draw.

    Raises:
        ValueError: For an unknown kernel or numbers out of range.

    Example:
        >>> core = Performer(8, 64, causal=True, generator=torch.Generator().manual_seed(0))
        >>> core(*torch.randn(3, 2, 4, 10, 8)).shape
        torch.Size([2, 4, 10, 8])
    """

    projection: Tensor
    steps: Tensor

    def __init__(
        self,
        width: int,
        features: int | None = None,
        *,
        kernel: str = "positive",
        causal: bool = False,
        eps: float | None = None,
        norms: Norms = "chi",
        iid: bool = False,
        redraw_every: int | None = 1000,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise unknown("kernel of a Performer", kernel, KERNELS)
        if redraw_every is not None and redraw_every < 1:
            raise ValueError(f"redraw_every: expected at least 1 step or None, got {redraw_every}")
        self.width = width
        self.features = max(int(width * math.log(width)), 1) if features is None else features
        self.kernel, self.causal, self.eps, self.norms, self.iid = kernel, causal, eps, norms, iid
        self.redraw_every = redraw_every
        self.register_buffer("projection", self._draw(generator))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        q: Float[Tensor, "B H Nq D"],
        k: Float[Tensor, "B Hkv Nk D"],
        v: Float[Tensor, "B Hkv Nk Dv"],
        *,
        mask: Mask | str | Tensor | None = None,
        scale: float | None = None,
        key_padding: Bool[Tensor, "B Nk"] | None = None,
    ) -> Float[Tensor, "B H Nq Dv"]:
        """Attention with the present directions; arguments as for :func:`favor_attention`."""
        mask = ("causal" if self.causal else "full") if mask is None else mask
        out = favor_attention(
            q,
            k,
            v,
            projection=self.projection,
            kernel=self.kernel,
            mask=mask,
            scale=scale,
            eps=self.eps,
            key_padding=key_padding,
        )
        assert isinstance(out, Tensor)
        return out

    def step(
        self,
        q: Float[Tensor, "B H D"],
        k: Float[Tensor, "B Hkv D"],
        v: Float[Tensor, "B Hkv Dv"],
        state: State | None = None,
        *,
        scale: float | None = None,
    ) -> tuple[Float[Tensor, "B H Dv"], State]:
        """One token of causal attention; arguments as for :func:`step`."""
        return step(q, k, v, state, projection=self.projection, kernel=self.kernel, scale=scale, eps=self.eps)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draws new directions in place. A state made with the old ones is of no use afterwards.

        Args:
            generator: Source of randomness; torch's default when missing.
        """
        self.projection.copy_(self._draw(generator))

    def advance(self, generator: torch.Generator | None = None) -> bool:
        """Counts a training step, and draws new directions when they are due; in evaluation it does nothing.

        Args:
            generator: Source of randomness; torch's default when missing.

        Returns:
            Whether new directions were drawn.

        Example:
            >>> core = Performer(8, redraw_every=3)
            >>> [core.advance() for _ in range(6)]
            [False, False, True, False, False, True]
        """
        if not self.training or self.redraw_every is None:
            return False
        self.steps += 1
        if int(self.steps) < self.redraw_every:
            return False
        self.steps.zero_()
        self.redraw(generator)
        return True

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        if self.iid:
            return gaussian(self.features, self.width, generator=generator)
        return orthogonal(self.features, self.width, norms=self.norms, generator=generator)

    def extra_repr(self) -> str:
        """What the module's text says about it."""
        return f"width={self.width}, features={self.features}, kernel={self.kernel!r}, causal={self.causal}"


def features_of(projection: Tensor | None, kernel: str, eps: float | None) -> FeatureMap:
    """The feature map of a kernel's name.

    Args:
        projection: (m, D), or None for ``"relu"``.
        kernel: One of ``KERNELS``.
        eps: A floor for every feature; None for the kernel's own.

    Returns:
        The map.

    Raises:
        ValueError: For an unknown kernel, or a missing projection.

    Example:
        >>> features_of(None, "relu", None).eps
        0.001
    """
    if kernel not in KERNELS:
        raise unknown("kernel of a Performer", kernel, KERNELS)
    if kernel == "relu":
        return Rectified(projection, 1e-3 if eps is None else eps)
    if projection is None:
        raise ValueError(f"projection: kernel {kernel!r} needs random directions (m, D), got None")
    return Positive(projection, kernel == "hyperbolic", 1e-4 if eps is None else eps)


def flops(case: Case) -> int:
    """Counts the operations of the projections and of both products with the features.

    Args:
        case: The call.

    Returns:
        ``2 * B * (H * Nq + Hkv * Nk) * m * (D + Dv + 1)``.
    """
    q, k, v, options = case
    m = options["projection"].shape[0] * (2 if options.get("kernel") == "hyperbolic" else 1)
    rows = q.numel() // q.shape[3] + k.numel() // k.shape[3]
    return 2 * rows * m * (q.shape[3] + v.shape[3] + 1)


def _projection(size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(size.seed or 0)
    dtype = torch.float64 if size.dtype == torch.float64 else torch.float32
    return orthogonal(24, size.width, generator=generator, dtype=dtype, device=size.device)


SPEC = Spec(
    "performer-favor",
    fn=favor_attention,
    step=step,
    reference=reference,
    paper="Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794",
    inputs=qkv(mask=lambda size: "causal" if size.causal else None, projection=_projection),
    backends=("reference", "blocked"),
    supports=linear.SPEC.supports,
    invariances=linear.SPEC.invariances,
    axes={"carrier": "all or earlier tokens", "kernel": "exp", "estimator": "average", "execution": "scan, sums"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_favor::test_products_of_features_estimate_the_kernel_within_their_standard_error",
        2: "test_favor::test_orthogonal_directions_err_less_than_independent_ones",
        3: "test_favor::test_positive_features_are_quiet_where_the_kernel_is_small",
        4: "test_favor::test_positive_features_are_positive",
        5: "test_favor::test_the_recurrence_equals_the_masked_parallel_form",
        6: "test_favor::test_many_features_approach_softmax_attention",
        7: "test_favor::test_blocks_of_directions_are_orthogonal",
    },
)
