"""Lightning Attention-2: causal linear attention whose memory fades by one fixed rate per head."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.engine import scan as engine
from manyheads.engine.scan import State
from manyheads.mask import Mask
from manyheads.mechanism import exact
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Size, Spec, qkv


def lightning_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    slopes: Float[Tensor, " H"] | None = None,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    key_padding: Bool[Tensor, "B N"] | None = None,
    state: State | None = None,
    return_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B H N Dv"] | tuple[Float[Tensor, "B H N Dv"], State]:
    r"""Sums values by plain dot products that fade with distance, in time linear in the number of tokens.

    $$o_i = \sum_{j \le i} \lambda_h^{\,i-j}\, (q_i \cdot k_j)\, v_j, \qquad \lambda_h = e^{-s_h}$$

    There is no softmax, no scale and no denominator: a norm follows outside. What the paper's kernels split is one
    call here: the engine takes keys of any width and values of any width, so nothing is cut at 128 channels or padded
    to a power of two; and all chunks of a segment are computed at once with one pass over their states, which stands
    for both the loop over blocks and the variant that scans all block states first.

    Args:
        q: (B, H, N, D), any floating dtype; activations such as SiLU are applied before.
        k: (B, Hkv, N, D); H is a multiple of Hkv.
        v: (B, Hkv, N, Dv).
        slopes: Decay rates s (H,), at least 0, see :func:`decay_slopes`; None for no decay.
        mask: None or ``"causal"``; ``Document(lengths) & Causal()`` for packed documents.
        scale: Multiplies the products; 1 by default.
        key_padding: bool (B, N), True for real tokens; the others neither write nor fade the memory, and give 0.
        state: What came before the first token.
        return_state: Also return the state after the last.
        chunk: Tokens computed together; changes no result.
        backend: ``"auto"``, ``"blocked"`` or ``"reference"``.

    Returns:
        (B, H, N, Dv) in the dtype of the inputs; with ``return_state`` also the :class:`State`.

    Raises:
        ValueError: For shapes that do not fit or a negative slope, naming the argument.
        TypeError: For wrong dtypes.
        UnsupportedError: For queries and keys of different lengths, or a mask other than those above.

    Conventions:
        Distances count the real tokens of a document. Products are summed in float32 (float64 for float64).

    Source:
        Qin et al., Lightning Attention-2, arXiv 2401.04658, section 3.

    Example:
        >>> q = k = v = torch.ones(1, 2, 4, 1)
        >>> out = lightning_attention(q, k, v, slopes=torch.tensor([2.0, 1.0]).log())
        >>> out[0, :, :, 0]
        tensor([[1.0000, 1.5000, 1.7500, 1.8750],
                [1.0000, 2.0000, 3.0000, 4.0000]])
    """
    _, lens = order(SPEC, mask, q)
    SPEC.check(q, k, v, causal=True)
    return engine.scan(
        q,
        k,
        v,
        decay=_decay(slopes, q),
        scale=scale,
        state=state,
        lens=lens,
        key_padding=key_padding,
        return_state=return_state,
        chunk=chunk,
        backend=backend,
    )


def step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B Hkv D"],
    v: Float[Tensor, "B Hkv Dv"],
    state: State | None = None,
    *,
    slopes: Float[Tensor, " H"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H Dv"], State]:
    """One token of :func:`lightning_attention`: fades the memory, writes the token, reads it.

    Args:
        q, k, v: Of one token: (B, H, D), (B, Hkv, D), (B, Hkv, Dv).
        state: What came before; nothing by default.
        slopes, scale: As for :func:`lightning_attention`.

    Returns:
        (B, H, Dv), and the new state.

    Raises:
        ValueError: For shapes that do not fit or a negative slope.

    Example:
        >>> one, slopes = torch.ones(1, 1, 1), torch.tensor([2.0]).log()
        >>> _, state = step(one, one, one, slopes=slopes)
        >>> round(step(one, one, one, state, slopes=slopes)[0].item(), 4)
        1.5
    """
    return engine.step(q, k, v, state, decay=_decay(slopes, q), scale=scale)


def decay_slopes(heads: int, *, layer: int = 0, layers: int | None = None) -> Float[Tensor, " H"]:
    r"""The decay rates of the released models: geometric over heads, falling to almost nothing in the last layer.

    $s_h = 2^{-8(h+1)/H} \cdot (1 - l/(L-1) + 10^{-5})$ for a power of two of heads. Of any other number, the next
    smaller power of two goes first, then every second rate of twice that many, as in ALiBi.

    Args:
        heads: Number of heads H.
        layer: Index l of the layer, from 0.
        layers: Number of layers L; None leaves the factor of the layer away.

    Returns:
        (H,) in float32, positive.

    Raises:
        ValueError: For numbers out of range.

    Example:
        >>> decay_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
        >>> decay_slopes(1, layer=1, layers=3)
        tensor([0.0020])
    """
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, got {heads}")
    power = 1 << (heads.bit_length() - 1)
    rates = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    rates += [2 ** (-8 * (2 * h + 1) / (2 * power)) for h in range(heads - power)]
    factor = 1.0
    if layers is not None:
        if not 0 <= layer < layers:
            raise ValueError(f"layer: expected an index below layers={layers}, got {layer}")
        factor = 1 - layer / max(layers - 1, 1) + 1e-5
    return torch.tensor(rates, dtype=torch.float64).mul(factor).float()


def reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    slopes: Float[Tensor, " H"] | None = None,
    mask: Mask | str | None = None,
    scale: float | None = None,
    key_padding: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """Every pair at once: the products, weighted by the decay between the two tokens."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    real = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if key_padding is None else key_padding
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).to(wide) for t in (k, v))
    k, v = (t.masked_fill(~real[:, None, :, None], 0.0) for t in (k, v))
    scores = q.to(wide) @ k.mT * (1.0 if scale is None else scale)
    if slopes is not None:
        at = real.to(wide).cumsum(1)
        distance = (at[:, None, :, None] - at[:, None, None, :]).relu()
        scores = scores * (-slopes.to(wide)[:, None, None] * distance).exp()
    seen = visible(mask, q) & real[:, None, :, None]
    return (scores.masked_fill(~seen, 0.0) @ v).to(v.dtype if q.dtype == wide else q.dtype)


