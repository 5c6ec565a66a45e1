"""The front door: one call for every mask, and why each backend would or would not take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .common import checks
from .common.errors import UnsupportedError, unknown
from .engine.result import Attn
from .engine.tiled import Bias, Term, default_tile, tiled
from .engine.tiled import flash, products, reference
from .engine.tiled.plan import visible_rows
from .engine.tiled.problem import Problem
from .engine.tiled.weight import WEIGHTS
from .mask import Causal, Full, Mask
from .mask.text import as_mask
from .mask.build import build

BACKENDS = ("sdpa", "blocked", "reference")
"""Every backend, in the order in which ``auto`` asks them."""

Positions = tuple[Tensor, Tensor]


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], mask: Mask | str | Tensor | None = ...,
              scale: float | None = ..., bias: Bias | Term | None = ..., softcap: float | None = ...,
              sink: Tensor | None = ..., dropout_p: float = ..., generator: torch.Generator | None = ...,
              positions: Positions | None = ..., key_padding: Tensor | None = ..., backend: str = ...) -> Attn: ...  # fmt: skip
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., mask: Mask | str | Tensor | None = ...,
              scale: float | None = ..., bias: Bias | Term | None = ..., softcap: float | None = ...,
              sink: Tensor | None = ..., dropout_p: float = ..., generator: torch.Generator | None = ...,
              positions: Positions | None = ..., key_padding: Tensor | None = ..., backend: str = ...) -> Tensor: ...  # fmt: skip
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | str | Tensor | None = None, scale: float | None = None,
    bias: Bias | Term | None = None, softcap: float | None = None, sink: Tensor | None = None, dropout_p: float = 0.0,
    generator: torch.Generator | None = None, positions: Positions | None = None, key_padding: Tensor | None = None,
    return_lse: bool = False, backend: str = "auto",
) -> Tensor | Attn:  # fmt: skip
    """Exact softmax attention under any mask.

    ``out_i = sum_j exp(s_ij - lse_i) v_j`` over the keys that the mask allows, with
    ``s_ij = cap(scale * q_i . k_j) + bias_ij`` and ``lse_i = log sum_j exp(s_ij)``.

    Args:
        q: Queries ``(B, Hq, Nq, D)``; float16, bfloat16, float32 or float64, any strides.
        k: Keys ``(B, Hkv, Nk, D)``. ``Hq`` must be a multiple of ``Hkv``; nothing is repeated in memory.
        v: Values ``(B, Hkv, Nk, Dv)``; ``Dv`` may differ from ``D``.
        mask: What may attend to what: a mask value, its text (``"causal & window(512)"``), a bool tensor that
            broadcasts to ``(B, H, Nq, Nk)`` with True for allowed, or None for everything.
        scale: Multiplies the dot products; ``D ** -0.5`` by default, 0.0 is legal.
        bias: ``ALiBi``, ``Relative``, ``Pair``, ``PerKey``, ``PerBlock`` or a sum of them; differentiable.
        softcap: ``c`` of ``c * tanh(x / c)``, applied to scaled scores before the bias.
        sink: ``(Hq,)`` logit of one more key with value zero; differentiable, part of ``lse``.
        dropout_p: Share of weights dropped after normalisation, the rest scaled by ``1 / (1 - p)``. The pattern depends
            on one draw from ``generator``, and then on batch, head and logical positions only.
        generator: Source of that draw; torch's default when missing.
        positions: Logical positions ``(q_pos, k_pos)``, integer, ``(N,)`` or ``(B, N)``. They decide masks and
            positional biases; storage order never does. By default queries are the last ``Nq`` of ``Nk`` positions.
        key_padding: bool ``(B, Nk)``, True for real keys. Padded keys may hold anything, NaN included.
        return_lse: Also return ``lse``.
        backend: ``"auto"`` takes the first backend without a reason to refuse; a name is used or raises.

    Returns:
        ``(B, Hq, Nq, Dv)`` in the dtype of the inputs, or :class:`Attn` with ``lse (B, Hq, Nq)`` in float32 (float64 for
        float64), natural log, differentiable. A row that may attend to nothing gives 0 and ``-inf``.

    Raises:
        ValueError: For shapes, positions, masks or texts that do not fit, naming the argument.
        TypeError: For wrong types and dtypes.
        UnsupportedError: When a named backend cannot take the call, with every reason.

    Conventions:
        ``Causal`` is bottom-right aligned when ``Nq != Nk``; ``Window(W)`` counts the query itself; scores and statistics
        are float32 whatever the input dtype.

    Example:
        >>> import manyheads as mh
        >>> q = k = v = torch.ones(1, 2, 6, 4)
        >>> mh.attention(q, k, v, mask=mh.Causal() & mh.Window(2)).shape
        torch.Size([1, 2, 6, 4])
        >>> mh.attention(q, k, v, mask="causal", return_lse=True).lse[0, 0].exp().round().int().tolist()
        [7, 15, 22, 30, 37, 44]
    """
    plain = bias is None and softcap is None and sink is None and not dropout_p
    plain = plain and positions is None and key_padding is None and backend == "auto" and not isinstance(mask, Tensor)
    if plain and not torch.compiler.is_compiling():
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, return_lse,
               needs_grad, mask)  # fmt: skip
        delegated = _delegations.get(key)
        if delegated is not None:
            return delegated(q, k, v, scale)
    seed = torch.randint(2**62, (1,), generator=generator) if dropout_p else None
    if isinstance(mask, str) and torch.compiler.is_compiling():  # a text is read inside the operator
        return tiled(q, k, v, mask, scale=scale, bias=bias, softcap=softcap, sink=sink, dropout_p=dropout_p, seed=seed,
                     positions=positions, key_padding=key_padding, return_lse=return_lse, backend=backend)  # type: ignore[call-overload, no-any-return]  # fmt: skip
    call = _call(q, k, v, mask, scale, bias, softcap, sink, dropout_p, positions, key_padding, return_lse)
    chosen = _choose(call, backend)
    if chosen == "sdpa":
        run = _sdpa_runner(call)
        if plain:
            _remember(call, mask, run)
        return run(q, k, v, scale)
    return tiled(q, k, v, call.mask, scale=scale, bias=bias, softcap=softcap, sink=sink, dropout_p=dropout_p, seed=seed,
                 positions=positions, key_padding=key_padding, return_lse=return_lse, backend=chosen)  # type: ignore[call-overload, no-any-return]  # fmt: skip


def attention_weights(
    q: Tensor, k: Tensor, *, mask: Mask | str | Tensor | None = None, rows: Sequence[int] | None = None,
    scale: float | None = None, softcap: float | None = None, sink: Tensor | None = None,
    positions: Positions | None = None, key_padding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The weights themselves, for some queries: to look at, not to compute with.

    Args:
        q, k: As for :func:`attention`.
        mask, scale, softcap, sink, positions, key_padding: As for :func:`attention`.
        rows: Which queries, by storage index (negative ones count from the end); all by default.

    Returns:
        ``(B, Hq, len(rows), Nk)`` in float32 (float64 for float64); rows sum to 1, to less with a sink, or to 0 when
        nothing is visible.

    Raises:
        ValueError: For a row out of range, or what :func:`attention` would raise.

    Example:
        >>> import manyheads as mh
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> mh.attention_weights(q, k, mask="causal", rows=[1])[0, 0].tolist()
        [[0.5, 0.5, 0.0, 0.0]]
    """
    call = _call(q, k, k, mask, scale, None, softcap, sink, 0.0, positions, key_padding, False)
    nq = q.shape[2]
    chosen = range(nq) if rows is None else rows
    if any(not -nq <= r < nq for r in chosen):
        raise ValueError(f"rows: expected indices of {nq} queries, got {list(chosen)}")
    index = torch.tensor([r % nq for r in chosen], dtype=torch.int64, device=q.device)
    layout = build(call.mask, nq, k.shape[2], tile=default_tile(nq, k.shape[2]), positions=positions,
                   key_padding=key_padding, batch=q.shape[0], heads=q.shape[1])  # fmt: skip
    if key_padding is not None:
        k = k.masked_fill(~key_padding[:, None, :, None], 0.0)
    none = torch.empty(0, 0, dtype=torch.int64)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    problem = Problem(q[:, :, index], k, k, layout, none, none, WEIGHTS["softmax"], factor, softcap or 0.0, (), sink)
    allowed = visible_rows(layout, index.tolist()).to(q.device)
    return reference.weights(problem, allowed)[0]


