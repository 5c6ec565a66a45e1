"""The report: the same numbers as the file, nothing loaded, nothing broken by what stands in a row."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import random
import re
import sys
from pathlib import Path

import pytest
import torch

from manyheads.bench import report, summary
from manyheads.bench.report import page, pictures
from manyheads.bench.row import Row
from manyheads.bench.store import Results, Store, read
from manyheads.bench.suites.patterns import resolve
from manyheads.cli import main
from manyheads.mask import as_mask
from tests.bench.report_data import HEADER, HOSTILE, Page, attention, mixed_rows, rows_of, write_results

pytest.importorskip("plotly")
COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.jsonl"))


@pytest.fixture
def mixed(tmp_path):
    """A results file with rows of every kind, and its report."""
    path = write_results(tmp_path / "run.jsonl", mixed_rows())
    return path, Page(report.write(path).read_text(encoding="utf-8"))


def test_every_number_of_the_page_is_that_of_the_file(mixed):
    path, found = mixed
    assert len(rows_of(path)) > 60
    for ours, theirs in zip(found.data["rows"], rows_of(path), strict=True):
        assert ours == {**theirs, **({"flops": str(theirs["flops"])} if theirs.get("flops", 0) > 2**53 else {})}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.name)
def test_the_committed_results_are_shown_whole_verdicts_included(path):
    expected = rows_of(path)
    found = Page(page.build(read(path))).data
    assert found["rows"] == expected
    assert sum("verdict" in row for row in expected) > 0


def test_shares_beside_a_picture_are_those_of_its_row(mixed):
    path, found = mixed
    rows = rows_of(path)
    shown = [attrs for tag, attrs in found.tags if tag == "dd" and "data-row" in attrs]
    assert len(shown) >= 8
    for attrs in shown:
        assert attrs["title"] == f"{attrs['data-field']} = {rows[int(attrs['data-row'])][attrs['data-field']]!r}"


def test_no_text_of_a_row_becomes_markup(mixed):
    _, found = mixed
    assert len(found.scripts) == 3
    assert not any(tag == "img" for tag, _ in found.tags)
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert any(row.get("note") == HOSTILE for row in found.data["rows"])
    assert "Test <CPU> & co" in found.text and HEADER["command"] in found.text


def test_only_the_scripts_of_the_page_may_run_and_nothing_is_loaded(mixed):
    _, found = mixed
    (policy,) = (attrs["content"] for tag, attrs in found.tags if tag == "meta" and "http-equiv" in attrs)
    for attrs, text in found.scripts:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert (f"'sha256-{digest}'" in policy) == ("id" not in attrs)
    assert "default-src 'none'" in policy and "http" not in policy
    addresses = [a[name] for _, a in found.tags for name in ("src", "href") if name in a]
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)


def test_every_field_of_a_row_is_explained():
    about = page.fields()
    assert set(about) == {f.name for f in dataclasses.fields(Row)}
    assert all(len(text) > 4 for text in about.values())


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("color", [*page.COLORS.values(), *page.MORE_COLORS])
@pytest.mark.parametrize("ground", page.BACKGROUNDS)
def test_every_colour_stands_out_in_light_and_in_dark(color, ground):
    light, dark = sorted((luminance(color), luminance(ground)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_thirty_providers_can_be_told_apart():
    found = page.styles([*page.COLORS, *(f"peer{i}" for i in range(26))])
    assert len({tuple(style.values()) for style in found.values()}) == 30


@pytest.mark.parametrize("text", ["causal & window(37)", "document([40, 61, 30]) & causal", "~causal", "full"])
def test_the_drawn_pairs_are_the_visible_ones(text):
    mask = as_mask(text)
    n = 131
    layout = mask.tiles(n, n, tile=(1, 1))
    drawn = torch.zeros(n, n, dtype=torch.bool)
    for x, y, w, h in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", pictures.outline(layout, [True] * 2)):
        part = drawn[int(y) : int(y) + int(h), int(x) : int(x) + int(w)]
        assert not part.any()
        part.fill_(True)
    assert torch.equal(drawn, layout.dense()[0, 0])


def test_a_picture_at_an_odd_length_ends_at_the_last_token():
    path = pictures.outline(as_mask("full").tiles(130, 70, tile=(128, 64)), [True] * 3)
    assert path == "M0 0h70v130h-70z"


def test_a_mask_that_the_seed_does_not_give_back_is_named_not_drawn():
    row = attention(random.Random(3), "causal_document", 515, "float32", "sdpa")
    drawn, missing = pictures.pictures([row])
    assert [p.name for p in drawn] == ["causal_document"] and not missing
    drawn, missing = pictures.pictures([row.replace(pairs=row.pairs + 1)])
    assert not drawn and missing[0].startswith("causal_document: ")


def test_of_a_mask_that_differs_by_head_one_head_is_drawn_and_said_so():
    mask = resolve("uniform_block_sparse(0.5,64)", 512, 5, 2)
    layout = mask.tiles(512, 512, tile=(128, 64), heads=2)
    case, shape = "uniform_block_sparse(0.5,64)-512-float32", "1x2x512x16"
    row = Row("masks", case, "sdpa", shape=shape, length=512, mask=mask.text, seed=5, pairs=layout.pairs)
    (drawn,), _ = pictures.pictures([row])
    assert (drawn.name, drawn.heads) == ("uniform_block_sparse(0.5,64)", 2)
    first = layout.spans(int(layout.index[0, 0]))
    area = sum(int(w) * int(h) for w, h in re.findall(r"h(\d+)v(\d+)", drawn.visited))
    assert area == 128 * 64 * sum(count for line in first for _, count, _ in line)
    assert "the first of 2 different heads" in Page(page.build(Results({}, [row]))).text


EDGES = {
    "nothing": [],
    "one row": [[Row("masks", "a", "sdpa", median_ms=1.0)]],
    "only refused": [[Row("masks", "a", "flex", status="refused", reason="no compiler")]],
    "no numbers": [[Row("other", "a", "b")]],
    "unknown mask": [[Row("masks", "a", "b", mask="gone($0)", length=8, shape="?x?", median_ms=1.0)]],
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("header", [{}, HEADER], ids=["bare", "full header"])
def test_files_with_little_in_them_give_a_page(tmp_path, name, header):
    path = write_results(tmp_path / "run.jsonl", EDGES[name], header)
    found = Page(report.write(path).read_text(encoding="utf-8"))
    assert len(found.data["rows"]) == sum(map(len, EDGES[name]))
    assert "Measured:" in found.text


def test_a_run_that_did_not_end_is_shown_as_far_as_it_came(tmp_path):
    store = Store(tmp_path / "run.jsonl", HEADER)
    store.case("masks", "a", [Row("masks", "a", "sdpa", median_ms=1.0)], 0.1)
    found = report.write(tmp_path / "run.jsonl")
    assert found == tmp_path / "run.html"
    seen = Page(found.read_text(encoding="utf-8"))
    assert len(seen.data["rows"]) == 1
    assert "did not end" in seen.text


def test_an_interruption_is_told(tmp_path):
    path = write_results(tmp_path / "run.jsonl", mixed_rows()[:2], notes=["interrupted after 2 of 9 cases"])
    assert "interrupted after 2 of 9 cases" in Page(report.write(path).read_text(encoding="utf-8")).text


def test_bad_places_are_named(tmp_path):
    path = write_results(tmp_path / "run.jsonl", [])
    with pytest.raises(ValueError, match="is a folder"):
        report.write(path, tmp_path)
    with pytest.raises(ValueError, match="cannot write /proc/none/x.html"):
        report.write(path, "/proc/none/x.html")
    with pytest.raises(ValueError, match="cannot read"):
        report.write(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="need the name"):
        report.write(Results({}))


def test_ten_lines_say_what_the_committed_run_came_to():
    timed = [path for path in COMMITTED if "-cpu-" in path.name][-1]
    found = summary.lines(read(timed))
    assert 8 <= len(found) <= 10
    rows = read(timed).rows
    met = sum(row.verdict == "met" for row in rows)
    assert f"Targets: {met} of {sum(row.verdict is not None for row in rows)} " in "\n".join(found)
    assert max(map(len, found)) < 240


def test_the_summary_names_what_is_wrong_and_what_was_left_out():
    rows = [row for case in mixed_rows() for row in case]
    said = "\n".join(summary.lines(Results(HEADER, rows, notes=["interrupted after 3 of 9 cases"])))
    assert "Wrong: 1 of " in said and "(flex)" in said
    for words in ("1 timing scattered", "1 row refused", "1 failed", "interrupted after 3 of 9", "1 could not be"):
        assert words in said


def test_models_and_claims_have_sentences_of_their_own():
    trained = {"phase": "train", "score_unit": "bits a byte", "better": "lower", "task": "bytes"}
    rows = [Row("quality", f"{name}-{s}", name, score=s, **trained) for name, s in (("rat", 2.5), ("rnn", 2.75))]
    claim = Row("quality", "claims", "rat", task="bytes", bar="rat is ahead", target=">= 0.01", measured=0.25)
    said = "\n".join(summary.lines(Results({}, [*rows, claim.replace(verdict="met")])))
    assert "Measured: 2 trained models in 2 cases." in said and "no speed-up" not in said
    assert "the best is rat in bytes" in said and "Targets" not in said
    assert "of 1 claim from papers, 1 held" in said


def test_a_noisy_timing_is_neither_best_nor_worst():
    quiet = Row("masks", "a", "manyheads", median_ms=1.0, gate="green", ratio=2.0, baseline="sdpa")
    other = quiet.replace(case="b", ratio=1.5)
    loud = quiet.replace(case="c", ratio=90.0, noisy=True)
    assert "Best: 2.00x as fast as sdpa" in "\n".join(summary.lines(Results({}, [quiet, other, loud])))


TINY = ("bench", "--suite", "masks", "--quick", "--length", "40", "--budget", "0", "--dtype", "float32", "--mask")


@pytest.fixture
def shell(capfd, monkeypatch, tmp_path):
    """Runs a command in an empty folder: status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(list(arguments))
        return status, *capfd.readouterr()

    return run


