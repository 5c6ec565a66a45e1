"""SALE: prefill that estimates every score from 4 bits and visits the key blocks that hold a large one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.common.quantise import Quantised, Smoothed, quantise, smoothed
from manyheads.engine.result import Attn
from manyheads.engine.tiled import tiled
from manyheads.mask import Causal, Mask, TileLayout
from manyheads.mechanism import exact, select
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Spec, qkv

_KEYS = 1024  # keys of one product of the estimate
_DENSE = 1e-5  # thresholds below are 0
_STEP = 1e-10  # what divides by a step takes no smaller one: tokens of zeros have next to none


@dataclass(frozen=True)
class SALE:
    """Sizes of SALE, in tokens.

    Attributes:
        q_block: Queries that share a choice.
        k_block: Keys that are chosen together; divides ``q_block`` and ``segment``.
        window: Every query sees at least so many of the keys that end with its own.
        segment: Where the window begins is rounded down to a multiple of this.
        bits: Of the estimate, 4 or 8.
        share: Tokens that share a scale when they are rounded.
        dense_up_to: Sequences of at most so many tokens are not sparse.

    Raises:
        ValueError: Sizes below 1, or that do not divide each other.
    """

    q_block: int = 64
    k_block: int = 32
    window: int = 128
    segment: int = 128
    bits: int = 4
    share: int = 1
    dense_up_to: int = 1024

    def __post_init__(self) -> None:
        for name in ("q_block", "k_block", "window", "segment", "share"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1 token, got {getattr(self, name)}")
        for name in ("q_block", "segment"):
            if getattr(self, name) % self.k_block:
                raise ValueError(f"{name}: expected a multiple of k_block={self.k_block}, got {getattr(self, name)}")

    def local(self, first: int) -> int:
        """Where the local area of the query block that begins at ``first`` begins."""
        return max(0, (first + 1 - self.window) // self.segment * self.segment)


def sale(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    threshold: float | Float[Tensor, " Hq"] = 0.004,
    config: SALE = SALE(),
    qk: str = "exact",
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq N Dv"] | Attn:
    r"""Causal softmax attention over the key blocks in which some estimated weight is large.

    The first key block and a local area are attended in any case, and give each query the largest score $m_i$ and the
    sum $l_i = \sum_j e^{s_{ij} - m_i}$ over them, exactly. Another key block is kept when some pair in it has

    $$e^{\tilde s_{ij} - m_i} / l_i \ge \tau, \qquad\text{that is}\qquad \tilde s_{ij} \ge \ln(\tau\, l_i) + m_i,$$

    its weight relative to them, not to the whole row, where $\tilde s$ comes from queries and keys of 4 bits whose
    means over tokens were taken off before (of the keys that changes no softmax, of the queries it is put back).
    No exponential is taken of what is estimated. What is kept is then computed exactly.

    Args:
        q: (B, Hq, N, D).
        k: (B, Hkv, N, D); Hq is a multiple of Hkv.
        v: (B, Hkv, N, Dv).
        threshold: $\tau \ge 0$ for all heads or (Hq,) for each, see :func:`calibrate`; below 1e-5 a head is dense.
        config: Sizes.
        qk: How the kept blocks multiply queries and keys: ``"exact"``, ``"int8"`` (SageAttention), ``"int4"``.
        mask: None or ``"causal"``; ``Document(lengths) & Causal()`` for packed documents, cut into blocks each.
        scale: Multiplies the scores; D ** -0.5 by default.
        return_lse: Also return the log of the normaliser, over the kept blocks.
        backend: As in :func:`manyheads.engine.tiled.tiled`.

    Returns:
        (B, Hq, N, Dv), or :class:`manyheads.Attn` with lse (B, Hq, N).

    Raises:
        ValueError: A negative threshold or one of another shape, shapes that do not fit.
        UnsupportedError: Another mask, queries and keys of different lengths, inputs that need gradients.

    Conventions:
        Means and scales are those of a whole document, later keys included, and the queries of a block choose together:
        the output never sees later keys, but which earlier ones it sees may depend on them.

    Source:
        Ji et al., SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling,
        arXiv 2505.24179.

    Example:
        >>> q = k = torch.zeros(1, 1, 8, 4)
        >>> small = SALE(q_block=2, k_block=2, window=2, segment=2, dense_up_to=0)
        >>> sale(q, k, torch.arange(8.0).view(1, 1, 8, 1), threshold=0.5, config=small).flatten()
        tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 2.5000, 3.2000, 3.8333])
    """
    lens = _prepared(q, k, v, mask, return_lse)
    parts = select.cut(lens, q, k, v, block=config.q_block)
    layout = _layout(q, k, parts, lens, _thresholds(threshold, q), config, scale)
    queries, keys, values = parts.tensors
    got = tiled(queries, keys, values, layout, scale=scale, qk=qk, return_lse=return_lse, backend=backend)
    return Attn(*map(parts.restore, got)) if isinstance(got, Attn) else parts.restore(got)


def selection(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    threshold: float | Float[Tensor, " Hq"] = 0.004,
    config: SALE = SALE(),
    qk: str = "exact",
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
) -> TileLayout | Bool[Tensor, "B Hq N N"]:
    """What :func:`sale` visits: a layout; of packed documents the pairs."""
    lens = _prepared(q, k, v, mask, False)
    parts = select.cut(lens, q, k, v, block=config.q_block)
    layout = _layout(q, k, parts, lens, _thresholds(threshold, q), config, scale)
    return layout if lens is None else select.pairs(layout, q, k, parts=parts)


def calibrate(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    error: float = 1.0,
    start: float = 0.008,
    config: SALE = SALE(),
    scale: float | None = None,
) -> Float[Tensor, " Hq"]:
    r"""Halves the threshold of each head until it changes the output of a prompt little enough.

    While $\sum |o_\text{sparse} - o_\text{dense}| \ge \text{error} \cdot B N$, the threshold is halved; at 1e-4 it
    becomes 0 and the head dense.

    Args:
        q, k, v: Of one prompt and layer, such as a retrieval over a long context.
        error: What the outputs of a token may differ by, summed over channels.
        start: The first threshold.
        config: Sizes.
        scale: As for :func:`sale`.

    Returns:
        Thresholds (Hq,) in float32; keep them with :func:`manyheads.mechanism.select.save`.

    Raises:
        ValueError: An error or start that is not positive.
    """
    for name, value in (("error", error), ("start", start)):
        if value <= 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    found = torch.full((q.shape[1],), float(start))
    dense = sale(q, k, v, threshold=0.0, config=config, scale=scale).float()  # type: ignore[union-attr]
    while True:
        sparse = sale(q, k, v, threshold=found, config=config, scale=scale).float()  # type: ignore[union-attr]
        off = ((sparse - dense).abs().sum((0, 2, 3)) >= error * q.shape[0] * q.shape[2]).cpu() & (found > 0)
        if not off.any():
            return found
        found = torch.where(off, found / 2, found)
        found = found.masked_fill(found <= 1e-4, 0.0)


# --- selection ----------------------------------------------------------------------------------------------------


def _layout(
    q: Tensor, k: Tensor, parts: select.Cut, lens: Tensor | None, tau: Tensor, config: SALE, scale: float | None
) -> TileLayout:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tokens = parts.length
    sizes = -(-tokens // config.q_block), -(-tokens // config.k_block)
    kept = torch.zeros(*q.shape[:2], *sizes, dtype=torch.bool, device=q.device)
    with torch.no_grad():
        for at, place in documents(lens, config.q_block, q):
            own = _blocks(q[at], k[at], tau, config, scale)
            rows, columns = place // config.q_block, place // config.k_block
            kept[at[0], :, rows : rows + own.shape[2], columns : columns + own.shape[3]] = own
    ids = torch.where(kept, torch.arange(sizes[1], device=q.device), -1)
    tile = (config.q_block, config.k_block)
    return TileLayout.from_ids(ids, nq=tokens, nk=tokens, tile=tile, mask=Causal(), batch=q.shape[0], heads=q.shape[1])


def documents(lens: Tensor | None, block: int, q: Tensor) -> list[tuple[tuple[slice, slice, slice], int]]:
    """Batch entries, heads and tokens of each document, and where it begins when all are padded to whole blocks."""
    every = slice(None)
    if lens is None:
        return [((every, every, every), 0)]
    found = []
    for b, own in enumerate(lens.tolist() if lens.dim() == 2 else [lens.tolist()]):
        start = place = 0
        for n in own:
            batch = every if lens.dim() == 1 else slice(b, b + 1)
            if n:
                found.append(((batch, every, slice(start, start + n)), place))
            start, place = start + n, place + -(-n // block) * block
    return found


def _blocks(q: Tensor, k: Tensor, tau: Tensor, config: SALE, scale: float) -> Tensor:
    """Which key blocks each query block of one document visits: bool ``(B, Hq, Tq, Tk)``."""
    n = q.shape[2]
    kept = select.block_causal(n, n, config.q_block, config.k_block, q.device)
    kept = kept.expand(*q.shape[:2], -1, -1).clone()
    if n <= config.dense_up_to:
        return kept
    estimate = _Estimate(q, k, config, scale)
    starts = range(0, n, config.q_block)
    for begin in sorted({config.local(first) for first in starts}):
        rows = [first for first in starts if config.local(first) == begin]
        if begin <= config.k_block:
            continue
        high = min(rows[-1] + config.q_block, n)
        bound = _bound(q[:, :, rows[0] : high], k, rows[0], begin, config, scale)
        bound = bound + tau.clamp_min(_DENSE).log().to(bound)[:, None]
        large = estimate.reaches(rows[0], bound, config.k_block, begin)
        far = slice(1, begin // config.k_block)
        own = slice(rows[0] // config.q_block, rows[0] // config.q_block + len(rows))
        kept[:, :, own, far] = large | (tau < _DENSE).to(q.device)[:, None, None]
    return kept


def _bound(q: Tensor, k: Tensor, first: int, begin: int, config: SALE, scale: float) -> Tensor:
    """``m + ln l`` of the first key block and the local area, for query rows from ``first``: ``(B, Hq, rows)``."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    keys = torch.cat([k[:, :, : config.k_block], k[:, :, begin : first + n]], 2)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.to(wide).unflatten(1, (-1, group)).flatten(2, 3)
    s = (rows @ keys.to(wide).mT).view(*q.shape[:3], -1) * scale
    later = torch.arange(begin, first + n, device=q.device) > torch.arange(first, first + n, device=q.device)[:, None]
    s[..., config.k_block :].masked_fill_(later, -math.inf)
    return s.logsumexp(-1)


