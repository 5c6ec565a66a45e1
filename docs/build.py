"""Writes what is generated: the tables of the README, the gallery, and the reference from the docstrings.

Run it with ``make docs``. A test fails when the committed files differ from what this writes.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import manyheads  # noqa: E402
from manyheads import catalog, nn, spec, testing  # noqa: E402
from manyheads.common import rope  # noqa: E402

BEGIN, END = "<!-- generated: features -->", "<!-- end of generated -->"
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
GALLERY_MASKS = (
    "causal",
    "causal & window(6)",
    "window(left=2, right=5)",
    "causal & (window(4) | sink(2))",
    "causal & document([7, 3, 10])",
    "causal & (window(3) | periodic(5))",
    "causal | prefix(6)",
    "neighborhood([4, 5], [3, 3])",
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
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{features()}\n{END}{after}"


def gallery() -> str:
    """A few lines on each mechanism, and pictures of masks."""
    parts = ["# Gallery", NOTE, "## Mechanisms"]
    for slug, found in sorted(spec.registry().items()):
        about = (inspect.getdoc(found.fn) or "").splitlines()[0]
        paper = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", found.paper)
        axes = "; ".join(f"{axis}: {words}" for axis, words in found.axes.items())
        declared = ", ".join(name for name in spec.CAPABILITIES if found.declares(name))
        parts.append(
            f"### {slug}\n{about}\n- call: `{found.fn.__module__}.{found.fn.__qualname__}`\n"
            f"- source: {paper}\n- {axes}\n- declares: {declared}"
        )
    parts.append("## Masks\nQueries go down, keys go right; `#` is visible.")
    for text in GALLERY_MASKS:
        mask = manyheads.as_mask(text)
        rows = mask.dense(20)[0, 0].tolist()
        drawn = "\n".join("".join("#" if seen else "." for seen in row) for row in rows)
        parts.append(f"### `{mask!r}`\n```text\n{drawn}\n```")
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """Everything public, from its docstring."""
    parts = ["# Reference", NOTE]
    for title, module, names in (
        ("manyheads", manyheads, manyheads.__all__),
        ("manyheads.nn", nn, nn.__all__),
        ("manyheads.common.rope", rope, _defined(rope)),
        ("manyheads.spec", spec, _defined(spec)),
        ("manyheads.catalog", catalog, catalog.__all__),
        ("manyheads.testing", testing, _defined(testing)),
    ):
        parts.append(f"## {title}\n{inspect.getdoc(module) or ''}")
        for name in sorted(names):
            parts.append(_described(name, getattr(module, name)))
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
    "docs/gallery.md": gallery,
    "docs/reference.md": reference,
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
