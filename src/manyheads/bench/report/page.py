"""Puts the page together: text, pictures, the rows as JSON, the script, plotly."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from manyheads.bench import environment, summary
from manyheads.bench.limits import Limits
from manyheads.bench.naming import mask_name
from manyheads.bench.report.pictures import Picture, pictures
from manyheads.bench.row import Row
from manyheads.bench.store import PARTIAL, Results
from manyheads.common.errors import missing_extra

SCRIPTS = ("core.js", "marks.js", "plots.js", "plane.js", "quality.js", "table.js", "sections.js")
"""Parts of the page's own script, in order."""

COLORS = {"manyheads": "#2f7de1", "sdpa": "#d9680f", "flex": "#0f9d8a", "reference": "#808890"}
"""Colours that providers keep in every report."""
MORE_COLORS = ("#9a5be0", "#d6457f", "#8f8a1d", "#1898b8", "#b0703c", "#3f9a3f", "#6f74e8", "#c050c8")
"""Colours of the others, in order of appearance; all have a contrast of 3 or more on both backgrounds."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagram", "star", "bowtie")
BACKGROUNDS = ("#ffffff", "#16181d")
"""The page in light and in dark."""

_EXACT_IN_JS = 2**53


def build(results: Results) -> str:
    """Makes the page.

    Args:
        results: The contents of a results file.

    Returns:
        The whole HTML text.

    Raises:
        ImportError: plotly is not installed.
    """
    scripts = [plotly(), "(() => {\n" + "\n".join(map(_asset, SCRIPTS)) + "\n})();\n"]
    drawn, missing = pictures(results.rows)
    env = dict(results.header.get("environment") or {})
    title = " · ".join(str(x) for x in ("Attention benchmark", env.get("cpu_model") or env.get("cpu_vendor")) if x)
    day = str(results.header.get("started") or "")[:10]
    parts = {
        "policy": _policy(scripts),
        "style": _asset("style.css"),
        "title": html.escape(f"{title} · {day}" if day else title),
        "heading": html.escape(title),
        "machine": html.escape(_machine(env)),
        "facts": _facts(results),
        "warnings": _warnings(results),
        "summary": "".join(f"<li>{html.escape(line)}</li>" for line in summary.lines(results)),
        "pictures": _gallery(drawn, missing, results.rows),
        "limits": _limits(results.header),
        "environment": _definitions(env),
        "options": _definitions(dict(results.header.get("options") or {})),
        "command": html.escape(_command(results)),
        "plotly": scripts[0],
        "data": embed(results),
        "script": scripts[1],
    }
    # one pass, so that what is put in is never read as a template
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def plotly() -> str:
    """The text of plotly.js, safe inside a script element.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise missing_extra("bench", "the report") from None
    text: str = get_plotlyjs()
    return text.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def embed(results: Results) -> str:
    """Everything that the script shows, as JSON that may stand in a script element.

    Whole numbers that a browser cannot hold exactly are written as text.

    Args:
        results: The contents of a results file.

    Returns:
        JSON without ``<``, ``>`` and ``&``.

    Example:
        >>> embed(Results({}, [Row("masks", "a", "sdpa", note="</script>")]))
        '...\\\\u003c/script\\\\u003e...'
    """
    rows = [json.loads(row.to_json()) for row in results.rows]
    for row in rows:
        del row["kind"]
    limits = Limits.from_dict(results.header.get("limits") or {})
    data = {
        "rows": [{k: _exact(v) for k, v in row.items()} for row in rows],
        "names": [mask_name(row) for row in results.rows],
        "limits": limits.to_dict(),
        "fields": fields(),
        "styles": styles(row.provider for row in results.rows),
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def fields() -> dict[str, str]:
    """What each field of a row means, from its documentation.

    Example:
        >>> fields()["length"]
        'Tokens, for plots over length.'
    """
    about = (Row.__doc__ or "").partition("Attributes:")[2]
    found = re.findall(r"^        (\w+): (.*?)(?=^        \w+: |\Z)", about, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}


def styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour and a symbol for each provider, the same everywhere in the report.

    Args:
        names: Providers in order of appearance.

    Returns:
        ``{"color", "symbol"}`` by provider.

    Example:
        >>> styles(["flex", "natten"])["flex"]
        {'color': '#0f9d8a', 'symbol': 'diamond'}
    """
    found = {}
    others = 0
    for name in dict.fromkeys(names):
        if name in COLORS:
            place, color = list(COLORS).index(name), COLORS[name]
        else:
            place, color = len(COLORS) + others, MORE_COLORS[others % len(MORE_COLORS)]
            others += 1
        found[name] = {"color": color, "symbol": SYMBOLS[place % len(SYMBOLS)]}
    return found


def _exact(value: Any) -> Any:
    return str(value) if type(value) is int and abs(value) > _EXACT_IN_JS else value


def _asset(name: str) -> str:
    text = importlib.resources.files("manyheads.bench.report").joinpath("assets", name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _policy(scripts: Sequence[str]) -> str:
    """Only these scripts may run, and nothing may be loaded from anywhere."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _machine(env: dict[str, Any]) -> str:
    try:
        return environment.one_line(env)
    except KeyError:
        return "The file does not say which machine this was."


def _facts(results: Results) -> str:
    facts = [
        ("measured", str(results.header.get("started") or "unknown").replace("T", " ").replace("+00:00", " UTC")),
        ("rows", f"{len(results.rows):,}"),
        ("cases", f"{len({(row.suite, row.case) for row in results.rows if row.bar is None}):,}"),
        ("file", results.path.name if results.path is not None else "none"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)


def _warnings(results: Results) -> str:
    lines = [f"The run says: {note}" for note in results.notes]
    if results.path is not None and results.path.name.endswith(PARTIAL):
        lines.append(
            "This run did not end. The report shows the cases that were finished; the same command with --resume --out "
            f"{results.path.name.removesuffix(PARTIAL)} continues it."
        )
    if not results.rows:
        lines.append("The file has no rows, so there is nothing to plot.")
    return "".join(f'<p class="warning" role="note">{html.escape(line)}</p>' for line in lines)


def _command(results: Results) -> str:
    return str(results.header.get("command") or "manyheads bench")


def _definitions(values: dict[str, Any]) -> str:
    if not values:
        return "<div><dt>nothing</dt><dd>The file says nothing about it.</dd></div>"
    return "".join(
        f"<div><dt>{html.escape(str(key).replace('_', ' '))}</dt><dd>{html.escape(_plain(value))}</dd></div>"
        for key, value in values.items()
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "all"
    return "not given" if value is None else str(value)


def _limits(header: dict[str, Any]) -> str:
    limits = Limits.from_dict(header.get("limits") or {})
    lines = [
        (f"products in {dtype}", rate, "GFLOP/s", f"fastest: {limits.method.get(dtype, 'mm')}")
        for dtype, rate in limits.matrix.items()
    ]
    said = limits.method
    for name, value, unit, how in (
        ("memory copied", limits.copy, "GB/s", "read plus written"),
        ("exponentials in cache", limits.exp_rate, "billions/s", said.get("exp", "float32")),
        ("exponentials from memory", limits.exp_memory, "billions/s", said.get("exp memory", "float32")),
    ):
        if value is not None:
            lines.append((name, value, unit, how))
    if not lines:
        return "<p>The file holds no measured limits.</p>"
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td class="number" title="{value!r}">{value:,.1f}</td>'
        f"<td>{html.escape(unit)}</td><td>{html.escape(str(how))}</td></tr>"
        for name, value, unit, how in lines
    )
    head = '<tr><th scope="col">limit</th><th scope="col" class="number">measured</th><th scope="col">unit</th>'
    return (
        f'<div class="scroll"><table class="small"><thead>{head}<th scope="col">how</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _gallery(drawn: Sequence[Picture], missing: Sequence[str], rows: Sequence[Row]) -> str:
    if not drawn and not missing:
        return "<p>No row has a mask.</p>"
    cards = "".join(_card(picture, rows[picture.row], number) for number, picture in enumerate(drawn))
    left = "".join(f"<li>{html.escape(line)}</li>" for line in missing)
    note = f'<p>Not drawn:</p><ul class="reasons">{left}</ul>' if missing else ""
    return f'<div class="gallery">{cards}</div>{note}'


def _card(picture: Picture, row: Row, number: int) -> str:
    nq, nk = picture.size
    tall, wide = picture.tile
    name = html.escape(picture.name)
    text = f"<code>{html.escape(row.mask or '')}</code>" if row.mask != picture.name else ""
    shares = "".join(
        f'<div><dt>{words}</dt><dd title="{field} = {value!r}" data-row="{picture.row}" data-field="{field}">'
        f"{value:.1%}</dd></div>"
        for words, field, value in (
            ("pairs visible", "area", row.area),
            ("tiles visited", "density", row.density),
        )
        if value is not None
    )
    grid = f"grid{number}"
    which = "" if picture.heads == 1 else f", the first of {picture.heads} different heads"
    return (
        f'<figure class="card"><button type="button" class="zoom" aria-label="Enlarge the picture of {name}">'
        f'<svg viewBox="0 0 {nk} {nq}" preserveAspectRatio="none" role="img" aria-label="{name}: which keys each '
        f'query may see">'
        f'<defs><pattern id="{grid}" width="{wide}" height="{tall}" patternUnits="userSpaceOnUse">'
        f'<path d="M{wide} 0H0V{tall}" class="lines" stroke-width="{wide / 12:g}"/></pattern></defs>'
        f'<path class="visited" d="{picture.visited}"/><path class="seen" d="{picture.seen}"/>'
        f'<path class="grid" fill="url(#{grid})" d="{picture.visited}"/></svg></button>'
        f'<figcaption><strong>{name.replace("_", "_<wbr>")}</strong>{text}<dl class="shares">{shares}</dl>'
        f"<small>{nq:,} × {nk:,} tokens{which}, tiles of {tall} × {wide}</small></figcaption></figure>"
    )
