"""Other packages: what they take is right where they are installed, and what they refuse has a reason everywhere."""

from __future__ import annotations

import pytest
import torch

from manyheads.bench import environment, providers
from manyheads.bench.measure import attention_rows
from manyheads.bench.oracle import judge, truth
from manyheads.bench.providers import Form, form_of, peers
from manyheads.bench.providers.base import first_reason
from manyheads.bench.providers.torch import Varlen, cumulative
from manyheads.bench.row import Row
from manyheads.bench.workload import Problem
from manyheads.mask import Causal, Document, Neighborhood, PerHead, Window, as_mask
from manyheads.mask.longca import STATIC, longca
from tests.bench.test_suites import Context

EXACT = [peer.name for peer in peers.PROVIDERS if not peer.lossy]
BANDS = ("full", "causal", "causal & window(9)", "window(12)", "document([30, 34])", "causal & document([30, 34])",
         "causal & window(9) & document([30, 34])", "causal & (window(9) | sink(4))")  # fmt: skip


def result(name, problem):
    """What a provider answers, or why it does not."""
    provider = providers.get(name)
    if (reason := provider.refuse(problem)) is not None:
        return reason
    return provider.prepare(problem)(*problem.tensors())


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("mask", BANDS)
def test_what_a_peer_takes_is_right(name, mask):
    problem = Problem(as_mask(mask), 64, heads=4, width=16)
    if "not installed" in str(result(name, problem)):
        pytest.skip(f"{name} is not installed")
    out = result(name, problem)
    if isinstance(out, str):
        assert len(out) > 5
        return
    known = truth(problem, *problem.tensors())
    assert judge((out[:, :, known.rows],), known, allowed=2.0).gate == "green"


@pytest.mark.parametrize(
    ("name", "mask", "kv_heads"),
    [("x-transformers", "causal & window(9)", 1), ("x-transformers", "full", 4), ("fla", "causal & window(9)", 2)],
)
def test_installed_peers_do_take_part(name, mask, kv_heads):
    problem = Problem(as_mask(mask), 64, heads=4, kv_heads=kv_heads, width=16)
    out = result(name, problem)
    if "not installed" in str(out):
        pytest.skip(f"{name} is not installed")
    known = truth(problem, *problem.tensors())
    assert judge((out[:, :, known.rows],), known, allowed=2.0).gate == "green"


@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
def test_an_approximation_shows_its_error_and_has_no_ratio(phase):
    pytest.importorskip("performer_pytorch")
    problem = Problem(as_mask("causal"), 100, heads=2, width=32, phase=phase)
    rows = attention_rows(Context(), Row("masks", "x", "-"), problem, ("manyheads", "sdpa", "performer"))
    ours, sdpa, performer = rows
    assert performer.gate == "lossy" and performer.error_norm > 0.05
    assert performer.ratio is None and performer.median_ms is not None
    assert performer.version and performer.version != ours.version
    assert ours.baseline == sdpa.provider == "sdpa"


@pytest.mark.parametrize(
    ("name", "problem", "reason"),
    [
        ("sdpa-cudnn", Problem(Causal(), 64), "needs a GPU"),
        ("sdpa-efficient", Problem(Causal(), 64), "needs a GPU"),
        ("sdpa-math", Problem(Causal(), 8192), "keeps all scores"),
        ("varlen", Problem(Causal(), 64), "needs a GPU"),
        ("manyheads-triton", Problem(Causal(), 64), "needs a GPU|no backend"),
    ],
)
def test_what_needs_a_gpu_says_so(name, problem, reason):
    found = providers.get(name).refuse(problem)
    assert any(each in found for each in reason.split("|"))


def reason_on_a_gpu(name, problem, monkeypatch):
    """What a provider would say on a GPU, were its package installed; refusing looks at shapes only."""
    monkeypatch.setattr(peers, "installed", lambda module: True)
    return providers.get(name).refuse(problem)


def gpu(mask, **more):
    return Problem(as_mask(mask), more.pop("length", 4096), dtype=more.pop("dtype", "bfloat16"), device="cuda", **more)


