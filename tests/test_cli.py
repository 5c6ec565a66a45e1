"""The command line: what it prints, and that bad input is one clear error with status 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from manyheads.bench.store import Store, read
from manyheads.cli import main

TINY = ("bench", "--suite", "masks", "--quick", "--length", "64", "--budget", "0", "--dtype", "float32")


@pytest.fixture
def shell(capfd, monkeypatch, tmp_path):
    """Runs a command in an empty folder: status, what it printed, what it complained about."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--suite", "maks"), "unknown suite 'maks': did you mean 'masks'?"),
        (("bench", "--provider", "spda"), "unknown provider 'spda': did you mean 'sdpa'?"),
        (("bench", "--suite", "masks", "--mask", "casual"), "unknown mask 'casual': did you mean 'causal'?"),
        (("bench", "--suite", "masks", "--mask", "causal & windw(3)"), "did you mean 'window'?"),
        (("bench", "--dtype", "bfloat61"), "unknown dtype 'bfloat61': did you mean 'bfloat16'?"),
        (("bench", "--suite", "overhead", "--provider", "flex"), "nothing to run"),
        (("bench", "--quick", "--full"), "--quick and --full exclude each other"),
        (("bench", "--resume"), "name the file to continue with --out"),
        (("bench", "--suite", "masks", "--input", "none.safetensors"), "there is no file none.safetensors"),
        ((*TINY, "--out", "/proc/none/x.jsonl"), "cannot write /proc/none/x.jsonl"),
        ((*TINY, "--out", "."), "is a folder"),
        (("bench", "--length", "0"), "--length"),
        (("bench", "--case", "causl-1024-float32"), "did you mean 'causal-1024-float32'?"),
        (("bench", "--phase", "bakward"), "unknown phase 'bakward': did you mean 'backward'?"),
        (("bench", "--heads", "8:3"), "heads: expected 8, or 8:2"),
        (("bench", "--cache", "cool"), "unknown cache 'cool': did you mean 'cold'?"),
        (("bench", "--threads", "0"), "threads: expected 'all' or a number from 1 to"),
        (("bench", "--device", "gpu"), "unknown device 'gpu'"),
        (("bench", "--fail-on-slower", "5"), "name the file to compare with as --against"),
        ((*TINY, "--against", "none.jsonl"), "cannot read none.jsonl"),
        (("compare", "a.jsonl", "b.jsonl"), "cannot read a.jsonl"),
        (("bench", "--wings"), "--wings"),
        (("fly",), "fly"),
        (("list", "--state", "worky"), "unknown state 'worky': did you mean 'works'?"),
        (("show", "causal & windw(3)"), "did you mean 'window'?"),
        (("show", "window(-1)"), "window"),
        (("show", "document([3, 4])", "-n", "9"), "document is for 7 keys, the call has 9"),
        (("show", "causal", "--tile", "3"), "tile: expected 2 positive numbers as 128x128, got '3'"),
        (("show", "causal", "-n", "100000", "--tile", "8x8"), "do not fit"),
        (("show", "causal", "--png", "no/folder/x.png"), "cannot write no/folder/x.png"),
        (("explain", "1x8x64"), "query: expected 4 positive numbers as 1x8x4096x64, got '1x8x64'"),
        (("explain", "1x8x64x16", "--kv", "1x3x64x16"), "8"),
        (("explain", "1x8x64x16", "--backend", "blockd"), "unknown backend 'blockd': did you mean 'blocked'?"),
        (("explain", "1x8x64x16", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("explain", "1x8x64x16", "--backend", "sdpa", "--mask", "window(3)"), "mask"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error_and_status_2(shell, arguments, message):
    status, out, err = shell(*arguments)
    assert status == 2
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in err


def test_a_bench_writes_rows_and_prints_where_they_are(shell, tmp_path):
    status, out, err = shell(*TINY, "--mask", "causal", "--out", "deep/run.jsonl")
    assert status == 0
    found = read(tmp_path / "deep" / "run.jsonl")
    assert {r.provider for r in found.rows} == {"manyheads", "sdpa", "reference"}
    assert found.header["environment"]["torch"] == torch.__version__
    assert found.header["environment"]["cpu_vendor"]
    assert found.header["limits"]["matrix"]["float32"] > 0
    assert found.header["command"].startswith("manyheads bench --suite masks")
    for word in ("machine: ", "limits: ", "provider", "causal-64-float32", "3 rows: deep/run.jsonl"):
        assert word in out
    assert "[1/1] masks/causal-64-float32" in err


def test_results_go_to_a_file_of_their_own_by_default(shell, tmp_path):
    assert shell(*TINY, "--mask", "full", "--provider", "sdpa")[0] == 0
    (path,) = (tmp_path / "reports").glob("bench-*.jsonl")
    assert len(read(path).rows) == 1


def test_short_names_of_dtypes_are_understood(shell, tmp_path):
    arguments = [*TINY[:-1], "bf16"]
    assert shell(*arguments, "--mask", "full", "--provider", "sdpa", "--out", "x.jsonl")[0] == 0
    assert [r.dtype for r in read(tmp_path / "x.jsonl").rows] == ["bfloat16"]


def test_a_dry_run_says_what_would_run_and_writes_nothing(shell, tmp_path):
    status, out, _ = shell("bench", "--dry-run")
    assert status == 0
    for suite in ("masks/", "layouts/", "overhead/", "packing/", "targets/"):
        assert suite in out
    assert "minutes; nothing was run" in out
    assert list(tmp_path.iterdir()) == []


def test_resuming_measures_only_what_is_missing(shell, tmp_path):
    masks = ("--mask", "causal", "--mask", "full", "--provider", "sdpa")
    arguments = (*TINY, *masks, "--out", "x.jsonl")
    assert shell(*arguments)[0] == 0
    whole = read(tmp_path / "x.jsonl")
    cut = Store(tmp_path / "x.jsonl", whole.header)
    cut.case("masks", "causal-64-float32", [whole.rows[0]], 0.1)
    cut.close()
    status, _, err = shell(*arguments, "--resume")
    assert status == 0
    assert "causal-64" not in err and "full-64" in err
    again = read(tmp_path / "x.jsonl")
    assert again.rows[0] == whole.rows[0]
    assert [r.case for r in again.rows] == [r.case for r in whole.rows]


def test_resuming_with_the_newer_options_measures_nothing_twice(shell, tmp_path):
    arguments = (*TINY, "--mask", "full", "--provider", "sdpa", "--heads", "4:2", "--cache", "cold", "--out", "x.jsonl")
    assert shell(*arguments)[0] == 0
    status, out, _ = shell(*arguments, "--resume", "--dry-run")
    assert status == 0 and "0 cases, 1 are measured already" in out
    status, _, err = shell(*arguments, "--resume")
    assert status == 0 and "full-64" not in err
    (row,) = read(tmp_path / "x.jsonl").rows
    assert (row.layout, row.cache) == ("gqa 4:2", "cold")


def test_threads_are_in_every_row(shell, tmp_path):
    before = torch.get_num_threads()
    try:
        status, out, _ = shell(*TINY, "--mask", "full", "--provider", "sdpa", "--threads", "1", "--out", "x.jsonl")
        assert status == 0 and "1 thread" in out
        shell(*TINY, "--mask", "full", "--provider", "sdpa", "--threads", "all", "--out", "y.jsonl")
        assert read(tmp_path / "x.jsonl").rows[0].threads == 1
        assert read(tmp_path / "y.jsonl").rows[0].threads == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_a_run_is_compared_with_an_earlier_one(shell, tmp_path):
    arguments = (*TINY, "--mask", "full", "--provider", "sdpa")
    assert shell(*arguments, "--out", "old.jsonl")[0] == 0
    whole = read(tmp_path / "old.jsonl")
    (row,) = whole.rows
    for name, scale in (("slow", 1e3), ("fast", 1e-3)):
        changed = row.replace(**{each: getattr(row, each) * scale for each in ("median_ms", "p20_ms", "p80_ms")})
        store = Store(tmp_path / f"{name}.jsonl", whole.header)
        store.case("masks", row.case, [changed.replace(provider="manyheads")], 0.1)
        store.close()
    status, out, _ = shell("compare", "fast.jsonl", "slow.jsonl", "--fail-on-slower", "5")
    assert status == 1 and "1 slower" in out and "failed: something of ours is slower" in out
    assert shell("compare", "slow.jsonl", "fast.jsonl", "--fail-on-slower", "5")[0] == 0
    status, out, _ = shell(*TINY, "--mask", "full", "--out", "new.jsonl", "--against", "fast.jsonl",
                           "--fail-on-slower", "5", "--no-report")  # fmt: skip
    assert status == 1 and "against fast.jsonl:" in out and "appeared: 2" in out


def test_another_question_does_not_continue_the_same_file(shell):
    arguments = (*TINY, "--mask", "full", "--provider", "sdpa", "--out", "x.jsonl")
    assert shell(*arguments)[0] == 0
    status, _, err = shell(*arguments, "--seed", "7", "--resume")
    assert status == 2
    assert "measured with another options (seed: 42 there, 7 here)" in err


def test_a_truncated_capture_is_a_clear_error(shell, tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    status, _, err = shell("bench", "--suite", "masks", "--input", "c.safetensors")
    assert status == 2
    assert "c.safetensors is truncated" in err


def test_control_c_keeps_the_rows_that_are_there(tmp_path):
    out = tmp_path / "run.jsonl"
    arguments = [*TINY, "--length", "2048", "--length", "4096", "--out", str(out)]
    code = "import sys; from manyheads.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[1/"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, complaints = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in complaints
    assert "interrupted: the rows measured so far are kept" in printed
    found = read(out)
    assert found.rows and "interrupted after" in found.notes[0]
    assert not out.with_name("run.jsonl.partial").exists()


def test_the_catalogue_as_text_and_as_json(shell):
    status, out, _ = shell("list")
    assert status == 0 and "159 systems" in out
    status, out, _ = shell("list", "--json")
    entries = json.loads(out)
    assert len(entries) == 159
    assert set(entries[0]) >= {"slug", "title", "state", "object", "evidence", "missing"}
    for entry in entries:
        held = {int(n) for n in entry["evidence"]}
        assert held | set(entry["missing"]) == set(range(1, len(entry["checks"]) + 1))
    status, out, _ = shell("list", "--state", "planned")
    assert status == 0 and "0 work" in out


def test_the_doctor_says_what_is_here(shell):
    status, out, _ = shell("doctor")
    assert status == 0
    for word in ("torch ", "threads", "compiler:", "products (chosen by measurement)", "scores in float32", "extras:"):
        assert word in out


def test_a_mask_is_drawn_with_its_tiles(shell, tmp_path):
    status, out, _ = shell("show", "causal & window(2)", "-n", "4")
    assert status == 0
    assert "█ █ · ·" in out and "tiles of 128 x 128: 100.00% visited, 43.75% of the pairs visible" in out


def test_a_mask_is_drawn_as_a_picture(shell, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, _ = shell("show", "causal", "-n", "256", "--tile", "32x64", "--png", "mask.png")
    assert status == 0
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_explaining_a_call_allocates_none_of_it(shell):
    status, out, _ = shell("explain", "4x64x1048576x128", "--kv", "4x8x1048576x128", "--mask", "causal & window(512)")
    assert status == 0
    assert "blocked: taken" in out and "sdpa: refused" in out


def test_version_and_help(shell):
    assert shell("--version")[1].strip()
    status, out, _ = shell()
    assert status == 0 and "bench" in out
    assert "--quick" in shell("bench", "--help")[1]


def test_without_the_extra_the_command_says_what_to_install():
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "from manyheads.cli import main\n"
        "sys.exit(main(['list']))"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'manyheads[bench]'" in done.stderr and "Traceback" not in done.stderr


def test_without_the_extra_for_models_capturing_says_what_to_install(shell, monkeypatch, tmp_path):
    (tmp_path / "t.txt").write_text("words")
    monkeypatch.setattr("manyheads.cli.look.importlib.util.find_spec", lambda name: None)
    status, _, err = shell("capture", "model", "t.txt")
    assert status == 2 and "pip install 'manyheads[hf]'" in err


def test_a_model_or_text_that_is_not_there_is_an_error(shell, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, _, err = shell("capture", "no-such-model", "none.txt")
    assert status == 2 and "cannot read none.txt" in err
    (tmp_path / "t.txt").write_text("words")
    status, _, err = shell("capture", "./no-such-model", "t.txt")
    assert status == 2 and "cannot load ./no-such-model" in err


def test_a_captured_model_can_be_measured(shell, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    (tmp_path / "t.txt").write_text("a b c " * 20)
    status, out, _ = shell("capture", folder, "t.txt", "--out", "c.safetensors", "--tokens", "48")
    assert status == 0 and "48 tokens: c.safetensors" in out
    status, out, _ = shell(
        *TINY[:4], "--budget", "0", "--dtype", "float32", "--mask", "causal", "--input", "c.safetensors", "--out", "x"
    )
    assert status == 0
    assert {r.shape for r in read(tmp_path / "x").rows} == {"1x2x48x8"}
