"""BLASST: exact attention that leaves out key tiles whose best score lies far below the best one so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.engine.result import Attn
from manyheads.engine.tiled import skipping, tiled
from manyheads.mask import Document, Mask, TileLayout, as_mask
from manyheads.mask.build import build
from manyheads.mechanism import exact, select
from manyheads.spec import Case, Spec, qkv

Tile = tuple[int, int]
THRESHOLDS = tuple(m * 10.0**e for e in range(-6, -1) for m in (1.0, 3.0)) + (0.1,)
"""Thresholds that a calibration tries by default."""


def blasst(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    threshold: float = 1e-3,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    tile: Tile = (128, 128),
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""Softmax attention that visits the key tiles of a query tile in order and skips those that cannot matter much.

    With $\tilde m_{ij}$ the best score of row $i$ in tile $j$ and $m_{ij}$ the best one up to it, tile $j$ is skipped
    when

    $$\tilde m_{ij} - m_{ij} < \ln \lambda \quad \text{for every row } i \text{ of the query tile.}$$

    What is skipped is missing from the denominator too, and every skipped weight is below $\lambda$ relative to the
    largest one of its row. The rule is one-sided and depends on the order of the keys: a tile that was kept early may
    prove negligible later, and nothing is undone. There is no predictor: the products of queries and keys are all
    computed; exponentials, values and the second product are what is saved.

    Training with the same skips (the paper's sparsity-aware training) needs nothing more: the decision is a constant,
    and what is skipped gets no gradient. A call of few queries is the decode form, with one running maximum over all
    keys; kernels that split the keys know only that of their part, and skip less.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D); Hq is a multiple of Hkv.
        v: (B, Hkv, Nk, Dv).
        threshold: $\lambda$ in [0, 1); 0 skips nothing. :meth:`Fit.threshold` finds it for a sparsity and a length.
        mask: Any mask; None for all pairs. Tiles are cut anew in each of packed documents.
        scale: Multiplies the scores; D ** -0.5 by default.
        tile: Queries and keys that are decided together.
        return_lse: Also return the log of the normaliser, that of the tiles that were kept.
        backend: As in :func:`manyheads.engine.tiled.tiled`.

    Returns:
        (B, Hq, Nq, Dv), or :class:`manyheads.Attn` with lse (B, Hq, Nq).

    Raises:
        ValueError: A threshold outside [0, 1), a tile without queries or keys, shapes that do not fit.

    Conventions:
        The rows of a tile decide together, so a later query of the same tile can keep keys for an earlier one: the
        output never sees later keys under a causal mask, but which of the keys in its own tile are kept may depend
        on them.

    Source:
        BLASST: Dynamic Blocked Attention Sparsity via Softmax Thresholding, arXiv 2512.12087.

    Example:
        >>> q, k = torch.ones(1, 1, 4, 1), torch.tensor([9.0, 9.0, 0.0, 0.0]).view(1, 1, 4, 1)
        >>> v = torch.arange(4.0).view(1, 1, 4, 1)
        >>> blasst(q, k, v, threshold=1e-3, tile=(4, 2)).flatten().tolist()      # the second tile is left out
        [0.5, 0.5, 0.5, 0.5]
    """
    lens = _prepared(q, k, v, threshold, mask, tile, return_lse)
    options: dict[str, Any] = {"scale": scale}
    options |= {"skip_threshold": threshold, "tile": tile, "return_lse": return_lse, "backend": backend}
    if lens is None:
        return tiled(q, k, v, mask if isinstance(mask, Mask | str) else as_mask(mask), **options)
    parts, documents = _cut(q, k, v, lens, tile, mask)
    queries, keys, values = parts.tensors
    got = tiled(queries, keys, values, documents, key_padding=parts.key_padding(q.shape[0]), **options)
    return Attn(*map(parts.restore, got)) if isinstance(got, Attn) else parts.restore(got)


def selection(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    threshold: float = 1e-3,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    tile: Tile = (128, 128),
) -> TileLayout | Bool[Tensor, "B Hq Nq Nk"]:
    """What :func:`blasst` keeps: a layout; of packed documents the pairs."""
    lens = _prepared(q, k, v, threshold, mask, tile, False)
    floor = math.log(threshold) if threshold else -math.inf
    if lens is None:
        layout = _layout(mask, q, k, tile)
        return skipping.only(layout, (_gaps(q, k, layout, scale) >= floor).cpu())
    parts, documents = _cut(q, k, v, lens, tile, mask)
    queries, keys, _ = parts.tensors
    layout = _layout(documents, queries, keys, tile, parts.key_padding(q.shape[0]))
    kept = skipping.only(layout, (_gaps(queries, keys, layout, scale) >= floor).cpu())
    return select.pairs(kept, q, k, parts=parts)


class Skipped(NamedTuple):
    """How much a call skips.

    Attributes:
        visited: int64 (B, Hq): tiles that hold a visible pair.
        skipped: int64 (B, Hq): of them, those left out.
    """

    visited: Int[Tensor, "B Hq"]
    skipped: Int[Tensor, "B Hq"]

    @property
    def sparsity(self) -> float:
        """Share of the tiles that is left out."""
        return float(self.skipped.sum() / self.visited.sum().clamp(min=1))


