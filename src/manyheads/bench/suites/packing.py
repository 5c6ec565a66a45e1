"""Suite ``packing``: a sentence encoder on real documents, padded and packed.

The documents are docstrings of Python's standard library. Token ids are made before anything is timed, for all sides
alike; what is timed goes from lists of token ids to normalised embeddings, packing included. The plain sides are
transformers' own forward pass with SDPA on padded batches; the packed sides replace its attention by a ``Document``
mask and compute no padding. Everything else of the model is the same code with the same weights.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.bench.device import label, wait
from manyheads.bench.environment import version
from manyheads.bench.row import Row, against
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.timing import Timing
from manyheads.method.packing import Packing, nnlshp, spfhp

BATCH = 32
"""Documents in a padded batch."""
LONGEST = 512
"""Tokens of a document after truncation, and of a row of a packing."""
TOKENS = 2048
"""Tokens in a packed forward pass."""
RESOLUTION = 16
"""Lengths are rounded up to multiples of this for least squares, which a few hundred documents do not resolve finer."""
COSINE = 0.9999
"""What the worst document must agree by."""
SHORTEST = 48
"""Characters; what is shorter is a label and not a document."""
PROVIDERS = ("padded", "sorted", "packed-spfhp", "packed-nnlshp")
COUNTS = {
    "quick": {"float32": 64, "bfloat16": 64},
    "default": {"float32": 512, "bfloat16": 64},
    "full": {"float32": 512, "bfloat16": 512},
}
"""Documents by level and dtype."""
ROUNDS = {"quick": 2, "default": 3, "full": 7}
"""How often every side embeds all documents, in turn."""


def cases(options: Options) -> list[Case]:
    """One case for each dtype, with as many documents as the level allows."""
    dtypes = options.pick(("float32", "bfloat16"))
    return [encoder_case(dtype, options, documents=COUNTS[options.level][dtype]) for dtype in dtypes]


def encoder_case(dtype: str, options: Options, *, documents: int = 512, seed: int | None = None) -> Case:
    """The encoder on real documents, all sides interleaved.

    Args:
        dtype: ``"float32"`` or ``"bfloat16"``, for all sides.
        options: Rounds and providers.
        documents: How many documents.
        seed: Draws other documents; None for the suite's own.

    Returns:
        The case; its rows have sentences per second, the share of tokens computed for nothing, and the smallest cosine
        between embeddings of the same document here and in the float32 model on padded batches.
    """
    name = f"encoder-{documents}-{dtype}" + ("" if seed is None else f"-seed-{seed}")
    who = tuple(provider for provider in options.chosen(PROVIDERS) if provider in PROVIDERS) or PROVIDERS
    seconds = 10.0 + documents / 512 * (35.0 if dtype == "float32" else 15.0) * ROUNDS[options.level]
    return Case("packing", name, lambda context: _run(context, name, dtype, documents, seed, who), seconds, tuple(who))


def real_documents(count: int, seed: int | None = None) -> list[str]:
    """Picks docstrings of the public modules of Python's standard library.

    The choice depends on nothing but the texts (by their SHA-256), hence on the version of Python only.

    Args:
        count: How many.
        seed: Another choice for another seed.

    Returns:
        The documents, in an order that has nothing to do with their lengths.

    Raises:
        ValueError: There are not that many.

    Example:
        >>> len(real_documents(3))
        3
    """
    found = _docstrings()
    if count > len(found):
        raise ValueError(f"documents: the standard library has {len(found)}, got {count}")
    salt = "" if seed is None else f"{seed}:"
    return sorted(found, key=lambda text: hashlib.sha256((salt + text).encode()).digest())[:count]


@functools.lru_cache(maxsize=1)
def _docstrings() -> tuple[str, ...]:
    texts: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= SHORTEST:
                    texts[text] = None
    return tuple(texts)


def padded(model: Any, tokens: Sequence[Tensor], *, by_length: bool) -> Tensor:
    """Embeds documents in padded batches, with transformers as it comes.

    Args:
        model: The encoder.
        tokens: Token ids of each document.
        by_length: Whether documents are sorted by length first, longest first.

    Returns:
        ``(documents, D)`` in the given order, mean over real tokens, scaled to length 1.
    """
    order = list(range(len(tokens)))
    if by_length:
        order.sort(key=lambda index: -len(tokens[index]))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            chosen = [tokens[index] for index in order[start : start + BATCH]]
            ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            lengths = torch.tensor([len(each) for each in chosen])
            real = torch.arange(ids.shape[1]) < lengths[:, None]
            ids, lengths, real = (each.to(getattr(model, "device", "cpu")) for each in (ids, lengths, real))
            hidden = model(input_ids=ids, attention_mask=real.long()).last_hidden_state.float()
            summed = (hidden * real[:, :, None]).sum(1)
            parts.append(torch.nn.functional.normalize(summed / lengths[:, None], dim=-1))
        found = torch.cat(parts)
        return torch.empty_like(found).index_copy_(0, torch.tensor(order, device=found.device), found)


def padding_share(lengths: Sequence[int], *, by_length: bool) -> float:
    """Share of tokens of padded batches that are padding.

    Example:
        >>> padding_share([1, 3], by_length=False)
        0.33333333333333337
    """
    order = sorted(lengths, reverse=True) if by_length else list(lengths)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return 1.0 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


@dataclass
class _Side:
    """One way to embed the documents, and what it gave last."""

    embed: Callable[[], Tensor]
    waste: float
    note: str
    device: str = "cpu"
    found: Tensor | None = None

    def __call__(self) -> None:
        self.found = self.embed()
        wait(self.device)


@dataclass(frozen=True)
class _Work:
    """Documents as token ids, and the same encoder twice: as it comes, and with its attention replaced."""

    tokens: list[Tensor]
    lengths: list[int]
    plain: Any
    ours: Any
    device: str = "cpu"

    @classmethod
    def load(cls, dtype: str, count: int, seed: int | None, device: str) -> _Work:
        from manyheads.integration import encoder
        from manyheads.integration.transformers import enable

        with encoder.quiet():
            plain, tokenizer = encoder.load(dtype=getattr(torch, dtype), attn_implementation="sdpa")
            ours, _ = encoder.load(dtype=getattr(torch, dtype), attn_implementation="sdpa")
        made = tokenizer(real_documents(count, seed), truncation=True, max_length=LONGEST)["input_ids"]
        tokens = [torch.tensor(each) for each in made]
        return cls(tokens, [len(each) for each in tokens], plain.to(device), enable(ours.to(device)), device)

    def side(self, provider: str) -> _Side:
        if provider in ("padded", "sorted"):
            by_length = provider == "sorted"
            embed = functools.partial(padded, self.plain, self.tokens, by_length=by_length)
            note = f"transformers, sdpa, batches of {BATCH} " + ("sorted by length" if by_length else "as they come")
            return _Side(embed, padding_share(self.lengths, by_length=by_length), note, self.device)
        packing = self.pack(provider)
        note = (
            f"rows of {LONGEST} are {packing.efficiency:.1%} full with {packing.factor:.1f} documents each, "
            f"laid end to end without their tails, {TOKENS} tokens a pass"
        )
        return _Side(functools.partial(self.packed, provider), 0.0, note, self.device)

    def pack(self, provider: str) -> Packing:
        if provider == "packed-nnlshp":
            return nnlshp(self.lengths, LONGEST, resolution=RESOLUTION)
        return spfhp(self.lengths, LONGEST)

    def packed(self, provider: str) -> Tensor:
        from manyheads.integration.encoder import encode_packed

        return encode_packed(self.ours, self.tokens, packing=self.pack(provider), tokens=TOKENS)


def _run(context: Context, name: str, dtype: str, count: int, seed: int | None, who: Sequence[str]) -> list[Row]:
    device = context.options.device
    base = Row("packing", name, "-", phase="encode", dtype=dtype, seed=seed, cache="warm")
    base = base.replace(device=label(device), threads=torch.get_num_threads())
    context.say(f"packing/{name}: loading the encoder and {count} documents")
    try:
        work = _Work.load(dtype, count, seed, device)
        sides = {provider: work.side(provider) for provider in dict.fromkeys(("padded", *who))}
    except (ImportError, OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        return [base.replace(provider=provider, status="refused", reason=why) for provider in who]
    base = base.replace(
        shape=f"{count} documents, {sum(work.lengths)} tokens, longest {max(work.lengths)}",
        length=sum(work.lengths),
        input="docstrings of the standard library, all-MiniLM-L6-v2",
    )
    context.say(f"packing/{name}: {len(sides)} ways to embed {count} documents, interleaved")
    times = _interleave(
        sides,
        dataclasses.replace(work, tokens=work.tokens[:BATCH], lengths=work.lengths[:BATCH]),
        ROUNDS[context.options.level],
    )
    truth = sides["padded"].found if dtype == "float32" else padded(work.plain.float(), work.tokens, by_length=True)
    rows = []
    for provider, timing in times.items():
        cosine = _worst_cosine(sides[provider].found, truth)
        rows.append(
            base.replace(
                provider=provider,
                version=version("manyheads" if provider.startswith("packed") else "transformers"),
                rate=count / timing.median_ms * 1e3,
                rate_unit="sentences/s",
                waste=sides[provider].waste,
                agreement=cosine,
                gate="green" if cosine >= COSINE else "red",
                note=sides[provider].note,
                **timing.fields(),
            )
        )
    return [rows[0], *(against(row, rows[0]) for row in rows[1:])]


def _interleave(sides: dict[str, _Side], few: _Work, rounds: int) -> dict[str, Timing]:
    """Times the sides in turn, after each has embedded a few documents untimed."""
    for provider in sides:
        few.side(provider)()
    samples: dict[str, list[float]] = {provider: [] for provider in sides}
    for _ in range(rounds):
        for provider, side in sides.items():
            start = time.perf_counter_ns()
            side()
            samples[provider].append((time.perf_counter_ns() - start) / 1e6)
    return {provider: Timing(tuple(found)) for provider, found in samples.items()}


def _worst_cosine(found: Tensor | None, truth: Tensor | None) -> float:
    assert found is not None and truth is not None
    return float(torch.nn.functional.cosine_similarity(found.double(), truth.double(), dim=-1).min())


SUITE = Suite(
    "packing",
    "A sentence encoder on real documents: padded batches against packed rows.",
    cases,
    PROVIDERS,
)
