"""Parallax: softmax attention corrected along a learned probe, local linear attention without its solves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.attention import Positions
from manyheads.engine.result import Attn
from manyheads.engine.solve import probe
from manyheads.mask import Mask, as_mask
from manyheads.mechanism import exact
from manyheads.spec import Case, Size, Spec, qkv


class KeysValues(NamedTuple):
    """Keys and values of earlier tokens.

    Attributes:
        k: (B, Hkv, N, D).
        v: (B, Hkv, N, Dv).
    """

    k: Tensor
    v: Tensor


def parallax(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    r: Float[Tensor, "B Hq Nq D"],
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    state: KeysValues | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | tuple[Float[Tensor, "B Hq Nq Dv"], KeysValues]:
    r"""Softmax attention that also follows how values change with keys, along a probe of its own for every query.

    $$o_i = \bar v_i - \mathrm{Cov}_{p_i}(v, k)\, r_i
          = \Big(1 + \sum_j p_{ij}\, r_i \cdot k_j\Big) \sum_j p_{ij} v_j - \sum_j p_{ij} (r_i \cdot k_j)\, v_j$$

    with $p_i = \mathrm{softmax}_j(\mathrm{scale}\; q_i \cdot k_j)$. Keys and values are read once, in tiles.

    Args:
        q: Queries (B, Hq, Nq, D), any floating dtype.
        k: Keys (B, Hkv, Nk, D); Hq is a multiple of Hkv and nothing is repeated in memory.
        v: Values (B, Hkv, Nk, Dv).
        r: Probes, as q. Their products with keys are not scaled.
        mask: A mask value, its text, a bool tensor with True for allowed, or None for everything. A window of w keys
            is ``"causal & window(w)"``; packed documents ``Document(lengths) & Causal()``.
        scale: Multiplies ``q . k``; ``D ** -0.5`` by default.
        positions: Logical positions ``(q_pos, k_pos)``, (N,) or (B, N).
        key_padding: bool (B, Nk), True for real keys; padding on the left or anywhere. The others may hold anything.
        state: Keys and values of earlier tokens, which come before ``k`` and ``v``: decoding, a token or a chunk at a
            time. ``mask`` then spans both, with the queries at its end.
        return_state: Also return the keys and values of all tokens.
        backend: ``"auto"``, ``"blocked"`` or ``"reference"``.

    Returns:
        (B, Hq, Nq, Dv) in the dtype of the inputs; with ``return_state`` also :class:`KeysValues`. A row that may
        attend to nothing gives 0.

    Raises:
        ValueError: For shapes that do not fit, naming the argument; ``key_padding`` beside a state.
        TypeError: For wrong types or dtypes.

    Source:
        Zuo et al., Parallax: Parameterized Local Linear Attention, arXiv 2605.29157, algorithm 1.

    Example:
        >>> q, r, k, v = (torch.randn(1, 2, 6, 4) for _ in range(4))
        >>> out = parallax(q, k, v, r=r, mask="causal")
        >>> _, before = parallax(q[:, :, :5], k[:, :, :5], v[:, :, :5], r=r[:, :, :5], mask="causal", return_state=True)
        >>> last = parallax(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], r=r[:, :, 5:], mask="causal", state=before)
        >>> torch.allclose(out[:, :, 5:], last, atol=1e-5)
        True
    """
    if state is not None or return_state:
        if key_padding is not None:
            raise ValueError("key_padding: has no meaning beside a state, which holds real tokens only")
        k, v = _appended(state, k, v)
    out = probe(
        q,
        r,
        k,
        v,
        as_mask(mask),
        scale=scale,
        positions=positions,
        key_padding=key_padding,
        backend=backend,
    )
    assert isinstance(out, Tensor)
    return (out, KeysValues(k, v)) if return_state else out


def step(
    q: Float[Tensor, "B Hq D"],
    k: Float[Tensor, "B Hkv D"],
    v: Float[Tensor, "B Hkv Dv"],
    state: KeysValues | None = None,
    *,
    r: Float[Tensor, "B Hq D"],
    mask: Mask | str | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B Hq Dv"], KeysValues]:
    """One token of :func:`parallax`, which sees itself and what the mask shows of the tokens before.

    Args:
        q, k, v, r: Of one token: (B, Hq, D), (B, Hkv, D), (B, Hkv, Dv), (B, Hq, D).
        state: Keys and values before; nothing by default.
        mask: As for :func:`parallax`, such as ``"causal & window(w)"``.
        scale: As for :func:`parallax`.

    Returns:
        (B, Hq, Dv), and the keys and values of all tokens: a new copy, linear in the tokens.

    Raises:
        ValueError: For shapes that do not fit.

    Example:
        >>> token = torch.ones(1, 2, 4)
        >>> out, state = step(token, token, token, r=token)
        >>> out.shape, state.k.shape
        (torch.Size([1, 2, 4]), torch.Size([1, 2, 1, 4]))
    """
    q, k, v, r = (t[:, :, None] for t in (q, k, v, r))
    out, state = parallax(q, k, v, r=r, mask=mask, scale=scale, state=state, return_state=True)
    assert isinstance(out, Tensor) and state is not None
    return out[:, :, 0], state


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    r: Float[Tensor, "B Hq Nq D"],
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> Float[Tensor, "B Hq Nq Dv"]:
    """Every pair: the weights of exact attention, the same times their probe's products, both over the values."""
    shares, _ = weights(q, k, mask=mask, scale=scale, positions=positions, key_padding=key_padding)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if key_padding is not None:
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    turned = shares * (r.to(shares.dtype) @ k.to(shares.dtype).mT)
    mean, other = (t.to(v.dtype).to(shares.dtype) @ v.to(shares.dtype) for t in (shares, turned))
    return ((1 + turned.sum(-1, keepdim=True)) * mean - other).to(v.dtype)


