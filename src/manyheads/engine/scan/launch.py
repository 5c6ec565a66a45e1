"""The Triton backend: what it refuses, how tokens are cut, and the launches of a problem."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..configs import Config, choose
from ..gpu import architecture, interpreted, launch, padded, readable, refuse_inputs, row_products, tf32
from .problem import Problem, by_token, finite

_LEAST = 16  # tokens of a tile: rows of the smallest matrix instruction
_FEW = 64.0  # the largest decay over a tile of which half precision sees no digit lost in a difference


def refuse_call(q: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> list[str]:
    """Why the kernels cannot take some tensors; empty when they can."""
    reasons = refuse_inputs(q, v)
    if decay is not None and decay.dim() == 4:
        reasons.append("it has no kernels for a decay per channel")
    if beta is not None:
        reasons.append("it has no kernels for the delta rule (beta)")
    return reasons


def chunk_of(q: Tensor, v: Tensor, chunk: int | None) -> int:
    """Tokens between two stored states; wider heads, whose states are larger, store fewer.

    Args:
        q, v: ``(B, H, N, D)`` and ``(B, Hkv, N, Dv)``.
        chunk: What the caller wants, a power of two; None for the engine's choice.
    """
    width = max(q.shape[3], v.shape[3])
    return max(_LEAST, chunk) if chunk else 64 if width <= 64 else 128 if width <= 128 else 256


def saved(
    q: Tensor, v: Tensor, chunk: int, normalised: bool, gated: bool
) -> tuple[torch.dtype, list[tuple[int, ...]]]:
    """What the backward needs: dtype and shape of the states before the chunks, and the shape of all other sums."""
    b, h, n, d = q.shape
    cut = _Cut.of(q, chunk)
    kept = sum(cut.sizes(q, normalised, gated))
    return _state_dtype(q), [(cut.chunks, b, h, d, v.shape[3]), (kept,)]


def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Output, final state and ``m``; with ``save`` states before chunks, and all other sums, for the backward."""
    out = p.v.new_empty(p.q.shape[0], p.q.shape[1], p.q.shape[2], p.v.shape[3])
    nothing = p.state.new_zeros(0)
    if not out.numel():
        dtype, shapes = saved(p.q, p.v, p.chunk, bool(p.normalise), p.gate is not None)
        kept = [p.state.new_zeros(shape) for shape in shapes] if save else [nothing, nothing]
        return out, p.state, p.m, kept[0].to(dtype), kept[1]
    cut = _Cut.of(p.q, p.chunk)
    run = _Run(p, cut)
    parts = cut.parts(p)
    states, state, m = run.states(cut, parts)
    values = torch.empty_like(out, dtype=run.v.dtype)
    run.mix("forward", cut, parts, (run.q, run.k, run.v), states, values, NORMALISE=p.normalise)
    return values.to(out.dtype), state, m, *((states, parts["all"]) if save else (nothing, nothing))


