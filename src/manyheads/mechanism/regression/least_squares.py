"""The least-squares layer: the linear map that fits all keys and values so far best, read at the query."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.common import checks
from manyheads.mask import Mask
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Spec, drawn, qkv

_CHUNK = 64
_TINY = 64 * torch.finfo(torch.float64).eps


class LeastSquaresState(NamedTuple):
    """What recursive least squares remembers, in float64.

    Attributes:
        P: ``(B, Hkv, D, D)``, the inverse of the decayed sum of ``k k^T`` and ridge.
        M: ``(B, Hkv, D, Dv)``, the fitted map: the output is ``M^T q``.
    """

    P: Tensor
    M: Tensor


def least_squares(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    decay: Float[Tensor, "*gate"] | None = None,
    ridge: float | Float[Tensor, "*ridge"] = 0.01,
    mask: Mask | str | None = None,
    scale: float | None = None,
    state: LeastSquaresState | None = None,
    return_state: bool = False,
    chunk: int = _CHUNK,
) -> Float[Tensor, "B Hq Nq Dv"] | tuple[Float[Tensor, "B Hq Nq Dv"], LeastSquaresState]:
    r"""Fits ``v = M^T k`` by ridge regression to all tokens up to each, and evaluates every fit at its query.

    $$M_t = \arg\min_M \sum_{i \le t} \gamma^{t-i} |v_i - M^\top k_i|^2 + \lambda \gamma^t |M|^2,
    \qquad o_t = \mathrm{scale}\; M_t^\top q_t$$

    Linear attention is one gradient step of the same problem, and lacks the inverse of the covariance of the keys.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D); query heads of a key head share its state.
        v: (B, Hkv, Nk, Dv).
        decay: Log decay log(gamma), at most 0 and finite: per key head (Hkv,) or per token (B, Hkv, Nk).
        ridge: lambda > 0, a number or (Hkv,); it decays with the tokens.
        mask: None or ``"causal"``, or ``Document(lens) & Causal()``.
        scale: Multiplies the queries; 1 by default.
        state: What came before the first token; ``ridge`` is then ignored, but for packed documents after the first.
        return_state: Also return the state after all tokens.
        chunk: Tokens solved together; it changes no result.

    Returns:
        (B, Hq, Nq, Dv); with ``return_state`` also a :class:`LeastSquaresState`.

    Raises:
        ValueError: Shapes or ranges that do not fit; a system that is singular to working precision.
        UnsupportedError: Another mask: :func:`ridge_regression` is the fit to all tokens at once.

    Conventions:
        The solves run in float64 whatever the dtype: keys that repeat make them ill-conditioned. One Cholesky
        factorisation of D x D and one of chunk x chunk serve a whole chunk; time and memory are linear in tokens, and
        the backward keeps O(N / chunk) states. A strong decay forgets the ridge too: when the keys that it leaves do
        not span the channels, the call is refused.

    Source:
        Wang et al., Test-time regression, arXiv 2501.12352, section 4; recursive least squares, Gauss.

    Example:
        >>> k = torch.eye(3).view(1, 1, 3, 3)
        >>> v = torch.tensor([[2.0], [3.0], [5.0]]).view(1, 1, 3, 1)
        >>> least_squares(k, k, v, ridge=1e-9)[0, 0, :, 0].round(decimals=4).tolist()
        [2.0, 3.0, 5.0]
    """
    checks.attention_inputs(q, k, v)
    causal, lens = order(SPEC, mask, q)
    SPEC.check(q, k, v, causal=causal)
    _check(q, k, decay, ridge, chunk)
    dtype = v.dtype
    q, k, v = (t.to(torch.float64) for t in (q, k, v))
    q = q if scale is None else q * scale
    log = _by_token(decay, k)
    start = _started(state, k, v, ridge)
    if lens is None:
        out, end = _chunked(q, k, v, log, start, chunk)
    else:
        back, (q, k, v, log) = _split(lens, q, k, v, log[..., None])
        out, end = _chunked(q, k, v, log[..., 0], back.started(start, _started(None, k, v, ridge)), chunk)
        out, end = back.joined(out), back.ended(end)
    return (out.to(dtype), end) if return_state else out.to(dtype)


def ridge_regression(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    ridge: float | Float[Tensor, "*ridge"] = 0.01,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> Float[Tensor, "B Hq Nq Dv"]:
    r"""One linear fit to all keys and values, read at every query.

    $$o_i = V^\top K (K^\top K + \lambda I)^{-1} q_i$$

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        ridge: lambda >= 0, a number or (Hkv,); it may be 0 where the keys span all channels.
        key_padding: bool (B, Nk), True for real keys.

    Returns:
        (B, Hq, Nq, Dv), computed in float64.

    Raises:
        ValueError: Shapes that do not fit; a system that is singular to working precision.

    Example:
        >>> k = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
        >>> ridge_regression(k, k, 2 * k, ridge=14.0).flatten().tolist()
        [1.0, 2.0, 3.0]
    """
    checks.attention_inputs(q, k, v)
    _check(q, k, None, ridge, 1)
    dtype = v.dtype
    if key_padding is not None:
        checks.key_padding(key_padding, k)
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    q, k, v = (t.to(torch.float64) for t in (q, k, v))
    floor = torch.as_tensor(ridge, dtype=k.dtype, device=k.device)
    floor = floor[:, None, None] if floor.dim() else floor
    gram = k.mT @ k + floor * torch.eye(k.shape[3], dtype=k.dtype, device=k.device)
    fit = torch.cholesky_solve(k.mT @ v, _factor(gram))
    return (q.unflatten(1, (k.shape[1], -1)) @ fit[:, :, None]).flatten(1, 2).to(dtype)


def step(
    q: Float[Tensor, "B Hq D"],
    k: Float[Tensor, "B Hkv D"],
    v: Float[Tensor, "B Hkv Dv"],
    state: LeastSquaresState | None = None,
    *,
    decay: Float[Tensor, "*gate"] | None = None,
    ridge: float | Float[Tensor, "*ridge"] = 0.01,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B Hq Dv"], LeastSquaresState]:
    r"""One token of recursive least squares, in time that does not depend on how many came before.

    $$P_t = \frac{1}{\gamma}\Big(P - \frac{P k k^\top P}{\gamma + k^\top P k}\Big), \qquad
    M_t = M_{t-1} + P_t k_t (v_t - M_{t-1}^\top k_t)^\top$$

    Args:
        q: (B, Hq, D).
        k: (B, Hkv, D).
        v: (B, Hkv, Dv).
        state: What came before; nothing by default.
        decay: Log decay (Hkv,) or (B, Hkv).
        ridge, scale: As for :func:`least_squares`; ``ridge`` counts in the first step only.

    Returns:
        Output (B, Hq, Dv) and the new state.

    Raises:
        ValueError: Shapes or ranges that do not fit.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> out, state = step(one, one, 3 * one, ridge=1.0)
        >>> out, state = step(one, one, 3 * one, state)
        >>> out.item()
        2.0
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions (B, H, D) of one token, got shape {tuple(t.shape)}")
    gate = decay[..., None] if decay is not None and decay.dim() == 2 else decay
    checks.attention_inputs(q[:, :, None], k[:, :, None], v[:, :, None])
    _check(q[:, :, None], k[:, :, None], gate, ridge, 1)
    dtype = v.dtype
    keys, values = k.to(torch.float64), v.to(torch.float64)
    P, M = _started(state, keys[:, :, None], values[:, :, None], ridge)
    gamma = torch.ones((), dtype=P.dtype, device=P.device) if decay is None else decay.to(P.dtype).exp()
    gamma = gamma[..., None, None]
    Pk = P @ keys[..., None]
    gain = Pk / (gamma + keys[..., None, :] @ Pk)
    P = (P - gain @ Pk.mT) / gamma
    M = M + gain @ (values[..., None, :] - keys[..., None, :] @ M)
    rows = q.to(P.dtype).unflatten(1, (k.shape[1], -1)) * (1.0 if scale is None else float(scale))
    return (rows @ M).flatten(1, 2).to(dtype), LeastSquaresState(P, M)


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    decay: Float[Tensor, "*gate"] | None = None,
    ridge: float | Float[Tensor, "*ridge"] = 0.01,
    mask: Mask | str | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B Hq Nq Dv"]:
    """The normal equations of every query, solved one by one: ``(K^T G K + ridge g^t I)^-1 K^T G V`` at the query."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group, dtype = q.shape[1] // k.shape[1], v.dtype
    q, k, v = (t.to(wide) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    seen = visible(mask, q)
    log = _by_token(decay, k[:, ::group]).to(wide).repeat_interleave(group, 1)
    since = log.cumsum(-1)
    weights = (since[..., :, None] - since[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    first = seen.int().argmax(-1).expand(since.shape)  # of its document, from where on the ridge decays too
    before = since - (since - log).gather(-1, first)
    floor = torch.as_tensor(ridge, dtype=wide, device=q.device)
    floor = floor.repeat_interleave(group)[:, None] if floor.dim() else floor
    gram = torch.einsum("bhij,bhjc,bhjd->bhicd", weights, k, k)
    gram = gram + torch.diag_embed((floor * before.exp())[..., None].expand(q.shape))
    cross = torch.einsum("bhij,bhjc,bhje->bhice", weights, k, v)
    fitted = torch.linalg.solve(gram, cross)
    return (torch.einsum("bhic,bhice->bhie", q, fitted) * (1.0 if scale is None else scale)).to(dtype)


# --- the fits of a chunk ----------------------------------------------------------------------------------------


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, log: Tensor, start: LeastSquaresState, chunk: int
) -> tuple[Tensor, LeastSquaresState]:
    """All fits, and the last: within a chunk, a Gaussian process that starts from the fit before it."""
    b, heads, n, d = k.shape
    group = q.shape[1] // heads
    if n == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), start
    size = min(chunk, n)
    short = -n % size  # padding writes nothing and forgets nothing
    q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, short)) for t in (q, k, v))
    q = q.view(b, heads, group, -1, size, d).transpose(2, 3)
    k, v = (t.unflatten(2, (-1, size)) for t in (k, v))
    since = torch.nn.functional.pad(log, (0, short)).unflatten(2, (-1, size)).cumsum(-1)
    # sums of k k^T and k v^T before every chunk and after the last
    later = (since[..., -1:] - since).exp()[..., None] * k
    grams, crosses, keep = later.mT @ k, later.mT @ v, since[..., -1].exp()[..., None, None]
    info = torch.cholesky_inverse(_factor(start.P))
    total = info @ start.M
    infos, totals = [info], [total]
    for gram, cross, kept in zip(grams.unbind(2), crosses.unbind(2), keep.unbind(2), strict=True):
        infos.append(kept * infos[-1] + gram)
        totals.append(kept * totals[-1] + cross)
    roots = _factor(torch.stack(infos, 2))
    fits = torch.cholesky_solve(torch.stack(totals, 2), roots)
    end = LeastSquaresState(torch.cholesky_inverse(roots[:, :, -1]), fits[:, :, -1])
    roots, fits = roots[:, :, :-1], fits[:, :, :-1]
    # with noise exp(since), leading blocks of one factorisation serve every token of the chunk
    keys = torch.linalg.solve_triangular(roots, k.mT, upper=False)
    rows = torch.linalg.solve_triangular(roots, q.flatten(3, 4).mT, upper=False)
    inner = _factor(keys.mT @ keys + torch.diag_embed(since.exp()))
    both = torch.cat([v - k @ fits, keys.mT @ rows], -1)
    errors, scores = torch.linalg.solve_triangular(inner, both, upper=False).split([v.shape[-1], group * size], -1)
    scores = scores.mT.unflatten(-2, (group, size)).tril()
    out = q @ fits[:, :, :, None] + scores @ errors[:, :, :, None]
    return out.transpose(2, 3).reshape(b, heads * group, -1, v.shape[-1])[:, :, :n], end


def _factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a system, which must have a solution; where reading it does not wait for a device."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not torch.compiler.is_compiling() and matrix.device.type == "cpu" and matrix.numel():
        with torch.no_grad():
            left = root.diagonal(dim1=-2, dim2=-1).square() / matrix.diagonal(dim1=-2, dim2=-1)
            if bool(failed.any()) or not bool((left > _TINY).all()):
                raise ValueError(
                    "ridge: the least-squares system is singular to working precision; use a larger ridge, or a "
                    "weaker decay, which forgets the ridge and the keys that span the rest"
                )
    return root


def _started(state: LeastSquaresState | None, k: Tensor, v: Tensor, ridge: float | Tensor) -> LeastSquaresState:
    b, heads, _, d = k.shape
    shapes = (b, heads, d, d), (b, heads, d, v.shape[3])
    if state is None:
        value = torch.as_tensor(ridge, dtype=k.dtype, device=k.device)
        if not isinstance(ridge, Tensor) and not ridge > 0:
            raise ValueError(f"ridge: the first tokens alone never determine a fit; expected ridge > 0, got {ridge}")
        value = value[:, None, None] if value.dim() else value
        eye = torch.eye(d, dtype=k.dtype, device=k.device).expand(shapes[0])
        return LeastSquaresState(eye / value, k.new_zeros(shapes[1]))
    if not isinstance(state, LeastSquaresState):
        raise TypeError(f"state: expected a LeastSquaresState, got {type(state).__name__}")
    for name, t, shape in zip(("P", "M"), state, shapes, strict=True):
        if tuple(t.shape) != shape or t.dtype != torch.float64:
            raise ValueError(f"state: {name} must be float64 of shape {shape}, got {t.dtype} of {tuple(t.shape)}")
    return state


def _by_token(decay: Tensor | None, k: Tensor) -> Tensor:
    """Log decays ``(B, Hkv, N)`` in float64."""
    if decay is None:
        return torch.zeros(k.shape[:3], dtype=torch.float64, device=k.device)
    decay = decay.to(torch.float64)
    return decay[None, :, None].expand(k.shape[:3]) if decay.dim() == 1 else decay


def _check(q: Tensor, k: Tensor, decay: Tensor | None, ridge: float | Tensor, chunk: int) -> None:
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: expected a positive number of tokens, got {chunk!r}")
    b, heads, n, _ = k.shape
    readable = not torch.compiler.is_compiling() and k.device.type == "cpu"
    if decay is not None:
        if not isinstance(decay, Tensor) or not decay.is_floating_point():
            got = decay.dtype if isinstance(decay, Tensor) else type(decay).__name__
            raise TypeError(f"decay: expected a floating tensor, got {got}")
        if tuple(decay.shape) not in ((heads,), (b, heads, n)):
            raise ValueError(
                f"decay: expected shape (Hkv={heads},) or (B={b}, Hkv={heads}, N={n}), got {tuple(decay.shape)}"
            )
        if readable and decay.numel() and not bool(((decay <= 0) & decay.isfinite()).all()):
            raise ValueError(
                f"decay: expected finite log decays of at most 0, got {float(decay.min()):.4g} to "
                f"{float(decay.max()):.4g}"
            )
    if isinstance(ridge, Tensor):
        if tuple(ridge.shape) not in ((), (heads,)):
            raise ValueError(f"ridge: expected a number or shape (Hkv={heads},), got {tuple(ridge.shape)}")
        if readable and not bool((ridge > 0).all()):
            raise ValueError(f"ridge: expected positive numbers, got {float(ridge.min()):.4g}")
    elif not 0.0 <= ridge < math.inf:
        raise ValueError(f"ridge: expected a number of at least 0, got {ridge}")


# --- packed documents as rows of their own ----------------------------------------------------------------------


class _Documents:
    """Where the documents of packed rows lie, and how to put their results together again."""

    def __init__(self, lens: Tensor, batch: int, device: torch.device) -> None:
        rows = torch.atleast_2d(lens).to("cpu", torch.int64)
        self.lens = rows.expand(batch, -1)
        longest = torch.arange(int(self.lens.max()))
        starts = self.lens.cumsum(1) - self.lens
        self.real = (longest < self.lens[..., None]).to(device)
        self.index = (starts[..., None] + longest.clamp_max(10**9)).clamp_max(int(rows[0].sum()) - 1).to(device)
        self.row = torch.arange(batch, device=device)[:, None, None]
        found = (self.lens > 0) * torch.arange(self.lens.shape[1])
        self.last = found.argmax(1).to(device)

    def rows(self, t: Tensor) -> Tensor:
        """``(B, H, N, X)`` as ``(B * documents, H, longest, X)``, zeros behind the ends."""
        cut = t.transpose(1, 2)[self.row, self.index] * self.real[..., None, None]
        return cut.flatten(0, 1).transpose(1, 2)

    def joined(self, t: Tensor) -> Tensor:
        """Back to ``(B, H, N, X)``."""
        parts = t.transpose(1, 2).unflatten(0, self.lens.shape)[self.real]
        return parts.unflatten(0, (self.lens.shape[0], -1)).transpose(1, 2)

    def started(self, first: LeastSquaresState, fresh: LeastSquaresState) -> LeastSquaresState:
        """The state of every row's first document is the call's; the others start anew."""
        docs = self.lens.shape[1]
        own = (torch.arange(self.lens.numel(), device=self.row.device) % docs == 0)[:, None, None, None]
        return LeastSquaresState(
            *(torch.where(own, a.repeat_interleave(docs, 0), b) for a, b in zip(first, fresh, strict=True))
        )

    def ended(self, end: LeastSquaresState) -> LeastSquaresState:
        """The state that left the last document with tokens."""
        at = torch.arange(len(self.last), device=self.last.device), self.last
        return LeastSquaresState(*(t.unflatten(0, self.lens.shape)[at] for t in end))


def _split(lens: Tensor, *tensors: Tensor) -> tuple[_Documents, list[Tensor]]:
    found = _Documents(lens, tensors[0].shape[0], tensors[0].device)
    return found, [found.rows(t) for t in tensors]


def flops(case: Case) -> int:
    """Counts the operations of a forward call in chunks.

    Args:
        case: The call.

    Returns:
        Products, triangular solves and factorisations over all heads.
    """
    (b, heads, n, d), width = case.k.shape, case.v.shape[3]
    c, rows = min(_CHUNK, n), case.q.shape[1] * n
    keys = heads * n
    states = 2 * d * (d + width) + (d**3 // 3 + 2 * d * d * width) // c + d * d + 2 * c * d + c * c // 3 + c * width
    reads = d * d + 2 * d * (c + width) + c * c + c * width
    return b * (keys * states + rows * reads)


def traffic(case: Case) -> int:
    """Counts the bytes that have to move at least once: inputs and output.

    Args:
        case: The call.

    Returns:
        Bytes.
    """
    out = case.q.shape[0] * case.q.shape[1] * case.q.shape[2] * case.v.shape[3]
    return sum(t.numel() * t.element_size() for t in case[:3]) + out * case.v.element_size()


SPEC = Spec(
    "least-squares",
    fn=least_squares,
    reference=reference,
    paper="Wang et al., Test-time regression, arXiv 2501.12352",
    inputs=qkv(
        decay=drawn("BGN", lambda t: -0.02 * t.square()),
        ridge=1.0,
        mask=lambda size: "causal" if size.causal else "full",
    ),
    gates={"decay": "BGN"},
    step=step,
    supports={"causal_self", "gqa", "value_width", "backward", "decode"},
    invariances=("packed", "batch", "split"),
    axes={"carrier": "causal", "kernel": "linear", "estimator": "ridge regression", "execution": "chunks"},
    flops=flops,
    bytes=traffic,
)
