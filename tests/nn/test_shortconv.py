"""The short convolution: causal, channel by channel, in steps, and not across borders of documents."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.nn import ShortConv

F64 = torch.float64


def conv(**options):
    """A layer in double precision."""
    torch.manual_seed(3)
    return ShortConv(5, **options).double()


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_is_the_sum_over_the_tokens_before(generator, kernel):
    layer = conv(kernel=kernel, bias=True)
    x = torch.randn(2, 9, 5, generator=generator, dtype=F64)
    want = torch.stack(
        [sum(layer.weight[:, -1 - s] * x[:, t - s] for s in range(min(kernel, t + 1))) for t in range(9)], 1
    )
    torch.testing.assert_close(layer(x), F.silu(want + layer.bias))


@pytest.mark.parametrize("kernel", [1, 3])
def test_pieces_and_steps_equal_one_call(generator, kernel):
    layer = conv(kernel=kernel)
    x = torch.randn(2, 9, 5, generator=generator, dtype=F64)
    first, cache = layer(x[:, :1], return_cache=True)
    second, cache = layer(x[:, 1:5], cache=cache, return_cache=True)
    outs = [first, second]
    for t in range(5, 9):
        y, cache = layer.step(x[:, t], cache)
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))


@pytest.mark.parametrize("lens", [[4, 0, 1, 6], [[5, 6], [9, 2]]])
def test_documents_do_not_meet(generator, lens):
    layer = conv(kernel=4, bias=True)
    x = torch.randn(2, 11, 5, generator=generator, dtype=F64, requires_grad=True)
    got = layer(x, mask=Document(lens) & Causal())
    rows = lens if isinstance(lens[0], list) else [lens, lens]
    want = torch.cat([
        torch.cat([layer(part) for part in row[None].split(cut, 1) if part.shape[1]], 1)
        for row, cut in zip(x, rows, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(got, want)
    weight = torch.randn(got.shape, generator=generator, dtype=F64)
    for a, b in zip(*(torch.autograd.grad(y, [x, layer.weight], weight) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_stands_before_a_border_may_be_anything():
    layer = ShortConv(2, activation="none")
    x = torch.ones(1, 6, 2)
    x[:, :3] = float("nan")
    assert layer(x, mask=Document([3, 3]) & Causal())[:, 3:].isfinite().all()


def test_wrong_input_is_named():
    layer = ShortConv(4)
    with pytest.raises(ValueError, match="did you mean 'silu'"):
        ShortConv(4, activation="sillu")
    with pytest.raises(ValueError, match="kernel: expected at least 1 token"):
        ShortConv(4, kernel=0)
    with pytest.raises(ValueError, match=r"cache: expected the last tokens \(B, kernel - 1, C\) = \(1, 3, 4\)"):
        layer.step(torch.ones(1, 4), torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match=r"x: expected tokens \(B, N, C=4\)"):
        layer(torch.ones(1, 2, 3))
    with pytest.raises(UnsupportedError, match="does not support mask"):
        layer(torch.ones(1, 2, 4), mask="window(2)")
    with pytest.raises(UnsupportedError, match="a cache with packed documents"):
        layer(torch.ones(1, 2, 4), mask=Document([2]) & Causal(), return_cache=True)