class _Estimate:
    """Low-bit scores of one document against bounds, block by block."""

    def __init__(self, q: Tensor, k: Tensor, config: SALE, scale: float) -> None:
        self.q_block, self.scale = config.q_block, scale
        self.group = q.shape[1] // k.shape[1]
        self.parts: Smoothed = smoothed(q, k)
        self.q: Quantised = quantise(self.parts.queries, config.bits, block=config.share)
        self.k: Quantised = quantise(self.parts.keys, config.bits, block=config.share)
        self.known: dict[tuple[int, int], Tensor] = {}
        self.fast = q.device.type == "cpu" and q.dtype != torch.float64

    def reaches(self, first: int, bound: Tensor, block: int, end: int) -> Tensor:
        """Which key blocks from the second up to key ``end`` hold a score that reaches its row's bound.

        Args:
            first: First query row.
            bound: ``(B, Hq, rows)``.
            block: Keys of a block.
            end: A multiple of it.

        Returns:
            bool ``(B, Hq, query blocks, end / block - 1)``.
        """
        batch, heads, n = bound.shape
        blocks = -(-n // self.q_block)
        found = bound.new_zeros(batch, heads, blocks * self.q_block, end // block - 1, dtype=torch.bool)
        rows = slice(first, first + n)
        plain = not self.fast or self.scale <= 0
        shift = self.parts.row[:, :, rows]
        least = bound - shift * self.scale if plain else bound / self.scale - shift
        for b in range(batch):
            for g in range(heads // self.group):
                own = slice(g * self.group, (g + 1) * self.group)
                for low in range(block, end, _KEYS // block * block or block):
                    keys = slice(low, min(low + (_KEYS // block * block or block), end))
                    hit = (self._plainly if plain else self._signs)(b, g, own, rows, keys, least[b, own], block)
                    found[b, own, :n, low // block - 1 : keys.stop // block - 1] = hit
        return found.unflatten(2, (blocks, self.q_block)).any(3)

    def _plainly(
        self, b: int, g: int, own: slice, rows: slice, keys: slice, least: Tensor, block: int
    ) -> Tensor:
        """Which key blocks reach the bound of each row, ``(G, rows, blocks)``."""
        wide = least.dtype
        s = self.q.values[b, own, rows].to(wide) @ self.k.values[b, g, keys].to(wide).T
        s = s * self.q.steps[b, own, rows, None] * self.k.steps[b, g, keys] + self.parts.column[b, own, None, keys]
        return (s * self.scale >= least[..., None]).unflatten(-1, (-1, block)).any(-1)

    def _signs(self, b: int, g: int, own: slice, rows: slice, keys: slice, least: Tensor, block: int) -> Tensor:
        """The same from one bfloat16 product whose sign says it, the keys outermost.

        With steps a of queries and b of keys, ``a b x + c >= t`` is ``x + c/b 1/a - t/a 1/b >= 0``: two more terms,
        each of two numbers in two parts. The bits of bfloat16 are negative as 16-bit integers where it is negative,
        and the maximum of integers is much the faster one.
        """
        a = self.q.steps[b, own, rows].clamp_min(_STEP)
        left = [self.q.values[b, own, rows].to(torch.bfloat16), _thrice(1 / a, False), _thrice(-least / a, False)]
        queries = torch.cat(left, -1)
        out = []
        for h, row in enumerate(queries):
            s = torch.mm(self._right(b, g, own.start + h)[keys], row.T)
            out.append((s.view(torch.int16).unflatten(0, (-1, block)).amax(1) >= 0).T)
        return torch.stack(out)

    def _right(self, b: int, g: int, h: int) -> Tensor:
        """The keys' side of that product, for one query head; kept."""
        if (b, h) not in self.known:
            steps = self.k.steps[b, g].clamp_min(_STEP)
            more = _thrice(self.parts.column[b, h] / steps, True), _thrice(1 / steps, True)
            self.known[b, h] = torch.cat([self.k.values[b, g].to(torch.bfloat16), *more], -1)
        return self.known[b, h]


def _thrice(x: Tensor, second: bool) -> Tensor:
    """A factor of a product in two bfloat16 parts, laid out so that three columns multiply all that matters."""
    high = x.to(torch.bfloat16)
    low = (x - high).to(torch.bfloat16)
    return torch.stack([high, low, high] if second else [high, high, low], -1)


def _thresholds(threshold: float | Tensor, q: Tensor) -> Tensor:
    found = torch.as_tensor(threshold, dtype=torch.float32)
    if found.dim() and tuple(found.shape) != (q.shape[1],):
        raise ValueError(f"threshold: expected one number or shape (Hq={q.shape[1]},), got {tuple(found.shape)}")
    known = found.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and not bool((found >= 0).all()):
        raise ValueError(f"threshold: expected numbers of at least 0, got {float(found.min())}")
    return found.expand(q.shape[1]).to(q.device)


def _prepared(q: Tensor, k: Tensor, v: Tensor, mask: Mask | str | Tensor | None, lse: bool) -> Tensor | None:
    _, lens = order(SPEC, mask, q)
    SPEC.check(q, k, v, causal=True, lse=lse)
    return lens


# --- definition ---------------------------------------------------------------------------------------------------


def reference(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    threshold: float | Float[Tensor, " Hq"] = 0.004,
    config: SALE = SALE(),
    mask: Mask | str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    chosen: TileLayout | Tensor | None = None,
) -> Float[Tensor, "B Hq N Dv"] | Attn:
    """Every weight relative to sink and local area, block by block, and an exact softmax over what is kept."""
    seen = visible(mask, q).expand(*q.shape[:3], -1)
    if chosen is not None:
        seen = seen & select.pairs(chosen, q, k)
    else:
        lens = order(SPEC, mask, q)[1]
        kept = torch.zeros_like(seen)
        for at, _ in documents(lens, config.q_block, q):
            own = q[at].double(), k[at].double()
            kept[at[0], :, at[2], at[2]] = plain_choice(*own, _thresholds(threshold, q), config, scale)
        seen = seen & kept
    return exact.reference(q, k, v, mask=seen, scale=scale, return_lse=return_lse)


def plain_choice(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    threshold: Float[Tensor, " Hq"],
    config: SALE,
    scale: float | None = None,
    *,
    rounded: bool = True,
) -> Bool[Tensor, "B Hq N N"]:
    """Which pairs of one document lie in kept blocks, from weights written out; ``rounded=False``: of exact scores."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    parts = smoothed(q, k)
    low = [quantise(t, config.bits, block=config.share).dequantise() for t in (parts.queries, parts.keys)]
    s = q @ k.repeat_interleave(group, 1).mT * scale
    guess = low[0] @ low[1].repeat_interleave(group, 1).mT + parts.row[..., None] + parts.column[:, :, None]
    guess = guess * scale if rounded else s
    kept = torch.ones(*q.shape[:3], n, dtype=torch.bool)
    for first in range(0, n if n > config.dense_up_to else 0, config.q_block):
        rows = slice(first, first + config.q_block)
        key, row = torch.arange(n), torch.arange(n)[rows, None]
        near = ((key < config.k_block) | (key >= config.local(first))) & (key <= row)
        total = s[:, :, rows].exp().masked_fill(~near, 0.0).sum(-1, keepdim=True)
        for low_key in range(config.k_block, config.local(first), config.k_block):
            columns = slice(low_key, low_key + config.k_block)
            relative = (guess[:, :, rows, columns].exp() / total).amax((2, 3))
            keep = (relative >= threshold) | (threshold < _DENSE)
            kept[:, :, rows, columns] = keep[..., None, None]
    return kept


def flops(case: Case) -> int:
    """Counts a forward call: the estimate of every pair, and the two products if every block were kept.

    Args:
        case: The call.

    Returns:
        ``2 * pairs * (2 * D + Dv)`` over all heads.
    """
    pairs = exact.flops(case._replace(options={"mask": "causal"})) // (case.q.shape[3] + case.v.shape[3])
    return pairs * (2 * case.q.shape[3] + case.v.shape[3])


SPEC = Spec(
    "sale",
    fn=sale,
    reference=reference,
    selection=selection,
    paper="Ji et al., SALE: Low-bit Estimation for Efficient Sparse Attention, arXiv 2505.24179",
    inputs=qkv(
        mask=lambda size: "causal" if size.causal else "full",
        threshold=0.1,
        config=SALE(q_block=16, k_block=8, window=8, segment=8, dense_up_to=0),
    ),
    backends=("reference", "blocked"),
    supports={"causal_self", "gqa", "value_width", "lse"},
    invariances=("packed", "batch", "heads", "own_selected", "first_selected"),
    axes={"carrier": "blocks with a large estimated weight", "kernel": "exp", "estimator": "average",
          "execution": "tiles"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_sale::test_a_threshold_of_zero_is_dense",
        2: "test_sale::test_exact_scores_drop_only_blocks_of_small_weights",
        3: "test_sale::test_smoothing_changes_no_softmax",
        4: "test_quantise::test_no_element_is_off_by_more_than_half_a_step",
        5: "test_sale::test_short_sequences_are_dense",
        6: "test_sale::test_calibrated_thresholds_fall_with_the_error",
    },
)
