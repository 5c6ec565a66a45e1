"""Suite ``parallel``: schemes on several processes, with the work and the bytes of every rank.

On a CPU the processes exchange over gloo and share its cores, so that times compare schemes with one another; they say
nothing about a network. On GPUs each process has one of its own and they exchange over NCCL. Balance and bytes do not
depend on the machine.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

from manyheads.bench import device
from manyheads.bench.environment import version
from manyheads.bench.measure import area, brief, compare
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.suites import ranks
from manyheads.bench.suites.ranks import PEERS, Found, Job
from manyheads.bench.timing import Timing
from manyheads.bench.workload import Problem
from manyheads.common.errors import UnsupportedError
from manyheads.mask import Causal, Document, Mask, Window
from manyheads.mask.longca import LONG, STATIC, longca
from manyheads.mask.sampling import document_lengths
from manyheads.parallel import DEALS, SCHEMES
from manyheads.parallel.deal import deal
from manyheads.parallel.plan import Sizes, plan

USUAL = {"ulysses": "contiguous", "groupcast": "nearby"}
"""The deal of a scheme where it is not ``"balanced"``."""
HEADS, KV_HEADS, WIDTH = 8, 8, 64
CALL = Sizes(64, 8, 128)
"""Heads and widths of the plans: those of the long-context benchmark."""
PER_RANK = 8192
CORPORA = ("pile", "prolong64k", "prolong512k")
MASKS = {"quick": ("causal_document",), "default": ("causal", "causal_document", "sliding_window_causal")}
WORLDS = {"quick": (2,), "default": (2,), "full": (2, 4, 8)}
LENGTHS = {"quick": (1024,), "default": (2048,), "full": (2048, 8192)}
"""Tokens on each rank."""
PROVIDERS = (*(f"manyheads-{scheme}" for scheme in SCHEMES), *PEERS)


def cases(options: Options) -> list[Case]:
    """Schemes on masks; then a forward pass beside other packages, with slow links; then balance and bytes."""
    masks = options.masks or MASKS.get(options.level, STATIC + LONG)
    lengths = options.lengths or LENGTHS[options.level]
    worlds = WORLDS[options.level]
    made = [schemes(name, n, world, options) for name in masks for n in lengths for world in worlds]
    if not options.masks:
        orders = ("causal",) if options.level == "quick" else ("causal", "full")
        made += [forward(order, lengths[0], worlds[0], options) for order in orders]
        made += [balance(world) for world in (8, 64)]
        made += [volume(kind, 8) for kind in VOLUMES]
    return [case for case in made if not options.providers or {*options.providers} & {*case.providers}]


def schemes(name: str, per_rank: int, world: int, options: Options) -> Case:
    """Forward and backward pass of every scheme, and the ring with other deals.

    Args:
        name: A mask of the long-context benchmark; its documents are drawn.
        per_rank: Tokens on each rank.
        world: Processes.
        options: For the seed.

    Returns:
        The case.
    """
    pairs = [(scheme, USUAL.get(scheme, "balanced")) for scheme in SCHEMES]
    pairs += [("ring", shard) for shard in ("contiguous", "zigzag")]
    window = per_rank // 8 if name.startswith("sliding") else None

    def job(seconds: float) -> Job:
        mask = longca(name, world * per_rank, seed=options.seed, window=window).mask
        problem = replace(_problem(mask, world * per_rank, options), phase="forward+backward")
        return Job(problem, world, tuple(pairs), seconds=seconds)

    return _case(f"{name}-{world}x{per_rank}", job, [_provider(pair) for pair in pairs], 10.0)


def forward(order: str, per_rank: int, world: int, options: Options) -> Case:
    """A forward pass beside other packages, which know no other masks; the ring also with slow links.

    Args:
        order: ``"causal"`` or ``"full"``.
        per_rank: Tokens on each rank.
        world: Processes.
        options: For the seed.

    Returns:
        The case.
    """
    pairs = (("ulysses", "contiguous"), ("ring", "zigzag"))
    peers = PEERS if order == "causal" else PEERS[:1]

    def job(seconds: float) -> Job:
        problem = _problem(longca(order, world * per_rank).mask, world * per_rank, options)
        return Job(problem, world, pairs, peers, seconds, delay=True)

    return _case(f"forward-{order}-{world}x{per_rank}", job, [*(_provider(pair) for pair in pairs), *peers], 6.5)


def balance(world: int, per_rank: int = PER_RANK, mixes: int = 30, seed: int = 0) -> Case:
    """The largest area of a rank over the mean, the worst of sampled mixes of packed documents; nothing is run.

    Args:
        world: Ranks.
        per_rank: Tokens on each.
        mixes: How many are drawn.
        seed: Of the first.

    Returns:
        The case; one row for each way of dealing tokens.
    """
    name = f"balance-{world}x{per_rank}"

    def run(context: Context) -> list[Row]:
        worst: dict[str, float] = {}
        for mix in range(mixes):
            context.say(f"parallel/{name}: mix {mix + 1} of {mixes}")
            mask = _packed(world * per_rank, CORPORA[mix % len(CORPORA)], seed + mix)
            for shard in DEALS:
                found = deal(shard, mask, world * per_rank, world).imbalance(mask)
                worst[shard] = max(worst.get(shard, 1.0), found)
        base = Row("parallel", name, "-", phase="plan", length=world * per_rank, ranks=world, seed=seed)
        base = base.replace(mask="causal & document($0)")
        of = f"the worst of {mixes} mixes of documents"
        return [
            base.replace(provider=f"manyheads-{s}", deal=s, imbalance=value, note=f"max/mean {value:.3f}, {of}")
            for s, value in worst.items()
        ]

    return Case("parallel", name, run, 1.0 + world / 14, tuple(f"manyheads-{shard}" for shard in DEALS))


VOLUMES = ("documents", "window-1025", "window-4097")


def volume(kind: str, world: int, per_rank: int = PER_RANK, seed: int = 0) -> Case:
    """Bytes that all ranks send forward and backward, by scheme, from the plan; nothing is run.

    Args:
        kind: ``"documents"`` (nine mixes without one longer than a quarter of the sequence, on which all ranks
            would have to work) or ``"window-<keys>"``.
        world: Ranks.
        per_rank: Tokens on each.
        seed: Of the documents.

    Returns:
        The case; one row for each scheme, with the mix in which group-cast saves least.
    """
    name = f"bytes-{kind}-{world}x{per_rank}"
    n = world * per_rank

    def run(context: Context) -> list[Row]:
        context.say(f"parallel/{name}: planning")
        masks = _mixes(n, 9, seed) if kind == "documents" else [Causal() & Window(int(kind.split("-")[1]))]
        found = [_planned(mask, world, n) for mask in masks]
        least = min(found, key=lambda sums: sums["ring"] / max(1, sums["groupcast"]))
        base = Row("parallel", name, "-", phase="plan", length=n, ranks=world, mask=masks[0].text, seed=seed)
        return [
            base.replace(provider=f"manyheads-{s}", deal="nearby", **_sent(least.get(s), s, world)) for s in SCHEMES
        ]

    return Case("parallel", name, run, 0.5, tuple(f"manyheads-{scheme}" for scheme in SCHEMES))


def _planned(mask: Mask, world: int, n: int) -> dict[str, int]:
    """Bytes of each scheme that can divide the heads among so many ranks."""
    dealt = deal("nearby", mask, n, world)
    found = {}
    for scheme in SCHEMES:
        with contextlib.suppress(UnsupportedError):
            planned = plan(mask, dealt, scheme, CALL)
            found[scheme] = int(planned.forward_bytes.sum() + planned.backward_bytes.sum())
    return found


def _sent(total: int | None, scheme: str, world: int) -> dict[str, object]:
    """The fields of a row that say what a scheme sends."""
    if total is None:
        return {"status": "refused", "reason": f"{scheme} cannot divide the heads among {world} ranks"}
    return {"sent_mib": total / 2**20, "note": f"{total >> 20} MiB"}


def _mixes(n: int, count: int, seed: int) -> list[Mask]:
    masks: list[Mask] = []
    while len(masks) < count:
        lengths = document_lengths(n, CORPORA[seed % len(CORPORA)], seed=seed)
        if max(lengths) <= n / 4:
            masks.append(Causal() & Document(lengths))
        seed += 1
    return masks


def _packed(n: int, corpus: str, seed: int) -> Mask:
    return Causal() & Document(document_lengths(n, corpus, seed=seed))


def _problem(mask: Mask, n: int, options: Options) -> Problem:
    return Problem(mask, n, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH, seed=options.seed)


def _provider(pair: tuple[str, str]) -> str:
    """``manyheads-<scheme>``, and the deal where it is not the usual one."""
    scheme, shard = pair
    other = "" if shard in ("", USUAL.get(scheme, "balanced")) else f"-{shard}"
    return scheme if scheme in PEERS else f"manyheads-{scheme}{other}"


def _case(name: str, job: object, who: Sequence[str], seconds: float) -> Case:
    assert callable(job)

    def run(context: Context) -> list[Row]:
        asked: Job = job(context.options.seconds)
        if context.options.on_gpu:
            there = torch.cuda.device_count()
            if there < asked.world:
                reason = f"takes {asked.world} GPUs, one for each process; this machine has {there}"
                return [Row("parallel", name, p, status="refused", reason=reason) for p in who]
            asked = replace(asked, device="cuda")
        context.say(f"parallel/{name}: {asked.world} processes")
        base = _base(name, asked)
        try:
            found = ranks.run(asked)
        except RuntimeError as error:
            return [base.replace(provider=p, status="failed", reason=brief(error, kind=False)) for p in who]
        rows = [_row(base, pair, each, asked) for pair, each in found.items()]
        return compare(rows)

    return Case("parallel", name, run, seconds, tuple(who))


def _base(name: str, job: Job) -> Row:
    p = job.problem
    seen = area(p.mask, p.queries, p.nk, batch=p.batch, heads=p.heads)
    base = Row("parallel", name, "-", phase=p.phase, shape=p.shape, length=p.queries, dtype=p.dtype, layout=p.layout)
    base = base.replace(mask=p.mask.text, pairs=seen.pairs, area=seen.area, density=seen.density, seed=p.seed)
    base = base.replace(device=device.label(job.device), threads=1, cache="warm", ranks=job.world)
    return base.replace(flops=p.flops(seen.pairs))


def _row(base: Row, pair: tuple[str, str], found: Found, job: Job) -> Row:
    provider = _provider(pair)
    row = base.replace(provider=provider, deal=pair[1] or None, version=version(_PACKAGES.get(provider, "manyheads")))
    if found.reason is not None:
        return row.replace(status="refused", reason=found.reason)
    row = row.replace(**{**Timing(found.ms).fields(), "first_ms": None}, **found.verdict)
    row = row.replace(gflops=None if not row.flops or not row.median_ms else row.flops / row.median_ms / 1e6)
    if found.areas:
        uneven, sent = max(found.areas) / statistics.fmean(found.areas), max(map(sum, found.sent)) / 2**20
        row = row.replace(imbalance=uneven, sent_mib=sent, note=f"max/mean {uneven:.3f}, {sent:.1f} MiB sent")
    if found.delay_ms and pair[0] == "ring":
        row = row.replace(overlap=hidden(found.alone_ms, found.delay_ms, found.slow_ms))
        late = f"{found.delay_ms:.1f} ms of delay: {found.alone_ms:.1f} -> {found.slow_ms:.1f} ms"
        row = row.replace(note=f"{row.note}; {late}")
    return row if provider != "yunchang" else row.replace(note="its exchange around torch's attention")


def hidden(compute: float, delay: float, together: float) -> float:
    """The share of the smaller of compute and communication that the other one hides.

    Args:
        compute: Time without delay.
        delay: Time of all messages.
        together: Time with delay.

    Returns:
        1 where the smaller one costs nothing, 0 where one waits for the other; noise may leave that range.

    Example:
        >>> hidden(10.0, 5.0, 11.0), hidden(10.0, 20.0, 30.0)
        (0.8, 0.0)
    """
    return (compute + delay - together) / min(compute, delay)


_PACKAGES = {"yunchang": "yunchang", "torch-context-parallel": "torch"}

SUITE = Suite("parallel", "schemes on several processes: time, balance, bytes", cases, PROVIDERS)