def flops(case: Case) -> int:
    """Counts the operations of the recurrence: every token writes the state and reads it.

    Args:
        case: The call.

    Returns:
        ``4 * B * H * N * D * Dv``.
    """
    return 4 * case.q.numel() * case.v.shape[3]


def _decay(slopes: Tensor | None, q: Tensor) -> Tensor | None:
    if slopes is None:
        return None
    if tuple(slopes.shape) != (q.shape[1],):
        raise ValueError(f"slopes: expected shape (H={q.shape[1]},), got {tuple(slopes.shape)}")
    if not slopes.is_floating_point():
        raise TypeError(f"slopes: expected a floating tensor, got {slopes.dtype}")
    if slopes.device.type == "cpu" and not torch.compiler.is_compiling() and bool((slopes < 0).any()):
        raise ValueError(f"slopes: decay rates are at least 0, got {float(slopes.min()):.4g}")
    return -slopes


def _slopes(size: Size) -> Tensor:
    slopes = decay_slopes(size.heads, layer=1, layers=4)
    return slopes.to(size.device, torch.float64 if size.dtype == torch.float64 else torch.float32)


SPEC = Spec(
    "lightning-attention-2",
    fn=lightning_attention,
    step=step,
    reference=reference,
    paper="Qin et al., Lightning Attention-2, arXiv 2401.04658",
    inputs=qkv(mask=lambda size: "causal" if size.causal else "full", slopes=_slopes),
    gates={"slopes": "H"},
    backends=("reference", "blocked", "triton"),
    supports={"causal_self", "gqa", "value_width", "key_padding", "backward", "decode"},
    invariances=("packed", "padding", "batch", "heads", "split"),
    axes={"carrier": "earlier tokens", "kernel": "dot product, fading", "estimator": "sum", "execution": "scan"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_lightning::test_recurrent_parallel_and_chunked_forms_agree",
        2: "test_lightning::test_the_chunk_changes_nothing",
        3: "test_lightning::test_gradients_match_finite_differences",
        4: "test_lightning::test_without_decay_it_is_masked_linear_attention",
        5: "test_lightning::test_strong_decay_leaves_each_token_its_own_value",
        6: "test_lightning::test_splitting_the_width_and_summing_changes_nothing",
        7: "test_lightning::test_streaming_pieces_with_the_carried_state_equals_one_call",
    },
)
