"""RAT: a gated recurrence inside chunks of tokens, softmax attention over what the chunks end with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.attention import attention
from manyheads.common import checks
from manyheads.common.errors import UnsupportedError
from manyheads.common.rope import RoPE
from manyheads.engine.merge import merge
from manyheads.engine.scan.elementwise import elementwise
from manyheads.mask import Mask
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Size, Spec, drawn, qkv

from .chunks import Chunks, check_size, cut, earlier
from .mlstm import traffic


class RATState(NamedTuple):
    """What RAT remembers of a document: the recurrence of its last chunk, and the ends of the chunks before.

    Attributes:
        k, v: (B, H, D) the recurrence after the last token, in float32 (float64 for float64).
        keys, values: (B, H, S, D) what the S complete chunks ended with, keys rotated, in the dtype of the inputs.
        tokens: Tokens read.
    """

    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    tokens: int


def rat(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    *,
    forget: Float[Tensor, "B H N D"],
    chunk: int = 16,
    rope: RoPE | None = None,
    mask: Mask | str | None = None,
    scale: float | None = None,
    state: RATState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B H N D"] | tuple[Tensor, RATState]:
    r"""Mixes tokens within chunks by a gated average, and across chunks by attention to the chunks' ends.

    From zero at the start of every chunk, with the same gate for keys and values,

    $$\tilde k_t = g_t \odot \tilde k_{t-1} + (1 - g_t) \odot k_t, \qquad
    \tilde v_t = g_t \odot \tilde v_{t-1} + (1 - g_t) \odot v_t;$$

    token t then attends to $(\tilde k, \tilde v)$ at the last token of every earlier chunk and at itself. Chunks of one
    token are attention, one chunk for everything is a recurrence.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D).
        v: (B, H, N, D), of the width of the keys, which share its gates.
        forget: (B, H, N, D) gates g in [0, 1]. Keep them in float32 for inputs in half precision.
        chunk: Tokens of a chunk.
        rope: Rotation of queries and averaged keys, whose position is the number of the chunk.
        mask: None or causal, or packed documents (``Document(lens) & Causal()``): chunks begin anew with each.
        scale: Multiplies the scores; D ** -0.5 by default.
        state: What came before; it may end inside a chunk.
        return_state: Also return the state after the last token.
        backend: As in :func:`manyheads.attention`.

    Returns:
        (B, H, N, D) in the dtype of ``v``; with ``return_state`` also the :class:`RATState`.

    Raises:
        ValueError: For shapes that do not fit, or on a CPU for gates outside [0, 1].
        TypeError: For wrong dtypes.
        UnsupportedError: For masks other than those above.

    Conventions:
        Averaged keys and values are rounded to the dtype of the inputs, in which a cache keeps them.

    Source:
        Wei et al., RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling,
        arXiv 2507.04416, section 3.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> v = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 4, 1).expand(-1, -1, -1, 2)
        >>> gates = torch.zeros(1, 1, 4, 2)
        >>> rat(q, k, v, forget=gates, chunk=2)[0, 0, :, 0].tolist()   # itself, and the end of the first chunk
        [1.0, 3.0, 4.0, 5.0]
    """
    checks.attention_inputs(q, k, v)
    SPEC.check(q, k, v, causal=True)
    _check(forget, q.shape, chunk)
    _, lens = order(SPEC, mask, q)
    before = _state(state, q, chunk)
    if not q.shape[2]:
        return (v, before) if return_state else v
    number, begun = divmod(before.tokens, chunk)
    if lens is None and begun + q.shape[2] <= chunk:  # all in one chunk, of which only these tokens are computed
        chunks = cut(q.shape[2], q.shape[2], None, device=q.device)
    else:
        chunks = cut(q.shape[2], chunk, lens, offset=begun, device=q.device)
    sums = _averages(k, v, forget, chunks, before, begun > 0)
    place = chunks.rank + (number if chunks.document is None else number * (chunks.document == 0))
    queries = _rotated(chunks.split(q), rope, place)
    keys, values = _rotated(sums[0], rope, place).to(q.dtype), sums[1].to(v.dtype)
    ends = [torch.cat([old, t[:, :, :, -1]], 2) for old, t in ((before.keys, keys), (before.values, values))]
    seen, positions = earlier(chunks, before.keys.shape[2])
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    grouped = queries.transpose(2, 3).flatten(1, 2)  # all queries of a chunk see the same ends: a group of heads
    found = attention(
        grouped, *ends, mask=seen, positions=positions, scale=factor, return_lse=True, backend=backend
    )
    across = [t.unflatten(1, (q.shape[1], chunks.size)).transpose(2, 3) for t in found]
    out = chunks.join(merge((across[0], across[1]), (values, _own(queries, keys, factor))).out)
    return (out, _after(before, sums, (keys, values), chunks, lens, chunk)) if return_state else out


def step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B H D"],
    v: Float[Tensor, "B H D"],
    state: RATState | None = None,
    *,
    forget: Float[Tensor, "B H D"],
    chunk: int = 16,
    rope: RoPE | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H D"], RATState]:
    """One token of :func:`rat`: continues the recurrence, then attends to the chunks before and to itself.

    Args:
        q: (B, H, D).
        k: (B, H, D).
        v: (B, H, D).
        state: What came before; nothing by default.
        forget: (B, H, D) gates in [0, 1].
        chunk, rope, scale: As in :func:`rat`.

    Returns:
        Output (B, H, D) in the dtype of ``v``, and the new state.

    Raises:
        ValueError: For shapes or values that do not fit.

    Example:
        >>> one = torch.ones(1, 1, 2)
        >>> out, state = step(one, one, one, forget=0.5 * one, chunk=2)
        >>> out, state = step(one, one, one, state, forget=0.5 * one, chunk=2)
        >>> out[0, 0].tolist(), state.keys.shape[2]
        ([0.75, 0.75], 1)
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3 or t.shape != q.shape:
            raise ValueError(f"{name}: expected one token (B, H, D), the same for q, k and v, got {tuple(t.shape)}")
    _check(forget, q.shape, chunk)
    old = _state(state, q[:, :, None], chunk)
    fresh, gate = not old.tokens % chunk, forget.to(old.k.dtype)
    k_sum, v_sum = (
        (1 - gate) * x + (0 if fresh else gate * past) for x, past in ((k, old.k), (v, old.v))
    )
    place = torch.full((1, 1), old.tokens // chunk, device=q.device)
    query, key = (_rotated(t[:, :, None, None], rope, place) for t in (q, k_sum))
    key, value = key[:, :, 0].to(q.dtype), v_sum[:, :, None].to(v.dtype)
    factor = q.shape[2] ** -0.5 if scale is None else float(scale)
    parts = [(value, _own(query[:, :, 0], key, factor))]
    if old.keys.shape[2]:
        parts.append(attention(query[:, :, 0], old.keys, old.values, scale=factor, return_lse=True))
    out = merge(*parts).out[:, :, 0]
    keys, values = old.keys, old.values
    if not (old.tokens + 1) % chunk:
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return out, RATState(k_sum, v_sum, keys, values, old.tokens + 1)


def reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    *,
    forget: Float[Tensor, "B H N D"],
    chunk: int = 16,
    rope: RoPE | None = None,
    mask: Mask | str | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H N D"]:
    """Token by token, then a softmax over every token's own entry and the ends of earlier chunks."""
    allowed = visible(mask, q)[:, 0]
    place = (allowed.sum(-1) - 1).expand(q.shape[0], -1)  # in its document
    wide = torch.promote_types(q.dtype, torch.float32)
    gate, past, sums = forget.to(wide), torch.zeros_like(torch.cat([k, v], -1)[:, :, 0], dtype=wide), []
    for t in range(q.shape[2]):
        g = torch.cat([gate[:, :, t]] * 2, -1)
        past = (1 - g) * torch.cat([k, v], -1)[:, :, t] + torch.where(place[:, None, None, t] % chunk == 0, 0, g * past)
        sums.append(past)
    keys, values = torch.stack(sums, 2).chunk(2, -1)
    if rope is not None:
        q, keys = rope(q, place // chunk), rope(keys, place // chunk)
    keys, values = keys.to(q.dtype).to(wide), values.to(v.dtype).to(wide)
    number, last = place // chunk, place % chunk == chunk - 1
    seen = allowed & last[:, None, :] & (number[:, None, :] < number[:, :, None])
    seen = seen | torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    scores = q.to(wide) @ keys.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ values).to(v.dtype)


def flops(case: Case) -> int:
    """Counts the operations of a forward call: the two recurrences, and two products for every pair that is seen.

    Args:
        case: The call, without documents.

    Returns:
        Operations over all heads.
    """
    batch, heads, tokens, width = case.q.shape
    size = case.options.get("chunk", 16)
    whole, rest = divmod(tokens, size)
    pairs = tokens + size * whole * (whole - 1) // 2 + rest * whole
    return batch * heads * width * (8 * tokens + 4 * pairs)


def _averages(
    k: Tensor, v: Tensor, forget: Tensor, chunks: Chunks, before: RATState, continued: bool
) -> list[Tensor]:
    """Both recurrences in chunks, (B, H, M, C, D); empty slots repeat what stands before them."""
    wide = before.k.dtype
    keep = chunks.split(forget.to(wide), fill=1.0)
    found = []
    for x, past in ((k, before.k), (v, before.v)):
        rest = past.new_zeros(*past.shape[:2], chunks.count - 1, past.shape[2])
        first = past if continued else torch.zeros_like(past)
        found.append(elementwise(keep, (1 - keep) * chunks.split(x.to(wide)), torch.cat([first[:, :, None], rest], 2)))
    return found


def _rotated(x: Tensor, rope: RoPE | None, place: Tensor) -> Tensor:
    """Rotates (B, H, M, C, D) by the number of the chunk, (R, M)."""
    if rope is None:
        return x
    positions = place.repeat_interleave(x.shape[3], 1)
    flat = rope(x.flatten(2, 3), positions[0] if len(positions) == 1 else positions)
    return flat.unflatten(2, x.shape[2:4])


def _own(queries: Tensor, keys: Tensor, factor: float) -> Tensor:
    """The score of every token with itself, in the dtype of statistics."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    return (queries.to(wide) * keys.to(wide)).sum(-1) * factor


def _after(
    before: RATState,
    sums: list[Tensor],
    ends: tuple[Tensor, Tensor],
    chunks: Chunks,
    lens: Tensor | None,
    size: int,
) -> RATState:
    """The state behind the last token of the last document."""
    first, stop, tokens = 0, chunks.count, before.tokens + chunks.tokens
    older: tuple[Tensor, Tensor] = (before.keys, before.values)
    if lens is not None:
        rows = torch.atleast_2d(lens)
        if len(rows) > 1:
            raise UnsupportedError("rat: a state after documents that differ between batch entries; call one by one")
        lengths = rows[0].tolist()
        last = max(i for i, n in enumerate(lengths) if n)
        lengths[0] += chunks.offset
        first = sum(-(-n // size) for n in lengths[:last])
        stop = first + -(-lengths[last] // size)
        tokens = lengths[last]
        if last:
            older = (before.keys[:, :, :0], before.values[:, :, :0])
        else:
            tokens += before.tokens - chunks.offset
    whole = first + tokens // size - older[0].shape[2]
    keys, values = (torch.cat([o, t[:, :, first:whole, -1]], 2) for o, t in zip(older, ends, strict=True))
    return RATState(sums[0][:, :, stop - 1, -1], sums[1][:, :, stop - 1, -1], keys, values, tokens)


def _state(state: RATState | None, q: Tensor, chunk: int) -> RATState:
    batch, heads, _, width = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        zero, none = q.new_zeros(batch, heads, width, dtype=wide), q.new_zeros(batch, heads, 0, width)
        return RATState(zero, zero, none, none, 0)
    if not isinstance(state, RATState):
        raise TypeError(f"state: expected a RATState, got {type(state).__name__}")
    for name, t in (("k", state.k), ("v", state.v)):
        if tuple(t.shape) != (batch, heads, width):
            raise ValueError(f"state: {name} must have shape (B, H, D) = {(batch, heads, width)}, got {tuple(t.shape)}")
    shape = (batch, heads, state.tokens // chunk, width)
    for name, t in (("keys", state.keys), ("values", state.values)):
        if tuple(t.shape) != shape:
            raise ValueError(
                f"state: {name} must have shape (B, H, S, D) = {shape} after {state.tokens} tokens in chunks of "
                f"{chunk}, got {tuple(t.shape)}"
            )
    return state


def _check(forget: Tensor, shape: torch.Size, chunk: int) -> None:
    check_size(chunk)
    if not isinstance(forget, Tensor) or not forget.is_floating_point():
        got = forget.dtype if isinstance(forget, Tensor) else type(forget).__name__
        raise TypeError(f"forget: expected a floating tensor like k, got {got}")
    if forget.shape != shape:
        raise ValueError(f"forget: expected the shape of k, {tuple(shape)}, got {tuple(forget.shape)}")
    if not torch.compiler.is_compiling() and forget.device.type == "cpu" and forget.numel():
        low, high = torch.aminmax(forget)
        if not (low >= 0 and high <= 1):
            raise ValueError(f"forget: expected gates in [0, 1], got {float(low):.4g} to {float(high):.4g}")


def _rope(size: Size) -> RoPE | None:
    return None if size.width % 2 else RoPE()


SPEC = Spec(
    "rat",
    fn=rat,
    reference=reference,
    step=step,
    paper="Wei et al., RAT: Bridging RNN Efficiency and Attention Accuracy, arXiv 2507.04416",
    inputs=qkv(
        mask=lambda size: "causal" if size.causal else "full",
        forget=drawn("BHND", torch.sigmoid),
        chunk=4,
        rope=_rope,
    ),
    gates={"forget": "BHND"},
    backends=("reference", "blocked"),
    supports={"causal_self", "backward", "decode"},
    invariances=("packed", "batch", "heads", "split"),
    axes={"carrier": "ends of chunks", "kernel": "exp", "estimator": "average", "execution": "scan and tiles"},
    flops=flops,
    bytes=traffic,
    evidence={
        1: "test_rat::test_one_chunk_is_the_pure_recurrence",
        2: "test_rat::test_chunks_of_one_token_without_memory_are_causal_attention",
        3: "test_rat::test_steps_equal_one_call",
        4: "test_rat::test_parameters_add_up_to_the_published_model",
        5: ("test_elementwise::test_gradients_of_both_orders_match_finite_differences",
            "test_rat::test_merging_the_own_entry_passes_gradcheck"),
    },
)  # fmt: skip
