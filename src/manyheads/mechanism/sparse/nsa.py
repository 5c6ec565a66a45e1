"""Native sparse attention (NSA), whose selected branch FSA computes key block by key block: the whole mechanism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from manyheads.common import checks
from manyheads.common.rope import RoPE
from manyheads.engine.result import Attn
from manyheads.engine.tiled import tiled
from manyheads.mask import Mask, TileLayout
from manyheads.mechanism import carrier, exact
from manyheads.mechanism.select import Cut, Forced, cut, pairs
from manyheads.spec import Case, Size, Spec, drawn, qkv

from . import per_query
from .per_query import best_blocks, by_block, numbered

Gate = Float[Tensor, "B #Hq N"] | None


@dataclass(frozen=True)
class NSAConfig:
    """Sizes of native sparse attention.

    Attributes:
        kernel: Tokens of a window that is compressed to one key; a multiple of ``stride``.
        stride: Tokens from the begin of one window to the next.
        block: Tokens of a block that is selected; a multiple of ``stride``.
        keep: Blocks that a query selects, the forced ones included.
        first: Of these, the first blocks of the sequence.
        local: Of these, the blocks that end with the query's own.
        window: Keys of the sliding branch, the query itself included; 0 for no such branch. The released code counts
            the keys before the query: its 512 is 513 here.
        rope: Rotation of queries and keys, and of compressed keys at the begin of their window; None for none.

    Raises:
        ValueError: Sizes that do not fit together.
    """

    kernel: int = 32
    stride: int = 16
    block: int = 64
    keep: int = 16
    first: int = 1
    local: int = 2
    window: int = 512
    rope: RoPE | None = None

    def __post_init__(self) -> None:
        for name, least in (("kernel", 1), ("stride", 1), ("block", 1), ("keep", 1), ("first", 0), ("local", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.window < 0:
            raise ValueError(f"window: expected a number of keys, or 0 for no sliding branch, got {self.window}")
        for name in ("kernel", "block"):
            if getattr(self, name) % self.stride:
                raise ValueError(f"{name}: expected a multiple of stride={self.stride}, got {getattr(self, name)}")
        if self.first + self.local > self.keep:
            forced = self.first + self.local
            raise ValueError(f"keep: expected at least the {forced} blocks that are always kept, got {self.keep}")


DEFAULT = NSAConfig()


class Compression(NamedTuple):
    """What turns a window of tokens into one: a linear map of all its channels, for each key head.

    Attributes:
        key: (G, kernel * D, D).
        value: (G, kernel * Dv, Dv).
        position: (G, kernel, D), added to the keys of a window.
    """

    key: Tensor
    value: Tensor
    position: Tensor


def nsa(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    gate_compressed: Gate = None,
    gate_selected: Gate = None,
    gate_window: Gate = None,
    compression: Compression | None = None,
    config: NSAConfig = DEFAULT,
    mask: Mask | str | None = None,
    scale: float | None = None,
    order: str = "auto",
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"]:
    r"""Attention to compressed windows, to the blocks of keys that they point at, and to the latest keys.

    $$o_t = g^c_t\, \mathrm{attn}(q_t, \tilde K, \tilde V) + g^s_t\, \mathrm{attn}(q_t, K_{I_t}, V_{I_t})
    + g^w_t\, \mathrm{attn}(q_t, K_{t-w+1..t}, V_{t-w+1..t})$$

    A compressed key is seen once its whole window is past. $I_t$ are the ``keep`` blocks with the highest score,
    one set for all query heads of a key head: the weights $\mathrm{softmax}(q_t \tilde K)$ summed over these heads, and
    over all pairs of a cell of ``stride`` tokens of the block and a window that covers the cell. No gradient flows
    through the choice. Keys and values are compressed as they come; ``config.rope`` turns queries, keys and compressed
    keys afterwards.

    Args:
        q: (B, Hq, Nq, D), not rotated yet where the config has a ``rope``. The last query stands at the last key.
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        gate_compressed, gate_selected, gate_window: (B, Hq, Nq), or (B, 1, Nq) for all heads; 1 by default.
        compression: Weights of the windows; their average by default.
        config: Sizes.
        mask: None or causal; ``Document(lengths) & Causal()`` for packed documents, where windows, blocks and positions
            begin anew.
        scale: Multiplies the scores of all branches; D ** -0.5 by default.
        order: Loop order of the selected branch, as in :func:`manyheads.engine.tiled.tiled`: ``"queries"`` as in NSA,
            ``"keys"`` as in FSA. The result is the same.
        backend: As in :func:`manyheads.attention`.

    Returns:
        (B, Hq, Nq, Dv) in the dtype of ``v``. A query before the end of the first window gets 0 from that branch.

    Raises:
        ValueError: For shapes that do not fit, naming the argument.
        TypeError: For wrong dtypes.
        UnsupportedError: For masks other than those above.

    Source:
        Yuan et al., Native Sparse Attention, arXiv 2502.11089; Yan et al., Flash Sparse Attention, arXiv 2508.18224.

    Example:
        >>> q, k, v = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
        >>> small = NSAConfig(kernel=8, stride=4, block=8, keep=3, local=1, window=10)
        >>> nsa(q, k, v, config=small).shape
        torch.Size([1, 4, 50, 8])
    """
    gates = (gate_compressed, gate_selected, gate_window)
    inputs = _Inputs.of(q, k, v, gates, compression, config, mask, scale)
    compressed, ids = inputs.compressed(backend), None
    ids = inputs.choose(compressed.lse)
    own = per_query.layout(ids, inputs.k.shape[2], config.block, q.shape[1])
    chosen = tiled(inputs.q, inputs.k, inputs.v, own, scale=inputs.scale, order=order, backend=backend)
    assert isinstance(chosen, Tensor)
    outs = [compressed.out, chosen]
    if config.window:
        outs.append(inputs.near(backend))
    return _gated([per_query.restored(inputs.parts, out) for out in outs], gates)


def selection(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    gate_compressed: Gate = None,
    gate_selected: Gate = None,
    gate_window: Gate = None,
    compression: Compression | None = None,
    config: NSAConfig = DEFAULT,
    mask: Mask | str | None = None,
    scale: float | None = None,
    order: str = "auto",
) -> TileLayout | Int[Tensor, "B Hkv N K"]:
    """What the selected branch of :func:`nsa` visits.

    Args:
        q, k, v, gate_compressed, gate_selected, gate_window, compression, config, mask, scale, order: As for
            :func:`nsa`.

    Returns:
        The layout, its ``ids`` (B, Hkv, Nq, keep) of blocks; for packed documents the tokens themselves, -1 for none.

    Example:
        >>> q = k = v = torch.randn(1, 1, 20, 4)
        >>> selection(q, k, v, config=NSAConfig(kernel=4, stride=2, block=4, keep=3, local=1)).ids[0, 0, -1, [0, 2]]
        tensor([0, 4], dtype=torch.int32)
    """
    with torch.no_grad():
        inputs = _Inputs.of(q, k, v, (), compression, config, mask, scale)
        ids = inputs.choose(inputs.compressed("auto").lse)
        return per_query.selected(ids, inputs.parts, k.shape[2], q.shape[1])


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    gate_compressed: Gate = None,
    gate_selected: Gate = None,
    gate_window: Gate = None,
    compression: Compression | None = None,
    config: NSAConfig = DEFAULT,
    mask: Mask | str | None = None,
    scale: float | None = None,
    order: str = "auto",
    chosen: TileLayout | Tensor | None = None,
) -> Float[Tensor, "B Hq Nq Dv"]:
    """Three dense attentions under tables of pairs; a window for every token that could end one."""
    queries, keys, heads = q.shape[2], k.shape[2], q.shape[1]
    allowed, place, number = (t.to(q.device) for t in numbered(mask, queries, keys, config.block))
    begin = config.kernel - 1
    ends = (place >= begin) & ((place - begin) % config.stride == 0)
    windows = [pad(t, (0, 0, begin, 0)) for t in (k, v)]
    ck, cv = (compress(t, config, w, p, stride=1) for t, w, p in zip(windows, *_weights(compression), strict=True))
    if config.rope is not None:
        at = place.expand(q.shape[0], -1)
        q_at = at if queries == keys else torch.arange(keys - queries, keys, device=q.device)
        q, k, ck = config.rope(q, q_at), config.rope(k, at), config.rope(ck, at - begin)
    seen = allowed & ends[:, None, None]
    out, lse = exact.reference(q, ck, cv, mask=seen, scale=scale, return_lse=True)
    outs = [out]
    if chosen is None:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ ck.repeat_interleave(heads // k.shape[1], 1).to(wide).mT
        scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
        weight = (scores - lse[..., None]).exp().masked_fill(~seen, 0.0).unflatten(1, (k.shape[1], -1)).sum(2)
        total = weight.new_zeros(*weight.shape[:3], int(number.max()) + 1)
        for n in range(config.kernel // config.stride):  # the cells of a window, the first n strides from its begin
            cell = number.roll(begin - n * config.stride, -1)
            total = total + by_block(weight, cell, lambda w, own: w.masked_fill(~own, 0).sum(-1))
        visible = by_block(allowed, number, lambda a, own: (a & own).any(-1))
        best = best_blocks(total.detach(), visible, config.keep, config.first, config.local)
        index = number[:, None, None].expand(*best.shape[:3], -1)
        table = best.gather(3, index).repeat_interleave(heads // k.shape[1], 1) & allowed
    else:
        table = pairs(chosen, q, k) & allowed
    outs.append(exact.reference(q, k, v, mask=table, scale=scale))
    if config.window:
        distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
        near = allowed & (distance < config.window).to(q.device)
        outs.append(exact.reference(q, k, v, mask=near, scale=scale))
    return _gated(outs, (gate_compressed, gate_selected, gate_window))


def compress(
    x: Float[Tensor, "B H N D"],
    config: NSAConfig = DEFAULT,
    weight: Float[Tensor, "H W D"] | None = None,
    position: Float[Tensor, "H K D"] | None = None,
    *,
    stride: int | None = None,
) -> Float[Tensor, "B H n D"]:
    """One token for each window of tokens: its average, or a learned linear map of all its channels.

    Args:
        x: (B, H, N, D) keys, not rotated, or values.
        config: Sizes.
        weight: (H, kernel * D, D); the average by default.
        position: (H, kernel, D), added to each window first.
        stride: Another distance of windows than that of the config.

    Returns:
        (B, H, n, D) with ``n = (N - kernel) // stride + 1`` windows, none where ``N < kernel``.

    Raises:
        ValueError: For weights of another shape.

    Example:
        >>> x = torch.arange(6.0).reshape(1, 1, 6, 1)
        >>> compress(x, NSAConfig(kernel=4, stride=2, block=4)).flatten().tolist()
        [1.5, 3.5]
    """
    heads, width = x.shape[1], x.shape[3]
    for name, t, shape in (
        ("weight", weight, (heads, config.kernel * width, width)),
        ("position", position, (heads, config.kernel, width)),
    ):
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    if x.shape[2] < config.kernel:
        return x[:, :, :0]
    windows = x.unfold(2, config.kernel, stride or config.stride)  # (B, H, n, D, kernel)
    if position is not None:
        windows = windows + position.mT[:, None]
    if weight is None:
        return windows.mean(-1)
    return windows.transpose(-1, -2).flatten(-2) @ weight


class _Inputs(NamedTuple):
    """Everything cut into whole blocks of one document each, rotated, and where it stands."""

    q: Tensor
    k: Tensor
    v: Tensor
    ck: Tensor
    cv: Tensor
    parts: Cut
    config: NSAConfig
    scale: float

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor | None, ...],
        compression: Compression | None,
        config: NSAConfig,
        mask: Mask | str | None,
        scale: float | None,
    ) -> _Inputs:
        checks.attention_inputs(q, k, v)
        checks.options(q, k, scale=scale, softcap=None, sink=None, dropout_p=0.0)
        SPEC.check(q, k, v, causal=True)
        _check(q, gates)
        _, lens = carrier.order(SPEC, mask, q)
        per_query.self_only(lens, q.shape[2], k.shape[2], SPEC.slug)
        scale = q.shape[3] ** -0.5 if scale is None else float(scale)
        parts = cut(lens, q, k, v, block=config.block) if lens is not None else Cut((q, k, v), config.block, k.shape[2])
        q, k, v = parts.tensors
        ck, cv = (compress(t, config, w, p) for t, w, p in zip((k, v), *_weights(compression), strict=True))
        if config.rope is not None:
            at = _places(parts)
            q_at = at if lens is not None else torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
            q, k = config.rope(q, q_at), config.rope(k, at)
            ck = config.rope(ck, at[..., :: config.stride][..., : ck.shape[2]])
        return _Inputs(q, k, v, ck, cv, parts, config, scale)

    @property
    def offset(self) -> int:
        return self.k.shape[2] - self.q.shape[2]

    def near(self, backend: str) -> Tensor:
        """The sliding branch."""
        width = min(self.config.window, self.k.shape[2])
        positions = per_query.far_apart(self.parts)
        found = tiled(
            self.q, self.k, self.v, f"causal & window({width})", positions=positions, scale=self.scale, backend=backend
        )
        return found if isinstance(found, Tensor) else found.out

    def compressed(self, backend: str) -> Attn:
        """The branch of the windows; each is seen from its last token on."""
        config, count, reach = self.config, self.ck.shape[2], self.k.shape[2]
        if not count:
            acc = torch.promote_types(self.q.dtype, torch.float32)
            none = self.q.new_full(self.q.shape[:3], -torch.inf, dtype=acc)
            return Attn(self.v.new_zeros(*self.q.shape[:3], self.v.shape[3]), none)
        last = torch.arange(count, device=self.q.device) * config.stride + config.kernel - 1
        positions: tuple[Tensor, Tensor] | None = (torch.arange(self.offset, reach, device=self.q.device), last)
        whole = None
        if self.parts.document is not None:
            positions = per_query.far_apart(self.parts, last)
            whole = self._whole(last).expand(self.q.shape[0], -1)
        found = tiled(
            self.q, self.ck, self.cv, f"causal & window({reach})" if whole is not None else "causal",
            positions=positions, key_padding=whole, scale=self.scale, return_lse=True, backend=backend,
        )  # fmt: skip
        assert isinstance(found, Attn)
        return found

    def choose(self, lse: Tensor) -> Tensor:
        """The blocks of each query, (B, G, Nq, keep)."""
        q, ck, config = self.q.detach(), self.ck.detach(), self.config
        wide = torch.promote_types(q.dtype, torch.float32)
        heads, (batch, groups, count, _) = q.shape[1], ck.shape
        keys, lse = ck.to(wide), lse.detach()
        last = torch.arange(count, device=q.device) * config.stride + config.kernel - 1
        overlap, inside = config.kernel // config.stride - 1, config.block // config.stride

        def score(some: slice) -> Tensor:
            blocks = per_query.blocks_seen(some, q.shape[2], self.k.shape[2], config.block)
            use = min(count, max(0, (some.stop + self.offset - config.kernel) // config.stride + 1))
            if not use:
                return keys.new_zeros(batch, groups, some.stop - some.start, blocks)
            own = (q[:, :, some].to(wide) * self.scale).unflatten(1, (groups, heads // groups))
            weight = own.flatten(2, 3) @ keys[:, :, :use].mT
            weight = weight.unflatten(2, own.shape[2:4]).sub_(lse[:, :, some].unflatten(1, own.shape[1:3])[..., None])
            seen = self._windows_seen(some, last[:use])
            weight = weight.exp_().masked_fill_(~seen, 0.0).sum(2)
            cells = pad(weight, (overlap, blocks * inside - use)).unfold(-1, overlap + 1, 1).sum(-1)
            return cells.unflatten(-1, (blocks, inside)).sum(-1)

        rows = per_query.rows_at_once(batch * heads * max(count, 1))
        return per_query.choose(
            score,
            self.parts,
            queries=q.shape[2],
            keys=self.k.shape[2],
            block=config.block,
            keep=config.keep,
            force=Forced(first=config.first, local=config.local, own=False),
            rows=rows,
        )

    def _windows_seen(self, some: slice, last: Tensor) -> Tensor:
        """bool (B|1, 1, 1, rows, n): windows that lie in the past and in the document of a query."""
        at = torch.arange(some.start, some.stop, device=last.device) + self.offset
        seen = (last <= at[:, None])[None, None, None]
        if self.parts.document is None:
            return seen
        document = self.parts.document
        same = (document[:, at][:, :, None] == document[:, last][:, None]) & self._whole(last)[:, None]
        return seen & same[:, None, None]

    def _whole(self, last: Tensor) -> Tensor:
        """bool (B|1, n): windows that begin and end in one document."""
        assert self.parts.document is not None
        document = self.parts.document
        return (document[:, last] == document[:, last - (self.config.kernel - 1)]) & (document[:, last] >= 0)


def _places(parts: Cut) -> Tensor:
    """The position of each token in its document."""
    at = torch.arange(parts.length, device=parts.tensors[0].device)
    if parts.document is None:
        return at
    document = torch.where(parts.document < 0, parts.length, parts.document)  # what belongs to none comes last
    starts = torch.searchsorted(document, document)
    places = at - starts
    return places[0] if len(places) == 1 else places


def _weights(compression: Compression | None) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Maps of keys and values, and what is added to them before."""
    if compression is None:
        return (None, None), (None, None)
    return (compression.key, compression.value), (compression.position, None)


