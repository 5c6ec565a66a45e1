"""Sequence packing without cross-contamination: several short sequences in a row, none of which sees another.

Choose rows with ``pack`` (or an algorithm by name), lay them out with ``collate``, run the model with the batch's
``mask()`` and ``position_ids``, and take the results apart with ``PackedBatch``.

Source:
    Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027.

Example:
    >>> from manyheads.method.packing import collate, pack
    >>> sequences = [[7, 8, 9, 7, 8], [5, 6, 5], [3, 4, 3, 4], [1, 2]]
    >>> packing = pack([len(s) for s in sequences], capacity=8)
    >>> batch = collate(sequences, packing)
    >>> batch.input_ids.tolist(), batch.mask()
    ([[3, 4, 3, 4, 5, 6, 5, 0], [7, 8, 9, 7, 8, 1, 2, 0]], document([[4, 3, 1], [5, 2, 1]]))
"""

from __future__ import annotations

from manyheads.method.packing.adjust import Hyperparameters, adjust
from manyheads.method.packing.algorithms import ALGORITHMS, greedy, lpfhp, pack, spfhp
from manyheads.method.packing.batch import PackedBatch, collate
from manyheads.method.packing.nonnegative import nnlshp
from manyheads.method.packing.result import Packing, histogram

EVIDENCE = {
    1: "tests/method/test_packing.py::test_every_sequence_is_packed_exactly_once",
    2: "tests/method/test_packing.py::test_no_pack_exceeds_capacity_or_depth",
    3: "tests/method/test_packed_batch.py::test_packed_outputs_and_gradients_equal_unpacked",
    4: "tests/method/test_packed_batch.py::test_order_inside_a_pack_changes_nothing",
    5: "tests/method/test_packing.py::test_spfhp_is_at_least_as_full_as_greedy_first_fit",
    6: "tests/method/test_packing.py::test_least_squares_leaves_no_sequence_without_a_slot",
}
"""Which test proves each numbered check of the card."""

__all__ = [
    "ALGORITHMS",
    "EVIDENCE",
    "Hyperparameters",
    "PackedBatch",
    "Packing",
    "adjust",
    "collate",
    "greedy",
    "histogram",
    "lpfhp",
    "nnlshp",
    "pack",
    "spfhp",
]