def backward(
    p: Problem, saved: tuple[Tensor, Tensor, Tensor | None], dout: Tensor | None, dstate: Tensor | None,
    wants: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the tensors of a problem, from the states before its chunks and from its output."""
    states, rest, out = saved
    dstate = torch.zeros_like(p.state) if dstate is None else dstate.contiguous()
    if not p.q.shape[:3].numel():
        grads: list[Tensor | None] = [None if t is None else torch.zeros_like(t) for t in p.tensors]
        return [*grads[:-1], dstate]
    decays = wants[3] and p.decay is not None
    flowing = decays or (wants[5] and p.gate is not None)
    cut = _Cut.of(p.q, p.chunk)
    run = _Run(p, cut)
    parts = cut.parts(p, rest)
    dout = readable(torch.zeros_like(p.v[:, :1]).expand(*p.q.shape[:3], -1) if dout is None else dout)
    extra = None
    if p.normalise:
        assert out is not None
        if flowing and p.q.dtype.itemsize == 2:
            # summed over tokens, the rounding of a half-precision output would show
            fresh = {name: torch.empty_like(parts[name]) for name in ("factor", "slope")}
            out = torch.empty(out.shape, dtype=torch.float32, device=out.device)
            run.mix("forward", cut, parts | fresh, (run.q, run.k, run.v), states, out, NORMALISE=p.normalise)
        extra = -(parts["slope"].view(p.q.shape[:3]) * row_products(dout, readable(out).contiguous()))
    if decays and cut.per > 1:
        fine = _Cut(cut.tile, 1, cut.tiles)  # what passes a tile needs the states at both of its ends
        own = fine.parts(p)
        states, _, _ = run.states(fine, own)
        cut, parts = fine, own | {name: parts[name] for name in ("factor", "slope")}
    later, later_norms, before = run.gradient_of_states(cut, parts, dout, extra, dstate)
    flows = _Flows.like(run, cut) if flowing else None
    given = parts | {"extra": extra, "flows": flows}
    (b, h, n, d), hkv, dv = p.q.shape, p.k.shape[1], p.v.shape[3]
    dq = torch.empty(b, h, n, d, dtype=run.q.dtype, device=p.q.device)
    wide = run.q.dtype if p.group == 1 else torch.float32  # of every query head, to be added up
    dk, dv_ = (torch.empty(b, h, n, w, dtype=wide, device=p.q.device) for w in (d, dv))
    kind = "backward" if flows is None else "sums"
    if wants[0] or flows is not None:
        run.mix(kind, cut, given, (dout, run.v, run.k), states, dq, own=run.q, TRANSPOSED=True)
    behind = given | {"norms": later_norms}
    if wants[1] or flows is not None:
        run.mix(kind, cut, behind, (run.v, dout, run.q), later, dk, own=run.k, TRANSPOSED=True, REVERSE=True)
    if wants[2]:
        run.mix("backward", cut, behind | {"flows": None}, (run.k, run.q, dout), later, dv_, REVERSE=True)
    ddecay = dgate = None
    if flows is not None:
        dgate = flows.gate(p) if p.gate is not None else None
        ddecay = flows.decay(run, cut, parts, states, later, later_norms) if decays else None
    if p.group > 1:
        dk, dv_ = (t.unflatten(1, (hkv, p.group)).sum(2) for t in (dk, dv_))
    found = [dq.to(p.q.dtype), dk.to(p.k.dtype), dv_.to(p.v.dtype), ddecay, None, dgate, before]
    return [g if w else None for g, w in zip(found, wants, strict=True)]


@dataclass(frozen=True)
class _Cut:
    """Tokens in tiles, tiles in chunks: tokens of a tile, tiles of a chunk, tiles of the sequence."""

    tile: int
    per: int
    tiles: int

    @classmethod
    def of(cls, q: Tensor, chunk: int) -> _Cut:
        """How the tokens of a call are cut."""
        chunk = max(_LEAST, chunk)
        tile = min(chunk, 64 if q.dtype.itemsize == 2 else 32)
        return cls(tile, chunk // tile, -(-q.shape[2] // tile))

    @property
    def chunks(self) -> int:
        """Chunks of the sequence."""
        return -(-self.tiles // self.per)

    def sizes(self, q: Tensor, normalised: bool, gated: bool) -> list[int]:
        """Elements of each of the sums that go with the states; 0 for what a call has not."""
        rows, n, d = q.shape[0] * q.shape[1], q.shape[2], q.shape[3]
        divided = rows * n if normalised or gated else 0
        return [self.chunks * rows * d if normalised else 0, rows * (self.tiles + 1) if gated else 0, divided, divided]

    def parts(self, p: Problem, rest: Tensor | None = None) -> dict[str, Any]:
        """Room for these sums, or what is in ``rest``, by name; None for what a call has not."""
        sizes = self.sizes(p.q, bool(p.normalise), p.gate is not None)
        if rest is None:
            rest = torch.empty(sum(sizes), dtype=torch.float32, device=p.q.device)
        found: dict[str, Any] = {"all": rest}
        for name, part in zip(("norms", "maxima", "factor", "slope"), rest.split(sizes), strict=True):
            found[name] = part if part.numel() else None
        return found


class _Run:
    """The launches of one problem, and what they share."""

    def __init__(self, p: Problem, cut: _Cut) -> None:
        self.p, self.tile = p, cut.tile
        self.q, self.k, self.v = (readable(t) for t in (p.q, p.k, p.v))
        self.nothing = torch.empty(1, dtype=torch.float32, device=p.q.device)  # stands for what is not there
        b, h, n, _ = p.q.shape
        decay = by_token(p)
        if decay is None and p.gate is not None:
            decay = p.state.new_zeros(1)
        self.decay = None
        if decay is not None:
            self.decay = (decay[None, :, None] if decay.dim() == 1 else decay).expand(b, h, n)
        self.gate = None if p.gate is None else p.gate.to(p.accumulate)
        self.exact = self.q.dtype == torch.float32
        # float16 has too little range for sums without a softmax
        rough = tf32(p.q) or p.q.dtype == torch.float16
        self.shared: dict[str, Any] = {
            "tokens": n, "tiles": cut.tiles, "heads": h, "scale": float(p.scale), "TILE": cut.tile,
            "DECAY": self.decay is not None, "GATE": self.gate is not None, "NORM": int(bool(p.normalise)),
            "LIMIT": 0.0 if self.exact else _FEW, "PRECISION": "tf32" if rough else "ieee",
            **_strides("g", self.decay), **_strides("i", self.gate),
            "g": self._or_nothing(self.decay), "gate": self._or_nothing(self.gate),
        }  # fmt: skip
        self.shared |= dict.fromkeys(("prefix", "reach", "peak"), self.nothing)
        if self.decay is not None:
            size = b * h * cut.tiles * cut.tile
            for name in ("prefix", "reach", "peak")[: 3 if self.gate is not None else 2]:
                self.shared[name] = torch.empty(size, dtype=torch.float32, device=p.q.device)
            launch(_kernels().sums, (b * h * cut.tiles,), self.shared)

    def states(self, cut: _Cut, parts: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """States before every chunk, and state and ``m`` at the end."""
        m = None if self.p.m is None else torch.empty_like(self.p.m)
        given = {"m_start": self._or_nothing(self.p.m), "m_end": self._or_nothing(m), "group": self.p.group}
        x, y = self.k, self.v
        states, end = self._carry("forward", cut, x, y, self.p.state, parts["norms"], parts["maxima"], given)
        return states, end, m

    def gradient_of_states(
        self, cut: _Cut, parts: dict[str, Any], dout: Tensor, extra: Tensor | None, dstate: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of the state and of its sum of keys behind every chunk, and of the state before all tokens."""
        norms = None if parts["norms"] is None else torch.empty_like(parts["norms"])
        given = {"factor": self._or_nothing(parts["factor"]), "extra": self._or_nothing(extra), "group": 1}
        given |= {"FACTOR": parts["factor"] is not None, "REVERSE": True}
        states, end = self._carry("backward", cut, self.q, dout, dstate, norms, parts["maxima"], given)
        return states, norms, end

    def _carry(
        self, kind: str, cut: _Cut, x: Tensor, y: Tensor, start: Tensor, norms: Tensor | None, maxima: Tensor | None,
        given: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (b, h), d, dv = self.p.q.shape[:2], x.shape[3], y.shape[3]
        config = _config("carry", self.p, kind)
        bd, bv = min(config.bm, padded(d)), min(config.bn, padded(dv))
        states = torch.empty(cut.chunks, b, h, d, dv, dtype=_state_dtype(self.p.q), device=x.device)
        end = torch.empty(self.p.state.shape, dtype=torch.float32, device=x.device)
        nothing = dict.fromkeys(("factor", "extra", "m_start", "m_end"), self.nothing)
        arguments = self.shared | {"FACTOR": False, "REVERSE": False} | nothing | given | {
            "x": x, "y": y, **_strides("x", x), **_strides("y", y), "start": start.contiguous(), "states": states,
            "end": end, "norms": self._or_nothing(norms), "maxima": self._or_nothing(maxima), "per": cut.per,
            "D": d, "DV": dv, "BD": bd, "BV": bv,
        }  # fmt: skip
        launch(_kernels().carry, (-(-d // bd) * -(-dv // bv), b * h), arguments, config)
        return states, end

    def mix(
        self, kind: str, cut: _Cut, parts: dict[str, Any], xyz: tuple[Tensor, Tensor, Tensor], states: Tensor,
        out: Tensor, *, own: Tensor | None = None, **switches: Any,
    ) -> None:  # fmt: skip
        """One launch of ``mix``; see its file for what ``x``, ``y`` and ``z`` are."""
        x, y, z = xyz
        own = x if own is None else own
        config = _config("mix", self.p, kind)
        w, wz = x.shape[3], z.shape[3]
        block, columns = min(config.bm, padded(w)), min(config.bn, padded(wz))
        on: dict[str, Any] = {"NORMALISE": "", "TRANSPOSED": False, "REVERSE": False, **switches}
        flows = parts.get("flows")
        # the sums of weights pass from the last column of values to those of queries and of keys
        augmented = self.p.normalise and on["TRANSPOSED"]
        given = {name: self._or_nothing(parts.get(name)) for name in ("norms", "maxima", "factor", "slope", "extra")}
        given |= dict.fromkeys(("flow", "drop", "column"), self.nothing)
        if flows is not None:
            given |= flows.arguments(on["REVERSE"])
        arguments = self.shared | given | on | {
            "x": x, "y": y, "z": z, "own": own, "states": states, "out": out, "group": self.p.group, "per": cut.per,
            **_strides("x", x), **_strides("y", y), **_strides("z", z), **_strides("o", own),
            "W": w, "WZ": wz, "BX": block, "BZ": columns, "SUMS": flows is not None,
            "FACTOR": kind != "forward" and parts["factor"] is not None,
            "AUGMENT": (2 if on["REVERSE"] else 1) if augmented else 0,
        }  # fmt: skip
        launch(_kernels().mix, (-(-wz // columns) * cut.tiles * out.shape[0] * out.shape[1],), arguments, config)

    def _or_nothing(self, t: Tensor | None) -> Tensor:
        return self.nothing if t is None else t


@dataclass
class _Flows:
    """Sums of weights times their gradients, from which the gradients of decays and gates are made.

    Each is ``(blocks, B * H, tiles * TILE)``, to be summed over blocks of the width.

    Attributes:
        read: What each token reads from before its tile.
        sent: What each token sends behind its tile.
        drop: What passes each token inside its tile.
        column: What each token sends inside its tile, to itself too.
    """

    read: Tensor
    sent: Tensor
    drop: Tensor
    column: Tensor

    @classmethod
    def like(cls, run: _Run, cut: _Cut) -> _Flows:
        """Room for the sums of a problem."""
        b, h, _, d = run.p.q.shape
        blocks = -(-d // min(_config("mix", run.p, "sums").bn, padded(d)))
        shape = (blocks, b * h, cut.tiles * cut.tile)
        return cls(*(torch.empty(shape, dtype=torch.float32, device=run.q.device) for _ in range(4)))

    def arguments(self, keys: bool) -> dict[str, Tensor]:
        """Where the kernel for queries, or for keys, puts them."""
        return {"flow": self.sent if keys else self.read, "drop": self.drop, "column": self.column}

    def gate(self, p: Problem) -> Tensor:
        """The gradient of the input gate."""
        assert p.gate is not None
        total = (self.sent + self.column).sum(0)[:, : p.q.shape[2]]
        return total.reshape(p.gate.shape).to(p.gate.dtype)

    def decay(
        self, run: _Run, cut: _Cut, parts: dict[str, Any], states: Tensor, later: Tensor, later_norms: Tensor | None
    ) -> Tensor:
        """The gradient of the decay, from states at the borders of tiles: all is added up, nothing taken away."""
        p, decay = run.p, run.p.decay
        assert decay is not None
        (b, h, n, d), rows = p.q.shape, p.q.shape[0] * p.q.shape[1]
        read, sent, drop = (t.sum(0).view(rows, cut.tiles, cut.tile) for t in (self.read, self.sent, self.drop))
        whole = run.shared["prefix"].view(rows, cut.tiles, cut.tile)[..., -1]
        if parts["maxima"] is not None:
            maxima = parts["maxima"].view(rows, cut.tiles + 1)
            whole = whole + maxima[:, :-1] - finite(maxima[:, 1:])
        lines = (1, 1, cut.tiles * rows * d, p.v.shape[3])
        kept = row_products(later.view(lines), states.view(lines)).view(cut.tiles, rows, d)
        if later_norms is not None:
            kept = kept + (later_norms * parts["norms"]).view(cut.tiles, rows, d)
        through = whole.exp() * kept.sum(-1).T
        # read from here on, sent from before, and what passes the whole tile
        total = drop + read.flip(-1).cumsum(-1).flip(-1) + F.pad(sent[..., :-1], (1, 0)).cumsum(-1) + through[..., None]
        total = total.reshape(b, h, -1)[:, :, :n]
        assert run.decay is not None
        total = total.masked_fill(run.decay == -torch.inf, 0.0)  # nothing passes
        return (total.sum((0, 2)) if decay.dim() == 1 else total).to(decay.dtype)


def _strides(name: str, t: Tensor | None) -> dict[str, int]:
    """Strides over batch, heads and tokens, by the kernels' names."""
    steps = (0, 0, 0) if t is None else t.stride()[:3]
    return {f"s{name}{axis}": step for axis, step in zip("bhn", steps, strict=True)}


def _state_dtype(q: Tensor) -> torch.dtype:
    """States are factors of products: bfloat16 beside bfloat16, else float32; sums stay float32 throughout."""
    return torch.bfloat16 if q.dtype == torch.bfloat16 and not interpreted() else torch.float32


def _config(kernel: str, p: Problem, kind: str) -> Config:
    return choose(kernel, architecture(p.q.device), max(p.q.shape[3], p.v.shape[3]), p.q.element_size(), kind)


@functools.cache
def _kernels() -> Any:
    from . import kernels

    return kernels