# --- which backend ----------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of :func:`attention`, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    plain: bool
    positions: bool
    key_padding: bool
    return_lse: bool
    needs_grad: bool

    @property
    def dense(self) -> bool:
        """Whether every pair is visible."""
        return isinstance(self.mask, Full) or (isinstance(self.mask, Causal) and self.q.shape[2] == 1)


@dataclass(frozen=True)
class Explanation:
    """Which backend takes a call, and why the others do not.

    Attributes:
        taken: The backend that runs.
        refusals: For every backend its reasons, empty for one that could run.
        notes: What else a reader of a profile should know: density, the way of multiplying, warnings.
    """

    taken: str
    refusals: dict[str, list[str]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for name, reasons in self.refusals.items():
            state = "taken" if name == self.taken else "refused" if reasons else "could run"
            lines.append(f"{name}: {state}" + "".join(f"\n    {r}" for r in reasons))
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def explain(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | str | Tensor | None = None, scale: float | None = None,
    bias: Bias | Term | None = None, softcap: float | None = None, sink: Tensor | None = None, dropout_p: float = 0.0,
    positions: Positions | None = None, key_padding: Tensor | None = None, return_lse: bool = False,
    backend: str = "auto",
) -> Explanation:  # fmt: skip
    """Says which backend would run a call, why the others would not, and what the mask costs.

    Args:
        q, k, v, mask, scale, bias, softcap, sink, dropout_p, positions, key_padding, return_lse, backend: As for
            :func:`attention`.

    Returns:
        An :class:`Explanation`; print it.

    Raises:
        ValueError: As :func:`attention` would.
        UnsupportedError: When a named backend refuses.

    Example:
        >>> import manyheads as mh
        >>> q = torch.ones(1, 2, 256, 16)
        >>> print(str(mh.explain(q, q, q, mask="window(8)")).splitlines()[0])
        sdpa: refused
    """
    call = _call(q, k, v, mask, scale, bias, softcap, sink, dropout_p, positions, key_padding, return_lse)
    taken = _choose(call, backend)
    refusals = {name: _refusals(name, call) for name in BACKENDS}
    if taken == "blocked" and not refusals["sdpa"]:
        refusals["sdpa"] = _slower(call)
    notes = []
    if taken != "sdpa":
        layout = build(call.mask, q.shape[2], k.shape[2], tile=default_tile(q.shape[2], k.shape[2]),
                       positions=positions, key_padding=key_padding, batch=q.shape[0], heads=q.shape[1])  # fmt: skip
        notes.append(f"visited tiles of {layout.tile[0]} x {layout.tile[1]}: {layout.density:.2%} of all, "
                     f"{layout.area:.2%} of the pairs are visible")  # fmt: skip
        notes.extend([layout.cost_note] if layout.cost_note else [])
    if taken == "blocked" and q.device.type == "cpu":
        fused = call.plain and products.fused_wins(q.dtype)
        notes.append("pieces go to torch's fused kernel" if fused else "pieces go to separate products and passes")
    notes.extend(_sees_later(call))
    return Explanation(taken, refusals, tuple(notes))


def _call(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | str | Tensor | None, scale: float | None, bias: Bias | Term | None,
    softcap: float | None, sink: Tensor | None, dropout_p: float, positions: Positions | None,
    key_padding: Tensor | None, return_lse: bool,
) -> Call:  # fmt: skip
    checks.attention_inputs(q, k, v)
    checks.options(q, k, scale=scale, softcap=softcap, sink=sink, dropout_p=dropout_p)
    if positions is not None:
        checks.positions(positions, q, k)
    if key_padding is not None:
        checks.key_padding(key_padding, k)
    value = as_mask(mask)
    _check_mask_shape(value, q)
    plain = bias is None and softcap is None and sink is None and not dropout_p
    grads = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return Call(q, k, v, value, plain, positions is not None, key_padding is not None, return_lse, grads)


def _check_mask_shape(mask: Mask, q: Tensor) -> None:
    for size, want, what in ((mask.shape[0], q.shape[0], "batch"), (mask.shape[1], q.shape[1], "heads")):
        if size not in (1, want):
            raise ValueError(f"mask: its {what} size is {size}; q has {want} (shape {tuple(q.shape)})")


def _choose(call: Call, backend: str) -> str:
    if backend == "auto":
        return "sdpa" if not _refusals("sdpa", call) and not _slower(call) else "blocked"
    if backend not in BACKENDS:
        raise unknown("backend", backend, ["auto", *BACKENDS])
    reasons = _refusals(backend, call)
    if reasons:
        raise UnsupportedError(f"backend {backend!r} cannot take this call: " + "; ".join(reasons))
    return backend


def _refusals(backend: str, call: Call) -> list[str]:
    """Why a backend cannot give the right answer; empty when it can."""
    if backend != "sdpa":
        return []
    reasons = []
    square_causal = isinstance(call.mask, Causal) and call.q.shape[2] == call.k.shape[2]
    if not (call.dense or square_causal):
        why = "its causal mask is upper-left, so Nq must equal Nk" if isinstance(call.mask, Causal) else (
            "it takes a mask only as a tensor of Nq x Nk")  # fmt: skip
        reasons.append(f"mask {call.mask.text!r}: {why}")
    if not call.plain:
        reasons.append("bias, softcap, sink and dropout here have meanings that it does not share")
    if call.positions:
        reasons.append("it knows no logical positions")
    if call.key_padding:
        reasons.append("padded keys that hold NaN would reach its output")
    if 0 in call.q.shape or 0 in call.k.shape or 0 in call.v.shape:
        reasons.append("a dimension is empty")
    if call.return_lse and call.needs_grad:
        reasons.append("its lse is not differentiable")
    if call.return_lse and (call.q.device.type != "cpu" or call.q.shape[3] != call.v.shape[3]):
        reasons.append("it returns an lse only on a CPU and for Dv = D")
    return reasons


def _slower(call: Call) -> list[str]:
    """Why ``auto`` prefers the engine although SDPA could run."""
    pairs = call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.k.shape[2]
    if call.q.device.type != "cpu" or pairs < _PROBE_PAIRS or call.q.dtype not in (torch.float32, torch.bfloat16):
        return []
    if torch.compiler.is_compiling() or products.fused_wins(call.q.dtype):
        return []  # a probe cannot run inside a trace
    return ["products and passes were measured to be faster on this processor"]


_PROBE_PAIRS = 1 << 22


def _sees_later(call: Call) -> list[str]:
    names = call.mask.text
    if "causal" not in names or isinstance(call.mask, Causal):
        return []
    from .mask.show import sees_later

    return ["the mask contains causal, yet some query sees a later key"] if sees_later(call.mask, call.k.shape[2]) else []


# --- delegation -------------------------------------------------------------------------------------------------

Runner = Callable[[Tensor, Tensor, Tensor, float | None], "Tensor | Attn"]
_delegations: dict[tuple[object, ...], Runner] = {}


def _remember(call: Call, mask: object, run: Runner) -> None:
    q, k, v = call.q, call.k, call.v
    key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, call.return_lse,
           call.needs_grad, mask)  # fmt: skip
    if len(_delegations) > 1024:
        _delegations.clear()
    _delegations[key] = run


def _sdpa_runner(call: Call) -> Runner:
    causal = not call.dense
    groups = call.q.shape[1] // call.k.shape[1]
    if call.return_lse:
        return lambda q, k, v, scale: Attn(
            *flash.whole(q, k, v, causal, q.shape[3] ** -0.5 if scale is None else float(scale))
        )
    if call.q.shape[2] == 1 and groups > 1:
        return _rows_of_a_group
    if groups > 1:
        return lambda q, k, v, scale: scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=True
        )
    if causal:
        return _causal
    return _dense


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=scale)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, scale=scale)


def _rows_of_a_group(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """One query token: the query heads of a key head become the rows of one product."""
    b, h, _, d = q.shape
    stacked = q.reshape(b, k.shape[1], h // k.shape[1], d)
    return scaled_dot_product_attention(stacked, k, v, scale=scale).reshape(b, h, 1, v.shape[3])