@pytest.mark.parametrize(
    ("name", "problem", "reason"),
    [
        ("sdpa-flash", gpu("window(9)"), "no mask on a GPU but causal"),
        ("sdpa-flash", gpu("causal", dtype="float32"), "float16 and bfloat16"),
        ("sdpa-efficient", gpu("causal", kv_heads=2), "no grouped heads"),
        ("varlen", gpu("causal & (window(9) | sink(4))"), "bands within documents"),
        ("varlen", gpu("causal", value_width=32), "values as wide as keys"),
        ("xformers", gpu("window(9)"), "its windows are causal"),
        ("xformers", gpu("causal", kv_heads=2, phase="backward"), "forward only"),
        ("fla", gpu("full"), "its kernel is causal"),
        ("natten", gpu("causal"), "neighbourhoods"),
        ("natten", gpu("causal & window(9)", kv_heads=2), "no grouped heads"),
        ("sageattention", gpu("causal", phase="forward+backward"), "no backward"),
        ("sageattention", gpu("causal", width=80), "widths 64, 96 and 128"),
        ("flash-attn", gpu("causal", dtype="float32"), "float16 and bfloat16"),
        ("flash-attn", gpu("prefix(9) | causal"), "bands within documents"),
    ],
)
def test_limits_of_the_gpu_s_packages_are_known_without_one(name, problem, reason, monkeypatch):
    assert reason in (reason_on_a_gpu(name, problem, monkeypatch) or "")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("sdpa", gpu("causal & window(9)")),
        ("sdpa-flash", gpu("causal", kv_heads=2)),
        ("sdpa-cudnn", gpu("causal")),
        ("varlen", gpu("causal & window(9) & document([1000, 3096])")),
        ("flex", gpu("causal", phase="forward+backward")),
        ("flex", gpu("causal", length=65_536)),
        ("xformers", gpu("causal & document([1000, 3096])", kv_heads=2)),
        ("natten", gpu("causal & window(9)")),
        ("fla", gpu("causal & window(9) & document([1000, 3096])", phase="backward")),
        ("sageattention", gpu("causal", kv_heads=2)),
        ("flash-attn", gpu("causal & window(9) & document([1000, 3096])", kv_heads=2, phase="backward")),
    ],
)
def test_what_the_gpu_s_packages_are_good_at_is_not_refused(name, problem, monkeypatch):
    assert reason_on_a_gpu(name, problem, monkeypatch) is None


def test_a_package_that_is_not_here_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda module: False)
    for peer in peers.PROVIDERS:
        assert f"not installed (pip install --no-deps {peer.package})" == peer.refuse(Problem(Causal(), 64))
    monkeypatch.setattr(environment, "version", lambda package: None)
    assert set(providers.presence(EXACT).values()) == {"not installed"}
    assert not set(providers.volunteers("cpu")) & set(EXACT)


@pytest.mark.parametrize("name", STATIC)
def test_a_form_says_exactly_what_its_mask_says(name):
    mask = longca(name, 90, seed=4, window=11).mask if name != "block_causal_document" else as_mask("prefix(3)")
    form = form_of(mask)
    if form is None:
        assert name not in ("full", "causal", "full_document", "causal_document", "sliding_window")
        return
    parts = [Causal()] if form.causal else []
    if form.left is not None:
        parts.append(Window(left=form.left + 1))
    if form.right:
        parts.append(Window(right=form.right + 1))
    parts += [Document(form.lengths)] if form.lengths else []
    again = as_mask("full")
    for part in parts:
        again = again & part
    assert torch.equal(again.dense(90), mask.dense(90))


def test_masks_beyond_bands_have_no_form():
    others = ["window(9) | sink(4)", "~causal", "causal & periodic(4)", "document([3, 5], [4, 9])"]
    assert [form_of(as_mask(text)) for text in others] == [None] * 4
    assert form_of(PerHead([Window(3), Window(4)])) is None
    assert form_of(as_mask("window(left=5)")) == Form(left=4)
    assert form_of(as_mask("window(9) & window(left=3, right=20)")) == Form(left=2, right=8)


def test_a_causal_window_is_a_causal_neighbourhood():
    near = peers.Natten()._neighborhood(Problem(as_mask("causal & window(7)"), 50))
    assert torch.equal(near.dense(50), as_mask("causal & window(7)").dense(50))
    own = Problem(Neighborhood((5, 6), 3), 30)
    assert peers.Natten()._neighborhood(own) is own.mask


def test_bounds_of_documents_are_where_they_end():
    bounds, longest = cumulative((5, 1, 9), "cpu")
    assert (bounds.tolist(), longest) == ([0, 5, 6, 15], 9)


def test_packed_attention_is_called_with_what_this_torch_takes(monkeypatch):
    from torch.nn.attention import varlen

    given = {}

    def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **more):
        given.update(cu=cu_seq_q.tolist(), longest=max_q, window=window_size, shape=tuple(query.shape), more=more)
        return query

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    problem = Problem(as_mask("causal & window(4) & document([6, 4])"), 10, heads=2, width=8)
    q, k, v = problem.tensors()
    out = Varlen().prepare(problem)(q, k, v)
    assert given == {"cu": [0, 6, 10], "longest": 6, "window": (3, 0), "shape": (10, 2, 8), "more": {}}
    assert torch.equal(out, q)


def test_reasons_are_asked_in_order():
    assert first_reason((False, "a"), (1, "b"), (True, "c")) == "b"
    assert first_reason((0, "a")) is None


def test_every_provider_has_a_package_and_ours_are_ours():
    for name in providers.names():
        assert providers.get(name).package
    assert {name for name in providers.names() if providers.is_ours(name)} == {
        "manyheads", "manyheads-blocked", "manyheads-triton", "reference",
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("mask", BANDS)
def test_every_provider_on_a_gpu_is_right_or_refuses(mask, phase, device):
    problem = Problem(as_mask(mask), 64, heads=4, width=64, dtype="bfloat16", phase=phase, device=device)
    context = Context()
    rows = attention_rows(context, Row("masks", "x", "-"), problem, providers.names())
    assert {(r.provider, r.reason) for r in rows if r.status == "failed"} == set()
    assert {r.provider for r in rows if r.gate == "red"} == set()
    assert {"manyheads", "sdpa"} <= {r.provider for r in rows if r.gate == "green"}
