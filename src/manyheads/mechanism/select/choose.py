"""From scores of blocks to the blocks that are kept: top-k, top-p, a threshold, and what is always kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor


@dataclass(frozen=True)
class Forced:
    """Blocks that are kept whatever their score. They count within what a selector may keep.

    Attributes:
        first: So many of the first visible blocks of a row.
        local: So many of the last visible blocks, those that end with the row's own one.
        own: Whether the row's own block is kept (as ``local=1`` does where nothing later is visible).

    Example:
        >>> visible = torch.ones(4, 4).tril().bool()
        >>> Forced(first=1, local=2).mask(visible).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """

    first: int = 0
    local: int = 0
    own: bool = True

    def __post_init__(self) -> None:
        for name in ("first", "local"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number of blocks >= 0, got {getattr(self, name)}")

    @property
    def most(self) -> int:
        """Blocks that this forces in a row of enough visible ones, where a row has one own block."""
        return self.first + max(self.local, int(self.own))

    def mask(
        self, visible: Bool[Tensor, "*B Tq Tk"], own: Bool[Tensor, "*#B Tq Tk"] | None = None
    ) -> Bool[Tensor, "*B Tq Tk"]:
        """The forced blocks of each row.

        First and last are counted among the visible blocks of a row, so those of a packed document are its own.

        Args:
            visible: bool (..., Tq, Tk): blocks that a row may keep.
            own: bool, the row's own blocks, from :func:`own_blocks`, where they are not the last visible one: rows that
                look both ways, or blocks of queries larger than those of keys. ``local`` then counts back from the last
                of them.

        Returns:
            bool (..., Tq, Tk), a subset of ``visible``.
        """
        rank = visible.cumsum(-1, dtype=torch.int32)
        found = rank <= self.first
        if own is None:
            left = rank[..., -1:] - rank  # visible blocks after this one
            found = found | (left < max(self.local, int(self.own)))
        else:
            last = torch.where(own & visible, rank, 0).amax(-1, keepdim=True)
            found = found | ((rank > last - self.local) & (rank <= last))
            found = found | own if self.own else found
        return found & visible


Force = Forced | Tensor | None


def top_k(
    scores: Float[Tensor, "B H Tq Tk"],
    keep: int,
    *,
    visible: Bool[Tensor, "*visible"] | None = None,
    force: Force = None,
    budgets: Integer[Tensor, " H"] | None = None,
) -> Int[Tensor, "B H Tq keep"]:
    """The blocks with the highest scores. No exponential: the order of the scores is all that counts.

    Args:
        scores: (B, H, Tq, Tk). A block of score -inf is kept only if forced; NaN is not a score.
        keep: Blocks kept in a row, forced ones among them: 1 to Tk.
        visible: bool, broadcast to the scores: blocks that a row may keep; all by default.
        force: What is always kept: :class:`Forced`, or a bool tensor broadcast to the scores; by default nothing. If a
            tensor forces more than ``keep`` blocks, those of the lowest index stay.
        budgets: Integers (H,) from 1 to ``keep``: what each head keeps of its ``keep`` blocks.

    Returns:
        int32 (B, H, Tq, keep): ascending blocks, -1 after the last. Of equal scores the lower block is kept, so that
        nothing depends on what else is in the row. Not differentiable.

    Raises:
        ValueError: ``keep`` below 1, above the number of blocks or below what ``force`` alone keeps; budgets of another
            shape or out of range; what does not broadcast.

    Example:
        >>> scores = torch.tensor([[[[3.0, 9.0, 5.0, 7.0]]]])
        >>> top_k(scores, 2).flatten().tolist(), top_k(scores, 2, force=Forced(first=1, own=False)).flatten().tolist()
        ([1, 3], [0, 1])
    """
    _check_keep(keep, scores, force, "keep")
    scores, forced = _prepared(scores, visible, force)
    if budgets is not None:
        _check_budgets(budgets, scores, keep)
        budgets = budgets.to(scores.device)[None, :, None, None]
    return _pick(scores, forced, keep, budgets)


def top_p(
    scores: Float[Tensor, "B H Tq Tk"],
    mass: float | Float[Tensor, " H"],
    most: int | None = None,
    *,
    visible: Bool[Tensor, "*visible"] | None = None,
    force: Force = None,
) -> Int[Tensor, "B H Tq most"]:
    """The fewest blocks whose softmax weights add up to a share of all, and the forced ones besides.

    Args:
        scores: (B, H, Tq, Tk), logits.
        mass: Share in (0, 1], for all heads or (H,) for each; 1 keeps everything visible.
        most: Blocks kept at most, forced ones first, then by score; Tk by default. It is the width of the result, so
            nothing waits for the device.
        visible: As for :func:`top_k`.
        force: As for :func:`top_k`; forced blocks are added to the prefix that reaches the share.

    Returns:
        int32 (B, H, Tq, most): ascending blocks, -1 after the last.

    Raises:
        ValueError: A share out of range, ``most`` out of range, what does not broadcast.

    Example:
        >>> scores = torch.tensor([[[[0.5, 0.3, 0.15, 0.05]]]]).log()
        >>> top_p(scores, 0.75).flatten().tolist(), top_p(scores, 0.9, 3).flatten().tolist()
        ([0, 1, -1, -1], [0, 1, 2])
    """
    most = scores.shape[-1] if most is None else most
    _check_keep(most, scores, force, "most")
    share = _per_head(mass, scores, "mass")
    if not isinstance(mass, Tensor) and not 0 < mass <= 1:
        raise ValueError(f"mass: expected a share in (0, 1], got {mass}")
    scores, forced = _prepared(scores, visible, force)
    order = scores.sort(dim=-1, descending=True, stable=True)
    weight = order.values.softmax(-1).nan_to_num(nan=0.0)  # a row that sees nothing
    before = weight.cumsum(-1) - weight
    inside = (before < share) | (share >= 1)  # rounding shall not lose a block of everything
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order.indices, inside)
    return _pick(scores.masked_fill(~kept, float("-inf")), forced, most)


def above(
    scores: Float[Tensor, "B H Tq Tk"],
    threshold: float | Float[Tensor, " H"],
    most: int | None = None,
    *,
    visible: Bool[Tensor, "*visible"] | None = None,
    force: Force = None,
) -> Int[Tensor, "B H Tq most"]:
    """The blocks whose score reaches a threshold, and the forced ones besides.

    Args:
        scores: (B, H, Tq, Tk).
        threshold: Kept is what is at least this, for all heads or (H,) for each.
        most: Blocks kept at most, forced ones first, then by score; Tk by default.
        visible, force: As for :func:`top_k`.

    Returns:
        int32 (B, H, Tq, most): ascending blocks, -1 after the last.

    Raises:
        ValueError: ``most`` out of range, what does not broadcast.

    Example:
        >>> above(torch.tensor([[[[3.0, 9.0, 5.0]]]]), 5.0).flatten().tolist()
        [1, 2, -1]
    """
    most = scores.shape[-1] if most is None else most
    _check_keep(most, scores, force, "most")
    least = _per_head(threshold, scores, "threshold")
    scores, forced = _prepared(scores, visible, force)
    return _pick(scores.masked_fill(~(scores >= least), float("-inf")), forced, most)


def _prepared(scores: Tensor, visible: Tensor | None, force: Force) -> tuple[Tensor, Tensor | None]:
    """Scores with -inf for what is not visible, without a gradient; and what is forced."""
    scores = scores.detach()
    for name, given in (("visible", visible), ("force", force)):
        if isinstance(given, Tensor):
            _check_fits(given, scores, name)
    if isinstance(force, Forced):
        seen = torch.ones((), dtype=torch.bool, device=scores.device).expand(scores.shape[-2:])
        force = force.mask(seen if visible is None else visible)
    elif force is not None and visible is not None:
        force = force & visible
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores, force


def _pick(scores: Tensor, forced: Tensor | None, keep: int, budgets: Tensor | None = None) -> Tensor:
    """The best ``keep`` of what is above -inf, forced ones first; ascending, -1 after the last."""
    if forced is not None:
        scores = scores.masked_fill(forced, float("inf"))
    blocks = scores.shape[-1]
    if keep == blocks:
        found, at = scores, torch.arange(blocks, device=scores.device).expand(scores.shape)
        if budgets is not None:
            found, at = scores.sort(dim=-1, descending=True, stable=True)
    else:
        found, at = _best(scores, keep)
    taken = found > float("-inf")
    if budgets is not None:
        taken = taken & (torch.arange(keep, device=scores.device) < budgets)
    ids = torch.where(taken, at, blocks).to(torch.int32).sort(-1).values
    return torch.where(ids < blocks, ids, -1)


def _best(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The highest scores and where they are, best first; of equal ones the first."""
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():  # a look costs less than the longer keys
        found, at = scores.topk(keep, dim=-1)
        least = found[..., -1:].clamp(min=torch.finfo(scores.dtype).min)
        if not bool(((scores >= least).sum(-1) > keep).any()):
            return found, at
    if scores.dtype == torch.float64:
        found, at = scores.sort(dim=-1, descending=True, stable=True)
        return found[..., :keep], at[..., :keep]
    at = _keys(scores).topk(keep, dim=-1).indices
    return scores.gather(-1, at), at