def skipped_tiles(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    thresholds: Sequence[float],
    *,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    tile: Tile = (128, 128),
) -> list[Skipped]:
    """Counts what each of some thresholds would skip, from one dense pass over the scores.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        thresholds: In [0, 1).
        mask, scale, tile: As for :func:`blasst`.

    Returns:
        A count for each threshold.

    Raises:
        ValueError: As :func:`blasst`.

    Example:
        >>> q, k = torch.ones(1, 1, 4, 1), torch.tensor([9.0, 9.0, 0.0, 0.0]).view(1, 1, 4, 1)
        >>> [count.sparsity for count in skipped_tiles(q, k, [1e-6, 1e-3], tile=(4, 2))]
        [0.0, 0.5]
    """
    for threshold in thresholds:
        _prepared(q, k, k, threshold, mask, tile, False)
    gaps = _gaps(q, k, _layout(mask, q, k, tile), scale)
    visited = (gaps > -math.inf).sum((2, 3))
    floors = [math.log(t) if t else -math.inf for t in thresholds]
    return [Skipped(visited, ((gaps < floor) & (gaps > -math.inf)).sum((2, 3))) for floor in floors]


@dataclass(frozen=True)
class Fit:
    r"""The threshold for a sparsity and a length: $\lambda = a\, e^{b s} / L$.

    Attributes:
        a: Positive factor.
        b: Growth with the sparsity.
    """

    a: float
    b: float

    def threshold(self, sparsity: float, length: int) -> float:
        """The threshold that should skip a share of the tiles of a sequence.

        Args:
            sparsity: The share, in [0, 1).
            length: Keys of the call.

        Returns:
            A threshold for :func:`blasst`, below 1.

        Raises:
            ValueError: A sparsity outside [0, 1), or no keys.

        Example:
            >>> Fit(a=0.5, b=6.0).threshold(0.0, 1000)
            0.0005
        """
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity: expected a share in [0, 1), got {sparsity}")
        if length < 1:
            raise ValueError(f"length: expected at least 1 key, got {length}")
        return min(self.a * math.exp(self.b * sparsity) / length, math.nextafter(1.0, 0.0))


def fit(points: Iterable[tuple[int, float, float]], *, least: float = 0.05, most: float = 0.95) -> Fit:
    r"""Fits $\lambda L = a\, e^{b s}$ by least squares of the logarithms.

    Args:
        points: Triples of keys L, threshold and the sparsity that it gave, of one phase (prefill or decode).
        least, most: Points of a sparsity outside are left out: where nothing or everything is skipped, a threshold says
            nothing about it.

    Returns:
        The :class:`Fit`.

    Raises:
        ValueError: Fewer than two sparsities between ``least`` and ``most``.

    Example:
        >>> fit([(100, 0.001 * math.exp(4.0 * s), s) for s in (0.25, 0.5, 0.75)])
        Fit(a=0.1, b=4.0)
    """
    kept = [(s, math.log(t * n)) for n, t, s in points if least <= s <= most and t > 0]
    if len({s for s, _ in kept}) < 2:
        raise ValueError(
            f"points: a fit needs two sparsities or more between {least} and {most}, got {len(kept)} points there; "
            "try other thresholds or longer sequences"
        )
    s, y = torch.tensor(kept, dtype=torch.float64).T
    b = float(((s - s.mean()) * (y - y.mean())).sum() / (s - s.mean()).square().sum())
    return Fit(round(math.exp(float(y.mean() - b * s.mean())), 12), round(b, 12))


def calibrate(
    samples: Iterable[tuple[Tensor, Tensor]],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    mask: Mask | str | None = "causal",
    scale: float | None = None,
    tile: Tile = (128, 128),
) -> Fit:
    """Fits :class:`Fit` to queries and keys of one phase, each sample scored once.

    Args:
        samples: Pairs q (B, Hq, Nq, D) and k (B, Hkv, Nk, D) of several lengths; of decode steps, few queries.
        thresholds: What is tried.
        mask, scale, tile: As the calls will have them.

    Returns:
        The fit; keep it with :func:`manyheads.mechanism.select.save`.

    Raises:
        ValueError: As :func:`fit`: no threshold skips a share between the extremes.
    """
    points = []
    for q, k in samples:
        counts = skipped_tiles(q, k, thresholds, mask=mask, scale=scale, tile=tile)
        points += [(k.shape[2], t, count.sparsity) for t, count in zip(thresholds, counts, strict=True)]
    return fit(points)


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    threshold: float = 1e-3,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    tile: Tile = (128, 128),
    return_lse: bool = False,
    chosen: TileLayout | Tensor | None = None,
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """All scores, tile by tile through the rule, and an exact softmax over what it keeps."""
    seen = as_mask(mask).dense(q.shape[2], k.shape[2]).expand(*q.shape[:3], -1)
    if chosen is not None:
        seen = seen & select.pairs(chosen, q, k)
    else:
        s = (q.double() @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).double().mT).detach()
        s = (s * (q.shape[3] ** -0.5 if scale is None else scale)).masked_fill(~seen, -math.inf)
        lens = _lens(mask)
        lens = torch.tensor([q.shape[2]]) if lens is None else lens
        kept = torch.zeros_like(seen)
        for b in range(q.shape[0]):
            end = 0
            for n in (lens if lens.dim() == 1 else lens[b]).tolist():
                own = slice(end, end := end + n)
                columns = own if _lens(mask) is not None else slice(None)
                kept[b, :, own, columns] = _kept(s[b, :, own, columns], tile, threshold)
        seen = seen & kept
    return exact.reference(q, k, v, mask=seen, scale=scale, return_lse=return_lse)