def test_a_bench_ends_with_the_summary_and_the_report(shell, tmp_path):
    status, out, _ = shell(*TINY, "causal", "--out", "run.jsonl")
    assert status == 0
    assert "In short:\n  Measured: 3 timings in 1 case" in out
    assert out.endswith("report: run.html\n")
    assert Page((tmp_path / "run.html").read_text()).data["rows"] == rows_of(tmp_path / "run.jsonl")


def test_a_bench_without_plotly_says_what_to_install_and_succeeds(shell, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    status, out, _ = shell(*TINY, "causal", "--out", "run.jsonl")
    assert status == 0
    assert "no report: " in out and "bench" in out.partition("no report: ")[2]
    assert out.endswith("write it later with: manyheads report run.jsonl\n")
    assert not (tmp_path / "run.html").exists()


def test_a_bench_can_leave_the_report_out(shell, tmp_path):
    status, out, _ = shell(*TINY, "causal", "--out", "run.jsonl", "--no-report")
    assert status == 0 and "In short:" in out and "report" not in out
    assert not (tmp_path / "run.html").exists()


def test_the_command_writes_where_it_is_told(shell, tmp_path):
    write_results(tmp_path / "run.jsonl", mixed_rows()[:1])
    assert shell("report", "run.jsonl")[:2] == (0, "run.html\n")
    assert shell("report", "run.jsonl", "--out", "deep/other.html")[:2] == (0, "deep/other.html\n")
    status, _, err = shell("report", "none.jsonl")
    assert status == 2 and err.startswith("error: results: cannot read none.jsonl")
