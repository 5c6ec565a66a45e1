"""Providers agree where they take part, and say why where they do not."""

from __future__ import annotations

import pytest
import torch

from manyheads.bench import environment, providers
from manyheads.bench.oracle import judge, truth
from manyheads.bench.workload import Problem
from manyheads.mask import Causal, Full, PerHead, Window, as_mask
from manyheads.mask.longca import STATIC, longca


@pytest.mark.parametrize("name", ["manyheads", "manyheads-blocked", "sdpa", "reference"])
@pytest.mark.parametrize("mask", STATIC)
def test_every_provider_computes_the_same_attention(name, mask):
    problem = Problem(longca(mask, 150, seed=1).mask, 150, heads=4, kv_heads=2, width=16)
    q, k, v = problem.tensors()
    provider = providers.get(name)
    assert provider.refuse(problem) is None
    out = provider.prepare(problem)(q, k, v)
    known = truth(problem, q, k, v)
    peer = known.exact[0].float()
    torch.testing.assert_close(out[:, :, known.rows], peer, rtol=1e-4, atol=1e-5)


def test_causal_attention_with_more_keys_than_queries_is_not_torch_s_is_causal():
    problem = Problem(Causal(), 20, 50, width=8)
    q, k, v = problem.tensors()
    out = providers.get("sdpa").prepare(problem)(q, k, v)
    known = truth(problem, q, k, v)
    assert judge((out[:, :, known.rows],), known).gate == "green"


@pytest.mark.parametrize(
    ("name", "problem", "reason"),
    [
        ("sdpa", Problem(Window(512), 131_072), "N x N mask of 16.0 GiB"),
        ("flex", Problem(Causal(), 512, phase="forward+backward"), "no backward"),
        ("flex", Problem(Causal(), 512, dtype="float64"), "float32"),
        ("flex", Problem(Causal(), 131_072), "block mask"),
        ("reference", Problem(Causal(), 8192), "quadratic"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason(name, problem, reason):
    assert reason in (providers.get(name).refuse(problem) or "")


def test_masks_that_torch_knows_need_no_n_by_n_tensor():
    for mask in (Full(), Causal()):
        assert providers.get("sdpa").refuse(Problem(mask, 2**20)) is None


def test_flex_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(environment, "compiler", lambda: None)
    assert "C++ compiler" in (providers.get("flex").refuse(Problem(Causal(), 512)) or "")


def test_the_capability_table_covers_everybody():
    problems = [("a", Problem(Causal(), 8192)), ("b", Problem(Window(9), 512, phase="forward+backward"))]
    table = dict(providers.capabilities(problems, providers.STANDARD))
    assert set(table["a"]) == set(providers.STANDARD)
    assert table["a"]["sdpa"] == "yes" and "quadratic" in table["a"]["reference"]
    assert "backward" in table["b"]["flex"]


def test_a_provider_can_be_added_once():
    class Peer:
        name, package = "peer-of-this-test", "torch"

        def refuse(self, problem):
            return None

        def prepare(self, problem):
            return lambda q, k, v: v

    try:
        providers.add(Peer())
        assert providers.get("peer-of-this-test").name in providers.names()
        with pytest.raises(ValueError, match="taken"):
            providers.add(Peer())
    finally:
        providers._PROVIDERS.pop("peer-of-this-test", None)


@pytest.mark.slow
@pytest.mark.skipif(environment.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("mask", ["causal & window(20)", "document([60, 68])"])
def test_compiled_flex_attention_computes_the_same(mask):
    problem = Problem(as_mask(mask), 128, heads=2, width=16)
    q, k, v = problem.tensors()
    with torch.no_grad():
        out = providers.get("flex").prepare(problem)(q, k, v)
    known = truth(problem, q, k, v)
    torch.testing.assert_close(out[:, :, known.rows], known.exact[0].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(environment.compiler() is None, reason="needs a C++ compiler")
def test_many_flex_masks_and_one_mask_per_head_meet_no_recompilation_limit():
    masks = [PerHead([Window(5), Window(40)]), *(Window(n) for n in range(4, 14))]
    for mask in masks:
        problem = Problem(mask, 128, heads=2, width=16)
        q, k, v = problem.tensors()
        with torch.no_grad():
            out = providers.get("flex").prepare(problem)(q, k, v)
        known = truth(problem, q, k, v)
        torch.testing.assert_close(out[:, :, known.rows], known.exact[0].float(), rtol=1e-4, atol=1e-5)
