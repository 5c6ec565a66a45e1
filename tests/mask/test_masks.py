"""The algebra: every mask equals its definition, in full and by boxes; masks are values."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.mask import (
    Block,
    BlockMap,
    Causal,
    Dense,
    Document,
    Earlier,
    Full,
    Mask,
    Neighborhood,
    PerBatch,
    PerHead,
    Periodic,
    Predicate,
    Prefix,
    Rectangles,
    Sink,
    Window,
    as_mask,
)
from manyheads.mask.longca import longca
from manyheads.mask.store import known
from tests.mask import cases


def dense(mask, nq, nk=None, **options):
    """The only matrix of a scalar mask."""
    (only,) = mask.dense(nq, nk, **options).flatten(0, 1)
    return only.numpy()


@given(cases.sized_masks())
def test_dense_equals_the_definition(case):
    n, mask, rule = case
    assert (dense(mask, n) == cases.table(rule, n)).all()


@given(cases.neighborhoods())
def test_neighborhood_equals_the_definition(case):
    mask, rule = case
    n = int(np.prod(mask.grid))
    assert (dense(mask, n) == cases.table(rule, n)).all()


def boxes(mask, n, spans, side):
    """Bounds of the coordinates of some runs of positions."""
    found = {}
    for name, values in mask.coords(np.arange(n), side, n).items():
        runs = [values[a:b] for a, b in spans]
        found[name] = np.array([r.min() for r in runs]), np.array([r.max() for r in runs])
    return found


def runs_of(n):
    """Lists of non-empty runs of positions."""
    run = st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted).filter(lambda r: r[0] < r[1])
    return st.lists(run, min_size=1, max_size=5)


def classified(mask, n, rows, columns):
    """``(may, must)`` and the truth ``(any, all)`` of all pairs of runs."""
    q = {name: (lo[:, None], hi[:, None]) for name, (lo, hi) in boxes(mask, n, rows, "q").items()}
    may, must = mask.classify(q, boxes(mask, n, columns, "k"))
    whole = dense(mask, n)
    cells = [[whole[a:b, c:d] for c, d in columns] for a, b in rows]
    some = np.array([[cell.any() for cell in row] for row in cells])
    every = np.array([[cell.all() for cell in row] for row in cells])
    return may, must, some, every


@given(st.data(), cases.sized_masks())
def test_boxes_are_never_promised_too_much(data, case):
    n, mask, _ = case
    rows, columns = data.draw(runs_of(n)), data.draw(runs_of(n))
    may, must, some, every = classified(mask, n, rows, columns)
    assert may.shape == must.shape == (len(rows), len(columns))
    assert not (some & ~may).any() and not (must & ~every).any()


def simple(n):
    """Leaves whose boxes of neighbouring positions are known exactly."""
    lens = [n - n // 2, n // 2 - n // 3, n // 3]
    bits = (np.add.outer(np.arange(n), 2 * np.arange(n)) % 5) < 2
    return [
        Full(),
        Causal(),
        Window(3),
        Window(left=2, right=5),
        Window(right=2),
        Document(lens),
        Earlier(lens),
        Prefix(4),
        Prefix(4, side="query"),
        Prefix(2, lens=lens),
        Sink(3),
        Periodic(3, 1),
        Periodic(4, 1, of="key"),
        Block(Causal(), 3),
        Block(Window(2), 4),
        Neighborhood(n, 4),
        Neighborhood(n, 5, 3),
        Neighborhood(n, 5, 2, causal=True),
        Rectangles([[1, n - 1]], [[2, n]], [1]),
        Rectangles([[0, n // 2], [n // 2, n]], [[0, n], [3, 7]], [2, 3]),
        Dense(bits),
        BlockMap(bits[:3, :3], block=5, q_len=n, k_len=n),
    ]


@pytest.mark.parametrize("mask", simple(13), ids=lambda m: m.text)
def test_boxes_of_simple_leaves_are_exact(mask):
    spans = [(a, b) for a in range(13) for b in range(a + 1, 14)]
    may, must, some, every = classified(mask, 13, spans, spans)
    assert (may == some).all()
    assert (must == every).all()


@given(cases.sized_masks(keyed=True))
def test_equal_differences_mean_equal_bits(case):
    """What tile keys stand on: a relative leaf depends on differences of its coordinates alone."""
    n, mask, _ = case
    for leaf in mask.leaves():
        assert leaf.relative or not leaf.keyed
        if leaf.relative:
            q, k = leaf.coords(np.arange(n), "q", n), leaf.coords(np.arange(n), "k", n)
            ahead = [np.subtract.outer(q[axis], k[axis]).ravel().tolist() for axis in leaf.axes]
            bits = {}
            for key, bit in zip(zip(*ahead, strict=True), dense(leaf, n).ravel().tolist(), strict=True):
                assert bits.setdefault(key, bit) == bit


# Values


@given(cases.sized_masks())
def test_masks_are_values(case):
    n, mask, _ = case
    again = pickle.loads(pickle.dumps(mask))
    assert again == mask and hash(again) == hash(mask) and {mask: 1}[again] == 1
    assert copy.deepcopy(mask) is mask and copy.copy(mask) is mask
    assert (again.dense(n) == mask.dense(n)).all()


def test_masks_cannot_be_changed():
    mask = Causal() & Document([2, 3])
    with pytest.raises(AttributeError, match="immutable"):
        mask.text = "full"
    with pytest.raises(AttributeError, match="immutable"):
        del mask.data
    for leaf in mask.leaves():
        for datum in leaf._data:
            with pytest.raises(ValueError, match="read-only"):
                datum.array[0] = 9


def test_data_is_copied_once_and_shared_when_equal():
    lens = torch.tensor([2, 3])
    a = Document(lens)
    lens[0] = 4
    assert a.data[0].tolist() == [2, 3]
    b = Causal() & Document([2, 3]) & ~Earlier([2, 3])
    assert b.text == "causal & document($0) & ~earlier($0)" and len(b.data) == 1
    assert b.data[0] is a.data[0] and known(a.data[0]) is not None


def test_equality_sees_structure_and_data():
    assert Causal() & Window(3) == Causal() & Window(left=3, right=3)
    assert Causal() & Window(3) != Window(3) & Causal()
    assert Document([2, 3]) != Document([3, 2]) and Document([2, 3]) == Document([2, 3], [2, 3])
    assert Causal() != "causal" and Dense([[1, 0]]) != Dense([[1, 1]])


def test_nested_combinations_are_flattened():
    a, b, c = Causal(), Window(3), Sink(1)
    assert (a & (b & c)).text == ((a & b) & c).text == "causal & window(3) & sink(1)"
    assert (a | (b | a)).text == "causal | window(3)"
    assert ~~a is a and (a & Full()) is a and (Full() & Full()).text == "full"
    assert (~(a & b)).text == "~(causal & window(3))" and ((a | b) & c).text == "(causal | window(3)) & sink(1)"
    assert (a | b & c).text == "causal | window(3) & sink(1)"


def test_a_mask_has_no_truth_value():
    with pytest.raises(TypeError, match="truth value"):
        _ = Causal() and Window(2)


def test_combining_with_something_else_is_refused():
    with pytest.raises(TypeError):
        _ = Causal() & "window(2)"
    with pytest.raises(TypeError):
        _ = Causal() | None


# Batch entries and heads


def test_heads_and_batch_entries_select_their_masks():
    mask = PerHead([Causal(), Window(2), Full()]) & Document([[2, 3], [1, 4]])
    assert mask.shape == (2, 3)
    assert mask.at(1, 0) == Causal() & Document([1, 4]) and mask.at(0, 2) == Document([2, 3])
    assert mask.at(0, 1) is mask.at(0, 1)
    assert mask.heads(1, 3).shape == (2, 2) and mask.heads(1, 3).at(0, 0) == mask.at(0, 1)
    assert mask.batch(1, 2).shape == (1, 3) and mask.batch(1, 2).at(0, 1) == mask.at(1, 1)
    whole = mask.dense(5)
    assert whole.shape == (2, 3, 5, 5)
    assert (whole[1, 1] == mask.at(1, 1).dense(5)).all()
    assert (whole[:, 1:3] == mask.heads(1, 3).dense(5)).all()


def test_every_kind_of_mask_slices_by_head_and_batch():
    bits = torch.arange(2 * 3 * 16).reshape(2, 3, 4, 4) % 5 < 2
    kinds = [
        Dense(bits),
        BlockMap(bits, block=1),
        BlockMap(bits, q_sizes=[1, 0, 2, 1], k_sizes=[1, 1, 1, 1]),
        Predicate(lambda b, h, q, k: (q + k + b + 2 * h) % 3 == 0, shape=(2, 3)),
        Block(PerHead([Causal(), Window(1), Full()]), 2) | PerBatch([Sink(1), Sink(2)]),
        ~(PerHead([Causal(), Window(1), Full()]) & PerBatch([Sink(1), Sink(2)])),
        PerHead([Prefix([1, 2]), Prefix([1, 2], lens=[[1, 3], [2, 2]]), Earlier([[1, 3], [2, 2]])]),
    ]
    for mask in kinds:
        whole = mask.dense(4)
        assert whole.shape == (2, 3, 4, 4), mask
        assert (mask.heads(1, 3).dense(4) == whole[:, 1:3]).all(), mask
        assert (mask.batch(1, 2).dense(4) == whole[1:2]).all(), mask
        assert (mask.batch(1, 2).heads(2, 3).dense(4) == whole[1:2, 2:3]).all(), mask
        assert (mask.at(0, 2).dense(4)[0, 0] == whole[0, 2]).all(), mask


def test_a_mask_that_differs_between_heads_needs_a_choice():
    mask = PerHead([Causal(), Full()])
    for call in (
        lambda: mask.coords(np.arange(3), "q", 3),
        lambda: mask.allows({}, {}),
        lambda: mask.classify({}, {}),
    ):
        with pytest.raises(ValueError, match=r"take mask\.at"):
            call()


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="2 heads, another for 3"):
        _ = PerHead([Causal(), Full()]) & PerHead([Causal(), Full(), Full()])
    with pytest.raises(ValueError, match="already has shape"):
        PerHead([PerHead([Causal(), Full()]), Causal()])
    with pytest.raises(TypeError, match="expected masks"):
        PerHead([Causal(), "full"])
    with pytest.raises(ValueError, match="at least one"):
        PerBatch([])
    with pytest.raises(ValueError, match="heads: expected 0 <= i < j <= 2"):
        PerHead([Causal(), Full()]).heads(1, 3)


# Positions


def test_queries_end_where_keys_end():
    assert dense(Causal(), 2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert dense(Causal(), 3, 1).tolist() == [[False], [False], [True]]
    q, k = Causal().default_positions(2, 5)
    assert q.tolist() == [3, 4] and k.tolist() == [0, 1, 2, 3, 4]


def test_positions_decide_and_storage_order_does_not(generator):
    order = torch.randperm(9, generator=generator)
    mask = Causal() & (Window(3) | Document([4, 5]))
    assert (dense(mask, 9, positions=(order, order)) == dense(mask, 9)[order][:, order]).all()


def test_positions_may_differ_between_batch_entries():
    q = torch.tensor([[3], [1]])
    whole = Causal().dense(1, 4, positions=(q, torch.arange(4)))
    assert whole.shape == (2, 1, 1, 4) and whole.sum(-1).flatten().tolist() == [4, 2]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5))
def test_documents_of_two_lengths_are_end_aligned_each(pairs):
    q_lens, k_lens = [p[0] for p in pairs], [p[1] for p in pairs]
    nq, nk = sum(q_lens), sum(k_lens)
    if not nq or not nk:
        return
    got = dense(Causal() & Document(q_lens, k_lens), nq, nk)
    rows = []
    for d, (a, b) in enumerate(pairs):
        for r in range(a):
            before = sum(k_lens[:d])
            rows.append([before <= c < before + b and c - before <= r + b - a for c in range(nk)])
    assert got.tolist() == rows


def test_documents_of_two_lengths_may_differ_between_batch_entries():
    mask = Document([[1, 2], [2, 1]], [[2, 2], [1, 3]])
    q, k = mask.default_positions(3, 4)
    assert q.tolist() == [[1, 2, 3], [0, 1, 4]] and k.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert mask.dense(3, 4)[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1]]


MISFITS = [
    (Document([3, 4]), 8, 8, "document is for 7 keys, the call has 8"),
    (Document([3, 4]), 9, 7, r"q_pos: document covers positions 0\.\.6, got -2\.\.6"),
    (Document([3], [4]), 4, 4, "document is for 3 queries, the call has 4"),
    (Dense([[1, 0], [0, 1]]), 2, 3, "dense is for 2 keys, the call has 3"),
    (Dense([[1, 0]]), 2, 2, "dense covers positions"),
    (Neighborhood((3, 3), 3), 8, 8, "neighborhood is for 9 keys"),
    (BlockMap([[1]], block=4), 5, 5, r"block_map is for 1\.\.4 keys"),
    (BlockMap([[1, 1], [1, 1]], block=4), 5, 8, "give q_len and k_len"),
    (Block(Document([1, 2]), 4), 13, 13, r"block is for 9\.\.12 keys"),
    (Document([3], [4]) & Document([3], [5]), 3, 4, "disagree|document is for 5 keys"),
]


@pytest.mark.parametrize(("mask", "nq", "nk", "message"), MISFITS, ids=lambda x: getattr(x, "text", None))
def test_a_mask_of_another_length_is_refused(mask, nq, nk, message):
    with pytest.raises(ValueError, match=message):
        mask.check(nq, nk)
    with pytest.raises(ValueError, match=message):
        mask.dense(nq, nk)


def test_positions_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"k_pos: document covers positions 0\.\.2, got 0\.\.3"):
        Document([1, 2]).dense(1, 4, positions=([0], [0, 1, 2, 3]))
    with pytest.raises(ValueError, match="q_pos: .* positions, got shape"):
        Causal().check(2, 2, np.arange(3), np.arange(2))
    with pytest.raises(TypeError, match="expected integers"):
        Causal().dense(2, positions=(torch.rand(2), torch.arange(2)))
    with pytest.raises(ValueError, match="dense covers positions"):
        Dense([[1, 0], [0, 1]]).coords(np.array([2]), "k", 1)


def test_a_share_of_the_keys_may_be_given_with_positions():
    assert dense(Document([2, 3]), 1, 2, positions=([3], [1, 4])).tolist() == [[False, True]]


REFUSED = [
    (lambda: Window(0), ValueError, "width: expected an int >= 1, got 0"),
    (lambda: Window(), ValueError, "expected a width"),
    (lambda: Window(3, left=2), ValueError, "width alone"),
    (lambda: Window(2.5), TypeError, "width: expected an int"),
    (lambda: Window(True), TypeError, "width: expected an int"),
    (lambda: Document([2, -1]), ValueError, "q_lens: expected values >= 0, got -1"),
    (lambda: Document([0.5]), TypeError, "q_lens: expected integers"),
    (lambda: Document([]), ValueError, "at least one document"),
    (lambda: Document([1, 2], [3]), ValueError, "as many documents"),
    (lambda: Document([[1, 2], [3]]), ValueError, "rows of equal length"),
    (lambda: Document("ab"), TypeError, "q_lens: expected a list"),
    (lambda: Prefix(-1), ValueError, "length: expected values >= 0"),
    (lambda: Prefix(1, side="left"), ValueError, "side: expected 'key' or 'query'"),
    (lambda: Prefix([1, 2, 3], lens=[[1, 1], [2, 0]]), ValueError, "expected 3 rows"),
    (lambda: Periodic(0), ValueError, "stride"),
    (lambda: Periodic(2, of="keys"), ValueError, "of: expected"),
    (lambda: Sink(-1), ValueError, "n: expected"),
    (lambda: Block("causal", 2), TypeError, "inner: expected a mask"),
    (lambda: Block(Causal(), 0), ValueError, "size: expected"),
    (lambda: Block(Document([1], [2]), 2), ValueError, "cannot be lifted"),
    (lambda: Rectangles([[0, 2]], [[2, 0]]), ValueError, "expected start <= end"),
    (lambda: Rectangles([[0, 2]], [[0, 2]], [4]), ValueError, "types: expected 0 to 3"),
    (lambda: Rectangles([[0, 2]], [[0, 2], [0, 2]]), ValueError, "expected equal lengths"),
    (lambda: Rectangles([0, 2], [[0, 2]]), ValueError, r"q_ranges: expected shape \(n, 2\)"),
    (lambda: Dense([1, 0]), ValueError, "expected 2-D to 4-D"),
    (lambda: Dense(torch.rand(2, 2)), TypeError, "expected booleans, got float32"),
    (lambda: Dense([[2, 0]]), TypeError, "beyond 0 and 1"),
    (lambda: BlockMap([[1]]), ValueError, "give block, or q_sizes"),
    (lambda: BlockMap([[1]], q_sizes=[3]), ValueError, "both q_sizes and k_sizes"),
    (lambda: BlockMap([[1]], q_sizes=[3, 4], k_sizes=[7]), ValueError, "q_sizes: expected 1 sizes"),
    (lambda: BlockMap([[1]], block=4, q_len=5), ValueError, r"1 blocks of 4 hold 1\.\.4 tokens, got 5"),
    (lambda: Predicate(3), TypeError, "expected a function"),
    (lambda: Predicate(lambda q, k: q).dense(2), ValueError, "expected a boolean tensor"),
    (lambda: Predicate(lambda q, k: torch.ones(7, dtype=torch.bool)).dense(2), ValueError, "expected shape"),
    (lambda: Neighborhood((2, 2, 2, 2), 2), ValueError, "1 to 3 axes"),
    (lambda: Neighborhood(5, 1), ValueError, "window: expected at least 2"),
    (lambda: Neighborhood(5, 3, 4), ValueError, "stride: expected at most the window"),
    (lambda: Neighborhood(5, 3, 1, 2), ValueError, r"window \* dilation"),
    (lambda: Neighborhood((5, 5), (3, 3, 3)), ValueError, "window: expected an int or 2"),
    (lambda: Neighborhood(5, 3, causal=1), (TypeError, ValueError), "causal|iterable"),
    (lambda: as_mask(3), TypeError, "expected a Mask, text"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=lambda x: None)
def test_bad_arguments_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_dense_mask_of_absurd_size_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Causal().dense(2**20)


# Windows count self


@pytest.mark.parametrize("w", [1, 2, 5])
def test_window_counts_self_on_both_sides(w):
    inner = slice(8, 12)
    assert (dense(Causal() & Window(w), 20).sum(1)[inner] == w).all()
    assert (dense(Window(w), 20).sum(1)[inner] == 2 * w - 1).all()
    assert (dense(Window(left=w, right=3), 20).sum(1)[inner] == w + 2).all()


# Rectangles


@given(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.integers(0, 3))
def test_areas_follow_the_formulas(size, kind):
    q, k = size
    mask = Rectangles([[2, 2 + q]], [[1, 1 + k]], [kind])
    assert mask.areas().tolist() == [int(dense(mask, 12).sum())]


def test_many_rectangles_are_classified_a_part_at_a_time(monkeypatch):
    from manyheads.mask import rectangles

    monkeypatch.setattr(rectangles, "_CHUNK", 7)
    case = longca("prefix_lm_document", 61, lengths=[9, 1, 20, 13, 18], prefix=5)
    spans = [(a, min(a + w, 61)) for a in range(0, 61, 7) for w in (1, 7, 30)]
    may, must, some, every = classified(case.slices, 61, spans, spans)
    assert (may == some).all() and not (must & ~every).any()


def test_every_mask_is_documented_by_its_own_kind():
    for kind in Mask.__subclasses__():
        assert kind.__doc__
