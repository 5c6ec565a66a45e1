"""Writes what is generated: the tables of the README, the gallery, and the reference from the docstrings.

Run it with ``make docs``. A test fails when the committed files differ from what this writes.
"""

from __future__ import annotations

import inspect
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs")]

import parallel_tables  # noqa: E402
import sparse_tables  # noqa: E402
from gallery import page  # noqa: E402

import manyheads  # noqa: E402
from manyheads import catalog, model, nn, parallel, spec, testing  # noqa: E402
from manyheads.bench import store  # noqa: E402
from manyheads.bench.planning import fit  # noqa: E402
from manyheads.common import features as features_  # noqa: E402
from manyheads.common import kmeans, rope  # noqa: E402
from manyheads.engine import gather, scan, solve  # noqa: E402
from manyheads.mechanism import linear, regression, select  # noqa: E402

BEGIN, END = "<!-- generated: features -->", "<!-- end of generated -->"
BEGIN_ERRORS = "<!-- generated: errors of the model -->"
BEGIN_QUALITY = "<!-- generated: quality -->"
NOTE = "<!-- Written by docs/build.py from docstrings and declarations; run `make docs`. -->"
COLUMNS = (
    ("self", ("noncausal_self",)),
    ("causal", ("causal_self",)),
    ("cross", ("noncausal_cross",)),
    ("any mask", ("mask",)),
    ("GQA", ("gqa",)),
    ("lse", ("lse",)),
    ("backward", ("backward",)),
    ("decode", ("decode",)),
    ("many devices", ("context_parallel",)),
)


