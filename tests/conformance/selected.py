"""What the conformance tests ask of a selection: which pairs it means, and whether it is one at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.mask import TileLayout
from manyheads.mechanism.select import pairs
from manyheads.spec import Case, Spec


def select(spec: Spec, case: Case, **options: Any) -> Any:
    """What the mechanism selects in a call."""
    assert spec.selection is not None
    with torch.no_grad():
        return spec.selection(*case[:3], **case.options | options)


def pairs_of(chosen: Any, case: Case) -> Tensor:
    """The selected pairs as bool (B, Hq, Nq, Nk), keys in the order of the call; checks the form on the way."""
    shape = (*case.q.shape[:3], case.k.shape[2])
    if isinstance(chosen, TileLayout):
        assert_layout(chosen, shape)
    elif isinstance(chosen, tuple):
        assert_layout(chosen[0], shape)
        assert_permutation(chosen[1], case)
    elif chosen.dtype != torch.bool:
        assert_ids(chosen, case)
    return pairs(chosen, case.q, case.k).cpu()


def assert_layout(layout: TileLayout, shape: tuple[int, ...]) -> None:
    """A layout of these tokens, whose ids are in range and each once in a row."""
    assert (layout.nq, layout.nk) == shape[2:]
    assert all(own in (1, n) for own, n in zip(layout.index.shape, shape, strict=False))
    if layout.ids is not None:
        assert layout.ids.dtype == torch.int32
        assert_each_once(layout.ids, layout.grid[1])
        TileLayout.from_ids(layout.ids.cpu(), nq=layout.nq, nk=layout.nk, tile=layout.tile, heads=shape[1])


def assert_ids(ids: Tensor, case: Case) -> None:
    """Token ids for every query, in range and each once in a row."""
    assert ids.dim() == 4 and not ids.is_floating_point() and ids.dtype != torch.bool
    (batch, heads, queries, _), own = case.q.shape, ids.shape
    assert own[0] in (1, batch) and own[1] in (1, case.k.shape[1], heads) and own[2] == queries
    assert_each_once(ids, case.k.shape[2])


def assert_each_once(ids: Tensor, below: int) -> None:
    """Every id from 0 up to a number at most once in its row; -1 for none."""
    assert int(ids.amin() if ids.numel() else -1) >= -1 and int(ids.amax() if ids.numel() else -1) < below
    ordered = ids.sort(-1).values
    assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(), "a key is chosen twice"


def assert_permutation(order: Tensor, case: Case) -> None:
    """An order of the keys for each head."""
    batch, heads, keys = case.k.shape[:3]
    assert order.shape[0] == batch and order.shape[1] in (heads, case.q.shape[1]) and order.shape[2] == keys
    assert torch.equal(order.sort(-1).values.cpu(), torch.arange(keys).expand(order.shape))


def assert_causal(pairs: Tensor) -> None:
    """No query selects a later key; the last query stands at the last key."""
    queries, keys = pairs.shape[2:]
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    assert not (pairs & later).any(), "a later key is selected"


def assert_blind_to_later_keys(spec: Spec, case: Case, cut: int) -> None:
    """Keys from ``cut`` on, changed, leave what the queries before it select as it was."""
    before = pairs_of(select(spec, case), case)
    k, v = case.k.clone(), case.v.clone()
    k[:, :, cut:] = -3 * k[:, :, cut:].flip(2) + 1
    v[:, :, cut:] = v[:, :, cut:].flip(2)
    changed = case._replace(k=k, v=v)
    after = pairs_of(select(spec, changed), changed)
    early = max(0, cut - (k.shape[2] - case.q.shape[2]))
    assert torch.equal(before[:, :, :early], after[:, :, :early]), f"keys from {cut} on changed an earlier selection"


def assert_keeps(spec: Spec, pairs: Tensor, causal: bool) -> None:
    """The keys that a mechanism promises always to select are there."""
    queries, keys = pairs.shape[2:]
    at = torch.arange(keys - queries, keys)
    rows = torch.arange(queries)[at >= 0]
    if "own_selected" in spec.invariances:
        assert pairs[:, :, rows, at[at >= 0]].all(), "a query does not select its own key"
    if "first_selected" in spec.invariances:
        assert pairs[:, :, rows if causal else slice(None), 0].all(), "a query does not select the first key"
