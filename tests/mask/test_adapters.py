"""Masks from and to other libraries: the same pairs, each library's own way of counting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from manyheads.mask import (
    BlockMap,
    Causal,
    Dense,
    Document,
    Full,
    PerBatch,
    PerHead,
    Predicate,
    Prefix,
    Sink,
    Window,
    from_bool,
    from_cu_seqlens,
    from_flash_window,
    from_flex,
    from_hf_window,
    from_natten,
    from_sdpa,
    to_flex,
)
from tests.mask import cases


def middle(mask, n=40):
    """Keys that a query far from both ends sees."""
    return int(mask.dense(n)[0, 0, n // 2].sum())


@pytest.mark.parametrize("w", [1, 4, 7])
def test_windows_count_keys_as_their_library_does(w):
    assert middle(Causal() & Window(w)) == w
    assert middle(from_hf_window(w)) == w
    assert middle(from_hf_window(w, causal=False)) == 2 * w + 1
    assert middle(from_flash_window((w, w))) == 2 * w + 1
    assert middle(from_flash_window((w, 0))) == middle(from_flash_window((w, w), causal=True)) == w + 1
    assert middle(from_flash_window((0, w))) == w + 1
    assert middle(from_natten(40, w + 1)) == w + 1


def test_a_window_without_limit():
    assert from_flash_window((-1, -1)) == Full() and from_flash_window((-1, -1), causal=True) == Causal()
    assert middle(from_flash_window((-1, 3))) == 24 and middle(from_flash_window((3, -1))) == 23


def test_hf_windows_agree_with_transformers():
    masking = pytest.importorskip("transformers.masking_utils")
    i, j = torch.arange(30)[:, None], torch.arange(30)[None]
    rule = masking.sliding_window_causal_mask_function(6)
    assert torch.equal(from_hf_window(6).dense(30)[0, 0], torch.as_tensor(rule(0, 0, i, j)))
    both = getattr(masking, "sliding_window_bidirectional_overlay", None)
    if both is not None:
        assert torch.equal(from_hf_window(6, causal=False).dense(30)[0, 0], both(6)(0, 0, i, j))


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 1, 5, 7), (2, 3, 5, 7)])
def test_booleans_come_back(shape, generator):
    bits = torch.rand(shape, generator=generator) < 0.5
    mask = from_bool(bits)
    assert torch.equal(mask.dense(5, 7).expand(2, 3, 5, 7), bits.expand(2, 3, 5, 7))


@pytest.mark.parametrize(("nq", "nk"), [(4, 4), (3, 6), (6, 3)])
def test_causal_of_sdpa_is_upper_left(nq, nk, generator):
    q, k, v = (torch.rand(1, 1, n, 8, generator=generator) for n in (nq, nk, nk))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = from_sdpa(is_causal=True, nq=nq, nk=nk).dense(nq, nk)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), want)


def test_padding_masks_of_sdpa_broadcast_over_queries():
    keep = torch.tensor([[True, True, False], [True, False, False]])[:, None, None, :]
    mask = from_sdpa(keep, nq=2)
    assert torch.equal(mask.dense(2, 3), keep.expand(2, 1, 2, 3)) and from_sdpa() == Full()


REFUSED = [
    (lambda: from_sdpa(torch.zeros(2, 2)), TypeError, "additive mask is a bias"),
    (lambda: from_sdpa(torch.ones(2, 2) > 0, is_causal=True), ValueError, "not both"),
    (lambda: from_sdpa(is_causal=True), ValueError, "nq, nk: needed"),
    (lambda: from_sdpa(torch.ones(2, 2) > 0, nq=3), ValueError, "nq: attn_mask has 2, expected 3"),
    (lambda: from_cu_seqlens([1, 3]), ValueError, "expected 0, then"),
    (lambda: from_cu_seqlens([0, 3, 2]), ValueError, "never decrease"),
    (lambda: from_cu_seqlens(torch.tensor([0.0, 1.0])), TypeError, "expected integers"),
    (lambda: from_flash_window((-2, 0)), ValueError, "window_size"),
    (lambda: from_hf_window(0), ValueError, "sliding_window"),
    (lambda: from_flex(3, 4), TypeError, "expected a function"),
    (lambda: from_bool(torch.zeros(2, 2)), TypeError, "expected booleans"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=lambda x: None)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_cumulative_lengths_are_documents():
    assert from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=torch.int32)) == Document([3, 0, 2])
    assert from_cu_seqlens([0, 1], [0, 4], causal=True) == Causal() & Document([1], [4])


def flexed(mask, nq, nk):
    """The mask as FlexAttention sees it."""
    batch = max(mask.shape[0], 1)
    rule = to_flex(mask, nq, nk)
    return create_mask(rule, batch, mask.shape[1], nq, nk, device="cpu")


@given(cases.sized_masks(most=9))
def test_flex_sees_the_same_pairs(case):
    n, mask, _ = case
    assert torch.equal(flexed(mask, n, n), mask.dense(n))


def test_flex_sees_the_same_pairs_for_every_head():
    per_head = PerHead([Causal(), Window(2), Causal()])
    mask = per_head & PerBatch([Sink(1), Document([2, 4])]) | Prefix(1, side="query")
    assert torch.equal(flexed(mask, 6, 6), mask.dense(6))
    cross = Causal() & Document([[1, 2], [2, 1]], [[2, 2], [1, 3]])
    assert torch.equal(flexed(cross, 3, 4), cross.dense(3, 4))
    blocks = BlockMap(torch.arange(16).reshape(4, 2, 2) % 3 < 2, block=4, q_len=5, k_len=5)
    assert torch.equal(flexed(blocks, 5, 5), blocks.dense(5))


def test_a_mask_mod_counts_rows_and_columns():
    lens = torch.tensor([0, 0, 1, 1, 1])

    def rule(b, h, q, k):
        return (lens[q] == lens[k]) & (q + h >= k)

    mask = from_flex(rule, 5, heads=2)
    assert mask.shape == (1, 2) and mask == from_flex(rule, 5, heads=2)
    assert torch.equal(mask.dense(5), create_mask(rule, 1, 2, 5, 5, device="cpu"))
    first = from_flex(lambda b, h, q, k: k <= q, 3, 5)
    assert first.dense(3, 5)[0, 0].sum(-1).tolist() == [1, 2, 3]


@given(st.integers(1, 6), st.integers(1, 6))
def test_there_and_back(nq, nk):
    mask = Causal() | Window(2)
    again = from_flex(to_flex(mask, nq, nk), nq, nk)
    assert torch.equal(again.dense(nq, nk), mask.dense(nq, nk))


def test_a_predicate_is_the_way_out():
    mask = Causal() & Predicate(cases.odd) | ~Dense([[1] * 4] * 4)
    assert torch.equal(flexed(mask, 4, 4), mask.dense(4))
