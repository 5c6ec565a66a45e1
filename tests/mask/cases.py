"""Random masks, each with its definition pair by pair in plain Python, written apart from the library."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from manyheads.mask import (
    Block,
    BlockMap,
    Causal,
    Dense,
    Document,
    Earlier,
    Full,
    Neighborhood,
    Periodic,
    Predicate,
    Prefix,
    Rectangles,
    Sink,
    Window,
)


def table(rule, n):
    """The ``n x n`` matrix of a rule."""
    return np.array([[bool(rule(i, j)) for j in range(n)] for i in range(n)]).reshape(n, n)


def sums_to(n, least=0):
    """Lists of document lengths with sum n."""
    cuts = st.lists(st.integers(0, n), max_size=4).map(lambda c: np.diff([0, *sorted(c), n]).tolist())
    return cuts.filter(lambda lens: min(lens) >= least)


def owner(lens):
    """The document of each token."""
    return [d for d, length in enumerate(lens) for _ in range(length)]


def odd(q, k):
    """A rule that no other mask says; at module level so that it pickles."""
    return (q * k) % 3 == 0


def axis_visible(i, j, length, w, s, d, causal):
    """Visibility on one axis, word for word after the definition."""
    if i % d != j % d:
        return False
    size = length // d + (1 if i % d < length % d else 0)
    i, j = i // d, j // d
    if causal:
        leader = min((i // s) * s + s - 1, size - 1)
        return max(0, leader - w + 1) <= j <= i
    left, right = w // 2, w // 2 - 1 + w % 2
    leader = min((i // s) * s + s // 2, size - 1)
    centre = min(max(leader, left), size - 1 - right)
    return centre - left <= j <= centre + right


@st.composite
def neighborhoods(draw, n=None):
    """A neighbourhood over a grid of n cells (or any small grid) and its definition."""
    if n is None:
        grid = tuple(draw(st.lists(st.integers(2, 7), min_size=1, max_size=3)))
    else:
        grid = (n,)
    w = tuple(draw(st.integers(2, length)) for length in grid)
    d = tuple(draw(st.integers(1, length // x)) for length, x in zip(grid, w, strict=True))
    s = tuple(draw(st.integers(1, x)) for x in w)
    causal = tuple(draw(st.booleans()) for _ in grid)

    def rule(i, j):
        at = zip(np.unravel_index(i, grid), np.unravel_index(j, grid), grid, w, s, d, causal, strict=True)
        return all(axis_visible(*map(int, axis)) for axis in at)

    return Neighborhood(grid, w, s, d, causal), rule


@st.composite
def rectangles(draw, n):
    """A few typed rectangles and their definition."""
    span = st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)
    parts = draw(st.lists(st.tuples(span, span, st.integers(0, 3)), max_size=4))

    def rule(i, j):
        for (q0, q1), (k0, k1), kind in parts:
            inside = q0 <= i < q1 and k0 <= j < k1
            below = i - q1 >= j - k1 or kind not in (1, 3)
            above = j - k0 >= i - q0 or kind not in (2, 3)
            if inside and below and above:
                return True
        return False

    return Rectangles([p[0] for p in parts], [p[1] for p in parts], [p[2] for p in parts]), rule


@st.composite
def leaves(draw, n, keyed=True):
    """One primitive for n tokens and its definition."""
    kinds = "full causal window sides document earlier prefix within sink periodic counted rectangles lifted"
    kinds += " blocks" + (" near" if n >= 2 else "") + ("" if keyed else " dense fn")
    kind = draw(st.sampled_from(kinds.split()))
    small = st.integers(1, n + 1)
    if kind == "full":
        return Full(), lambda i, j: True
    if kind == "causal":
        return Causal(), lambda i, j: j <= i
    if kind == "window":
        w = draw(small)
        return Window(w), lambda i, j: abs(i - j) < w
    if kind == "sides":
        a, b = draw(st.tuples(st.none() | small, st.none() | small).filter(lambda p: p != (None, None)))
        mask = Window(left=a, right=b)
        return mask, lambda i, j: (a is None or i - j < a) and (b is None or j - i < b)
    if kind in ("document", "earlier"):
        lens = draw(sums_to(n))
        at = owner(lens)
        if kind == "document":
            return Document(lens), lambda i, j: at[i] == at[j]
        return Earlier(lens), lambda i, j: at[j] < at[i]
    if kind == "prefix":
        p, side = draw(st.integers(0, n + 1)), draw(st.sampled_from(["key", "query"]))
        return Prefix(p, side=side), lambda i, j: (j if side == "key" else i) < p
    if kind == "within":
        lens, p = draw(sums_to(n)), draw(st.integers(0, n))
        at = owner(lens)
        return Prefix(p, lens=lens), lambda i, j: j - at.index(at[j]) < p
    if kind == "sink":
        p = draw(st.integers(0, n))
        return Sink(p), lambda i, j: j < p
    if kind == "periodic":
        s, o = draw(small), draw(st.integers(-3, 9))
        return Periodic(s, o), lambda i, j: (i - j) % s == o % s
    if kind == "counted":
        s, o, of = draw(small), draw(st.integers(0, 9)), draw(st.sampled_from(["key", "query"]))
        return Periodic(s, o, of=of), lambda i, j: (j if of == "key" else i) % s == o % s
    if kind == "near":
        return draw(neighborhoods(n))
    if kind == "rectangles":
        return draw(rectangles(n))
    if kind == "dense":
        bits = np.array(draw(st.lists(st.booleans(), min_size=n * n, max_size=n * n))).reshape(n, n)
        return Dense(torch.from_numpy(bits)), lambda i, j: bits[i, j]
    if kind == "fn":
        return Predicate(odd), lambda i, j: (i * j) % 3 == 0
    if kind == "blocks":
        size = draw(small)
        t = -(-n // size)
        bits = np.array(draw(st.lists(st.booleans(), min_size=t * t, max_size=t * t))).reshape(t, t)
        return BlockMap(bits, block=size, q_len=n, k_len=n), lambda i, j: bits[i // size, j // size]
    size = draw(small)
    inner, rule = draw(leaves(-(-n // size), keyed=True))
    return Block(inner, size), lambda i, j: rule(i // size, j // size)


@st.composite
def masks(draw, n, depth=2, keyed=False):
    """A random composition for n tokens and its definition."""
    kind = draw(st.sampled_from(["leaf", "and", "or", "not"])) if depth else "leaf"
    if kind == "leaf":
        return draw(leaves(n, keyed=keyed))
    a, f = draw(masks(n, depth=depth - 1, keyed=keyed))
    if kind == "not":
        return ~a, lambda i, j: not f(i, j)
    b, g = draw(masks(n, depth=depth - 1, keyed=keyed))
    if kind == "and":
        return a & b, lambda i, j: f(i, j) and g(i, j)
    return a | b, lambda i, j: f(i, j) or g(i, j)


@st.composite
def sized_masks(draw, most=13, keyed=False):
    """``(n, mask, rule)``."""
    n = draw(st.integers(1, most))
    return (n, *draw(masks(n, keyed=keyed)))
