"""Masks of transformers, translated: the same pairs are visible, and nothing of size N x N is made."""

from __future__ import annotations

import copy

import pytest
import torch

from manyheads.common.errors import UnsupportedError
from manyheads.integration.masking import MaskCarrier, carry_mask, documents, translate
from manyheads.mask import Causal, Document, Full

masking = pytest.importorskip("transformers.masking_utils")

OWNERS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2, 2, 2]])
PLACES = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0, 1, 2]])
NO_PADDING = torch.zeros(2, dtype=torch.int64)


def functions() -> dict:
    packed = getattr(masking, "packed_sequence_compatibility_function", None)
    found = {
        "causal": masking.causal_mask_function,
        "bidirectional": masking.bidirectional_mask_function,
        "sliding": masking.sliding_window_causal_mask_function(3),
        "sliding bidirectional": masking.sliding_window_bidirectional_mask_function(2),
        "chunked": masking.chunked_causal_mask_function(4, NO_PADDING),
        "packed": masking.and_masks(masking.causal_mask_function, masking.packed_sequence_mask_function(OWNERS)),
        "or": masking.or_masks(masking.causal_mask_function, masking.packed_sequence_mask_function(OWNERS)),
    }
    if packed is not None:
        sliding = masking.sliding_window_causal_mask_function(2)
        found["packed sliding"] = packed(sliding, PLACES, OWNERS)
    return found


def visible(carrier: MaskCarrier, batch: int, nq: int, nk: int) -> torch.Tensor:
    """What a carrier lets see, as booleans ``(batch, 1, nq, nk)``."""
    seen = carrier.visibility
    found = seen.mask.dense(nq, nk, positions=seen.positions).expand(batch, 1, nq, nk).clone()
    return found if seen.key_padding is None else found & seen.key_padding[:, None, None, :]


@pytest.mark.parametrize("name", functions())
def test_every_known_function_shows_the_same_pairs(name):
    function = functions()[name]
    size = {"batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": function}
    theirs = masking.sdpa_mask(**size, allow_is_causal_skip=False)
    assert torch.equal(visible(carry_mask(**size), 2, 9, 9), theirs)


@pytest.mark.parametrize("name", ["causal", "bidirectional", "sliding", "chunked"])
@pytest.mark.parametrize(
    ("queries", "keys", "q_offset", "kv_offset"),
    [(4, 10, 6, 0), (1, 10, 9, 0), (7, 10, 0, 0), (1, 10, 4, 0), (1, 4, 9, 6), (3, 6, 7, 4)],
    ids=["continued", "decode", "static prefill", "static decode", "sliding decode", "sliding continued"],
)
def test_offsets_of_caches_and_padding_are_honoured(name, queries, keys, q_offset, kv_offset):
    padding = torch.ones(2, max(10, q_offset + queries), dtype=torch.bool)
    padding[0, :3] = False
    size = {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": torch.tensor(q_offset) if queries == 7 else q_offset,
        "kv_offset": kv_offset,
        "mask_function": functions()[name],
        "attention_mask": padding[:, : q_offset + queries],
    }
    theirs = masking.sdpa_mask(**size, allow_is_causal_skip=False)
    assert torch.equal(visible(carry_mask(**size), 2, queries, keys), theirs)


def test_a_million_tokens_cost_nothing():
    carrier = carry_mask(1, 1 << 20, 1 << 20, mask_function=masking.causal_mask_function)
    assert carrier.shape == (1, 1, 1 << 20, 1 << 20)
    assert carrier.visibility.mask == Causal()
    assert carrier.visibility.positions is None


def test_full_padding_masks_of_ones_are_dropped():
    ones = torch.ones(2, 5, dtype=torch.int64)
    assert carry_mask(2, 5, 5, mask_function=masking.causal_mask_function, attention_mask=ones).visibility == (
        carry_mask(2, 5, 5, mask_function=masking.causal_mask_function).visibility
    )


def test_documents_join_the_mask_of_the_model():
    with documents([4, 5]) as inner:
        encoder = carry_mask(1, 9, 9, mask_function=masking.bidirectional_mask_function).visibility
        decoder = carry_mask(1, 9, 9, mask_function=masking.causal_mask_function).visibility
    outside = carry_mask(1, 9, 9, mask_function=masking.bidirectional_mask_function).visibility
    assert encoder.mask == inner == Document([4, 5])
    assert decoder.mask == Causal() & Document([4, 5])
    assert outside.mask == Full()


def test_carriers_are_handed_on_and_not_computed_with():
    carrier = carry_mask(2, 3, 3, mask_function=masking.causal_mask_function)
    for same in (carrier.detach(), carrier.clone(), carrier.contiguous(), carrier.to("cpu")):
        assert isinstance(same, MaskCarrier) and same.visibility is carrier.visibility
        assert same.shape == carrier.shape
    for use in (lambda: carrier[:, :, :2], lambda: ~carrier, lambda: carrier.sum(), lambda: torch.where(carrier, 1, 0)):
        with pytest.raises(UnsupportedError, match="computes with its attention mask"):
            use()
    assert "causal" in repr(carrier)


def own_function(batch, head, query, key):
    return key <= query


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (own_function, "mask function 'own_function' is not one of transformers' own"),
        (masking.and_masks(masking.causal_mask_function, own_function), "own_function"),
        (masking.chunked_causal_mask_function(4, torch.tensor([0, 2])), "padded on the left"),
        (copy, "is not one of"),
    ],
)
def test_unknown_functions_are_refused_by_name(function, words):
    with pytest.raises(UnsupportedError, match=words):
        translate(function)


def test_positions_inside_documents_need_a_mask_of_distances():
    remap = getattr(masking, "remap_positions_for_packed_sequence", None)
    if remap is None:
        pytest.skip("this transformers does not remap positions")
    with pytest.raises(UnsupportedError, match="depends on more than the distance"):
        translate(remap(masking.chunked_causal_mask_function(4, NO_PADDING), PLACES))
