"""Skipped tiles: the rule, its bound, its gradients, counting and calibration."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import Causal, Document, attention
from manyheads.engine.tiled import tiled
from manyheads.mechanism import exact, select
from manyheads.mechanism.sparse.blasst import Fit, blasst, calibrate, fit, reference, selection, skipped_tiles


def topics(n, heads=4, kv_heads=2, width=16, *, run=16, strength=3.0, generator, dtype=torch.float64):
    """Queries and keys whose runs of tokens share one of a few directions, so that tiles differ in what they hold."""
    ways = torch.nn.functional.normalize(torch.randn(5, width, generator=generator, dtype=torch.float64), dim=-1)
    own = torch.randint(0, 5, (-(-n // run),), generator=generator).repeat_interleave(run)[:n]
    noise = [torch.randn(2, h, n, width, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]
    shift = ways[own] * strength * width**0.25
    return [(noise[0] + shift).to(dtype), (noise[1] + shift).to(dtype), noise[2].to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_threshold_of_zero_is_dense_bit_for_bit(dtype, generator):
    q, k, v = topics(77, generator=generator, dtype=dtype)
    dense = tiled(q, k, v, Causal(), tile=(128, 128), return_lse=True)
    for threshold in (0.0, 1e-30):
        got = blasst(q, k, v, threshold=threshold, mask="causal", return_lse=True)
        plain = exact.reference(q, k, v, mask="causal")
        assert (got.out.float() - plain.float()).abs().max() < (1e-5 if dtype == torch.float32 else 3e-2)
        if threshold == 0.0:
            assert torch.equal(got.out, dense.out) and torch.equal(got.lse, dense.lse)


@pytest.mark.parametrize("threshold", [1e-3, 0.03, 0.5])
def test_what_is_skipped_is_bounded(threshold, generator):
    q, k, v = topics(150, strength=5.0, generator=generator)
    options = {"threshold": threshold, "mask": "causal", "tile": (16, 8)}
    got = blasst(q, k, v, **options, return_lse=True)
    dense = exact.reference(q, k, v, mask="causal", return_lse=True)
    seen = torch.ones(150, 150).tril().bool()
    skipped = seen & ~select.pairs(selection(q, k, v, **options), q, k)
    assert skipped.any()
    s = q @ k.repeat_interleave(2, 1).mT * 16**-0.5
    best = s.masked_fill(~seen, -math.inf).amax(-1)
    assert (s - best[..., None])[skipped].max() < math.log(threshold)
    left = torch.exp(got.lse - best)  # the sum of what is kept, relative to the largest
    bound = 2 * skipped.sum(-1) * threshold / left * v.abs().amax()
    assert ((got.out - dense.out).abs().amax(-1) <= bound + 1e-12).all()


def test_a_huge_first_key_skips_the_rest_and_a_huge_last_key_nothing():
    q, k = torch.ones(1, 1, 16, 4), torch.zeros(1, 1, 128, 4)
    v = torch.randn(1, 1, 128, 4)
    first, last = k.clone(), k.clone()
    first[:, :, 0], last[:, :, -1] = 20.0, 20.0
    ahead, behind = (skipped_tiles(q, x, [1e-3], tile=(16, 16))[0] for x in (first, last))
    assert int(ahead.visited) == 8 and int(ahead.skipped) == 7
    assert int(behind.visited) == 8 and int(behind.skipped) == 0
    torch.testing.assert_close(
        blasst(q, first, v, tile=(16, 16)), tiled(q, first[:, :, :16], v[:, :, :16], "full"), rtol=1e-6, atol=1e-6
    )


def test_the_fit_recovers_its_parameters(generator):
    shares = torch.rand(30, generator=generator).tolist()
    points = [(n, 0.37 * math.exp(5.5 * s) / n, s) for n in (512, 4096, 65536) for s in shares]
    found = fit(points)
    assert found.a == pytest.approx(0.37) and found.b == pytest.approx(5.5)
    assert found.threshold(0.5, 4096) == pytest.approx(0.37 * math.exp(2.75) / 4096)
    errors = (torch.randn(90, generator=generator) * 0.05).tolist()
    noisy = fit([(n, t * math.exp(e), s) for (n, t, s), e in zip(points, errors, strict=True)])
    assert noisy.b == pytest.approx(5.5, abs=0.5)


def test_groups_equal_repeated_key_heads(generator):
    q, k, v = topics(90, heads=6, kv_heads=2, generator=generator)
    options = {"threshold": 0.05, "mask": "causal", "tile": (16, 8), "return_lse": True}
    got, repeated = blasst(q, k, v, **options), blasst(q, *(t.repeat_interleave(3, 1) for t in (k, v)), **options)
    torch.testing.assert_close(got.out, repeated.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.lse, repeated.lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["causal", None, "causal & window(37)"])
def test_what_is_kept_is_what_the_rule_keeps(mask, dtype, generator):
    q, k, v = topics(131, strength=4.0, generator=generator, dtype=dtype)
    wide = [t.double() for t in (q, k, v)]
    for threshold in (1e-4, 0.02, 0.6):
        options = {"threshold": threshold, "mask": mask, "tile": (32, 16), "return_lse": True}
        got, plain = blasst(q, k, v, **options), reference(*wide, **options)
        close = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(got.lse.double(), plain.lse, rtol=close, atol=close)  # a tile too many would show


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_skipped_tiles_get_no_gradient_and_the_rest_that_of_the_kept(backend, generator):
    q, k, v = topics(128, strength=5.0, generator=generator)
    options = {"threshold": 0.3, "mask": "causal", "tile": (16, 16)}
    leaves = [t.requires_grad_() for t in (q, k, v)]
    weight = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((blasst(*leaves, **options, backend=backend) * weight).sum(), leaves)
    kept = select.pairs(selection(*(t.detach() for t in leaves), **options), q, k)
    fixed = exact.reference(*leaves, mask=kept & torch.ones(128, 128).tril().bool())
    assert not (kept == torch.ones(128, 128).tril().bool()).all()
    for a, b in zip(got, torch.autograd.grad((fixed * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_packed_documents_are_cut_into_tiles_each(generator):
    q, k, v = topics(100, generator=generator)
    q, k, v = (t[:1] for t in (q, k, v))
    options = {"threshold": 0.2, "tile": (16, 16)}
    packed = blasst(q, k, v, mask=Document([37, 0, 63]) & Causal(), **options)
    looped = [blasst(*(t[:, :, a:b] for t in (q, k, v)), mask="causal", **options) for a, b in ((0, 37), (37, 100))]
    torch.testing.assert_close(packed, torch.cat(looped, 2), rtol=1e-10, atol=1e-10)


def test_more_is_skipped_as_the_threshold_rises_and_counts_are_those_of_the_layout(generator):
    q, k, v = topics(160, generator=generator)
    grid = [1e-6, 1e-3, 0.03, 0.3, 0.9]
    counts = skipped_tiles(q, k, grid, mask="causal", tile=(16, 8))
    shares = [c.sparsity for c in counts]
    assert shares == sorted(shares) and shares[0] < shares[-1]
    for threshold, count in zip(grid, counts, strict=True):
        layout = selection(q, k, v, threshold=threshold, mask="causal", tile=(16, 8))
        assert layout.visited == int((count.visited - count.skipped).sum())


def test_a_calibrated_threshold_hits_its_sparsity_at_a_length_it_has_not_seen(generator):
    lengths, options = (128, 192, 256, 384), {"mask": "causal", "tile": (16, 16)}
    samples = [topics(n, strength=3.0, generator=generator)[:2] for n in lengths for _ in range(6)]
    threshold = calibrate(samples, **options).threshold(0.4, 320)
    fresh = [topics(320, strength=3.0, generator=generator)[:2] for _ in range(8)]
    shares = [skipped_tiles(*sample, [threshold], **options)[0].sparsity for sample in fresh]
    assert abs(sum(shares) / len(shares) - 0.4) < 0.2


def test_a_calibration_is_kept_for_its_model_only(tmp_path):
    found = Fit(a=0.5, b=6.0)
    values = {"prefill": {"a": found.a, "b": found.b}}
    select.save(tmp_path / "blasst.json", select.Calibration("blasst", "tiny@1", {"heads": 4}, values))
    read = select.load(tmp_path / "blasst.json", mechanism="blasst", model="tiny@1", shapes={"heads": 4})
    assert Fit(**read.values["prefill"]) == found
    with pytest.raises(ValueError, match="model: .*tiny@1.*other"):
        select.load(tmp_path / "blasst.json", mechanism="blasst", model="other")


def test_few_queries_at_the_end_are_a_decode_step(generator):
    q, k, v = topics(96, generator=generator)
    options = {"threshold": 0.1, "mask": "causal", "tile": (1, 16)}
    step, whole = blasst(q[:, :, -1:], k, v, **options), blasst(q, k, v, **options)
    torch.testing.assert_close(step, whole[:, :, -1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 1.0}, "threshold: .*got 1.0"),
        ({"threshold": -0.1}, "threshold: .*got -0.1"),
        ({"tile": (0, 16)}, "tile: "),
        ({"tile": (12, 8), "mask": Document([10, 10])}, "tile: .*divide"),
    ],
)
def test_wrong_options_are_named(options, words):
    q = torch.ones(1, 1, 20, 4)
    with pytest.raises(ValueError, match=words):
        blasst(q, q, q, **options)


def test_a_fit_needs_something_to_fit():
    with pytest.raises(ValueError, match="points: .*two sparsities"):
        fit([(100, 0.1, 0.0), (200, 0.1, 1.0)])
    with pytest.raises(ValueError, match="sparsity: .*1.0"):
        Fit(1.0, 1.0).threshold(1.0, 10)
    with pytest.raises(ValueError, match="length: "):
        Fit(1.0, 1.0).threshold(0.5, 0)


def test_nothing_skipped_is_the_front_door(generator):
    q, k, v = topics(300, strength=0.0, generator=generator, dtype=torch.bfloat16)
    got = blasst(q, k, v, threshold=1e-12, mask="causal", return_lse=True)
    want = attention(q, k, v, mask="causal", return_lse=True)
    assert torch.equal(got.out, want.out) or (got.out.float() - want.out.float()).abs().max() < 2e-2
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-4, atol=1e-4)
