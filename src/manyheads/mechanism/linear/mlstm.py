"""The mLSTM: linear attention with an exponential or sigmoid input gate, a forget gate and a normaliser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.common import checks
from manyheads.common.errors import unknown
from manyheads.engine import scan as engine
from manyheads.engine.scan import State
from manyheads.mask import Mask
from manyheads.mechanism import exact
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Spec, drawn, qkv

GATES = ("exp", "sigmoid")
"""Input gates: ``exp(i)``, which needs a running maximum, and ``sigmoid(i)``, which does not."""


def mlstm(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    input_gate: Float[Tensor, "B H N"],
    forget_gate: Float[Tensor, "B H N"],
    gate: str = "exp",
    normalise: bool | str | None = None,
    mask: Mask | str | None = None,
    state: State | None = None,
    return_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B H N Dv"] | tuple[Tensor, State]:
    r"""Reads a matrix memory that a forget gate decays and an input gate writes.

    $$C_t = \sigma(f_t)\,C_{t-1} + g(i_t)\,k_t v_t^\top, \qquad n_t = \sigma(f_t)\,n_{t-1} + g(i_t)\,k_t, \qquad
    h_t = \frac{C_t^\top \tilde q_t}{\max(|n_t \cdot \tilde q_t|, 1)}$$

    with $g = \exp$ (mLSTMexp) or $g = \sigma$ (mLSTMsig) and $\tilde q = q / \sqrt D$.

    Args:
        q: (B, H, N, D).
        k: (B, Hkv, N, D); H is a multiple of Hkv, every query head has a state of its own.
        v: (B, Hkv, N, Dv).
        input_gate: (B, H, N) pre-activations i. Keep gates in float32 for inputs in half precision.
        forget_gate: (B, H, N) pre-activations f.
        gate: ``"exp"`` or ``"sigmoid"``, what the input gate is put through.
        normalise: What divides: ``"max1"`` or True as above, ``"abs"`` and ``"sum"`` without the floor of 1, False
            nothing. By default ``"max1"`` with ``"exp"``, and nothing with ``"sigmoid"``, where a norm follows.
        mask: None or causal, or packed documents (``Document(lens) & Causal()``), at whose borders the memory is
            empty.
        state: What came before; with ``"exp"`` it holds the running maximum m, which keeps large gates from
            overflowing, with ``"sigmoid"`` none (every weight is at most 1).
        return_state: Also return the state after the last token.
        chunk: Tokens between stored states; the engine's choice by default. It changes no result. In the kernels of
            the paper it is the outer of two levels of tiles: a chunk is cut again into tiles of queries and keys, so
            that it may be large (128 to 512 tokens) without a matrix of chunk x chunk scores; 64 without that second
            level is their baseline "limit_chunk".
        backend: As in :func:`manyheads.engine.scan.scan`.

    Returns:
        (B, H, N, Dv) in the dtype of ``v``; with ``return_state`` also the :class:`State`.

    Raises:
        ValueError: For shapes or names that do not fit.
        TypeError: For wrong dtypes.
        UnsupportedError: For masks other than those above.

    Conventions:
        The published kernels add 1e-6 to the divisor, which here is never below 1 and needs no such guard. Their
        backward treats divisor and maximum as constants: the same gradient wherever a scale-invariant norm follows,
        as in :class:`manyheads.nn.MLSTM`; gradients here are exact everywhere.

    Source:
        Beck et al., xLSTM, arXiv 2405.04517, section 2.3; Beck et al., Tiled Flash Linear Attention, arXiv 2503.14376.

    Example:
        >>> q = k = v = torch.ones(1, 1, 4, 4)
        >>> gates = dict(input_gate=torch.zeros(1, 1, 4), forget_gate=torch.full((1, 1, 4), 40.0))
        >>> mlstm(q, k, v, **gates, normalise=False)[0, 0, :, 0].tolist()    # nothing is forgotten
        [2.0, 4.0, 6.0, 8.0]
        >>> mlstm(q, k, v, **gates)[0, 0, :, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    checks.attention_inputs(q, k, v)
    SPEC.check(q, k, v, causal=True)
    kind = _normaliser(gate, normalise)
    _check_gates(input_gate, forget_gate, q.shape[:3], "(B, H, N)")
    _, lens = order(SPEC, mask, q)
    found = engine.scan(
        q,
        k,
        v,
        decay=F.logsigmoid(_wide(forget_gate)),
        gate=_log_gate(input_gate, gate),
        scale=q.shape[3] ** -0.5,
        normalise=kind,
        state=_inward(state, gate),
        lens=lens,
        return_state=True,
        chunk=chunk,
        backend=backend,
    )
    assert isinstance(found, tuple)
    return (found[0], _outward(found[1], gate)) if return_state else found[0]


def step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B Hkv D"],
    v: Float[Tensor, "B Hkv Dv"],
    state: State | None = None,
    *,
    input_gate: Float[Tensor, "B H"],
    forget_gate: Float[Tensor, "B H"],
    gate: str = "exp",
    normalise: bool | str | None = None,
) -> tuple[Float[Tensor, "B H Dv"], State]:
    """One token of :func:`mlstm`: updates the memory, then reads it.

    Args:
        q: (B, H, D).
        k: (B, Hkv, D).
        v: (B, Hkv, Dv).
        state: What came before; nothing by default.
        input_gate: (B, H) pre-activations.
        forget_gate: (B, H) pre-activations.
        gate, normalise: As in :func:`mlstm`.

    Returns:
        Output (B, H, Dv) in the dtype of ``v``, and the new state.

    Raises:
        ValueError: For shapes or names that do not fit.

    Example:
        >>> one, gate = torch.ones(1, 1, 4), torch.zeros(1, 1)
        >>> out, state = step(one, one, one, input_gate=gate, forget_gate=gate)
        >>> out[0, 0].tolist(), state.m.tolist()
        ([1.0, 1.0, 1.0, 1.0], [[0.0]])
    """
    kind = _normaliser(gate, normalise)
    _check_gates(input_gate, forget_gate, q.shape[:2], "(B, H)")
    out, state = engine.step(
        q,
        k,
        v,
        _inward(state, gate),
        decay=F.logsigmoid(_wide(forget_gate)),
        gate=_log_gate(input_gate, gate),
        scale=q.shape[-1] ** -0.5,
        normalise=kind,
    )
    return out, _outward(state, gate)


