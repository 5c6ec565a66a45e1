"""The context inside which attention spans many devices, and how tokens enter and leave it."""

from __future__ import annotations

import datetime
import functools
import hashlib
import re
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch
from ..common import checks
from ..common.errors import UnsupportedError
from ..common.scopes import active
from ..engine.result import Attn
from ..engine.tiled.bias import Bias, Term
from ..mask import Causal, Mask, as_mask, parse
from . import execution, plan, steps
from .collectives import Link, phase, unsupported
from .deal import Deal
from .deal import deal as dealt
from .execution import Execution, Recorded
from .steps import Call

Positions = tuple[Tensor, Tensor]


class Context:
    """What :func:`context` makes. Enter it with ``with``; it may be entered again and outlives its backward.

    Attributes:
        scheme: Name of the scheme.
        degree: Ranks that divide the heads; None where the heads of a call decide.
        rank, world: Of this process among the ranks of the sequence.
    """

    def __init__(
        self,
        mesh: Any,
        scheme: str,
        shard: str | Deal,
        mask: Mask,
        tokens: int | None,
        options: tuple[int | None, int | None, int | None],
        timeout: float | None,
        check: str,
    ) -> None:
        degree, window, chunk = options
        if check not in ("first", "always"):
            raise ValueError(f"check: expected 'first' or 'always', got {check!r}")
        group, inner = _group_of(mesh)
        self.link = Link(group, None if timeout is None else datetime.timedelta(seconds=timeout))
        self.rank, self.world = self.link.rank, self.link.world
        self.scheme, self.degree = scheme, execution.degree_of(scheme, self.world, inner if degree is None else degree)
        if window is not None:
            execution.window_of(self.world // (self.degree or 1), window)
        self.window = window
        self._shard, self._mask, self._chunk, self._check = shard, mask, chunk, check
        self._agreed: set[tuple[tuple[str, str], ...]] = set()
        self._deal: Deal | None = shard if isinstance(shard, Deal) else None
        self._executions: dict[tuple[Mask | None, int], Execution] = {}
        if tokens is not None:
            self.deal_for(tokens)

    def __enter__(self) -> Context:
        """Calls of attention now span the ranks."""
        active.append(self)
        return self

    def __exit__(self, *problem: object) -> None:
        """Calls of attention mean what they say again."""
        active.remove(self)

    # Tokens

    @property
    def deal(self) -> Deal:
        """Which tokens lie on which rank.

        Raises:
            ValueError: The length of the sequence is not known yet.
        """
        if self._deal is None:
            raise ValueError("context: the length is not known before shard(...); or say context(..., tokens=N)")
        return self._deal

    def deal_for(self, tokens: int) -> Deal:
        """The deal of a sequence of some length, which is then the context's.

        Args:
            tokens: Of the whole sequence.

        Raises:
            ValueError: The context has another length already.
        """
        if self._deal is None:
            self._deal = dealt(self._shard, self._mask, tokens, self.world, chunk=self._chunk)
        if (self._deal.n, self._deal.world) != (tokens, self.world):
            raise ValueError(
                f"context: it deals {self._deal.n} tokens to {self._deal.world} ranks, got {tokens} tokens and "
                f"{self.world} ranks; open another context for another length"
            )
        return self._deal

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor of the whole sequence; see :func:`shard`."""
        return self.deal_for(x.shape[dim]).shard(x, self.rank, dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole from the parts of all ranks; see :func:`unshard`."""
        if x.shape[dim] != self.deal.counts[self.rank]:
            raise ValueError(
                f"x: expected {self.deal.counts[self.rank]} tokens along dim {dim}, got shape {tuple(x.shape)}"
            )
        return _Unshard.apply(x, dim % x.dim(), self.link, self.deal)

    def positions(self, device: Any = None) -> Tensor:
        """Positions of this rank's tokens in the whole sequence; see :func:`positions`."""
        return self.deal.index(self.rank).to("cpu" if device is None else device)

    # Attention

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout_p: float = 0.0,
        generator: torch.Generator | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Tensor | Attn:
        """A call of ``manyheads.attention`` over the tokens of all ranks.

        Args:
            q, k, v: This rank's tokens, ``(B, H, n, D)``.
            dropout_p, generator, return_lse: As for attention.
            **options: The others: ``mask``, ``scale`` and ``softcap`` as for attention, the mask over all tokens;
                ``bias`` and ``sink`` over all tokens, the same on every rank; ``positions`` those of the deal or
                None; ``key_padding (B, n)`` of this rank's keys or ``(B, N)`` of all; ``backend`` ``"auto"``,
                ``"blocked"`` or ``"triton"``.

        Returns:
            This rank's tokens of the result.

        Raises:
            ValueError: For what does not fit, on this rank or another.
            UnsupportedError: What the scheme cannot do, with its reasons.
            RankError: Another rank is gone.
        """
        if torch.compiler.is_compiling():  # an exchange is no part of a graph: the call runs as it is, between two
            return torch.compiler.disable(self.attend)(
                q, k, v, dropout_p=dropout_p, generator=generator, return_lse=return_lse, **options
            )
        q, k, v = _autocast(q, k, v)
        seed = torch.randint(2**62, (1,), generator=generator) if dropout_p else None
        call, problem = None, ""
        facts: dict[str, str] = {}
        try:
            call, facts = self._call(q, k, v, dropout_p=dropout_p, **options)
        except UnsupportedError as error:
            problem = unsupported([str(error)])
        except (TypeError, ValueError) as error:
            problem = str(error)
        known = tuple(sorted(facts.items()))
        if problem or self._check == "always" or known not in self._agreed:
            device = q.device if isinstance(q, Tensor) else torch.device("cpu")
            self.link.agree(facts, problem, device)
            self._agreed.add(known)
        assert call is not None
        with phase("control"):
            if seed is not None:
                call.seed = self.link.from_first(seed, q.device)
            if call.padding is not None and call.padding.shape[1] != self.deal.n:
                call.padding = self._whole_padding(call.padding)
        if call.padding is not None:
            own = call.padding[:, self.positions(q.device)]
            k, v = (t.masked_fill(~own[:, None, :, None], 0.0) for t in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            run, terms = self._execution(call.mask, self._degree(q, k)), [t.tensor for t in call.terms]
            out, lse = Recorded.apply(run, call, q, k, v, call.sink, *terms)
        return Attn(out, lse) if return_lse else out

    def explain(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> dispatch.Explanation:
        """What a call would do here; communicates nothing."""
        options = {name: value for name, value in options.items() if name != "return_lse"}
        call, _ = self._call(q, k, v, **options)
        inside = "inside a parallel context the engine runs step by step, with an lse that the backward takes"
        refusals = {"sdpa": [inside], "triton": [], "blocked": [], "reference": [inside]}
        refusals["triton"] = steps.refuse("triton", q, v, call.terms)[1]
        areas = self.deal.areas(call.mask)
        own, most = (area / max(1, sum(areas)) for area in (areas[self.rank], max(areas)))
        notes = [
            str(self),
            f"this rank holds {self.deal.counts[self.rank]} of {self.deal.n} tokens, with {own:.2%} of the visible "
            f"pairs (at most {most:.2%} on a rank)",
        ]
        return dispatch.Explanation(call.backend, refusals, tuple(notes))

    def __str__(self) -> str:
        dealing = "a given deal" if isinstance(self._shard, Deal) else f"{self._shard} deal"
        divided = f", heads divided among {self.degree}" if (self.degree or 1) > 1 else ""
        return f"parallel: {self.scheme} over {self.world} ranks{divided}, {dealing}; this is rank {self.rank}"

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | str | Tensor | None = None,
        scale: float | None = None,
        bias: Bias | Term | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        dropout_p: float = 0.0,
        positions: Positions | None = None,
        key_padding: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Call, dict[str, str]]:
        """The call over all tokens, and what must be the same on all ranks."""
        from ..engine.tiled import sharding

        if sharding.seen(q, k, v, mask, sink):
            raise UnsupportedError("q, k, v: inside a parallel context expected this rank's tensors, got DTensors")
        checks.attention_inputs(q, k, v)
        checks.options(q, k, scale=scale, softcap=softcap, sink=sink, dropout_p=dropout_p)
        own, n = self.deal.counts[self.rank], self.deal.n
        if q.shape[2] != own or k.shape[2] != own:
            raise ValueError(
                f"q, k: this rank holds {own} of {n} tokens, got {q.shape[2]} queries and {k.shape[2]} keys; "
                "attention across two sequences is not supported in a parallel context"
            )
        value = parse(mask) if isinstance(mask, str) else as_mask(mask)
        for size, want, what in ((value.shape[0], q.shape[0], "batch"), (value.shape[1], q.shape[1], "heads")):
            if size not in (1, want):
                raise ValueError(f"mask: its {what} size is {size}; q has {want} (shape {tuple(q.shape)})")
        described = _described(value, n)
        mine = self.deal.index(self.rank)
        given = () if positions is None else checks.positions(positions, q, k)
        if any(bool((pos.cpu() != mine).any()) for pos in given):
            raise UnsupportedError("positions: inside a parallel context they follow from the deal; leave them out")
        terms = bias.terms if isinstance(bias, Bias) else () if bias is None else (bias,)
        for term in terms:
            if not isinstance(term, Term):
                raise TypeError(f"bias: expected a term or a sum of terms, got {type(term).__name__}")
            term.check(q.shape[1], q.shape[0], n, n)
        self._check_padding(key_padding, q)
        backend, reasons = steps.refuse(backend, q, v, terms)
        reasons += execution.refuse(self.scheme, self._degree(q, k), q.shape[1], k.shape[1])
        if reasons:
            raise UnsupportedError("; ".join(reasons))
        factor = q.shape[3] ** -0.5 if scale is None else float(scale)
        rest = (float(softcap or 0.0), float(dropout_p), None, tuple(terms), sink, key_padding, backend)
        call = Call(value, factor, *rest, range(q.shape[1]), range(k.shape[1]))
        return call, {"mask": described} | self._facts(call, q, k, v)

    def _facts(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> dict[str, str]:
        names = ("batch", "query heads", "key heads", "width", "value width")
        sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3])
        deal = self.deal
        chunks = hashlib.blake2b(repr(deal.chunks).encode(), digest_size=8).hexdigest()
        return {
            **{name: str(size) for name, size in zip(names, sizes, strict=True)},
            "dtype": str(q.dtype),
            "scale": repr(call.scale),
            "softcap": repr(call.softcap),
            "dropout_p": repr(call.dropout_p),
            "bias": ", ".join(f"{t.text()}{tuple(t.tensor.shape)}" for t in call.terms),
            "sink": str(call.sink is not None),
            "key_padding": "none" if call.padding is None else "all" if call.padding.shape[1] == deal.n else "own",
            "scheme": f"{self.scheme} {self.degree} {self.window}",
            "deal": f"{deal.n} tokens in chunks of {deal.chunk}, {chunks}",
        }

    def _check_padding(self, padding: Tensor | None, q: Tensor) -> None:
        sizes = (self.deal.counts[self.rank], self.deal.n)
        if padding is None:
            return
        if not isinstance(padding, Tensor) or padding.dtype != torch.bool:
            raise TypeError("key_padding: expected a bool tensor, True for real keys")
        if padding.dim() != 2 or padding.shape[0] != q.shape[0] or padding.shape[1] not in sizes:
            raise ValueError(
                f"key_padding: expected (B={q.shape[0]}, n={sizes[0]}) of this rank or (B, N={sizes[1]}) of all, got "
                f"{tuple(padding.shape)}"
            )

    def _whole_padding(self, own: Tensor) -> Tensor:
        shapes = [(own.shape[0], n) for n in self.deal.counts]
        parts = self.link.everyone(own.to(torch.uint8), shapes, "the gathering of key_padding").wait()
        return self.deal.unshard(parts, dim=1).bool()

    def _degree(self, q: Tensor, k: Tensor) -> int:
        if self.degree is not None:
            return self.degree
        return execution.widest(self.world, q.shape[1], k.shape[1])

    def _execution(self, mask: Mask, degree: int) -> Execution:
        key = mask if self.scheme == "groupcast" else None, degree
        if key not in self._executions:
            deal = self.deal

            def rows(rank: int, source: int) -> Tensor:
                return plan.needed_rows(mask, deal, rank, source)

            made = Execution(self.link, deal, self.scheme, degree, self.window, rows)
            if len(self._executions) > 64:
                self._executions.clear()
            self._executions[key] = made
        return self._executions[key]


def context(
    mesh: Any,
    *,
    scheme: str = "ring",
    shard: str | Deal = "balanced",
    mask: Mask | str | None = None,
    tokens: int | None = None,
    degree: int | None = None,
    window: int | None = None,
    chunk: int | None = None,
    timeout: float | None = None,
    check: str = "first",
) -> Context:
    """Makes attention span the devices of a mesh: every rank holds some tokens of one long sequence.

    Inside the context ``manyheads.attention`` takes this rank's tokens and gives this rank's results, as if it had
    been called on one device with all of them. Each rank gives the same masks, biases and options, over the whole
    sequence. Gradients of what every rank holds whole (biases, sinks) are shares that add up, as those of weights.

    Args:
        mesh: A ``DeviceMesh`` of one dimension (torchtitan's and FSDP2's ``mesh["cp"]``), of two for ``(ring,
            heads)``, or a process group.
        scheme: ``"ring"``, ``"gather"`` (all-gather and reduce-scatter), ``"ulysses"`` (heads for tokens),
            ``"hybrid"`` (Ulysses around a ring), ``"double_ring"`` (a ring of rings), or ``"groupcast"`` (only the
            rows that the mask needs).
        shard: How tokens are dealt: ``"contiguous"``, ``"zigzag"``, ``"striped"``, ``"per_document"``,
            ``"balanced"``, ``"nearby"``, or a :class:`~manyheads.parallel.deal.Deal`.
        mask: The mask whose work is balanced; causal by default. Calls may use any mask.
        tokens: Length of the whole sequence; that of the first tensor to be sharded by default.
        degree: Ranks that divide the heads, for ``"hybrid"`` and ``"double_ring"``.
        window: Ranks of a window of the double ring.
        chunk: Tokens per chunk of the deal.
        timeout: Seconds that a rank waits for another one on a CPU; the process group's by default.
        check: ``"first"`` compares shapes, dtypes and masks of all ranks before the first call of a kind,
            ``"always"`` before every call.

    Returns:
        The context.

    Raises:
        ValueError: A mesh, scheme, degree or window that does not fit, or torch.distributed not initialised.

    Conventions:
        A backward may run after the ``with``. A recomputation (activation checkpointing) may not, and torch then
        says that the recomputed tensors differ: run such a backward inside. Under ``torch.compile`` attention in a
        context breaks the graph.

    Example:
        >>> import tempfile
        >>> import manyheads as mh
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        >>> q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
        >>> with context(dist.group.WORLD, scheme="ring") as cp:
        ...     part = mh.attention(*(cp.shard(t, dim=2) for t in (q, k, v)), mask="causal")
        ...     whole = cp.unshard(part, dim=2)
        >>> torch.allclose(whole, mh.attention(q, k, v, mask="causal"), atol=1e-6)
        True
        >>> dist.destroy_process_group()
    """
    value = Causal() if mask is None else parse(mask) if isinstance(mask, str) else mask
    return Context(mesh, scheme, shard, value, tokens, (degree, window, chunk), timeout, check)


@overload
def shard(x: Tensor, /, *, dim: int = ...) -> Tensor: ...
@overload
def shard(x: Tensor, y: Tensor, /, *more: Tensor, dim: int = ...) -> tuple[Tensor, ...]: ...
def shard(*tensors: Tensor, dim: int = 1) -> Tensor | tuple[Tensor, ...]:
    """This rank's tokens of tensors that hold the whole sequence.

    Args:
        *tensors: With all tokens along ``dim``; the first one tells the context the length.
        dim: The dimension of tokens.

    Returns:
        The parts, in the order in which this rank stores its tokens; one tensor for one.

    Raises:
        ValueError: Outside a context, or for another length.
    """
    here = current("shard")
    parts = tuple(here.shard(x, dim) for x in tensors)
    return parts[0] if len(parts) == 1 else parts


def unshard(x: Tensor, *, dim: int = 1) -> Tensor:
    """The whole sequence from the parts of all ranks, in logical order, on every rank.

    Differentiable: the gradient of a part is the sum of what all ranks have for it, as of torch's all-gather.

    Args:
        x: This rank's tokens along ``dim``.
        dim: The dimension of tokens.

    Raises:
        ValueError: Outside a context, or for another number of tokens.
    """
    return current("unshard").unshard(x, dim)


def positions(device: Any = None) -> Tensor:
    """Where this rank's tokens lie in the whole sequence: what RoPE and position embeddings need.

    Args:
        device: Where to put them; the CPU by default.

    Returns:
        int64 ``(n,)``, ascending.

    Raises:
        ValueError: Outside a context, or before its length is known.
    """
    return current("positions").positions(device)


def current(what: str) -> Context:
    """The innermost context.

    Args:
        what: Who asks.

    Raises:
        ValueError: Outside a context.
    """
    for scope in reversed(active):
        if isinstance(scope, Context):
            return scope
    raise ValueError(f"{what}: expected to be called inside `with manyheads.parallel.context(...)`")


class _Unshard(torch.autograd.Function):
    """The parts of all ranks put together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, link: Link, deal: Deal) -> Tensor:
        ctx.dim, ctx.link, ctx.deal = dim, link, deal
        kind = torch.uint8 if x.dtype == torch.bool else x.dtype
        shapes = [(*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in deal.counts]
        parts = link.everyone(x.to(kind).contiguous(), shapes, "the gathering of tokens").wait()
        return deal.unshard(parts, dim).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        parts = [ctx.deal.shard(grad, r, ctx.dim).contiguous() for r in range(ctx.link.world)]
        return ctx.link.summed(parts, "the sum of gradients of tokens").wait(), None, None, None


@functools.lru_cache(32)
def _described(mask: Mask, n: int) -> str:
    """Checks a mask against the whole sequence, and names it alike in every process."""
    mask.check(n, n)
    own = any(leaf._sets_positions for leaf in mask.leaves())
    if own and any((side != np.arange(n)).any() for side in mask.default_positions(n, n)):
        raise UnsupportedError(f"mask: documents with two sets of lengths are not supported here: {mask}")
    data = hashlib.blake2b(digest_size=8)
    for t in mask.data:
        data.update(f"{t.dtype}{tuple(t.shape)}".encode() + t.numpy().tobytes())
    text = re.sub(r"\$fn:\w+", "function", mask.text)  # functions are numbered by each process
    return f"{text} {data.hexdigest()}" if mask.data else text


def _autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """What autocast makes of the inputs of an attention."""
    q = tensors[0]
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type) or q.dtype == torch.float64:
        return tensors
    return [t.to(torch.get_autocast_dtype(q.device.type)) for t in tensors]


def _group_of(mesh: Any) -> tuple[Any, int | None]:
    """The process group of a mesh, and how many of its ranks divide heads when the mesh says so."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("mesh: torch.distributed is not initialised; call init_process_group or use torchrun")
    if isinstance(mesh, dist.ProcessGroup):
        return mesh, None
    if not hasattr(mesh, "get_group") or not hasattr(mesh, "ndim"):
        raise TypeError(f"mesh: expected a DeviceMesh or a process group, got {type(mesh).__name__}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh: this rank is not part of {mesh}")
    if mesh.ndim == 1:
        return mesh.get_group(), None
    if mesh.ndim != 2:
        raise ValueError(f"mesh: expected 1 dimension, or 2 for (ring, heads), got {mesh}; take mesh['cp']")
    return mesh._flatten().get_group(), mesh.size(1)
