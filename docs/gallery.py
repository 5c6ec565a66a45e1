"""The gallery page: what works, with an example that runs, a picture and its tests; and what is planned.

Everything comes from declarations: the registry of mechanisms, the catalogue of systems and their evidence, and the
docstring of what a user imports, whose ``Example`` runs as a doctest and, written out as a block, with the page.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

import manyheads
from manyheads import catalog, spec

LONGEST_EXAMPLE = 8
"""Statements of an example, imports left out."""
PICTURED = 21
"""Tokens of a picture: three rows of seven for what lives on a grid."""
MASKS = (
    "causal",
    "causal & window(6)",
    "window(left=2, right=5)",
    "causal & (window(4) | sink(2))",
    "causal & document([7, 3, 10])",
    "causal & (window(3) | periodic(5))",
    "causal | prefix(6)",
    "neighborhood([4, 5], [3, 3])",
)


def page(note: str) -> str:
    """The whole page.

    Args:
        note: The remark that says how the page is made.
    """
    entries = {entry.slug: entry for entry in catalog.entries()}
    tools = [e for e in entries.values() if e.state == "works" and e.slug not in spec.registry()]
    parts = [
        "# Gallery",
        note,
        "What works comes first: an example, a picture of which query (down) sees which key (right) where there is\n"
        "one, and the tests that hold its checks. [What is planned](#planned) follows, by the module that is its home.",
        "## Mechanisms",
        *(mechanism(found, entries.get(slug)) for slug, found in sorted(spec.registry().items())),
        "## Methods and tools",
        *map(tool, tools),
        "## Masks\nQueries go down, keys go right; `#` is visible.",
        *(f"### `{manyheads.as_mask(text)!r}`\n{_mask(text)}" for text in MASKS),
        planned(e for e in entries.values() if e.state != "works"),
    ]
    return "\n\n".join(parts) + "\n"


def mechanism(found: spec.Spec, entry: catalog.Entry | None) -> str:
    """The entry of a mechanism.

    Args:
        found: Its declaration.
        entry: Its place in the catalogue, if it has one.
    """
    target = f"{found.fn.__module__}.{found.fn.__qualname__}"
    axes = "; ".join(f"{axis}: {words}" for axis, words in found.axes.items())
    declared = ", ".join(name for name in spec.CAPABILITIES if found.declares(name))
    lines = [
        f"### {found.slug}\n{_about(found.fn)}",
        f"- call: `{target}`, backends: {', '.join(found.backends) or 'its own'}",
        f"- source: {_linked(found.paper)}",
        *([f"- {axes}"] if axes else []),
        f"- declares: {declared}",
        _evidence(found.evidence, entry, "- held by `tests/conformance`, which runs whatever is declared above"),
    ]
    return "\n".join(lines) + f"\n\n{example(found.fn, target)}" + picture(found)


def tool(entry: catalog.Entry) -> str:
    """The entry of a system that is no mechanism.

    Args:
        entry: Its place in the catalogue.
    """
    found = _import(entry.object or "")
    lines = [
        f"### {entry.slug}\n{_about(found)}",
        f"- use: `{entry.object}`",
        f"- source: {_linked(_source(found))}",
        _evidence(entry.evidence, entry, ""),
    ]
    return "\n".join(lines) + f"\n\n{example(found, entry.object or '')}"


def example(thing: Any, target: str) -> str:
    """The example of a docstring as a block that runs by itself.

    Args:
        thing: A function, class or module whose docstring has an ``Example``.
        target: Its dotted path, to import it from where the example does not.

    Raises:
        ValueError: No example, or one of more than ``LONGEST_EXAMPLE`` statements.
    """
    steps = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
    if not 0 < len([s for s in steps if not s.source.startswith(("import ", "from "))]) <= LONGEST_EXAMPLE:
        raise ValueError(f"{target}: the gallery needs an Example of 1 to {LONGEST_EXAMPLE} statements in its docs")
    lines = []
    for step in steps:
        lines.append(_shown(step.source.rstrip()) if step.want else step.source.rstrip())
        lines += [f"# {line}" for line in step.want.splitlines()]
    code = "\n".join(lines)
    module, _, name = target.rpartition(".")
    needed = {f"from {module} import {name}"} if re.search(rf"(?<!\.)\b{name}\(", code) else set()
    needed |= {"import torch"} if "torch." in code else set()
    needed |= set(_imports("".join(step.source for step in steps), thing, but={name, "torch"}))
    missing = [line for line in needed if line not in code]
    return "```python\n" + "\n".join([*sorted(missing, reverse=True), code]) + "\n```"


def _imports(code: str, thing: Any, but: set[str]) -> Iterator[str]:
    """Imports of what an example finds in the module of the thing, where doctest runs it."""
    around = vars(inspect.getmodule(thing)) if inspect.getmodule(thing) is not thing else {}
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    own |= {a.asname or a.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom) for a in n.names}
    for name in {node.id for node in names} - own - but:
        if name in around and inspect.getmodule(around[name]) is not None:
            yield f"from {inspect.getmodule(around[name]).__name__} import {name}"


def picture(found: spec.Spec) -> str:
    """Which query weighs which key, drawn from the reference: with unit vectors as values it returns the weights.

    Args:
        found: The declaration; without values of another width there is no picture.
    """
    if not found.declares("value_width"):
        return ""
    causal = found.declares("causal_self") and not found.declares("noncausal_self")
    case = found.inputs(spec.Size(batch=1, heads=1, queries=PICTURED, seed=0, causal=causal))
    values = torch.eye(PICTURED).expand(1, 1, PICTURED, PICTURED)
    weights = found.reference(case.q, case.k, values, **case.options)
    seen = (weights[0, 0] != 0).tolist()
    if all(map(all, seen)):
        return ""
    given = {name: value for name, value in case.options.items() if value is not None and value is not False}
    options = ", ".join(f"{name}={value!r}" for name, value in given.items() if not isinstance(value, torch.Tensor))
    return f"\n\nWhat it weighs{f' with `{options}`' if options else ''}:\n" + _drawn(seen)


def planned(entries: Iterable[catalog.Entry]) -> str:
    """What does not work yet, by the module that it will live in.

    Args:
        entries: Systems of the catalogue.
    """
    homes: dict[str, list[catalog.Entry]] = defaultdict(list)
    for entry in entries:
        homes[entry.home].append(entry)
    count = sum(map(len, homes.values()))
    parts = [f"## Planned\n{count} systems of the catalogue, each with the module that is its home and how many of its "
             "checks a\ntest holds already; what can be imported of them is named."]  # fmt: skip
    for home, members in sorted(homes.items()):
        rows = [f"### `{home}`\n| system | | checks held | importable |\n|---|---|---|---|"]
        for e in members:
            held = len(e.checks) - len(e.missing)
            rows.append(f"| {e.slug} | {e.title} | {held} of {len(e.checks)} | {f'`{e.object}`' if e.object else ''} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


# --- words ----------------------------------------------------------------------------------------------------------


def _about(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def _source(thing: Any) -> str:
    found = re.search(r"^Source:\n((?:    .*\n?)+)", inspect.getdoc(thing) or "", re.MULTILINE)
    return " ".join(line.strip() for line in found[1].splitlines()) if found else "this project"


def _linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _evidence(held: Any, entry: catalog.Entry | None, otherwise: str) -> str:
    """The numbered checks with their tests."""
    if not held:
        return otherwise
    words = entry.checks if entry is not None else ()
    return "\n".join(
        f"- check {n}{f', {words[n - 1]}' if n <= len(words) else ''}: {', '.join(f'`{test}`' for test in tests)}"
        for n, tests in held.items()
    )


def _shown(source: str) -> str:
    """A statement that prints its value, as an interpreter would show it."""
    node = ast.parse(source).body[0]
    if not isinstance(node, ast.Expr) or source.startswith("print("):
        return source
    value = ast.get_source_segment(source, node.value) or source
    comment = source[len(value) :].strip() if source.startswith(value) else ""
    bare = isinstance(node.value, ast.Tuple) and not value.startswith("(")
    return f"print({f'({value})' if bare else value}){f'  {comment}' if comment else ''}"


def _import(path: str) -> Any:
    """A module, or something in one, by its dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _mask(text: str) -> str:
    return _drawn(manyheads.as_mask(text).dense(20)[0, 0].tolist())


def _drawn(rows: list[list[bool]]) -> str:
    return "```text\n" + "\n".join("".join("#" if seen else "." for seen in row) for row in rows) + "\n```"