def _keys(scores: Tensor) -> Tensor:
    """Integers that no two blocks of a row share, in the order of the scores, then of falling index."""
    bits = (scores.float() + 0.0).view(torch.int32)  # adding zero makes both zeros one
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) + torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)


def _check_keep(keep: int, scores: Tensor, force: Force, name: str) -> None:
    if scores.dim() != 4 or not scores.is_floating_point():
        raise ValueError(f"scores: expected floating (B, H, Tq, Tk), got {scores.dtype} {tuple(scores.shape)}")
    blocks = scores.shape[-1]
    if keep < 1:
        raise ValueError(f"{name}: expected at least 1 block, got {keep}")
    if keep > blocks:
        raise ValueError(f"{name}: expected at most the Tk={blocks} blocks that there are, got {keep}")
    if isinstance(force, Forced) and force.most > keep and keep < blocks:
        raise ValueError(f"{name}: expected at least the {force.most} blocks that {force} always keeps, got {keep}")


def _check_budgets(budgets: Tensor, scores: Tensor, keep: int) -> None:
    if tuple(budgets.shape) != (scores.shape[1],) or budgets.is_floating_point():
        raise ValueError(
            f"budgets: expected integers (H={scores.shape[1]},), got {budgets.dtype} {tuple(budgets.shape)}"
        )
    if budgets.device.type == "cpu" and not torch.compiler.is_compiling() and budgets.numel():
        low, high = int(budgets.min()), int(budgets.max())
        if low < 1 or high > keep:
            raise ValueError(f"budgets: expected numbers of blocks from 1 to keep={keep}, got {low} to {high}")


def _check_fits(given: Tensor, scores: Tensor, name: str) -> None:
    shape = (1,) * (scores.dim() - given.dim()) + tuple(given.shape)
    fits = len(shape) == scores.dim() and all(n in (1, m) for n, m in zip(shape, scores.shape, strict=True))
    if given.dtype != torch.bool or not fits:
        raise ValueError(
            f"{name}: expected bool, broadcast to the scores {tuple(scores.shape)}, "
            f"got {given.dtype} {tuple(given.shape)}"
        )


def _per_head(value: float | Tensor, scores: Tensor, name: str) -> float | Tensor:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if tuple(value.shape) != (scores.shape[1],):
        heads = scores.shape[1]
        raise ValueError(f"{name}: expected one number, or one per head (H={heads},), got {tuple(value.shape)}")
    return value.to(scores.device)[None, :, None, None]
