"""What will run: chosen by name, found at once when misspelt, and told with its duration."""

from __future__ import annotations

import pytest

from manyheads.bench import providers
from manyheads.bench.suite import Options, unfold
from manyheads.bench.suites import masks, patterns
from manyheads.cli.plan import plan, say, typical, who


def names(suites=("masks",), cases=(), **options):
    return [case.name for case in plan(suites, Options(**options), cases)]


def test_the_default_takes_at_most_a_quarter_of_an_hour():
    quick, default, full = (
        sum(case.seconds for case in unfold(plan((), Options(level=level)))) for level in ("quick", "default", "full")
    )
    assert quick < 150 < default < 900 < full


def test_the_full_level_has_every_mask_length_layout_phase_and_input():
    found = masks.cases(Options(level="full"))
    text = " ".join(case.name for case in found)
    assert len(found) == len({case.name for case in found})
    for mask in (*patterns.MASKS, *masks.KEEPING):
        assert any(case.name.startswith(f"{mask}-") for case in found), mask
    for part in ("-1024-", "-32768-", "-8:2x64", "-forward+backward", "-minilm.layer0-", "-minilm.layer5-"):
        assert part in text, part


def test_a_gpu_is_measured_at_the_shapes_of_the_benchmark_s_authors():
    found = names(device="cuda", level="full")
    assert {"causal-16384-bfloat16-64:8x128", "causal-49152-bfloat16-64x128-forward+backward"} <= set(found)
    assert "uniform_block_sparse(0.1,128)-32768-bfloat16-64:8x128" in found
    assert not any("float32" in name and "-1024-" in name for name in found)


def test_levels_grow():
    for device in ("cpu", "cuda"):
        sizes = [len(names(level=level, device=device)) for level in ("quick", "default", "full")]
        assert sizes == sorted(set(sizes))


def test_heads_width_batch_and_phase_can_be_chosen():
    found = names(masks=("causal",), lengths=(64,), dtypes=("float32",), heads=("12:4",), width=32, batch=2,
                  phases=("backward",))  # fmt: skip
    assert found == ["causal-64-float32-12:4x32-batch2-backward"]


@pytest.mark.parametrize("heads", ["8:3", "0", "8:", "a", "8:2:1", "-4"])
def test_heads_that_cannot_be_grouped_are_an_error(heads):
    with pytest.raises(ValueError, match="heads: expected 8, or 8:2"):
        names(heads=(heads,))


def test_choices_inside_a_suite_leave_out_the_suites_without_it():
    assert {case.suite for case in plan((), Options(phases=("backward",)))} == {"masks"}
    assert {case.suite for case in plan((), Options(cache="cold"))} == {"masks"}
    assert {case.suite for case in plan((), Options(lengths=(4096,)))} == {"masks", "layouts"}


def test_a_case_is_chosen_by_name_by_suite_or_by_pattern():
    assert names(cases=("causal-1024-float32",)) == ["causal-1024-float32"]
    assert names((), ("layouts/causal-131072",)) == ["causal-131072"]
    found = names(cases=("sliding*-8192-bfloat16",))
    assert found == ["sliding_window-8192-bfloat16", "sliding_window_causal-8192-bfloat16"]


def test_a_case_of_the_full_level_is_found_from_any_level():
    assert names(cases=("causal-32768-float32",), level="quick") == ["causal-32768-float32"]


def test_a_misspelt_case_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown case 'causl-1024-float32': did you mean 'causal-1024-float32'"):
        names(cases=("causl-1024-float32",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "quik"}, "unknown level 'quik': did you mean 'quick'"),
        ({"cache": "cool"}, "unknown cache 'cool': did you mean 'cold'"),
        ({"phases": ("bakward",)}, "unknown phase 'bakward': did you mean 'backward'"),
        ({"masks": ("uniform_blok_sparse",)}, "did you mean 'uniform_block_sparse'"),
    ],
)
def test_misspelt_options_suggest_the_nearest(options, message):
    with pytest.raises(ValueError, match=message):
        names(**options)


def test_the_plan_counts_what_is_left(capsys):
    cases = plan(("masks",), Options(masks=("causal",), lengths=(64,), heads=("8",)))
    assert say(cases) == 0
    whole = capsys.readouterr().out.splitlines()
    say(cases, [cases[0].key])
    left = capsys.readouterr().out.splitlines()
    assert whole[-1].startswith(f"{len(cases)} cases, about")
    assert left[-1].startswith(f"{len(cases) - 1} cases, 1 are measured already, about")
    assert len(whole) == len(left) + 1


def test_everybody_stands_in_the_table_unless_somebody_was_named():
    assert who(Options()) == list(providers.names())
    assert who(Options(providers=("flex",))) == ["flex"]
    table = dict(providers.capabilities(typical("cpu"), who(Options())))
    assert set(table) == {name for name, _ in typical("cuda")}
    assert table["causal"]["sdpa"] == "yes" and "backward" in table["gradients"]["flex"]
