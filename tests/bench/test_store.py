"""A results file is written whole or kept in part, and read back as it was."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from manyheads.bench.row import Row
from manyheads.bench.store import Store, read, resumable

HEADER = {"environment": {"torch": "2"}, "options": {"seed": 1}, "command": "manyheads bench"}


def row(case, provider="manyheads"):
    return Row("masks", case, provider, median_ms=1.0)


def test_the_final_name_appears_only_when_the_run_is_over(tmp_path):
    out = tmp_path / "new" / "run.jsonl"
    store = Store(out, HEADER)
    store.case("masks", "a", [row("a"), row("a", "sdpa")], 0.5)
    assert not out.exists()
    assert len(read(store.partial).rows) == 2
    assert store.close() == out
    assert [p.name for p in out.parent.iterdir()] == ["run.jsonl"]
    found = read(out)
    assert found.rows == [row("a"), row("a", "sdpa")]
    assert found.header["environment"] == {"torch": "2"}


def test_an_earlier_result_stays_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "run.jsonl"
    Store(out, HEADER).close()
    before = out.read_text()
    store = Store(out, {**HEADER, "command": "again"})
    assert out.read_text() == before
    store.close()
    assert read(out).header["command"] == "again"


def test_what_a_crash_leaves_is_read_up_to_the_last_whole_case(tmp_path):
    store = Store(tmp_path / "run.jsonl", HEADER)
    store.case("masks", "a", [row("a")], 0.1)
    with open(store.partial, "a") as file:
        file.write(row("b").to_json() + "\n" + row("b", "sdpa").to_json()[:40])
    found = read(store.partial)
    assert found.rows == [row("a")]
    assert found.finished == {("masks", "a")}


def test_resuming_writes_the_earlier_rows_again_and_goes_on(tmp_path):
    out = tmp_path / "run.jsonl"
    store = Store(out, HEADER)
    store.case("masks", "a", [row("a")], 0.1)
    store.case("masks", "b", [row("b")], 0.1)
    again = Store(out, HEADER, earlier=resumable(out, HEADER))
    again.case("masks", "c", [row("c")], 0.1)
    again.close()
    assert [r.case for r in read(out).rows] == ["a", "b", "c"]


def test_what_failed_is_measured_again(tmp_path):
    store = Store(tmp_path / "run.jsonl", HEADER)
    store.case("masks", "a", [row("a"), Row("masks", "a", "sdpa", status="failed", reason="no luck")], 0.1)
    store.case("masks", "b", [row("b"), Row("masks", "b", "flex", status="refused", reason="no compiler")], 0.1)
    store.case("targets", "c", [Row("targets", "c", "manyheads", verdict="not measured")], 0.1)
    store.close()
    found = resumable(tmp_path / "run.jsonl", HEADER)
    assert found.finished == {("masks", "b")}
    assert {r.case for r in found.rows} == {"b"}


def test_there_may_be_nothing_to_resume(tmp_path):
    assert resumable(tmp_path / "none.jsonl", HEADER) is None


@pytest.mark.parametrize("part", ["environment", "options"])
def test_rows_of_another_machine_or_question_are_not_mixed(tmp_path, part):
    out = tmp_path / "run.jsonl"
    Store(out, HEADER).close()
    other = {**HEADER, part: {**HEADER[part], "threads": 64}}
    with pytest.raises(ValueError, match=f"another {part} \\(threads"):
        resumable(out, other)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        Store(tmp_path, HEADER)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*run.jsonl: Not a directory|File exists"):
        Store(tmp_path / "file" / "run.jsonl", HEADER)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_is_a_clear_error(tmp_path):
    store = Store(tmp_path / "run.jsonl", HEADER)
    healthy, store._file = store._file, open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(ValueError, match="No space left on device; it keeps the rows so far"):
        store.case("masks", "a", [row("a")], 0.1)
    with contextlib.suppress(OSError):
        store._file.close()
    store._file = healthy
    store.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no header"),
        ('{"kind": "row"}\n', "no header"),
        ('{"kind": "header", "schema": 99}\n', "schema 99"),
        ('{"kind": "header"}\nrubbish\n{"kind": "note", "text": ""}\n', "line 2 is not JSON"),
        ('{"kind": "header"}\n[1]\n', "line 2 has no kind"),
    ],
)
def test_a_file_of_another_kind_is_an_error(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        read(tmp_path / "none.jsonl")


def test_every_line_is_json(tmp_path):
    store = Store(tmp_path / "run.jsonl", HEADER)
    store.case("masks", "a", [row("a")], 0.1)
    store.note("interrupted")
    kinds = [json.loads(line)["kind"] for line in store.close().read_text().splitlines()]
    assert kinds == ["header", "row", "case", "note"]
