"""Advice: what can run is ranked, what cannot says why, and what is measured is not mixed up with what is modelled."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from pathlib import Path

import pytest

from manyheads.bench import limits
from manyheads.bench.limits import Limits
from manyheads.bench.planning.advise import LAUNCH_MS, advise
from manyheads.bench.planning.architecture import interpret
from manyheads.bench.planning.fit import work_of
from manyheads.bench.planning.machines import Machine, find
from manyheads.bench.planning.model import unit_times
from manyheads.bench.redraw import problem_of
from manyheads.bench.row import Row
from manyheads.bench.store import Store
from manyheads.cli import main

SMALL = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 6}
LLAMA = {**SMALL, "model_type": "llama"}
GEMMA = {**SMALL, "model_type": "gemma3_text", "sliding_window": 256}
BERT = {"model_type": "bert", "num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 6}
DEEPSEEK = {
    "model_type": "deepseek_v3", "num_attention_heads": 16, "num_hidden_layers": 3, "kv_lora_rank": 128,
    "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip
RATES = {"matrix": {"float32": 300.0, "bfloat16": 2000.0}, "copy": 20.0, "exp_rate": 3.0, "threads": 2}
COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def options(advice, layer=0):
    """Options of one kind of layer by name."""
    return {option.name: option for option in advice.groups[layer].options}


@pytest.fixture
def laptop():
    """A processor with round rates."""
    return Machine("laptop", "cpu", Limits.from_dict(RATES), 16.0, 2 << 20, 2, "made up", measured=True)


@pytest.fixture
def measured(tmp_path):
    """A results file with some rows of a processor, at known shares of its perfect speed."""
    header = {
        "limits": RATES,
        "environment": {"cpu_vendor": "V", "cpu_model": "M", "threads": 2, "memory_gib": 16.0},
        "started": "2026-01-02T03:04:05",
    }
    store = Store(tmp_path / "run.jsonl", header)
    for mask, length, provider, efficiency in (
        ("causal", 1024, "sdpa", 0.5),
        ("causal", 2048, "sdpa", 0.5),
        ("causal & window(256)", 1024, "manyheads", 0.25),
        ("causal & window(128)", 1024, "manyheads", 0.25),
    ):
        made = Row(
            "masks", f"{mask}-{length}", provider, shape=f"1x8:2x{length}x64", length=length, mask=mask, gate="green",
            dtype="float32", noisy=False, rounds=9,
        )  # fmt: skip
        work = work_of(provider, problem_of(made))
        ms = max(unit_times(work, Limits.from_dict(RATES), "float32").values()) / efficiency
        done = made.replace(median_ms=ms, p20_ms=0.9 * ms, p80_ms=1.1 * ms, pairs=work.pairs)
        store.case("masks", done.case, [done], 0.1)
    return store.close()


# --- ranking --------------------------------------------------------------------------------------------------------


def test_options_that_can_run_come_first_and_the_fastest_first():
    for group in advise(interpret(GEMMA), 8192, machine="H100").groups:
        times = [option.ms for option in group.options]
        able = [ms for ms in times if ms is not None]
        assert len(able) >= 3 and times[len(able) :] == [None] * (len(times) - len(able))
        assert [float(f"{ms:.2g}") for ms in able] == sorted(float(f"{ms:.2g}") for ms in able)
        assert all(o.low_ms <= o.ms <= o.high_ms and o.memory > o.kept > 0 for o in group.options if o.ms)
        assert all(option.reasons for option in group.options if option.ms is None)


def test_of_options_equally_fast_the_one_with_less_memory_comes_first():
    first, second, *_ = advise(interpret(GEMMA), 32768, machine="A100", phase="decode").groups[0].options
    assert first.name == "rolling cache, sdpa" and first.ms == second.ms and first.memory < second.memory / 50


def test_layers_with_a_window_keep_it_and_the_others_do_not():
    sliding, full = advise(interpret(GEMMA), 8192, machine="H100").groups
    assert (sliding.kind, sliding.layers, sliding.mask) == ("sliding", 5, "causal & window(256)")
    assert (full.kind, full.layers, full.mask) == ("full", 1, "causal")
    assert sliding.best.ms < full.best.ms / 5


def test_torch_s_is_causal_is_refused_where_it_would_compute_something_else():
    sliding, full = advise(interpret(GEMMA), 8192, machine="H100").groups
    refused = next(o for o in sliding.options if o.name == "sdpa, is_causal")
    assert refused.status == "refused" and "it would compute something else" in refused.reasons[0]
    assert next(o for o in full.options if o.name == "sdpa, is_causal").ms is not None


def test_a_mask_tensor_costs_time_and_memory_and_is_refused_when_it_grows_too_large():
    found = options(advise(interpret(LLAMA), 8192, machine="H100"))
    dense, causal = found["sdpa, mask tensor"], found["sdpa, is_causal"]
    assert dense.ms > causal.ms and dense.memory - causal.memory == pytest.approx(8192**2 * 3, rel=0.01)
    assert "N x N mask" in options(advise(interpret(LLAMA), 65536, machine="H100"))["sdpa, mask tensor"].reasons[0]


def test_what_a_processor_cannot_do_is_refused_there_only(laptop):
    on_cpu, on_gpu = (options(advise(interpret(LLAMA), 2048, machine=m, phase="train")) for m in (laptop, "H100"))
    assert "no backward on a CPU" in on_cpu["flex"].reasons[0] and on_gpu["flex"].ms is not None
    assert on_cpu["manyheads, backend='triton'"].status == "refused"


def test_caps_and_sinks_are_for_those_who_know_them():
    capped = options(advise(interpret({**LLAMA, "attn_logit_softcapping": 30.0}), 2048, machine="H100"))
    assert "it has no soft cap" in capped["sdpa, is_causal"].reasons
    assert capped["flex"].ms is not None and next(iter(capped)).startswith(("manyheads", "flex"))
    sinks = options(advise(interpret({**LLAMA, "model_type": "gpt_oss", "sliding_window": 64}), 2048, machine="H100"))
    assert "it has no sink logits" in sinks["sdpa, mask tensor"].reasons


def test_what_does_not_fit_the_machine_is_refused():
    found = advise(interpret(LLAMA), 4 << 20, machine="L4", phase="train")
    assert found.groups[0].best is None and found.totals == ()
    assert any("for one layer, the machine has 24 GiB" in o.reasons[0] for o in found.groups[0].options)


# --- phases ---------------------------------------------------------------------------------------------------------


def test_training_takes_three_and_a_half_prefills_and_keeps_more():
    prefill, train = (advise(interpret(LLAMA), 8192, machine="H100", phase=p) for p in ("prefill", "train"))
    one, other = (options(a)["sdpa, is_causal"] for a in (prefill, train))
    launch = LAUNCH_MS["gpu"]
    assert other.ms - launch == pytest.approx(3.5 * (one.ms - launch))
    assert one.kept == 2 * 8192 * 64 * 2 * 2  # keys and values of two key heads in bfloat16
    assert other.kept == one.kept + 8192 * 8 * (2 * 64 * 2 + 4)  # queries, outputs and statistics besides
    assert train.totals[0].memory > prefill.totals[0].memory


def test_decoding_is_bound_by_the_bytes_of_the_cache():
    short, long = (
        options(advise(interpret(LLAMA), n, machine="H100", phase="decode", batch=64))["sdpa, no mask"]
        for n in (16384, 32768)
    )
    assert short.bound == long.bound == "memory" and long.kept == 2 * short.kept
    assert 1.8 < long.ms / short.ms < 2.0  # what a launch takes stays


def test_a_rolling_cache_is_offered_for_the_model_s_own_window_only():
    asked = {"machine": "H100", "phase": "decode"}
    own = options(advise(interpret(GEMMA), 8192, **asked))
    assert own["rolling cache, sdpa"].kept == 256 * 2 * 2 * 64 * 2
    assert "rolling cache, sdpa" not in options(advise(interpret(GEMMA), 8192, mask="causal & window(99)", **asked))
    assert "rolling cache, sdpa" not in options(advise(interpret(GEMMA), 200, **asked))


def test_latent_attention_keeps_its_latent_and_decodes_from_it():
    model, batch, length = interpret(DEEPSEEK), 2, 65536
    latent = batch * length * 160 * 2
    prefill = advise(model, length, machine="H200", batch=batch)
    assert {o.kept for o in prefill.groups[0].options if o.ms} == {latent}
    found = options(advise(model, length, machine="H200", phase="decode", batch=batch))
    expanded = found.pop("expanded keys and values, sdpa")
    assert {o.kept for o in found.values() if o.ms} == {latent}
    assert expanded.kept == batch * length * 16 * (96 + 64) * 2
    assert expanded.ms > 5 * min(o.ms for o in found.values() if o.ms)


def test_values_of_another_width_cost_torch_s_plain_path_on_a_processor(laptop):
    found = options(advise(interpret(DEEPSEEK), 2048, machine=laptop, dtype="float32"))
    scores = 2 * 4 * 16 * 2048**2
    assert found["sdpa, is_causal"].memory > scores > found["manyheads, backend='blocked'"].memory
    assert any("say backend='blocked'" in note for note in found["manyheads (sdpa)"].notes)


def test_encoders_are_not_decoded_and_images_know_their_tokens():
    with pytest.raises(ValueError, match="phase: decode needs a causal model; in bert every token sees"):
        advise(interpret(BERT), 512, machine="H100", phase="decode")
    image = interpret({**BERT, "model_type": "vit", "image_size": 224, "patch_size": 14})
    found = advise(image, machine="H100")
    assert found.length == 257 and found.groups[0].mask == "full" and found.groups[0].area == 1


# --- documents and masks --------------------------------------------------------------------------------------------


def test_packing_is_compared_with_padding_when_there_are_documents(laptop):
    found = options(advise(interpret(LLAMA), 8192, machine=laptop, lengths="pile", dtype="float32"))
    padded, packed = found["padded documents, sdpa"], found["manyheads (blocked)"]
    assert packed.ms < padded.ms and packed.memory < padded.memory
    assert "documents" in padded.notes[0] and "padding" in padded.notes[0]
    assert "padded documents, sdpa" not in options(advise(interpret(LLAMA), 8192, machine=laptop, dtype="float32"))


def test_a_mask_that_is_given_replaces_the_order_and_keeps_the_windows():
    sliding, full = advise(interpret(GEMMA), 4096, machine="H100", mask="causal & sink(4)").groups
    assert sliding.mask == "causal & sink(4) & window(left=256)" and full.mask == "causal & sink(4)"
    found = advise(interpret(GEMMA), 4096, machine="H100", mask="window(64)")
    assert "window(64) lets a token see later ones, which the model itself does not" in found.notes


def test_more_tokens_than_the_model_was_made_for_are_remarked_on():
    model = interpret({**LLAMA, "max_position_embeddings": 4096})
    assert any("made for 4096 tokens" in note for note in advise(model, 8192, machine="H100").notes)
    assert not any("made for" in note for note in advise(model, 4096, machine="H100").notes)


# --- what is known from where ---------------------------------------------------------------------------------------


def test_rows_of_the_very_call_are_measured_and_the_rest_is_fitted_from_them(measured):
    sliding, full = advise(interpret(GEMMA), 1024, results=measured).groups
    row = next(o for o in sliding.options if o.name == "manyheads (blocked)")
    assert row.status == "measured" and "9 rounds in run.jsonl (2026-01-02)" in row.basis
    assert row.ms == pytest.approx(row.modelled_ms, rel=0.01) and row.low_ms == pytest.approx(0.9 * row.ms)
    causal = next(o for o in full.options if o.name == "sdpa, is_causal")
    assert causal.status == "measured"
    longer = advise(interpret(GEMMA), 4096, results=measured)
    for option in options(longer, 1).values():
        if option.name == "sdpa, is_causal":
            assert option.status == "modelled" and option.basis.startswith("efficiency 0.50 (0.40 to 0.62), 2 rows of")
        if option.name == "flex":
            assert "assumed" in option.basis
    assert longer.machine == "V M, 2 threads" and longer.measured_rates


def test_rows_of_one_machine_say_nothing_about_another(measured):
    found = advise(interpret(GEMMA), 1024, machine="H100", results=measured)
    assert {o.status for group in found.groups for o in group.options} == {"modelled", "refused"}
    assert all("assumed" in o.basis for group in found.groups for o in group.options if o.ms)
    assert any("is of another machine" in note for note in found.notes)
    assert any("every time is modelled" in note for note in found.notes) and not found.measured_rates


def test_results_of_such_a_gpu_give_its_rates(tmp_path):
    header = {"limits": {"matrix": {"bfloat16": 6e5}, "copy": 4e3, "exp_rate": 3e3, "device": "NVIDIA H200"}}
    path = Store(tmp_path / "gpu.jsonl", header).close()
    found = advise(interpret(LLAMA), 8192, machine="H200", results=path)
    assert found.measured_rates and "bfloat16 600 TFLOP/s" in found.rates
    published = advise(interpret(LLAMA), 8192, machine="H200")
    assert found.groups[0].best.ms > published.groups[0].best.ms


def test_the_whole_model_is_the_sum_of_its_layers():
    found = advise(interpret(GEMMA), 8192, machine="H100")
    sliding, full = found.groups
    best = next(t for t in found.totals if t.name == "the best of each")
    assert best.ms == pytest.approx(5 * sliding.best.ms + full.best.ms)
    assert best.memory == 5 * sliding.best.kept + full.best.kept + max(
        o.memory - o.kept for o in (sliding.best, full.best)
    )
    assert found.totals[0] == best and best.fits
    ours = next(t for t in found.totals if t.name == "manyheads in every layer")
    assert ours.ms >= best.ms * 0.95


def test_dtypes_come_from_the_config_if_the_machine_knows_them(laptop):
    half = interpret({**LLAMA, "torch_dtype": "bfloat16"})
    assert advise(half, 512, machine=laptop).dtype == "bfloat16"
    assert advise(interpret(LLAMA), 512, machine=laptop).dtype == "float32"
    assert advise(interpret(LLAMA), 512, machine="H100").dtype == "bfloat16"
    assert advise(half, 512, machine="H100", dtype="float32").dtype == "float32"
    wide = advise(interpret({**LLAMA, "torch_dtype": "float16"}), 512, machine=laptop)
    assert wide.dtype == "float32" and "laptop has no rate for the config's float16: float32 instead" in wide.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length: expected at least one token, got 0"),
        ({"length": None}, "length: llama takes any number of tokens"),
        ({"batch": 0}, "batch: expected at least one sequence"),
        ({"phase": "prefil"}, "unknown phase 'prefil': did you mean 'prefill'?"),
        ({"machine": "H1000"}, "unknown device 'H1000': did you mean 'H100'?"),
        ({"mask": "casual"}, "unknown mask 'casual': did you mean 'causal'?"),
        ({"mask": "document([3, 4])"}, "document is for 7"),
        ({"lengths": "pille"}, "did you mean 'pile'?"),
        ({"mask": "causal", "lengths": "pile"}, "'causal' draws no documents"),
        ({"dtype": "bfloat61"}, "unknown dtype 'bfloat61': did you mean 'bfloat16'?"),
        ({"dtype": "float64"}, "the rates of H100 hold none for float64"),
        ({"results": "none.jsonl"}, "results: cannot read none.jsonl"),
    ],
)
def test_bad_input_is_named(arguments, message):
    given = {"length": 64, "machine": "H100", **arguments}
    with pytest.raises(ValueError) as caught:
        advise(interpret(LLAMA), given.pop("length"), **given)
    assert message in str(caught.value)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(capfd, tmp_path):
    """Runs `manyheads advise` on a config: status, what it printed, what it complained about."""
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))

    def run(*arguments, config=tmp_path):
        status = main(["advise", str(config), *(str(a) for a in arguments)])
        out, err = capfd.readouterr()
        return status, out, err

    return run


def test_the_command_prints_options_reasons_totals_and_notes(shell):
    status, out, _ = shell("--length", 8192, "--device", "H200", "--phase", "train")
    assert status == 0
    for words in (
        "model:   gemma3_text: 5 sliding, 1 full layers",
        "machine: H200 (not here: NVIDIA H200 datasheet",
        "5 layers, sliding: causal & window(256), 3.08% of the pairs visible",
        "cannot run: sdpa, is_causal: it would compute something else",
        "measure it: manyheads bench --suite masks --mask 'causal & window(256)' --length 8192",
        "attention of the whole model",
        "(1) efficiency",
        "note: times and memory are those of attention alone",
    ):
        assert words in out


def test_json_holds_what_the_library_returns(shell):
    status, out, _ = shell("--length", 4096, "--device", "H100", "--dtype", "bf16", "--json")
    assert status == 0
    expected = dataclasses.asdict(advise(interpret(GEMMA), 4096, machine="H100", dtype="bfloat16"))
    assert json.loads(out) == json.loads(json.dumps(expected))


def test_the_status_says_when_nothing_can_run(shell):
    status, out, _ = shell("--length", 1 << 20, "--device", "L4", "--batch", 16)
    assert status == 1 and "the machine has 24 GiB" in out


def test_measured_and_modelled_are_told_apart_in_print(shell, measured):
    out = shell("--length", 1024, "--results", measured)[1]
    assert "measured (" in out and "modelled (" in out and "the model says" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", 0, "--device", "H100"), "length: expected at least one token, got 0"),
        (("--device", "H100"), "say which with length"),
        (("--length", 64, "--device", "H1000"), "unknown device 'H1000': did you mean 'H100'?"),
        (("--length", 64, "--device", "H100", "--mask", "casual"), "did you mean 'causal'?"),
        (("--length", 64, "--results", "none.jsonl"), "cannot read none.jsonl"),
        (("--length", 64, "--phase", "decoding", "--device", "H100"), "did you mean 'decode'?"),
        (("--length", "many"), "Invalid value for '--length'"),
    ],
)
def test_bad_input_of_the_command_is_one_clear_error(shell, arguments, message):
    status, _, err = shell(*arguments)
    assert status == 2
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_a_missing_config_is_one_clear_error(shell, tmp_path):
    status, _, err = shell("--length", 64, config=tmp_path / "none.json")
    assert status == 2 and "config: there is no file" in err and "give a transformers config.json" in err


@pytest.mark.parametrize("phase", ["prefill", "train"])
def test_the_command_that_would_measure_it_is_one_that_the_benchmark_takes(laptop, phase, capfd):
    for group in advise(interpret(GEMMA), 1024, machine=laptop, phase=phase, dtype="float32", batch=2).groups:
        words = shlex.split(group.command)
        assert words[:2] == ["manyheads", "bench"]
        assert main([*words[1:], "--dry-run"]) == 0
        assert "nothing was run" in capfd.readouterr().out


def test_no_command_is_printed_where_nothing_would_measure_it():
    model = interpret(GEMMA)
    assert {g.command for g in advise(model, 2048, machine="H100", phase="decode").groups} == {""}
    sliding, full = advise(model, 131072, machine="H100", lengths="pile").groups
    assert sliding.command == full.command == ""  # the lists of documents are too long for a line
    sliding, full = advise(model, 131072, machine="H100", mask="causal_document", seed=7).groups
    assert sliding.command == "" and "--mask causal_document " in full.command
    assert "--seed 7" in full.command


def test_committed_results_give_measured_rows():
    paths = sorted(COMMITTED.glob("*cpu*.jsonl"))
    if not paths:
        pytest.skip("no results of a processor are committed")
    model = interpret({**LLAMA, "num_key_value_heads": 8})
    statuses = {o.status for path in paths for o in options(advise(model, 8192, results=path)).values()}
    assert statuses == {"measured", "modelled", "refused"}


def test_without_a_machine_this_one_is_measured(monkeypatch):
    monkeypatch.setattr(limits, "measure", functools.partial(limits.measure, size=64))
    found = advise(interpret(LLAMA), 256, machine="cpu")
    assert found.measured_rates and found.source == "measured now" and found.groups[0].best is not None
    assert "float32" in found.rates and "memory" in found.rates


def test_a_machine_may_be_given_as_a_value(laptop):
    slower = dataclasses.replace(find("H100"), limits=Limits(matrix={"bfloat16": 1e3}))
    fast, slow = (advise(interpret(LLAMA), 1024, machine=m).groups[0].best.ms for m in (find("H100"), slower))
    assert slow > 10 * fast
