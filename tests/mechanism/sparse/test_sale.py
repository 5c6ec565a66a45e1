"""SALE: estimate, bound, block map and calibration against weights written out."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.common.quantise import smoothed
from manyheads.mechanism import exact, select
from manyheads.mechanism.sparse.sale import SALE, calibrate, plain_choice, sale, selection

SMALL = SALE(q_block=16, k_block=8, window=16, segment=16, dense_up_to=0)


def sample(n, generator, *, heads=4, kv_heads=2, width=16, sharpness=2.0, sink=0.0, dtype=torch.float64):
    """Queries, keys with a common direction, values; the first key has about the score ``sink``."""
    shapes = [(1, h, n, width) for h in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    q, k = q * sharpness, k + 1.5
    if sink:
        q[..., 0], k[..., 0], k[:, :, 0] = 8.0, 0.0, 0.0
        k[:, :, 0, 0] = sink * width**0.5 / 8.0
    return q.to(dtype), k.to(dtype), v.to(dtype)


def causal(n):
    """The pairs that a causal call may see."""
    return torch.ones(n, n).tril().bool()


@pytest.mark.parametrize("threshold", [0.0, 9e-6])
def test_a_threshold_of_zero_is_dense(threshold, generator):
    q, k, v = sample(141, generator)
    got = sale(q, k, v, threshold=threshold, config=SMALL, return_lse=True)
    want = exact.reference(q, k, v, mask="causal", return_lse=True)
    torch.testing.assert_close(got.out, want.out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("threshold", [0.01, 0.2])
def test_exact_scores_drop_only_blocks_of_small_weights(threshold, generator):
    q, k, v = sample(141, generator, sink=12.0)
    seen = plain_choice(q, k, torch.full((4,), threshold), SMALL, rounded=False) & causal(141)
    s = q @ k.repeat_interleave(2, 1).mT / 4
    key, row = torch.arange(141), torch.arange(141)[:, None]
    local = torch.tensor([SMALL.local(i // 16 * 16) for i in range(141)])[:, None]
    near = ((key < 8) | (key >= local)) & (key <= row)
    dropped = causal(141) & ~seen
    assert dropped.any()
    total = s.masked_fill(~near, -math.inf).logsumexp(-1, keepdim=True)
    assert (s - total)[dropped].max() < math.log(threshold)
    dense = exact.reference(q, k, v, mask="causal")
    sparse = exact.reference(q, k, v, mask=seen)
    lost = dropped.sum(-1) * threshold  # of a sum of at least 1, relative to the near one
    assert ((sparse - dense).abs().amax(-1) <= 2 * lost * v.abs().amax() + 1e-12).all()


def test_smoothing_changes_no_softmax(generator):
    q, k, v = sample(40, generator)
    parts = smoothed(q, k, queries=False)
    moved = exact.reference(q, parts.keys, v, mask="causal", return_lse=True)
    want = exact.reference(q, k, v, mask="causal", return_lse=True)
    torch.testing.assert_close(moved.out, want.out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(moved.lse + parts.row / 4, want.lse, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n", [1, 63, 128, 160, 192])
def test_short_sequences_are_dense(n, generator):
    q, k, v = sample(n, generator)
    full = SALE(dense_up_to=0)
    assert torch.equal(select.pairs(selection(q, k, v, threshold=1e9, config=full), q, k)[0, 0], causal(n))
    torch.testing.assert_close(
        sale(q, k, v, threshold=1e9, config=full), exact.reference(q, k, v, mask="causal"), rtol=1e-11, atol=1e-11
    )


def test_calibrated_thresholds_fall_with_the_error(generator):
    q, k, v = sample(160, generator, sharpness=5.0, dtype=torch.float32)
    errors = (3.0, 0.3, 0.03, 1e-4)
    found = [calibrate(q, k, v, error=e, start=0.5, config=SMALL) for e in errors]
    for looser, tighter in zip(found, found[1:], strict=False):
        assert (tighter <= looser).all()
    assert (found[0] > found[-1]).any()
    for error, threshold in zip(errors, found, strict=True):
        off = sale(q, k, v, threshold=threshold, config=SMALL) - exact.reference(q, k, v, mask="causal")
        assert (off.abs().sum((0, 2, 3)) <= error * 160 + 1e-2).all()


def test_a_head_that_bears_no_threshold_becomes_dense(generator):
    q, k, v = sample(160, generator, sink=20.0)  # beside the first key all blocks are small
    assert (calibrate(q, k, v, error=1e-12, start=1.5e-4, config=SMALL) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("share", [1, 8])
def test_the_blocks_are_those_of_the_plain_rule(dtype, bits, share, generator):
    config = SALE(q_block=16, k_block=8, window=16, segment=16, dense_up_to=0, bits=bits, share=share)
    q, k, v = sample(149, generator, dtype=dtype)
    threshold = torch.tensor([0.05, 0.3, 0.0, 0.01])
    got = select.pairs(selection(q, k, v, threshold=threshold, config=config), q, k)
    want = plain_choice(q.double(), k.double(), threshold, config) & causal(149)
    differ = (got != want).unflatten(2, (-1, 1)).float().mean()
    assert differ == 0 if dtype == torch.float64 else differ < 0.02  # a near-tie is a block
    assert not want.equal(causal(149).expand_as(want))


def test_sink_and_local_area_are_always_there(generator):
    q, k, v = sample(149, generator)
    kept = select.pairs(selection(q, k, v, threshold=1e9, config=SMALL), q, k)
    for i in range(149):
        own = kept[0, :, i]
        assert own[:, : min(8, i + 1)].all() and own[:, max(0, i - 15) : i + 1].all()
    assert (kept.sum(-1) <= 8 + 16 + 16 + 16).all()


def test_documents_are_estimated_each_by_itself(generator):
    q, k, v = sample(150, generator)
    options = {"threshold": 0.1, "config": SMALL}
    packed = sale(q, k, v, mask=Document([53, 0, 97]) & Causal(), **options)
    looped = [sale(*(t[:, :, a:b] for t in (q, k, v)), **options) for a, b in ((0, 53), (53, 150))]
    torch.testing.assert_close(packed, torch.cat(looped, 2), rtol=1e-11, atol=1e-11)


def test_kept_blocks_can_multiply_in_eight_bits(generator):
    q, k, v = sample(150, generator, sharpness=1.0, dtype=torch.float32)
    exactly, rounded = (sale(q, k, v, threshold=0.05, config=SMALL, qk=qk) for qk in ("exact", "int8"))
    assert 0 < (exactly - rounded).abs().max() < 0.1


def test_thresholds_are_kept_for_their_model(tmp_path):
    table = [[0.008, 0.0], [0.002, 0.004]]
    made = select.Calibration("sale", "tiny@1", {"layers": 2, "heads": 2}, {"threshold": table})
    select.save(tmp_path / "sale.json", made)
    read = select.load(tmp_path / "sale.json", mechanism="sale", model="tiny@1", shapes={"heads": 2})
    assert read.values["threshold"] == table
    with pytest.raises(ValueError, match="heads"):
        select.load(tmp_path / "sale.json", mechanism="sale", model="tiny@1", shapes={"heads": 4})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: sale(q, q, q, threshold=-1.0), "threshold: .*-1.0"),
        (lambda q: sale(q, q, q, threshold=torch.ones(3)), r"threshold: .*Hq=2.*\(3,\)"),
        (lambda q: SALE(q_block=48, k_block=32), "q_block: expected a multiple of k_block=32, got 48"),
        (lambda q: SALE(window=0), "window: .*got 0"),
        (lambda q: calibrate(q, q, q, error=0.0), "error: .*0.0"),
    ],
)
def test_wrong_options_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.ones(1, 2, 20, 4))


def test_training_through_it_is_refused():
    q = torch.ones(1, 1, 20, 4, requires_grad=True)
    with pytest.raises(UnsupportedError, match="sale does not support backward"):
        sale(q, q, q)