def weights(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    *,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> tuple[Float[Tensor, "B Hq Nq Nk"], Float[Tensor, "B Hq Nq"]]:
    """The weights of exact attention and their log-normaliser, for references: the average of one-hot values.

    Example:
        >>> weights(torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3), mask="causal")[0][0, 0]
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    one_hot = torch.eye(k.shape[2], dtype=wide, device=k.device).expand(*k.shape[:2], -1, -1)
    options = {"mask": mask, "scale": scale, "positions": positions, "key_padding": key_padding}
    found = exact.reference(q.to(wide), k.to(wide), one_hot, return_lse=True, **options)  # type: ignore[arg-type]
    assert isinstance(found, Attn)
    return found.out, found.lse


def flops(case: Case) -> int:
    """Counts the operations of a forward call: two per channel and visible pair in each of three products.

    Args:
        case: The call.

    Returns:
        ``2 * pairs * (2 * D + Dv)``: scores of queries and of probes, and one average, whose weights hold both terms.
    """
    return exact.flops(case) * (2 * case.q.shape[3] + case.v.shape[3]) // (case.q.shape[3] + case.v.shape[3])


def _appended(state: KeysValues | None, k: Tensor, v: Tensor) -> KeysValues:
    """Earlier keys and values with the new ones behind them."""
    if state is None:
        return KeysValues(k, v)
    for name, old, new in (("k", state.k, k), ("v", state.v, v)):
        if old.dim() != 4 or new.dim() != 4 or old.shape[:2] != new.shape[:2] or old.shape[3] != new.shape[3]:
            raise ValueError(f"state: {name} of shape {tuple(old.shape)} cannot come before {tuple(new.shape)}")
    return KeysValues(torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2))


def _probes(size: Size) -> Tensor:
    """Probes of about the length at which the correction is as large as the average."""
    generator = torch.Generator().manual_seed(7 if size.seed is None else size.seed + 7)
    drawn = torch.randn(size.batch, size.heads, size.queries, size.width, generator=generator, dtype=torch.float64)
    return (drawn * size.width**-0.5).to(size.device, size.dtype)


SPEC = Spec(
    "parallax",
    fn=parallax,
    step=step,
    reference=reference,
    paper="Zuo et al., Parallax: Parameterized Local Linear Attention, arXiv 2605.29157",
    inputs=qkv(mask=lambda size: "causal" if size.causal else None, r=_probes),
    gates={"r": "BHND"},
    backends=("reference", "blocked"),
    supports={
        "noncausal_self",
        "causal_self",
        "noncausal_cross",
        "causal_cross",
        "mask",
        "gqa",
        "value_width",
        "positions",
        "key_padding",
        "backward",
        "decode",
    },  # fmt: skip
    invariances=("packed", "padding", "batch", "heads", "split"),
    axes={
        "carrier": "any mask",
        "kernel": "exp",
        "estimator": "average, corrected along a probe",
        "execution": "tiles",
    },
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_parallax::test_no_probe_is_softmax_attention",
        2: "test_parallax::test_a_constant_added_to_every_key_changes_nothing",
        3: "test_parallax::test_constant_values_are_returned",
        4: "test_parallax::test_streaming_equals_the_plain_form_for_any_block",
        5: "test_parallax::test_a_window_as_long_as_the_sequence_hides_nothing",
        6: "test_parallax::test_grouped_heads_equal_repeated_keys_and_values",
        7: "test_parallax::test_prefill_and_decoding_equal_one_call",
        8: "test_parallax::test_the_written_backward_equals_automatic_differentiation",
        9: "test_parallax::test_the_probe_of_local_linear_attention_gives_local_linear_attention",
    },
)
