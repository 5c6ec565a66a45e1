"""Key tiles outermost on a GPU: lists by key tile, made where the ids are without waiting for them, and the launches.

What a launch needs has a static size: the entries of all key tiles are cut into pieces of at most ``PIECE``, of which
there is at most one for each list and one for each ``PIECE`` entries. Programs of pieces that are not there do
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...mask.layout import TileLayout
from ..gpu import interpreted, launch, padded, readable, tf32
from .order import sharing
from .problem import Problem
from .rows import fitting, kept, words

PIECE = 1024
"""Entries of a piece: a key tile that every query chose is shared by many programs."""

_PARTIAL = 1 << 30  # bytes of partial results that are held at a time


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of a layout by key tile, on the device.

    Entries are sorted by section, key tile and query. A section is a range of ``step`` queries of one list of ids;
    sections are numbered list by list.

    Attributes:
        heads: Query heads that share each list.
        lists: Lists of a batch entry.
        ranges: Sections of each list.
        step: Queries of a section.
        slots: Places for ids of a query.
        entry: int32: ``query * slots + slot`` of each.
        mask_id: int32: its bitmap.
        masked: Whether there are any.
        starts: int32 ``(sections * tiles + 1,)``: first entry of each list by key tile.
        pieces: int32 like ``starts``: first piece of each.
        counts: int32 ``(lists of all batch entries, Nq)``: slots that are filled.
        bits: Words of bitmaps.
    """

    heads: int
    lists: int
    ranges: int
    step: int
    slots: int
    entry: Tensor
    mask_id: Tensor
    masked: bool
    starts: Tensor
    pieces: Tensor
    counts: Tensor
    bits: Tensor


def forward(p: Problem, choose: Any) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser of a problem.

    Args:
        p: Plain, with one query a tile.
        choose: The configuration of a kernel, by its name.
    """
    call = _Call(p, "entries_forward", choose)
    b, h, nq, _ = p.q.shape
    dv = p.v.shape[3]
    out = p.v.new_empty(b, h, nq, dv, dtype=p.result(p.v.dtype))
    lse = torch.empty(b, h, nq, dtype=torch.float32, device=p.q.device)
    kept_dtype = p.wide or call.v.dtype == p.v.dtype
    values = out if kept_dtype else torch.empty_like(out, dtype=call.v.dtype)
    sink = call.nothing if p.sink is None else p.sink.to(torch.float32).contiguous()
    for first, sections in call.launches(dv):
        part = values.new_empty(sections * call.rows_of_section, dv)
        stats = torch.empty(len(part), dtype=torch.float32, device=part.device)
        given = {"part": part, "stats": stats, "EXP": call.config.exp if not interpreted() else 0}
        call.pieces(_kernels().entries_forward, first, sections, given)
        given |= {"out": values, "lse": lse, "sink": sink, "SINK": p.sink is not None}
        call.merge(first, sections, dv, given | {"WEIGHTED": True})
    return out if values is out else out.copy_(values), lse


def backward(p: Problem, lse: Tensor, delta: Tensor, dout: Tensor, choose: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values.

    Args:
        p: As for :func:`forward`.
        lse: Log-normaliser, infinite in rows that see nothing.
        delta: ``dout . out`` less the gradient of ``lse``.
        dout: Gradient of the output, readable.
        choose: The configuration of a kernel, by its name.
    """
    call = _Call(p, "entries_backward", choose)
    d, dv, bn = p.q.shape[3], p.v.shape[3], call.layout.tile[1]
    own = call.q.dtype
    every = list(call.launches(d))
    once = len(every) == 1
    grads = [
        torch.empty(t.shape, dtype=p.result(t.dtype if own == p.q.dtype else own), device=t.device)
        for t in (p.q, p.k, p.v)
    ]
    sums = grads[1:] if once else [torch.zeros_like(g, dtype=torch.float32) for g in grads[1:]]
    for first, sections in every:
        part = call.q.new_empty(sections * call.rows_of_section, d)
        most = call.most_pieces(sections)
        tiles = [torch.empty(most * bn, width, dtype=torch.float32, device=p.q.device) for width in (d, dv)]
        given: dict[str, Any] = {"part": part, "lse": lse, "delta": delta, "dout": dout, "dk": tiles[0], "dv": tiles[1]}
        given |= {f"sd{axis}": step for axis, step in zip("bhn", dout.stride()[:3], strict=True)}
        call.pieces(_kernels().entries_backward, first, sections, given)
        given |= {"stats": call.nothing, "sink": call.nothing, "out": grads[0], "SINK": False, "WEIGHTED": False}
        call.merge(first, sections, d, given)
        for total, of in zip(sums, tiles, strict=True):
            call.total(first, sections, total, of, not once)
    whole = (grads[0], *sums)
    dq, dk, dv_ = (g.to(p.result(t.dtype)) for g, t in zip(whole, (p.q, p.k, p.v), strict=True))
    return dq, dk, dv_


