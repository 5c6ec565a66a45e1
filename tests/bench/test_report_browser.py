"""The report in a real browser: tables and plots work, on a screen, a phone and paper, without a network."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from manyheads.bench import report
from tests.bench.report_data import HOSTILE, mixed_rows, rows_of, write_results

pytest.importorskip("plotly")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

WHERE = os.pathsep.join([os.environ.get("PATH", ""), "/usr/bin", "/usr/local/bin"])
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, (shutil.which(name, path=WHERE) for name in NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-20-cpu-intel-amx.jsonl"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
CELLS = """() => [...document.querySelectorAll('td[data-field]')].map(cell =>
    [Number(cell.closest('tr').dataset.row), cell.dataset.field, cell.title, cell.textContent])"""
POINTS = """id => [...document.querySelectorAll(`#${id} .plot`)].flatMap(plot => plot._fullData
    .filter(trace => trace.customdata)
    .flatMap(trace => Array.from(trace.customdata, (row, i) => [row, trace.x[i], trace.y[i]])))"""


TOO_WIDE = """() => [...document.querySelectorAll('.plot')].filter(plot =>
    plot.querySelector('.main-svg').clientWidth > plot.clientWidth + 1).map(plot => plot.ariaLabel)"""


@pytest.fixture(scope="module")
def browser():
    """One headless browser for all tests."""
    options = {"executable_path": BROWSER, "args": ["--no-sandbox"]}
    with playwright.sync_playwright() as running, closing(running.chromium.launch(**options)) as found:
        yield found


@contextmanager
def opened(browser, page_file, address="", **options):
    """The report in a fresh window; at its end the browser must not have complained or asked for anything."""
    complaints, asked = [], []
    with closing(browser.new_context(offline=True, **options)) as context:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.add_init_script("navigator.clipboard.writeText = async text => { window.copied = text }")
        page.goto(f"{page_file.as_uri()}{address}")
        page.wait_for_selector("html[data-ready]", state="attached")
        yield page
    assert not complaints
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The report of the committed results."""
    return report.write(RESULTS, tmp_path_factory.mktemp("report") / "run.html")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A file with rows of every kind, and its report."""
    path = write_results(tmp_path_factory.mktemp("mixed") / "run.jsonl", mixed_rows())
    return path, report.write(path)


def values(page, field):
    """A column as numbers, blanks left out."""
    texts = [title for _, name, title, _ in page.evaluate(CELLS) if name == field]
    return [float(text.partition(" = ")[2]) for text in texts if text]


def is_wide(page):
    """Whether the page as a whole must be scrolled sideways."""
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_on_a_screen_everything_works(browser, page_file, tmp_path):
    rows = rows_of(RESULTS)
    with opened(browser, page_file, viewport={"width": 1280, "height": 900}, color_scheme="light") as page:
        page.screenshot(path=tmp_path / "light.png", full_page=True)
        assert not is_wide(page)
        assert page.evaluate(TOO_WIDE) == []

        shown = page.evaluate(CELLS)
        assert len({row for row, *_ in shown}) == len(rows)
        for row, field, title, text in shown:
            if title.startswith(f"{field} = ") and isinstance(rows[row].get(field), int | float):
                assert float(title.partition(" = ")[2]) == rows[row][field]
                assert_rounded(text, rows[row][field])
            elif title.startswith(f"{field} = "):
                assert title == f"{field} = {rows[row][field]}"

        for id, xs, ys in (
            ("lengths", lambda r: r["length"], lambda r: r["median_ms"]),
            ("errors", lambda r: r["error"] / r["error_limit"], lambda r: r["gflops"]),
            ("limits", None, lambda r: r["gflops"]),
        ):
            points = page.evaluate(POINTS, id)
            assert len(points) >= 50
            for row, x, y in points:
                assert y == ys(rows[row]) and (xs is None or x == xs(rows[row]))
        assert {row for row, *_ in page.evaluate(POINTS, "limits")} == {
            i for i, r in enumerate(rows) if "of_copy_rate" in r and "gflops" in r
        }
        assert page.locator("#more .plot .point").count() == sum(
            f in r for r in rows for f in ("peak_mib", "rate", "overhead_us")
        )

        heading = page.locator("#table th[data-field=median_ms]")
        for order, times in (("ascending", sorted), ("descending", lambda found: sorted(found, reverse=True))):
            heading.locator("button").click()
            assert heading.get_attribute("aria-sort") == order
            assert values(page, "median_ms") == times(r["median_ms"] for r in rows if "median_ms" in r)

        page.locator("#filter-provider").select_option("flex")
        page.locator("#filter-dtype").select_option("bfloat16")
        page.locator("#filter-q").fill("sliding_window")
        expected = [
            r["median_ms"]
            for r in rows
            if r["provider"] == "flex" and r.get("dtype") == "bfloat16" and "sliding_window" in r["case"]
        ]
        assert values(page, "median_ms") == sorted(expected, reverse=True)
        assert page.locator("#rows-count").inner_text().startswith(f"{len(expected)} of ")
        for part in ("provider=flex", "dtype=bfloat16", "q=sliding_window", "sort=median_ms%3Adesc"):
            assert part in page.evaluate("location.hash")

        page.locator("#copy-csv").click()
        copied = list(csv.DictReader(io.StringIO(page.evaluate("window.copied"))))
        assert [float(line["median_ms"]) for line in copied] == sorted(expected, reverse=True)

        page.locator("#table tbody tr").first.press("Enter")
        assert float(page.locator("#row-body dd[data-field=median_ms]").inner_text()) == max(expected)
        page.keyboard.press("Escape")
        assert not page.locator("#row-dialog").is_visible()

        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 29)"
        page.screenshot(path=tmp_path / "dark.png")


def assert_rounded(text, value):
    """What stands in a cell is the number, rounded for reading, with its unit."""
    if text == "baseline":
        return
    read, unit = re.fullmatch(r"([-+]?[\d,.]+(?:e[-+]\d+)?)(.*)", text).groups()
    share = 100 if unit == "%" else 1
    assert float(read.replace(",", "")) / share == pytest.approx(value, rel=0.006, abs=0.006 if unit == "%" else 1e-12)


def test_on_a_phone_nothing_is_wider_than_the_screen(browser, mixed, tmp_path):
    _, page_file = mixed
    with opened(browser, page_file, **PHONE) as page:
        page.screenshot(path=tmp_path / "phone.png", full_page=True)
        assert not is_wide(page)
        widths = page.evaluate("[...document.querySelectorAll('.plot .main-svg')].map(svg => svg.clientWidth)")
        assert len(widths) >= 6 and max(widths) <= 390
        page.locator("#targets summary").first.click()
        page.locator("#table tbody tr").first.click()
        assert page.locator("#row-dialog").is_visible()
        assert not is_wide(page)


def test_on_paper_there_is_text_and_no_controls(browser, mixed, tmp_path):
    _, page_file = mixed
    with opened(browser, page_file, viewport={"width": 1280, "height": 900}, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()
        assert not page.locator("#rows-controls").is_visible()
        assert page.locator("#summary .terms").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("#lengths .plot .main-svg").first.evaluate("svg => svg.clientWidth") < 400
        page.screenshot(path=tmp_path / "print.png")
        assert page.pdf(path=tmp_path / "print.pdf", format="A4").startswith(b"%PDF")
        page.emulate_media(media="screen")
        assert page.locator("nav").is_visible() and not page.locator("#summary .terms").is_visible()


def test_what_stands_in_a_row_is_shown_and_never_run(browser, mixed, tmp_path):
    path, page_file = mixed
    rows = rows_of(path)
    with opened(browser, page_file, "#rows?rows=all&gate=red&cols=ratio,provider,remark") as page:
        (red,) = [i for i, r in enumerate(rows) if r.get("gate") == "red"]
        assert page.locator("#table tbody tr").count() == 1
        assert page.locator("#table thead th").all_inner_texts() == ["speed-up", "provider", "remark"]
        assert page.locator("#table td[data-field=ratio]").inner_text() == ""
        assert HOSTILE in page.locator("#table td[data-field=remark]").inner_text()
        page.locator("#table tbody tr").click()
        assert page.locator("#row-body dd[data-field=note]").inner_text() == HOSTILE
        page.keyboard.press("Escape")
        assert HOSTILE in page.locator("#refused-body").inner_text()
        assert "out of luck" in page.locator("#refused-body").inner_text()
        assert page.locator("#targets-body details summary").inner_text().startswith("speed of <b>")
        assert {row for row, *_ in page.evaluate(POINTS, "errors")} >= {red}
        trained = page.evaluate(POINTS, "quality")
        assert {row for row, *_ in trained} == {i for i, r in enumerate(rows) if "score" in r}
        assert {rows[row]["score"] for row, *_ in trained} <= {x for _, x, _ in trained}
        assert {value for r in rows for value in r.get("curve", ())} <= {y for *_, y in trained}
        assert HOSTILE in page.locator("#quality-body").inner_text()
        page.locator("#lengths select").nth(1).select_option("ratio")
        assert red not in {row for row, *_ in page.evaluate(POINTS, "lengths")}
        page.locator("#lengths [data-legend] button", has_text="sdpa").click()
        left = {rows[row]["provider"] for row, *_ in page.evaluate(POINTS, "lengths")}
        assert left and "sdpa" not in left
        page.locator("#reset").click()
        assert page.locator("#table tbody tr").count() == sum("bar" not in r for r in rows)
        page.screenshot(path=tmp_path / "mixed.png", full_page=True)


@pytest.mark.parametrize("kind", ["refused", *(pytest.param(k, marks=pytest.mark.slow) for k in ("nothing", "many"))])
def test_extreme_files_are_shown_without_complaint(browser, tmp_path, kind):
    refused = [row for case in mixed_rows() for row in case if row.status != "measured"]
    many = [
        [row.replace(case=f"{row.case}-{i}") for row in case] for i in range(40) for case in mixed_rows(i)
    ]
    cases = {"nothing": [], "refused": [refused], "many": many}[kind]
    path = write_results(tmp_path / "run.jsonl", cases)
    with opened(browser, report.write(path)) as page:
        rows = rows_of(path)
        counted = f"{sum('bar' not in r for r in rows):,} of {len(rows):,} rows"
        assert page.locator("#rows-count").inner_text() == (counted if rows else "The file has no rows.")
        assert page.locator("#table tbody tr").count() <= 400
        if kind == "many":
            page.get_by_role("button", name="Show all").click()
            assert page.locator("#table tbody tr").count() > 2000
        else:
            assert page.locator(".plot").count() == 0
            assert page.locator("section .empty").count() >= 4
        page.screenshot(path=tmp_path / f"{kind}.png")
