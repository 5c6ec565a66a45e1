"""Masks by name: what is drawn has the share that its name promises, for each head apart."""

from __future__ import annotations

import pytest
import torch

from manyheads.bench.suites import patterns
from manyheads.bench.suites.patterns import resolve, sparse
from manyheads.mask.longca import STATIC


def test_there_are_fourteen():
    assert len(patterns.MASKS) == len(set(patterns.MASKS)) == 14
    assert set(STATIC) < set(patterns.MASKS)


@pytest.mark.parametrize("kept", patterns.KEPT)
def test_uniform_blocks_keep_their_share_in_every_row(kept):
    dense = resolve(f"uniform_block_sparse({kept})", 640, 3, heads=3).dense(640)
    assert dense.shape[1] == 3
    assert dense.sum(-1).unique().tolist() == [max(1, int(kept * 10)) * 64]


def test_heads_have_blocks_of_their_own():
    for name in patterns.DYNAMIC:
        first, second = resolve(f"{name}(0.5,64)", 1024, 0, heads=2).dense(1024)[0]
        assert not torch.equal(first, second)


def test_variable_blocks_vary():
    dense = resolve("variable_block_sparse(0.5,256)", 4096, 1, heads=1).dense(4096)[0, 0]
    steps = (dense[1:] != dense[:-1]).any(1).nonzero().flatten() + 1
    sizes = torch.diff(torch.tensor([0, *steps.tolist(), 4096]))
    assert len(sizes.unique()) > 3 and int(sizes.min()) >= 128


def test_the_same_seed_draws_the_same_blocks():
    assert resolve("uniform_block_sparse", 512, 7) == resolve("uniform_block_sparse", 512, 7)
    assert resolve("uniform_block_sparse", 512, 7) != resolve("uniform_block_sparse", 512, 8)


@pytest.mark.parametrize("name", patterns.MASKS)
@pytest.mark.parametrize("length", [96, 1000])
def test_every_mask_is_made_at_odd_lengths(name, length):
    assert resolve(name, length, 1, heads=2).tiles(length, length, heads=2).pairs > 0


@pytest.mark.parametrize("text", patterns.MASKS)
def test_the_text_of_a_block_mask_reads_back(text):
    drawn = sparse(text)
    assert (drawn is None) == (text in STATIC)
    assert drawn is None or sparse(drawn.text) == drawn


@pytest.mark.parametrize("text", ["uniform_block_sparse(0)", "uniform_block_sparse(1.5)", "uniform_block_sparse(1.2.3)",
                                  "variable_block_sparse(0.5,0)"])  # fmt: skip
def test_a_share_that_cannot_be_kept_is_an_error(text):
    with pytest.raises(ValueError, match=r"mask: expected \w+\(kept share above 0"):
        resolve(text, 64, 0)


def test_histograms_follow_the_length():
    assert [patterns.lengths_from("share_question", n) for n in (12_288, 65_536, 65_537)] == [
        "pile",
        "prolong64k",
        "prolong512k",
    ]
    assert patterns.lengths_from("block_causal_document", 1024) is None
