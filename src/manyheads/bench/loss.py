"""What a sparse mechanism loses on given queries, keys and values, against dense attention in float64.

Nothing of the size N x N is held: rows are judged in chunks, one batch entry and head after the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.bench import device
from manyheads.bench.oracle import visible
from manyheads.bench.timing import interleave
from manyheads.mask import Mask, TileLayout, as_mask
from manyheads.mask.evaluate import unpack
from manyheads.mask.runs import lookup
from manyheads.spec import Spec, find, registry

ROWS = 256
"""Query rows that are judged unless more are asked for."""
TOP = 64
"""Keys of a row that count as its top ones."""
_CELLS = 1 << 22  # scores held at once in float64: 32 MiB

Chosen = TileLayout | Tensor
"""What a selection gives: tiles; token ids ``(B|1, 1|Hkv|Hq, Nq, K)``, -1 for none; or bool pairs ``(..., Nq, Nk)``."""


class Lost(NamedTuple):
    """What a mechanism loses, and what choosing costs.

    Attributes:
        error: Frobenius norm of the output's difference from dense attention in float64, over that of the latter.
        worst: Largest absolute difference.
        rounding: Like ``error``, against float64 attention to the chosen keys alone: what is left is arithmetic, or
            what a mechanism does beside attending to its keys.
        mass: Share of dense attention's weight that lies on the chosen keys, the mean over rows and heads.
        lowest: The same for the head that keeps the least.
        recall: Share of each row's ``top`` heaviest keys that are chosen, the mean over rows and heads.
        top: How many keys count as the top ones.
        pairs: Chosen pairs, over batch and query heads.
        area: Those as a share of the pairs of dense attention.
        tiles: Visited tiles, over batch and query heads; None where tokens are chosen.
        density: Those as a share of the tiles that dense attention visits.
        selection_ms: Median time of choosing alone; None where nothing was timed.
        total_ms: Median time of the whole call, choosing included.
        rows: Query rows that were judged, in each head.
    """

    error: float
    worst: float
    rounding: float
    mass: float
    lowest: float
    recall: float
    top: int
    pairs: int
    area: float
    tiles: int | None
    density: float | None
    selection_ms: float | None
    total_ms: float | None
    rows: int

    @property
    def selection(self) -> float | None:
        """Choosing as a share of the whole time."""
        return self.selection_ms / self.total_ms if self.selection_ms is not None and self.total_ms else None


def lost(
    mechanism: str | Spec | Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: Mapping[str, Any] | None = None,
    selection: Callable[..., Any] | None = None,
    mask: Mask | str = "causal",
    top: int = TOP,
    rows: int | None = ROWS,
    budget_s: float | None = 0.5,
    seed: int = 0,
) -> Lost:
    """Measures what a mechanism that chooses its keys loses against attention to all of them.

    Args:
        mechanism: A slug or a declaration with a ``selection``; or any function ``fn(q, k, v, **options)``.
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        options: Keyword arguments of the mechanism. ``scale`` also holds for dense attention.
        selection: From the same arguments to what is visited: a :class:`TileLayout`, or token ids
            (B|1, 1|Hkv|Hq, Nq, K) padded with -1, bool pairs (B|1, 1|Hkv|Hq, Nq, Nk), or one of them with the order of
            the keys (B, Hkv or Hq, Nk) that its columns stand for. By default the mechanism's own.
        mask: What dense attention sees, and what the mechanism is given where it takes a mask.
        top: Keys of a row that count as its top ones.
        rows: Query rows to judge, drawn by ``seed``, the last one included; None for all.
        budget_s: Seconds of timing for each of selection and whole; None to time nothing.
        seed: Draws the rows.

    Returns:
        What is lost.

    Raises:
        ValueError: A mechanism that chooses nothing, a function without ``selection``, a selection over other tokens,
            or numbers below 1.
        TypeError: A selection that is neither a layout nor integer ids.

    Example:
        >>> from manyheads.testing import sample_qkv
        >>> q, k, v = sample_qkv(1, 2, 64, seed=0)
        >>> mask = as_mask("causal & window(16)")
        >>> found = lost(
        ...     lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(64, 64)),
        ...     q, k, v, selection=lambda q, k, v: mask.tiles(64, tile=(8, 8)), rows=None, budget_s=None,
        ... )
        >>> found.pairs, round(found.area, 3), 0 < found.mass < 1
        (1808, 0.435, True)
    """
    for name, value in (("top", top), ("rows", rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    dense = as_mask(mask)
    fn, choose = _functions(mechanism, selection)
    given = dict(options or {})
    if "mask" not in given and "mask" in inspect.signature(fn).parameters:
        given["mask"] = dense
    own = {name: value for name, value in given.items() if name not in ("backend", "return_lse")}
    with torch.no_grad():
        chosen, order = _parts(choose(q, k, v, **own), q, k)
        out = _output(fn(q, k, v, **given))
        picked = _rows(q.shape[2], rows, seed)
        scale = given.get("scale")
        scale = q.shape[3] ** -0.5 if scale is None else scale
        found: dict[str, Any] = _judged(q, k, v, out, chosen, order, dense, picked, scale, top)
        times = {}
        if budget_s is not None:
            calls = {"selection": lambda: choose(q, k, v, **own), "whole": lambda: fn(q, k, v, **given)}
            watch = device.stopwatch(str(q.device))
            taken = interleave(calls, budget_s=budget_s, rounds=(3, 50), warm=True, watch=watch)
            times = {name: timing.median_ms for name, timing in taken.items()}
    return Lost(
        **found,
        **counts(chosen, dense, q, k),
        top=top,
        selection_ms=times.get("selection"),
        total_ms=times.get("whole"),
        rows=len(picked),
    )


def counts(chosen: Chosen, dense: Mask, q: Tensor, k: Tensor) -> dict[str, Any]:
    """Pairs and tiles that a selection visits, and their shares of dense attention's.

    Args:
        chosen: The selection.
        dense: What dense attention sees.
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).

    Returns:
        ``pairs``, ``area``, ``tiles`` and ``density``, as in :class:`Lost`.

    Example:
        >>> q = torch.ones(1, 2, 4, 8)
        >>> counts(torch.tensor([[[[0], [1], [2], [-1]]]]), as_mask("causal"), q, q)["pairs"]
        6
    """
    batch, heads, nq, nk = *q.shape[:3], k.shape[2]
    tile = chosen.tile if isinstance(chosen, TileLayout) else (128, 128)
    whole = dense.tiles(nq, nk, tile=tile, batch=batch, heads=heads)
    if isinstance(chosen, TileLayout):
        each = batch * heads // (chosen.batch * chosen.heads)
        pairs, tiles = chosen.pairs * each, chosen.visited * each
        return {"pairs": pairs, "area": pairs / whole.pairs, "tiles": tiles, "density": tiles / whole.visited}
    each = batch * heads // (chosen.shape[0] * chosen.shape[1])
    pairs = int((chosen if chosen.dtype == torch.bool else chosen >= 0).sum()) * each
    return {"pairs": pairs, "area": pairs / whole.pairs, "tiles": None, "density": None}


def seen(chosen: Chosen, b: int, h: int, rows: Tensor, keys: int, heads: int) -> Tensor:
    """The pairs that a selection visits on some query rows of one head.

    Args:
        chosen: The selection.
        b: Batch entry.
        h: Query head.
        rows: (R,) query rows.
        keys: Nk.
        heads: Query heads Hq of the call.

    Returns:
        bool (R, Nk), on the CPU.

    Example:
        >>> layout = as_mask("causal").tiles(5, tile=(2, 2))
        >>> seen(layout, 0, 0, torch.tensor([0, 3]), 5, 1).int().tolist()
        [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    """
    rows = rows.cpu()
    if isinstance(chosen, Tensor):
        own = chosen[b if chosen.shape[0] > 1 else 0, h * chosen.shape[1] // heads]
        ids = own[rows.to(own.device)].cpu()
        if ids.dtype == torch.bool:
            return ids
        ids = ids.long()
        found = torch.zeros(len(rows), keys + 1, dtype=torch.bool)
        found.scatter_(1, torch.where(ids < 0, keys, ids), True)  # padding goes to a column that is cut off
        return found[:, :keys]
    (bm, bn), (tall, wide) = chosen.tile, chosen.grid
    runs = chosen.to_runs()
    index = runs.index
    row_set = int(index[b if index.shape[0] > 1 else 0, h if index.shape[1] > 1 else 0])
    at = rows.numpy()
    tiles = lookup(runs.runs, row_set * tall + at[:, None] // bm, np.arange(wide)[None])
    bits = unpack(runs.bits.cpu().numpy(), bn)
    # mask ids count from 1; 0 is all visible, and what is not visited has the last id
    full, none = np.ones((1, bm, bn), dtype=bool), np.zeros((1, bm, bn), dtype=bool)
    lines = np.concatenate([full, bits, none])[tiles, at[:, None] % bm]
    return torch.from_numpy(lines.reshape(len(at), wide * bn)[:, :keys])


def _functions(
    mechanism: str | Spec | Callable[..., Any], selection: Callable[..., Any] | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if isinstance(mechanism, str):
        mechanism = find(mechanism)
    if not isinstance(mechanism, Spec):
        if selection is None:
            raise ValueError("selection: a function needs one that says what it visits")
        return mechanism, selection
    own = selection or mechanism.selection
    if own is None:
        can = ", ".join(slug for slug, spec in sorted(registry().items()) if spec.selection)
        raise ValueError(f"mechanism: {mechanism.slug} chooses no keys; those that do: {can or 'none'}")
    return mechanism.fn, own


def _parts(found: Any, q: Tensor, k: Tensor) -> tuple[Chosen, Tensor | None]:
    """The selection and the order of the keys that its columns stand for, checked."""
    order = None
    if isinstance(found, tuple):
        found, order = found[0], found[1]
    nq, nk = q.shape[2], k.shape[2]
    if isinstance(found, TileLayout):
        if (found.nq, found.nk) != (nq, nk):
            raise ValueError(f"selection: expected a layout of {nq} x {nk} tokens, got {found.nq} x {found.nk}")
    elif not isinstance(found, Tensor) or found.is_floating_point():
        raise TypeError(f"selection: expected a TileLayout or integer ids, got {type(found).__name__}")
    elif found.dim() != 4 or found.shape[2] != nq:
        raise ValueError(f"selection: expected ids (B, H, {nq}, K), got {tuple(found.shape)}")
    return found, order


def _output(result: Any) -> Tensor:
    out = result if isinstance(result, Tensor) else result[0]
    assert isinstance(out, Tensor)
    return out


def _rows(count: int, wanted: int | None, seed: int) -> Tensor:
    if wanted is None or wanted >= count:
        return torch.arange(count)
    drawn = np.random.default_rng(seed).choice(count, size=wanted, replace=False)
    drawn[-1] = count - 1
    return torch.from_numpy(np.unique(drawn))


def _judged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    chosen: Chosen,
    order: Tensor | None,
    dense: Mask,
    rows: Tensor,
    scale: float,
    top: int,
) -> dict[str, float]:
    """Error, mass and recall over the rows of every head."""
    (batch, heads), nk, group = q.shape[:2], k.shape[2], q.shape[1] // k.shape[1]
    wrong = size = worst = hits = asked = inexact = inner = 0.0
    masses = torch.zeros(batch, heads, dtype=torch.float64)
    judged = 0
    for part in rows.split(max(1, _CELLS // nk)):
        allowed = visible(dense, part.numpy(), q.shape[2], nk)
        for b in range(batch):
            for h in range(heads):
                own = allowed[b if allowed.shape[0] > 1 else 0, h if allowed.shape[1] > 1 else 0].to(q.device)
                keys, values = k[b, h // group].double(), v[b, h // group].double()
                scores = (q[b, h, part.to(q.device)].double() @ keys.mT * scale).masked_fill(~own, -torch.inf)
                weights = scores.softmax(-1).nan_to_num()  # a row that sees nothing has no weights
                exact = weights @ values
                away = out[b, h, part.to(q.device)].double() - exact
                wrong, size = wrong + float(away.square().sum()), size + float(exact.square().sum())
                worst = max(worst, float(away.abs().max()))
                kept = seen(chosen, b, h, part, nk, heads).to(q.device)
                if order is not None:
                    kept = torch.zeros_like(kept).scatter_(1, _of_head(order, b, h, heads, len(part)), kept)
                kept &= own
                inside = scores.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num() @ values
                off = out[b, h, part.to(q.device)].double() - inside
                inexact, inner = inexact + float(off.square().sum()), inner + float(inside.square().sum())
                masses[b, h] += float((weights * kept).sum() / (weights.sum(-1) > 0).sum().clamp(min=1)) * len(part)
                best = scores.topk(min(top, nk), -1)
                real = best.values > -torch.inf
                hits += float((kept.gather(1, best.indices) & real).sum())
                asked += float(real.sum())
        judged += len(part)
    masses /= judged
    return {
        "error": (wrong / size) ** 0.5 if size else 0.0,
        "worst": worst,
        "rounding": (inexact / inner) ** 0.5 if inner else 0.0,
        "mass": float(masses.mean()),
        "lowest": float(masses.amin()),
        "recall": hits / asked if asked else 1.0,
    }


def _of_head(order: Tensor, b: int, h: int, heads: int, rows: int) -> Tensor:
    own = order[b if order.shape[0] > 1 else 0, h * order.shape[1] // heads]
    return own.long()[None].expand(rows, -1)
