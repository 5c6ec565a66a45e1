"""NAtS-L: every chunk of tokens is either kept for softmax attention or folded into a gated delta memory."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.common import checks
from manyheads.common.errors import UnsupportedError
from manyheads.mask import Mask
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Size, Spec, drawn, qkv

from .branches import DEFAULT, Branches, NATSConfig, NATSState, branches, branches_step, split_channels
from .gated_delta import unit_length
from .mlstm import traffic

Attend = Bool[Tensor, "B H N"] | Float[Tensor, "B H N"]


def natsl(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    *,
    decay: Float[Tensor, "B H N"],
    beta: Float[Tensor, "B H N"],
    attend: Attend,
    mix: Float[Tensor, "B Ha N 2"] | None = None,
    config: NATSConfig = DEFAULT,
    mask: Mask | str | None = None,
    state: NATSState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B H N Dv"] | tuple[Tensor, NATSState]:
    r"""Attends to kept chunks and reads a memory of the others, both from the same queries, keys and values.

    Attention sees the earlier chunks of type "attend" and its own chunk up to itself. The memory follows
    $S_t = e^{g_t}(I - \beta_t k_t k_t^\top) S_{t-1} + \beta_t k_t v_t^\top$ inside a chunk; at its end the writes of a
    chunk of type "attend" are taken back, its decay is not. A chunk's type acts on later chunks only. Then

    $$o = w_1\, \mathrm{RMS}(S_t^\top \hat q_t / \sqrt D) + w_2\, \mathrm{RMS}(\mathrm{softmax}(\bar q \bar K^\top /
    \sqrt{D_a})\, V)$$

    with $\hat q, \hat k$ of length 1 and $\bar q, \bar k$ of mean square 1 per attention head, each norm over the
    channels of an attention head.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D).
        v: (B, H, N, Dv).
        decay: (B, H, N) log decay g, at most 0. Keep gates in float32 for inputs in half precision.
        beta: (B, H, N) share that is overwritten, in [0, 2].
        attend: (B, H, N), read at the last token of every chunk and nowhere else: True or above 0.5 keeps the chunk for
            attention. In floating point it takes a gradient, as the number that multiplies the chunk's weights (and
            one less it, the chunk's write); see :func:`choose`.
        mix: (B, H * split, N, 2) weights of memory and attention; halves by default.
        config: Sizes, and what learns.
        mask: None or causal, or packed documents (``Document(lens) & Causal()``): chunks and memory begin anew.
        state: What came before; it may end inside a chunk.
        return_state: Also return the state after the last token.
        backend: As in :func:`manyheads.attention`.

    Returns:
        (B, H, N, Dv) in the dtype of ``v``; with ``return_state`` also the :class:`NATSState`.

    Raises:
        ValueError: For shapes that do not fit, or on a CPU for gates out of range.
        TypeError: For wrong dtypes.
        UnsupportedError: For masks other than those above, or a state with packed documents.

    Source:
        Deng et al., Neural Attention Search Linear, arXiv 2602.03681, section 3.

    Example:
        >>> q = k = v = torch.randn(1, 1, 6, 4)
        >>> gates = dict(decay=torch.zeros(1, 1, 6), beta=torch.ones(1, 1, 6))
        >>> kept = torch.tensor([[[0, 1, 0, 0, 0, 0]]]).bool()               # the first of three chunks
        >>> out, state = natsl(q, k, v, **gates, attend=kept, config=NATSConfig(chunk=2), return_state=True)
        >>> out.shape, state.attention.kept.tolist()
        (torch.Size([1, 1, 6, 4]), [[2]])
    """
    checks.attention_inputs(q, k, v)
    SPEC.check(q, k, v, causal=True)
    _, lens = order(SPEC, mask, q)
    _check(q, v, decay, beta, attend, mix, config)
    if lens is not None and return_state:
        raise UnsupportedError("natsl: a state after packed documents; call the documents one by one")
    shared = _shared(q, k, v, config)
    found, after = branches(
        *shared, decay=decay, beta=beta, attend=attend, config=config, lens=lens, state=state, backend=backend
    )
    out = _mixed(found, mix, config, v)
    return (out, after) if return_state else out


def step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B H D"],
    v: Float[Tensor, "B H Dv"],
    state: NATSState | None = None,
    *,
    decay: Float[Tensor, "B H"],
    beta: Float[Tensor, "B H"],
    attend: Tensor | None = None,
    mix: Float[Tensor, "B Ha 2"] | None = None,
    config: NATSConfig = DEFAULT,
) -> tuple[Float[Tensor, "B H Dv"], NATSState]:
    """One token of :func:`natsl`; when it completes its chunk, the chunk is kept or forgotten.

    Args:
        q: (B, H, D).
        k: (B, H, D).
        v: (B, H, Dv).
        state: What came before; nothing by default.
        decay: (B, H) log decay.
        beta: (B, H) share that is overwritten.
        attend: (B, H) type of the chunk, needed by the token that completes it.
        mix: (B, H * split, 2) weights of memory and attention; halves by default.
        config: As in :func:`natsl`.

    Returns:
        Output (B, H, Dv) in the dtype of ``v``, and the new state.

    Raises:
        ValueError: For shapes that do not fit, or a type that is missing.

    Example:
        >>> one, gate = torch.ones(1, 1, 4), torch.zeros(1, 1)
        >>> out, state = step(one, one, one, decay=gate, beta=gate)
        >>> out.shape
        torch.Size([1, 1, 4])
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise ValueError(f"{name}: expected one token (B, H, D), got shape {tuple(t.shape)}")
    q, k, v = (t[:, :, None] for t in (q, k, v))
    _check(q, v, decay[..., None], beta[..., None], None, None if mix is None else mix[:, :, None], config)
    first, second = ((a[:, :, 0], b[:, :, 0], c[:, :, 0]) for a, b, c in _shared(q, k, v, config))
    found, state = branches_step(first, second, state, decay=decay, beta=beta, attend=attend, config=config)
    both = Branches(*(t[:, :, None] for t in found))
    return _mixed(both, None if mix is None else mix[:, :, None], config, v)[:, :, 0], state