def features() -> str:
    """The table of mechanisms and what each declares, and the state of the catalogue."""
    names = [name for name, _ in COLUMNS]
    lines = [f"| mechanism | backends | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2)]
    for slug, found in sorted(spec.registry().items()):
        marks = ["yes" if all(map(found.declares, wanted)) else "" for _, wanted in COLUMNS]
        lines.append(f"| `{slug}` | {', '.join(found.backends)} | {' | '.join(marks)} |")
    entries = catalog.entries()
    works = [e.slug for e in entries if e.state == "works"]
    listed = ", ".join(f"`{slug}`" for slug in works) or "none yet"
    return "\n".join(lines) + (
        f"\n\nOf the {len(entries)} systems of the catalogue (`manyheads list`), {len(works)} work, "
        f"each of their\nchecks held by a test: {listed}."
    )


def readme() -> str:
    """The README with its generated part renewed."""
    return _renewed("README.md", BEGIN, features())


def advice() -> str:
    """The page on advice with its table of prediction errors renewed."""
    return _renewed("docs/advise.md", BEGIN_ERRORS, errors())


def errors() -> str:
    """How far the cost model is off on the committed results, each row predicted without rows of its own mask."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        results = store.read(path)
        checks = fit.validate(results)
        if not checks:
            continue
        inside = sum(c.low_ms <= (c.row.median_ms or 0.0) <= c.high_ms for c in checks) / len(checks)
        lines = [f"`{path.name}`, {len(checks)} rows; {inside:.0%} of the times lie in the predicted range:\n"]
        lines += ["| provider, dtype, phase | rows | median | worst of ten | worst |", "|---|---|---|---|---|"]
        lines += [f"| {what} | {n} | {a:.2f} | {b:.2f} | {c:.2f} |" for what, n, a, b, c in fit.error_table(checks)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def quality() -> str:
    """The page on quality with its tables of scores and claims renewed."""
    return _renewed("docs/quality.md", BEGIN_QUALITY, scores())


def scores() -> str:
    """Scores by task and mechanism of the newest committed run of the suite, and what became of the claims."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*-quality-quick.jsonl"))
    if not files:
        return "No run is committed."
    results = store.read(files[-1])
    trained = [row for row in results.rows if row.phase == "train" and row.score is not None]
    env = results.header.get("environment", {})
    lines = [f"`{files[-1].name}`, on {env.get('cpu_model', 'a CPU')} with torch {env.get('torch')}.\n"]
    lines += ["| task | mechanism | mean | range of seeds | chance | parameters |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys((row.task, row.provider) for row in trained):
        some = [row for row in trained if (row.task, row.provider) == key]
        found, one = [row.score or 0.0 for row in some], some[0]
        lines.append(
            f"| {one.task}, {one.score_unit} | {one.provider} | {statistics.fmean(found):.3f} "
            f"| {min(found):.3f} to {max(found):.3f} | {one.chance:.3g} | {one.parameters:,} |"
        )
    lines += ["", "| claim | smallest lead | |", "|---|---|---|"]
    for row in results.rows:
        if row.bar is not None:
            lead = "" if row.measured is None else f"{row.measured:+.3f}"
            lines.append(f"| {row.bar.removeprefix('quality, ')} | {lead} | {row.verdict} |")
    return "\n".join(lines)


def many_devices() -> str:
    """The page on many devices with its tables renewed."""
    text = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    tables = {
        "balance": parallel_tables.balance(),
        "simulated": parallel_tables.simulated(),
        "measured": parallel_tables.measured(results),
    }
    for name, made in tables.items():
        text = _between(text, f"<!-- generated: {name} -->", made)
    return text


def sparse_page() -> str:
    """The page on sparse attention with its measured plane renewed."""
    made = sparse_tables.measured(ROOT / "benchmarks" / "results")
    return _renewed("docs/sparse.md", "<!-- generated: plane -->", made)


def _renewed(name: str, begin: str, made: str) -> str:
    """A file with what stands between two marks replaced."""
    return _between((ROOT / name).read_text(encoding="utf-8"), begin, made)


def _between(text: str, begin: str, made: str) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{made}\n{END}{after}"


def gallery() -> str:
    """What works with examples and pictures, and what is planned."""
    return page(NOTE)


def reference() -> str:
    """Everything public, from its docstring."""
    parts = ["# Reference", NOTE]
    for title, module, names in (
        ("manyheads", manyheads, manyheads.__all__),
        ("manyheads.nn", nn, nn.__all__),
        ("manyheads.mechanism.linear", linear, linear.__all__),
        ("manyheads.mechanism.regression", regression, regression.__all__),
        ("manyheads.mechanism.select", select, select.__all__),
        ("manyheads.engine.gather", gather, ["gather", "refuse"]),
        ("manyheads.engine.scan", scan, scan.__all__),
        ("manyheads.engine.solve", solve, solve.__all__),
        ("manyheads.parallel", parallel, parallel.__all__),
        ("manyheads.model", model, model.__all__),
        ("manyheads.common.features", features_, _defined(features_)),
        ("manyheads.common.kmeans", kmeans, _defined(kmeans)),
        ("manyheads.common.rope", rope, _defined(rope)),
        ("manyheads.spec", spec, _defined(spec)),
        ("manyheads.catalog", catalog, catalog.__all__),
        ("manyheads.testing", testing, _defined(testing)),
    ):
        parts.append(f"## {title}\n{inspect.getdoc(module) or ''}")
        found = {name: getattr(module, name) for name in sorted(names)}
        parts += [_described(name, thing) for name, thing in found.items() if callable(thing)]
    return "\n\n".join(parts) + "\n"


def _defined(module: ModuleType) -> list[str]:
    """Public functions and classes that a module defines itself."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]


def _described(name: str, thing: Any) -> str:
    """One function or class with its methods."""
    text = [_headed("###", name, thing), _markdown(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing):
        for method, member in vars(thing).items():
            found = getattr(member, "__func__", member)
            if inspect.isfunction(found) and not method.startswith("_") and found.__doc__:
                about = _markdown(inspect.getdoc(found) or "")
                text += [_headed("####", f"{name}.{method}", found), about]
    return "\n\n".join(text)


def _headed(level: str, name: str, thing: Any) -> str:
    """A heading, and under it how to call the thing."""
    lines = textwrap.wrap(f"{name}{_signature(thing)}", 100, subsequent_indent="    ")
    return f"{level} {name}\n\n```text\n" + "\n".join(lines) + "\n```"


def _signature(thing: Callable[..., Any]) -> str:
    """Names and defaults, without annotations."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    shown, keyword = [], False
    for p in parameters:
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.VAR_POSITIONAL:
            keyword = True
        elif p.kind is p.KEYWORD_ONLY and not keyword:
            shown.append("*")
            keyword = True
        star = "*" * ((p.kind is p.VAR_POSITIONAL) + 2 * (p.kind is p.VAR_KEYWORD))
        default = "" if p.default is p.empty else f"={_plain(p.default)}"
        shown.append(f"{star}{p.name}{default}")
    return f"({', '.join(shown)})"


def _plain(value: Any) -> str:
    """A default as text that is the same on every machine."""
    return getattr(value, "__name__", "...") if callable(value) else re.sub(r" at 0x\w+", "", repr(value))


def _markdown(doc: str) -> str:
    """Turns a Google-style docstring into Markdown."""

    listed = ("Args", "Attributes", "Raises")

    def lines() -> Iterator[str]:
        section = ""
        for line in doc.splitlines():
            if head := re.fullmatch(r"([A-Z][a-z]+):( .*)?", line):
                if section == "Example":
                    yield "```"
                section = head[1]
                yield f"\n**{section}**{head[2] or ''}\n"
                if section == "Example":
                    yield "```pycon"
            elif section == "Example":
                yield line.removeprefix("    ")
            elif section in listed and (item := re.fullmatch(r"    (\S[^:]*): (.*)", line)):
                yield f"- `{item[1]}`: {item[2]}"
            else:
                yield line.removeprefix("    ")
        if section == "Example":
            yield "```"

    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", "\n".join(lines()))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


OUTPUTS: dict[str, Callable[[], str]] = {
    "README.md": readme,
    "docs/advise.md": advice,
    "docs/gallery.md": gallery,
    "docs/parallel.md": many_devices,
    "docs/quality.md": quality,
    "docs/reference.md": reference,
    "docs/sparse.md": sparse_page,
}


def main() -> None:
    """Writes every generated file and says which changed."""
    for name, build in OUTPUTS.items():
        path, text = ROOT / name, build()
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{name}: {'written' if changed else 'unchanged'}")


if __name__ == "__main__":
    main()