def _gated(outs: list[Tensor], gates: tuple[Tensor | None, ...]) -> Tensor:
    """The sum of the branches, each times its gate."""
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=outs[0].device)
    for out, gate in zip(outs, gates, strict=False):
        total = total + (out.to(wide) if gate is None else out.to(wide) * gate.to(wide)[..., None])
    return total.to(outs[0].dtype)


def _check(q: Tensor, gates: tuple[Tensor | None, ...]) -> None:
    names = ("gate_compressed", "gate_selected", "gate_window")
    for name, gate in zip(names, gates, strict=False):
        if gate is None:
            continue
        if not isinstance(gate, Tensor) or not gate.is_floating_point():
            got = gate.dtype if isinstance(gate, Tensor) else type(gate).__name__
            raise TypeError(f"{name}: expected a floating tensor (B, Hq, Nq), got {got}")
        if tuple(gate.shape) not in [(q.shape[0], n, q.shape[2]) for n in (1, q.shape[1])]:
            raise ValueError(f"{name}: expected shape {tuple(q.shape[:3])}, got {tuple(gate.shape)}")


def flops(case: Case) -> int:
    """Counts the operations of a forward call: the scores of the windows twice, the three branches once.

    Args:
        case: The call, without documents.

    Returns:
        Operations over all heads, every query keeping all it may.
    """
    config: NSAConfig = case.options.get("config", DEFAULT)
    (batch, heads, queries, width), keys = case.q.shape, case.k.shape[2]
    both = width + case.v.shape[3]
    pairs = 0
    for i in range(keys - queries, keys):
        windows = max(0, (i + 1 - config.kernel) // config.stride + 1)
        selected = min(i + 1, (config.keep - 1) * config.block + i % config.block + 1)
        pairs += 2 * (windows + selected + min(i + 1, config.window)) * both + 2 * windows * width
    return batch * heads * pairs


def _small(size: Size) -> NSAConfig:
    rope = RoPE() if size.width % 2 == 0 else None
    return NSAConfig(kernel=4, stride=2, block=4, keep=3, first=1, local=1, window=3, rope=rope)


SPEC = Spec(
    "fsa",
    fn=nsa,
    reference=reference,
    selection=selection,
    paper="Yan et al., Flash Sparse Attention, arXiv 2508.18224; Yuan et al., arXiv 2502.11089",
    inputs=qkv(
        config=_small,
        mask=lambda size: "causal" if size.causal else "full",
        gate_compressed=drawn("BHQ", torch.sigmoid, salt=1),
        gate_selected=drawn("BHQ", torch.sigmoid, salt=2),
        gate_window=drawn("BHQ", torch.sigmoid, salt=3),
    ),
    gates={"gate_compressed": "BHQ", "gate_selected": "BHQ", "gate_window": "BHQ"},
    backends=("reference", "blocked"),
    supports={"causal_self", "causal_cross", "gqa", "value_width", "backward"},
    invariances=("packed", "batch", "heads", "causal_selection", "own_selected", "first_selected"),
    axes={"carrier": "windows, blocks chosen by them, latest keys", "kernel": "exp", "estimator": "average",
          "execution": "tiles"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: ("test_nsa::test_key_outer_query_outer_and_a_dense_mask_agree",
            "test_nsa::test_the_whole_mechanism_is_the_same_in_both_orders",
            "test_order::test_one_query_a_tile_equals_the_definition_for_every_group"),
        2: "test_nsa::test_all_blocks_kept_is_causal_attention",
        3: "test_nsa::test_a_sequence_shorter_than_a_window_has_no_compressed_branch",
        4: "test_nsa::test_packed_sequences_equal_separate_calls",
        5: "test_nsa::test_gates_of_zero_leave_the_selected_branch_alone",
    },
)  # fmt: skip