def choose(
    logits: Float[Tensor, "*rows 2"], *, gumbel: bool = False, generator: torch.Generator | None = None
) -> Float[Tensor, "*rows"]:
    """Decides between attention (first logit) and memory (second), passing gradients straight through.

    Args:
        logits: (..., 2).
        gumbel: Whether to draw the decision, with Gumbel noise, instead of taking the larger logit.
        generator: Source of the noise.

    Returns:
        (...) exactly 1.0 for attention or 0.0 for memory, with the gradient of the softmax of the logits.

    Raises:
        ValueError: For another number of logits.

    Example:
        >>> choose(torch.tensor([[2.0, 1.0], [0.0, 1.0]])).tolist()
        [1.0, 0.0]
    """
    if logits.dim() < 1 or logits.shape[-1] != 2:
        raise ValueError(f"logits: expected (..., 2), one for attention and one for memory, got {tuple(logits.shape)}")
    if gumbel:
        noise = torch.empty_like(logits).exponential_(generator=generator)
        logits = logits - noise.log()
    soft = logits.softmax(-1)[..., 0]
    hard = (logits[..., 0] >= logits[..., 1]).to(soft.dtype)
    return hard + (soft - soft.detach())


def gated_norm(
    first: Float[Tensor, "*rows D"],
    second: Float[Tensor, "*rows D"],
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    mix: Float[Tensor, "*rows 2"] | None = None,
    gate: Float[Tensor, "*rows D"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "*rows D"]:
    """Two results, each with an RMS norm, mixed and gated: ``(w1 RMS(first) + w2 RMS(second)) * silu(gate)``.

    Args:
        first, second: (..., D).
        weights: Two (D,) that the normalised results are multiplied by.
        mix: (..., 2) weights of the results; halves by default.
        gate: (..., D); nothing by default.
        eps: Added to the mean square.

    Returns:
        (..., D) in the dtype of ``first``; norms are taken in float32 (float64 for float64).

    Example:
        >>> x = torch.full((2, 4), 3.0)
        >>> gated_norm(x, -x, mix=torch.tensor([0.75, 0.25]))[0].round(decimals=4).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    total = torch.zeros_like(first, dtype=wide)
    for n, part in enumerate((first.to(wide), second.to(wide))):
        normed = F.rms_norm(part, part.shape[-1:], None if weights is None else weights[n].to(wide), eps)
        total = total + normed * (0.5 if mix is None else mix[..., n, None].to(wide))
    return (total if gate is None else total * F.silu(gate.to(wide))).to(first.dtype)


def reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    *,
    decay: Float[Tensor, "B H N"],
    beta: Float[Tensor, "B H N"],
    attend: Attend,
    mix: Float[Tensor, "B Ha N 2"] | None = None,
    config: NATSConfig = DEFAULT,
    mask: Mask | str | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """Token by token, types as numbers that multiply: weights of attention, and what the memory is written."""
    allowed = visible(mask, q)[:, 0].expand(q.shape[0], -1, -1)
    place, size, wide = allowed.sum(-1) - 1, config.chunk, torch.promote_types(q.dtype, torch.float32)
    at, number = place % size, place // size
    gate = attend.to(wide)
    hard = gate.detach() > 0.5
    parts = [gate, 1 - gate]
    if not config.both:
        parts = [torch.where(m, g, g.detach()) for m, g in zip((hard, ~hard), parts, strict=True)]
    (mq, mk, mv), (aq, ak, av) = ([t.to(wide) for t in part] for part in _shared(q, k, v, config))
    memory, outs = mq.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    start = moved = memory
    for t in range(q.shape[2]):
        fresh = (at[:, t] == 0)[:, None, None, None]
        memory = torch.where((place[:, t] == 0)[:, None, None, None], 0.0, memory)
        start, moved = (torch.where(fresh, memory, s) for s in (start, moved))
        fade = decay[:, :, t, None, None].to(wide).exp()
        memory, moved = fade * memory, fade * moved
        key, value = mk[:, :, t, :, None], mv[:, :, t, None]
        memory = memory + beta[:, :, t, None, None].to(wide) * key * (value - key.mT @ memory)
        outs.append((mq[:, :, t, None] @ memory)[:, :, 0])
        kept = moved if config.decay_kept else start
        folded = kept + parts[1][:, :, t, None, None] * (memory - kept)
        memory = torch.where((at[:, t] == size - 1)[:, None, None, None], folded, memory)
    last = place - at + size - 1  # where the chunk of a token ends, in its document
    index = (torch.arange(q.shape[2], device=q.device) + last - place).clamp(max=q.shape[2] - 1)
    types = parts[0].gather(2, index[:, None].expand_as(gate)).repeat_interleave(config.split, 1)
    older = (number[:, None, :] < number[:, :, None])[:, None]
    weights = torch.where(older, types[:, :, None], 1.0)
    scores = (aq @ ak.mT * ak.shape[3] ** -0.5).masked_fill(~allowed[:, None], -torch.inf)
    weights = weights * (scores - scores.masked_fill(weights.detach() == 0, -torch.inf).amax(-1, keepdim=True)).exp()
    found = Branches(torch.stack(outs, 2).to(v.dtype), (weights / weights.sum(-1, keepdim=True) @ av).to(v.dtype))
    return _mixed(found, mix, config, v)


def flops(case: Case) -> int:
    """Counts the operations of a forward call, as if attention kept every chunk.

    Args:
        case: The call, without documents.

    Returns:
        Operations over all heads: the memory with the products that join chunks, and two products for every pair of
        causal attention.
    """
    (batch, heads, tokens, width), value_width = case.q.shape, case.v.shape[3]
    size = case.options.get("config", DEFAULT).chunk
    inside = 6 * width * (width + value_width) + size * (3 * width + 2 * (width + value_width))
    joined = 2 * width * value_width * tokens + 2 * width * width * value_width * -(-tokens // size)
    return batch * heads * (tokens * inside + joined + tokens * (tokens + 1) * (width + value_width))


def _shared(q: Tensor, k: Tensor, v: Tensor, config: NATSConfig) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Queries, keys and values of the memory and of the attention, from the same ones."""
    memory = (unit_length(q, config.eps) * q.shape[3] ** -0.5, unit_length(k, config.eps), v)
    cut_q, cut_k, cut_v = (split_channels(t, config.split) for t in (q, k, v))
    normed = [F.rms_norm(t, t.shape[-1:], eps=config.eps) for t in (cut_q, cut_k)]
    return memory, (normed[0], normed[1], cut_v)


def _mixed(found: Branches, mix: Tensor | None, config: NATSConfig, v: Tensor) -> Tensor:
    out = gated_norm(split_channels(found.memory, config.split), found.attention, mix=mix, eps=config.eps)
    return out.unflatten(1, (v.shape[1], config.split)).transpose(2, 3).flatten(-2)


def _check(
    q: Tensor, v: Tensor, decay: Tensor, beta: Tensor, attend: Tensor | None, mix: Tensor | None, config: NATSConfig
) -> None:
    shape = tuple(q.shape[:3])
    given = [("decay", decay, shape), ("beta", beta, shape)]
    if attend is not None:
        given.append(("attend", attend, shape))
    if mix is not None:
        given.append(("mix", mix, (shape[0], shape[1] * config.split, shape[2], 2)))
    for name, t, want in given:
        if not isinstance(t, Tensor) or not (t.is_floating_point() or (name == "attend" and t.dtype == torch.bool)):
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected a floating tensor{' or booleans' * (name == 'attend')}, got {got}")
        if tuple(t.shape) != want:
            raise ValueError(f"{name}: expected shape {want}, got {tuple(t.shape)}")
    for name, width in (("q", q.shape[3]), ("v", v.shape[3])):
        if width % config.split:
            raise ValueError(f"{name}: its width {width} is not a multiple of config.split = {config.split}")


def _attend(size: Size) -> Tensor:
    return drawn("BHN", salt=3)(size) > 0


SPEC = Spec(
    "natsl",
    fn=natsl,
    reference=reference,
    step=step,
    paper="Deng et al., Neural Attention Search Linear, arXiv 2602.03681",
    inputs=qkv(
        mask=lambda size: "causal" if size.causal else "full",
        decay=drawn("BHN", lambda t: -0.2 * F.softplus(t), salt=1),
        beta=drawn("BHN", torch.sigmoid, salt=2),
        attend=_attend,
        config=NATSConfig(chunk=16, eps=0.01),  # a norm of almost nothing would show rounding, not mistakes
    ),
    gates={"decay": "BHN", "beta": "BHN", "attend": "BHN"},
    backends=("reference", "blocked"),
    supports={"causal_self", "value_width", "backward", "decode"},
    invariances=("packed", "batch", "heads", "split"),
    axes={"carrier": "learned chunks", "kernel": "exp and inner product", "estimator": "average and delta rule",
          "execution": "scan and tiles"},
    flops=flops,
    bytes=traffic,
    evidence={
        1: ("test_natsl::test_chunks_that_all_attend_are_causal_attention",
            "test_natsl::test_chunks_that_none_attends_are_the_plain_memory_and_local_attention"),
        2: "test_natsl::test_steps_equal_one_call",
        3: "test_natsl::test_gradients_of_types_are_those_of_multiplicative_gates",
        4: "test_natsl::test_a_type_acts_on_later_chunks_only",
        5: "test_natsl::test_large_projections_have_six_times_the_square_of_the_width",
    },
)  # fmt: skip