class _Call:
    """One kernel on one problem: its configuration, its lists, and what all launches share."""

    def __init__(self, p: Problem, kernel: str, choose: Any) -> None:
        self.p, self.config = p, choose(kernel)
        self.layout = fitting(p.layout, (1, self.config.bn), True)
        self.q, self.k, self.v = (readable(t) for t in (p.q, p.k, p.v))
        size = max(p.q.shape[3], p.v.shape[3]) * self.q.element_size()
        self.lists = entries_of(self.layout, p.q.device, p.q.shape[0], p.q.shape[1], p.k.shape[1], size)
        self.nothing = torch.empty(1, device=p.q.device)  # stands for what is not there; never read
        self.sections = p.q.shape[0] * self.lists.lists * self.lists.ranges
        self.rows_of_section = self.lists.heads * self.lists.step * self.lists.slots

    def launches(self, width: int) -> Iterator[tuple[int, int]]:
        """First section and number of sections of each launch."""
        section = self.rows_of_section * width * self.q.element_size()
        most = max(1, _PARTIAL // max(1, section))
        for first in range(0, self.sections, most):
            yield first, min(most, self.sections - first)

    def most_pieces(self, sections: int) -> int:
        """Pieces that some sections have at most."""
        return sections * (self.layout.grid[1] + self.lists.step * self.lists.slots // PIECE)

    def pieces(self, kernel: Any, first: int, sections: int, given: dict[str, Any]) -> None:
        """Runs a kernel over the pieces of some sections."""
        lists, tiles = self.lists, self.layout.grid[1]
        number = torch.arange(self.most_pieces(sections), device=self.p.q.device, dtype=torch.int32)
        number = number + lists.pieces[first * tiles]
        last = (first + sections) * tiles - 1
        owner = (torch.searchsorted(lists.pieces, number, right=True) - 1).clamp(max=last)
        start = lists.starts[owner] + (number - lists.pieces[owner]) * PIECE
        stop = torch.minimum(start + PIECE, lists.starts[owner + 1])
        given = given | {"owner": owner.to(torch.int32), "start": start, "stop": stop}
        self._launch(kernel, len(number), first, given)

    def merge(self, first: int, sections: int, width: int, given: dict[str, Any]) -> None:
        """Adds up the slots of the queries of some sections."""
        lists, kernel = self.lists, _kernels().merge_entries
        programs = sections * lists.heads * -(-lists.step // _MERGED)
        given = given | {"counts": lists.counts, "WIDTH": width, "PADDED": padded(width), "ROWS": _MERGED}
        self._launch(kernel, programs, first, given, config=False)

    def total(self, first: int, sections: int, out: Tensor, part: Tensor, add: bool) -> None:
        """Adds up the pieces of the key tiles of some sections."""
        lists, key_heads = self.lists, self.p.k.shape[1]
        each = lists.lists // key_heads
        one = each * lists.ranges  # sections of a key head
        n, stop = first // one, -(-(first + sections) // one)
        given = {
            "part": part, "out": out, "bounds": lists.pieces, "n": n, "each": each, "begin": first,
            "end": first + sections, "base": first, "ADD": add, "WIDTH": out.shape[3], "PADDED": padded(out.shape[3]),
        }  # fmt: skip
        self._launch(_kernels().total_pieces, (stop - n) * self.layout.grid[1], first, given, config=False)

    def _launch(self, kernel: Any, programs: int, first: int, given: dict[str, Any], config: bool = True) -> None:
        p, lists = self.p, self.lists
        d, dv = p.q.shape[3], p.v.shape[3]
        arguments: dict[str, Any] = {"q": self.q, "k": self.k, "v": self.v}
        for name, t in (("sq", self.q), ("sk", self.k), ("sv", self.v)):
            arguments |= {f"{name}{axis}": step for axis, step in zip("bhn", t.stride()[:3], strict=True)}
        arguments |= {
            "entry": lists.entry, "mask_id": lists.mask_id, "bits": lists.bits, "nq": p.q.shape[2],
            "nk": p.k.shape[2], "heads": p.q.shape[1], "group": p.group, "units_b": lists.lists,
            "ranges": lists.ranges, "step": lists.step, "slots": lists.slots, "first": first,
            "scale": float(p.scale), "D": d, "BD": padded(d), "DV": dv, "BDV": padded(dv),
            "BN": self.layout.tile[1], "ROWS": max(self.config.bm, padded(lists.heads)), "PACK": lists.heads,
            "SPAN": 1 << (lists.heads - 1).bit_length(), "IDS_MASKED": lists.masked, "FAST": p.scale > 0,
            "PRECISION": "tf32" if tf32(p.q) else "ieee",
        }  # fmt: skip
        if programs:
            launch(kernel, (programs,), arguments | given, self.config if config else None)


_MERGED = 16  # queries of a program that adds up slots


def entries_of(
    layout: TileLayout, device: torch.device, batch: int, heads: int, kv_heads: int, row_bytes: int
) -> Entries:
    """The entries of a layout by key tile; kept with it.

    Args:
        layout: Of padded ids with one query a tile, anywhere.
        device: Where the lists go.
        batch: Batch entries of the call.
        heads: Its query heads.
        kv_heads: Its key heads.
        row_bytes: Bytes of a partial result; decides how many queries make a section.
    """
    key = ("entries", device, batch, heads, kv_heads, row_bytes, _PARTIAL)
    return kept(layout, key, lambda: _entries(layout, device, batch, heads, kv_heads, row_bytes))


def _entries(
    layout: TileLayout, device: torch.device, batch: int, heads: int, kv_heads: int, row_bytes: int
) -> Entries:
    assert layout.ids is not None and layout.ids_count is not None
    shared = sharing(layout, heads, kv_heads)
    lists, own = heads // shared, layout.ids.shape[:2]
    which = torch.arange(lists, device=device) * own[1] // lists
    entry = torch.arange(batch if own[0] > 1 else 1, device=device)
    at = (entry[:, None] * own[1] + which).expand(batch, lists).flatten()
    ids = layout.ids.to(device).flatten(0, 1)[at]
    counts = layout.ids_count.to(device).flatten(0, 1)[at].contiguous()
    (number, nq, slots), tiles = ids.shape, layout.grid[1]
    ranges = max(1, -(-shared * nq * slots * row_bytes // _PARTIAL))
    step = max(1, -(-nq // ranges))
    query = torch.arange(nq, device=device)[:, None]
    section = torch.arange(number, device=device)[:, None, None] * ranges + query // step
    place = ((section * tiles + ids) * nq + query).masked_fill(ids < 0, number * ranges * tiles * nq).flatten()
    place, order = place.sort()
    edges = torch.arange(number * ranges * tiles + 1, device=device) * nq
    starts = torch.searchsorted(place, edges).to(torch.int32)
    pieces = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + (PIECE - 1)) // PIECE, 0, dtype=torch.int32, out=pieces[1:])
    masked = layout.ids_mask is not None and len(layout.bits) > 0
    mask_id = order.new_zeros(1, dtype=torch.int32)
    if masked and layout.ids_mask is not None:
        mask_id = layout.ids_mask.to(device).flatten(0, 1)[at].flatten()[order]
    entry = (order % max(1, nq * slots)).to(torch.int32)
    if not len(entry):
        entry = mask_id.new_zeros(1)
    bits = words(layout, device)
    return Entries(
        shared, lists, ranges, step, slots, entry, mask_id, masked, starts, pieces, counts, bits
    )


@functools.cache
def _kernels() -> Any:
    from . import kernels

    return kernels
