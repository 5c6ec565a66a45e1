"""Names of the literature: each composition equals its definition pair by pair."""

from __future__ import annotations

import pytest

from manyheads.mask import named, parse
from manyheads.mask.text import vocabulary
from tests.mask.cases import owner, table

LENS = [5, 1, 0, 7, 4]
AT = owner(LENS)
START = [AT.index(d) for d in AT]
N = len(AT)

DEFINITIONS = [
    (named.sliding_window(4), lambda i, j: abs(i - j) < 4),
    (named.sliding_window_causal(4), lambda i, j: 0 <= i - j < 4),
    (named.streaming(4, 2), lambda i, j: j <= i and (i - j < 4 or j < 2)),
    (named.dilated_window(3, 2), lambda i, j: i - j in (-4, -2, 0, 2, 4)),
    (named.dilated_window(3, 1), lambda i, j: abs(i - j) < 3),
    (named.strided(3, 5), lambda i, j: j <= i and (i - j < 3 or (i - j) % 5 == 0)),
    (named.fixed(5, 2), lambda i, j: j <= i and (j // 5 == i // 5 or j % 5 >= 3)),
    (named.chunked(4), lambda i, j: j <= i and i // 4 == j // 4),
    (named.block_causal(4), lambda i, j: j // 4 <= i // 4),
    (named.full_document(LENS), lambda i, j: AT[i] == AT[j]),
    (named.causal_document(LENS), lambda i, j: AT[i] == AT[j] and j <= i),
    (named.causal_by_document(LENS), lambda i, j: AT[j] <= AT[i]),
    (named.block_causal_document(LENS, 3), lambda i, j: AT[i] == AT[j] and j // 3 <= i // 3),
    (named.shared_question(LENS), lambda i, j: j <= i and (AT[i] == AT[j] or AT[j] == 0)),
    (named.causal_blockwise(LENS), lambda i, j: j <= i and (AT[i] == AT[j] or AT[i] == 4)),
    (named.prefix_lm_causal(6), lambda i, j: j <= i or j < 6),
    (named.prefix_lm_document(2, LENS), lambda i, j: AT[i] == AT[j] and (j <= i or j - START[i] < 2)),
    (named.global_sliding_window(3, 2), lambda i, j: abs(i - j) < 3 or i < 2 or j < 2),
]


@pytest.mark.parametrize(("mask", "rule"), DEFINITIONS, ids=lambda x: getattr(x, "text", None))
def test_a_name_means_its_definition(mask, rule):
    assert (mask.dense(N)[0, 0].numpy() == table(rule, N)).all()
    assert parse(repr(mask)) == mask


def test_every_name_is_tested_and_parses():
    assert len(DEFINITIONS) == len(named.__all__) + 1
    assert set(named.__all__) <= set(vocabulary())


def test_documents_may_differ_between_batch_entries():
    lens = [[2, 3, 1], [1, 1, 4]]
    for make in (named.shared_question, named.causal_blockwise, named.causal_by_document):
        whole = make(lens).dense(6)
        for b, row in enumerate(lens):
            assert (whole[b] == make(row).dense(6)[0]).all()


def test_a_summary_longer_than_its_block_is_refused():
    with pytest.raises(ValueError, match="summary: expected at most the block 3, got 4"):
        named.fixed(3, 4)