class Transfer(NamedTuple):
    """How much larger or smaller than its values an mLSTM's output is, by its gates.

    Attributes:
        before: (I, F) mean over tokens of ``max |h|`` over the mean of ``max |v|``, for every pair of gates.
        after: The same behind an RMS norm per head.
    """

    before: Tensor
    after: Tensor


def transfer(
    input_gates: Sequence[float],
    forget_gates: Sequence[float],
    *,
    gate: str = "exp",
    normalise: bool | str | None = None,
    tokens: int = 512,
    width: int = 128,
    value_width: int | None = None,
    norm_eps: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Transfer:
    """Measures the gain of an mLSTM on normal inputs for constant gate pre-activations.

    Shows why the epsilon of the norm acts as a second input gate: where the gain before it is far below
    ``sqrt(norm_eps)``, the norm passes nothing on.

    Args:
        input_gates: Pre-activations of the input gate to try.
        forget_gates: Pre-activations of the forget gate to try.
        gate, normalise: As in :func:`mlstm`.
        tokens: Length of the sequence.
        width: Width of queries and keys.
        value_width: Width of values; ``width`` by default.
        norm_eps: Epsilon of the norm behind the mLSTM.
        generator: Source of queries, keys and values.

    Returns:
        The gains before and after the norm, in float32.

    Raises:
        ValueError: For a name that does not exist, or no tokens.

    Source:
        Beck et al., Tiled Flash Linear Attention, arXiv 2503.14376, section 4.

    Example:
        >>> gains = transfer([-12.0, 0.0], [4.0], gate="sigmoid", tokens=64, width=16)
        >>> bool(gains.before[0, 0] < 1e-3 < 0.1 < gains.before[1, 0])
        True
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    rows, columns = len(input_gates), len(forget_gates)
    q, k, v = (
        torch.randn(1, 1, tokens, n, generator=generator).expand(rows * columns, -1, -1, -1)
        for n in (width, width, value_width or width)
    )
    pairs = torch.cartesian_prod(torch.tensor(input_gates).float(), torch.tensor(forget_gates).float()).view(-1, 2)
    i, f = (pairs[:, n, None, None].expand(-1, 1, tokens) for n in (0, 1))
    h = mlstm(q, k, v, input_gate=i, forget_gate=f, gate=gate, normalise=normalise)
    assert isinstance(h, Tensor)
    normed = h * (h.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    size = v.abs().amax(-1).mean((1, 2))
    return Transfer(*((t.abs().amax(-1).mean((1, 2)) / size).view(rows, columns) for t in (h, normed)))


def reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    input_gate: Float[Tensor, "B H N"],
    forget_gate: Float[Tensor, "B H N"],
    gate: str = "exp",
    normalise: bool | str | None = None,
    mask: Mask | str | None = None,
    state: State | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """The parallel form: the weight of every pair of tokens, stabilised by the largest of each row."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    q, keys, values, i, f = (t.to(wide) for t in (q, k, v, input_gate, forget_gate))
    q = q * q.shape[3] ** -0.5
    allowed, total = visible(mask, q), F.logsigmoid(f).cumsum(-1)
    log = total[..., :, None] - total[..., None, :] + (i if gate == "exp" else F.logsigmoid(i))[..., None, :]
    log = log.masked_fill(~allowed, -torch.inf)
    m = log.amax(-1, keepdim=True).detach()
    carried = torch.full_like(m, -torch.inf)
    if state is not None:  # it is seen by the tokens that see the first one
        start = torch.zeros_like(state.S[..., 0, 0]) if state.m is None else state.m
        carried = (total + start[..., None]).masked_fill(~allowed[..., 0], -torch.inf)[..., None]
        m = torch.maximum(m, carried.detach())
    weights = q @ keys.mT * (log - m).exp()
    out, sums = weights @ values, weights.sum(-1, keepdim=True)
    if state is not None:
        old = (carried - m).exp()
        out = out + old * (q @ state.S)
        sums = sums if state.n is None else sums + old * (q @ state.n[..., None])
    kind = _normaliser(gate, normalise)
    if not kind:
        return (out * m.exp()).to(v.dtype)
    sums = sums if kind == "sum" else sums.abs()
    return (out / (torch.maximum(sums, (-m).exp()) if kind == "max1" else sums)).to(v.dtype)


def flops(case: Case, chunk: int = 64) -> int:
    """Counts the operations of a forward call in chunks: the products between chunks and those inside them.

    Args:
        case: The call.
        chunk: Tokens per chunk.

    Returns:
        Operations over all heads: a state of D x Dv written and read once for every token, and half a chunk of scores.
    """
    (batch, heads, tokens, width), value_width = case.q.shape, case.v.shape[3]
    return batch * heads * tokens * (4 * width * value_width + chunk * (width + value_width))


def traffic(case: Case) -> int:
    """Counts the bytes that have to move at least once: inputs, gates and output.

    Args:
        case: The call.

    Returns:
        Bytes.
    """
    gates = [t for t in case.options.values() if isinstance(t, Tensor)]
    return exact.traffic(case) + sum(t.numel() * t.element_size() for t in gates)


def _normaliser(gate: str, normalise: bool | str | None) -> bool | str:
    if gate not in GATES:
        raise unknown("input gate of mlstm", str(gate), GATES)
    if normalise is None:
        return "max1" if gate == "exp" else False
    return "max1" if normalise is True else normalise


def _check_gates(input_gate: Tensor, forget_gate: Tensor, shape: Sequence[int], axes: str) -> None:
    for name, t in (("input_gate", input_gate), ("forget_gate", forget_gate)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected a floating tensor {axes}, got {got}")
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{name}: expected shape {axes} = {tuple(shape)}, got {tuple(t.shape)}")


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _log_gate(input_gate: Tensor, gate: str) -> Tensor:
    return _wide(input_gate) if gate == "exp" else F.logsigmoid(_wide(input_gate))


def _inward(state: State | None, gate: str) -> State | None:
    """A state for the engine, which keeps a maximum for every input gate; that of a sigmoid is left at 0."""
    if state is None or gate == "exp":
        return state
    if isinstance(state, State) and state.m is not None:
        raise ValueError("state: m is given; it belongs to gate='exp'")
    return state._replace(m=torch.zeros_like(state.S[..., 0, 0]).detach())


def _outward(state: State, gate: str) -> State:
    if gate == "exp" or state.m is None:
        return state
    factor = state.m.exp()[..., None]
    return State(state.S * factor[..., None], None if state.n is None else state.n * factor)


SPEC = Spec(
    "tfla-mlstm",
    fn=mlstm,
    reference=reference,
    step=step,
    paper="Beck et al., Tiled Flash Linear Attention, arXiv 2503.14376",
    inputs=qkv(
        mask=lambda size: "causal" if size.causal else "full",
        input_gate=drawn("BHN", lambda t: t - 4, salt=1),
        forget_gate=drawn("BHN", lambda t: t + 3, salt=2),
    ),
    gates={"input_gate": "BHN", "forget_gate": "BHN"},
    backends=("reference", "blocked", "triton"),
    supports={"causal_self", "gqa", "value_width", "backward", "decode"},
    invariances=("packed", "batch", "heads", "split"),
    axes={"carrier": "causal", "kernel": "inner product", "estimator": "gated sum", "execution": "scan"},
    flops=flops,
    bytes=traffic,
    evidence={
        1: "test_mlstm::test_recurrent_parallel_and_chunked_forms_agree",
        2: "test_mlstm::test_open_forget_gate_is_normalised_linear_attention",
        3: (
            "test_mlstm::test_frozen_denominators_give_the_manual_backward",
            "test_mlstm::test_behind_a_scale_free_norm_the_manual_backward_is_exact",
        ),
        4: "test_mlstm::test_a_huge_input_gate_does_not_overflow",
        5: "test_mlstm::test_the_sigmoid_gate_needs_no_maximum",
    },
)