def _kept(s: Tensor, tile: Tile, threshold: float) -> Tensor:
    """The rule for one document: bool like its scores ``(H, Nq, Nk)``."""
    kept = torch.zeros_like(s, dtype=torch.bool)
    for h in range(s.shape[0]):
        for i in range(0, s.shape[1], tile[0]):
            best = s.new_full((len(s[h, i : i + tile[0]]),), -math.inf)
            for j in range(0, s.shape[2], tile[1]):
                top = s[h, i : i + tile[0], j : j + tile[1]].amax(-1)
                near = top >= torch.maximum(best, top) + (math.log(threshold) if threshold else -math.inf)
                if bool((near & (top > -math.inf)).any()):
                    kept[h, i : i + tile[0], j : j + tile[1]] = True
                    best = torch.maximum(best, top)
    return kept


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, mask: Mask | str | Tensor | None, tile: Tile, lse: bool
) -> Tensor | None:
    """Checks a call; the lengths of its documents, where it is packed and nothing else."""
    SPEC.check(q, k, v, lse=lse)
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold: expected a number in [0, 1), got {threshold}")
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"tile: expected two numbers of at least 1 (queries, keys), got {tile!r}")
    lens = _lens(mask)
    if lens is not None and tile[0] % tile[1] and tile[1] % tile[0]:
        raise ValueError(f"tile: with packed documents one size must divide the other, got {tile!r}")
    return lens


def _lens(mask: Mask | str | Tensor | None) -> Tensor | None:
    text = mask.text if isinstance(mask, Mask) else mask if isinstance(mask, str) else ""
    if "document" not in text:
        return None
    value = as_mask(mask)
    packed = value.text in ("document($0)", "causal & document($0)", "document($0) & causal")
    return value.data[0] if packed else None


def _cut(
    q: Tensor, k: Tensor, v: Tensor, lens: Tensor, tile: Tile, mask: Mask | str | Tensor | None
) -> tuple[select.Cut, Mask]:
    """Documents padded to whole tiles; the padding is documents of its own, so that no decision hears of it."""
    parts = select.cut(lens, q, k, v, block=max(tile))
    assert parts.lens is not None
    documents = Document(torch.stack([lens, parts.lens - lens], -1).flatten(-2))
    return parts, documents & as_mask("causal") if "causal" in as_mask(mask).text else documents


def _layout(
    mask: Mask | str | Tensor | None, q: Tensor, k: Tensor, tile: Tile, key_padding: Tensor | None = None
) -> TileLayout:
    padding = None if key_padding is None else key_padding.cpu()
    sizes: dict[str, Any] = {"batch": q.shape[0], "heads": q.shape[1], "key_padding": padding}
    return build(as_mask(mask), q.shape[2], k.shape[2], tile=tile, **sizes)


def _gaps(q: Tensor, k: Tensor, layout: TileLayout, scale: float | None) -> Tensor:
    with torch.no_grad():
        return skipping.gaps(q, k, layout, q.shape[3] ** -0.5 if scale is None else scale)


def flops(case: Case) -> int:
    """Counts the operations of a forward call that skips nothing: what it can save depends on the content.

    Args:
        case: The call.

    Returns:
        ``2 * pairs * (D + Dv)`` over all heads.
    """
    return exact.flops(case._replace(options={"mask": case.options.get("mask")}))


SPEC = Spec(
    "blasst",
    fn=blasst,
    reference=reference,
    selection=selection,
    paper="BLASST: Dynamic Blocked Attention Sparsity via Softmax Thresholding, arXiv 2512.12087",
    inputs=qkv(mask=lambda size: "causal" if size.causal else None, threshold=0.2, tile=(16, 16)),
    backends=("reference", "blocked"),
    supports={
        "noncausal_self", "causal_self", "noncausal_cross", "causal_cross", "mask", "gqa", "value_width", "lse",
        "backward",
    },  # fmt: skip
    invariances=("packed", "batch", "heads", "first_selected"),
    axes={"carrier": "tiles near the best score so far", "kernel": "exp", "estimator": "average", "execution": "tiles"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_blasst::test_a_threshold_of_zero_is_dense_bit_for_bit",
        2: "test_blasst::test_what_is_skipped_is_bounded",
        3: "test_blasst::test_a_huge_first_key_skips_the_rest_and_a_huge_last_key_nothing",
        4: "test_blasst::test_the_fit_recovers_its_parameters",
        5: "test_blasst::test_groups_equal_repeated_key_heads",
    },
)
