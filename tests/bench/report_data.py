"""A results file with everything that a report must cope with; shared by the tests of the report."""

from __future__ import annotations

import html.parser
import json
import random

from manyheads.bench.row import Row, against
from manyheads.bench.store import Store
from manyheads.mask.longca import longca

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'text' <!-- {{data}}"
HEADER = {
    "environment": {"cpu_model": "Test <CPU> & co", "cpu_vendor": "T", "threads": 2, "torch": "2", "python": "3"},
    "limits": {"matrix": {"float32": 317.25, "bfloat16": 641.5}, "copy": 21.5, "exp_rate": 3.75},
    "command": "manyheads bench --mask 'causal & window(7)'",
    "started": "2026-01-02T03:04:05+00:00",
    "options": {"level": "default", "seed": 5},
}


def attention(rng, name, length, dtype, provider, **changes):
    """A measured row of one mask, with the exact number of pairs that its mask has."""
    mask = longca(name, length, seed=5).mask
    layout = mask.tiles(length, length, tile=(128, 64), heads=3)
    ms = rng.uniform(0.1, 900.0)
    flops = 2 * layout.pairs * (16 + 16)
    gflops = flops / ms / 1e6
    moved = 4 * 3 * length * 64
    row = Row(
        "masks",
        f"{name}-{length}-{dtype}",
        provider,
        shape=f"1x3x{length}x16",
        length=length,
        dtype=dtype,
        mask=mask.text,
        input="normal, logit deviation 1",
        median_ms=ms,
        p20_ms=ms * rng.uniform(0.8, 0.99),
        p80_ms=ms * rng.uniform(1.01, 1.2),
        rounds=rng.randrange(5, 50),
        noisy=False,
        error=rng.uniform(1e-7, 4e-7),
        error_norm=rng.uniform(1e-7, 9e-7),
        error_limit=5e-7,
        gate="green",
        pairs=layout.pairs,
        flops=flops,
        gflops=gflops,
        of_matrix_rate=gflops / HEADER["limits"]["matrix"][dtype],
        of_copy_rate=moved / ms / 1e6 / HEADER["limits"]["copy"],
        density=layout.density,
        area=layout.area,
        seed=5,
    )
    return row.replace(**changes)


def compared(case):
    """The rows of a case, each with its ratio to sdpa."""
    sdpa = next(row for row in case if row.provider == "sdpa")
    return [against(row, sdpa) for row in case]


def mixed_rows(seed=1):
    """Cases of every kind: masks at three lengths, noisy, red, lossy, refused and failed rows, verdicts, packing."""
    rng = random.Random(seed)
    cases = []
    for name in ("full", "causal_document", "sliding_window_causal"):
        for length in (130, 515, 1030):
            for dtype in ("float32", "bfloat16"):
                who = [attention(rng, name, length, dtype, p) for p in ("manyheads", "sdpa", "reference")]
                cases.append(compared(who))
    red = attention(rng, "causal", 515, "float32", "flex", gate="red", error=3e-6, note=HOSTILE)
    lossy = attention(rng, "causal", 515, "float32", "performer <i>", gate="lossy", error=2e-2, version="1.1")
    noisy = attention(rng, "causal", 515, "float32", "manyheads", noisy=True)
    steady = attention(rng, "causal", 515, "float32", "sdpa")
    no = Row("masks", red.case, "natten", status="refused", reason=f"no causal: {HOSTILE}", length=515)
    broken = Row("masks", red.case, "reference", status="failed", reason="RuntimeError: out of luck")
    cases.append([*compared([noisy, steady, red, lossy]), no, broken])
    packed = Row("packing", "encoder-9", "packed", rate=12.5, rate_unit="sentences/s", median_ms=3.0, gate="green")
    cases.append([packed])
    cases.append([Row("overhead", "causal-1x2", "delegated", overhead_us=-1.75, median_ms=0.02)])
    cases.append([Row("layouts", "causal-515", "manyheads", phase="build", length=515, peak_mib=2.5, flops=2**53 + 1)])
    trained = {"phase": "train", "task": "recall", "score_unit": "accuracy", "better": "higher", "chance": 0.0625}
    for seed in (1, 2):
        curve = tuple(round(4 / (i + seed), 3) for i in range(20))
        row = Row("quality", f"recall-rat-seed-{seed}", "rat", score=0.25 * seed, seed=seed, curve=curve, **trained)
        cases.append([row.replace(steps=600, parameters=117_248, input=f"keys; {HOSTILE}", learning_rate=5e-3)])
    bars = [("met", 2.125, ">= 1.9x"), ("missed", 41.5, "<= 30 ms"), ("not measured", None, ">= 4x")]
    cases.append(
        [
            Row("targets", "speed", "manyheads", bar=f"speed of <b>: part {i}", target=t, measured=m, verdict=v)
            for i, (v, m, t) in enumerate(bars)
        ]
    )
    return cases


def write_results(path, cases, header=HEADER, notes=()):
    """Writes a results file as the benchmark does."""
    store = Store(path, header)
    for rows in cases:
        store.case(rows[0].suite, rows[0].case, rows, 0.1)
    for note in notes:
        store.note(note)
    return store.close()


def rows_of(path):
    """The rows of a results file, parsed by nothing but JSON."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in e.items() if k != "kind"} for e in entries if e["kind"] == "row"]


class Page(html.parser.HTMLParser):
    """What a browser's parser finds: tags with attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.words = [], [], []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        if tag == "script":
            self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1][1] += data
        else:
            self.words.append(data)

    @property
    def data(self):
        """The embedded JSON."""
        (text,) = (text for attrs, text in self.scripts if attrs.get("id") == "data")
        return json.loads(text)

    @property
    def text(self):
        """What can be read without a script, white space as one blank."""
        return " ".join(" ".join(self.words).split())
