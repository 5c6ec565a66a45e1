"""Which attention to use for a model, a length and a machine: options in order, with what each is known from."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from manyheads.bench import store
from manyheads.bench.planning import architecture, fit, machines
from manyheads.bench.planning.architecture import Architecture, Layers
from manyheads.bench.planning.fit import Fit
from manyheads.bench.planning.machines import Machine
from manyheads.bench.planning.model import predict
from manyheads.bench.planning.simulate import named
from manyheads.bench.planning.ways import Way, assumed, ways
from manyheads.bench.row import Row
from manyheads.bench.workload import DTYPES, Problem, human
from manyheads.common.errors import unknown
from manyheads.mask import Mask
from manyheads.mask.sampling import default_distribution
from manyheads.mask.show import later_key

PHASES = {"prefill": "forward", "train": "forward+backward", "decode": "forward"}
"""From a phase of a model's life to what the benchmark calls it."""

LAUNCH_MS = {"cpu": 0.02, "gpu": 0.01}
"""Milliseconds that any call takes, by kind of machine: assumed, and of weight for decoding only."""


@dataclass(frozen=True)
class Option:
    """One way of computing the attention of some layers.

    Attributes:
        name: In words.
        provider: The provider that the benchmark measures it with.
        status: ``"measured"``, ``"modelled"`` or ``"refused"``.
        ms: Milliseconds of one layer, ``None`` if it cannot run.
        low_ms: Lower end of the range; the 20th percentile where it was measured.
        high_ms: Upper end.
        modelled_ms: What the model says, also where it was measured.
        bound: What bounds it: products, exponentials, memory or the launch.
        memory: Bytes of one layer's call at its peak, workspace of kernels left out.
        kept: Bytes that stay after the call: keys and values for later tokens, or what the backward pass reads.
        basis: Where the time comes from.
        reasons: Why it cannot run.
        notes: What else to know.
    """

    name: str
    provider: str
    status: str
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    modelled_ms: float | None = None
    bound: str | None = None
    memory: int | None = None
    kept: int | None = None
    basis: str = ""
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Advice for layers that are alike.

    Attributes:
        kind: ``"full"``, ``"sliding"`` or ``"chunked"``.
        layers: How many.
        mask: The mask as text.
        shape: The call of one layer, as in the rows of the benchmark.
        area: Share of the pairs that is visible.
        options: What can run, the fastest first (of two that agree to two digits, the one with less memory), then what
            cannot.
        command: The command that would measure them; empty where no suite does, or its mask fits no line.
    """

    kind: str
    layers: int
    mask: str
    shape: str
    area: float
    options: tuple[Option, ...]
    command: str

    @property
    def best(self) -> Option | None:
        """The first option, if it can run."""
        return self.options[0] if self.options and self.options[0].ms is not None else None


@dataclass(frozen=True)
class Total:
    """The attention of the whole model.

    Attributes:
        name: ``"the best of each"``, or the provider used in every layer.
        ms: Milliseconds, all layers.
        low_ms: Lower end of the range, if every layer is at its lower end.
        high_ms: Upper end.
        memory: Bytes: what every layer keeps, and the peak of one call.
        fits: Whether this fits the machine's memory beside nothing else; ``None`` where that is unknown.
    """

    name: str
    ms: float
    low_ms: float
    high_ms: float
    memory: int
    fits: bool | None


@dataclass(frozen=True)
class Advice:
    """What to use.

    Attributes:
        model: The model in words.
        machine: The machine's name.
        source: Where its rates are from.
        measured_rates: Whether they were measured; otherwise they are published peaks.
        rates: The rates in words.
        phase: ``"prefill"``, ``"train"`` or ``"decode"``.
        length: Tokens.
        batch: Sequences.
        dtype: Dtype of queries, keys and values.
        groups: Advice by kind of layer.
        totals: The whole model's attention, in the same order.
        notes: What a reader must know.
    """

    model: str
    machine: str
    source: str
    measured_rates: bool
    rates: str
    phase: str
    length: int
    batch: int
    dtype: str
    groups: tuple[Group, ...]
    totals: tuple[Total, ...]
    notes: tuple[str, ...]


def advise(
    config: str | Path | Architecture,
    length: int | None = None,
    *,
    machine: str | Machine = "here",
    phase: str = "prefill",
    mask: str | None = None,
    dtype: str | None = None,
    batch: int = 1,
    results: str | Path | None = None,
    lengths: str | None = None,
    seed: int = 42,
) -> Advice:
    """Ranks the ways to compute a model's attention.

    Args:
        config: A transformers ``config.json``, a folder with one, or what was read from one.
        length: Tokens: of a sequence in prefill and training, in the cache when decoding. Vision models know their own.
        machine: ``"here"`` (its limits are measured now, unless ``results`` are given), a name of
            ``manyheads.bench.planning.machines``, or a machine.
        phase: ``"prefill"``, ``"train"`` (forward and backward) or ``"decode"`` (one token for each sequence).
        mask: Instead of the model's own order: the text of a mask, or the name of one of the long-context benchmark.
            Layers with a window or chunks keep these.
        dtype: Dtype of queries, keys and values; by default the config's, else float32 on a CPU and bfloat16 elsewhere.
        batch: Sequences at once.
        results: A results file: its rows are what is measured, and what efficiencies are fitted from.
        lengths: What document lengths are drawn from, for masks that draw them.
        seed: Seed of what is drawn.

    Returns:
        The advice. Times are those of attention alone; projections and other layers are left out.

    Raises:
        ValueError: A config, length, phase, dtype, machine or mask that does not exist or does not fit.

    Example:
        >>> given = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
        ...          "num_hidden_layers": 32}
        >>> found = advise(architecture.interpret(given), 8192, machine="H100")
        >>> found.groups[0].mask, found.groups[0].best.status, found.groups[0].best.bound
        ('causal', 'modelled', 'products')
    """
    model = config if isinstance(config, Architecture) else architecture.read(config)
    length = _check(model, length, phase, batch)
    wanted = _wanted(dtype, model)
    known = store.read(Path(results)) if results is not None else None
    place = _machine(machine, known, wanted)
    kind = _dtype(dtype, wanted, place)
    there = known is not None and place.name == machines.here((), known=known).name
    if lengths is not None and mask is None:
        mask = "causal_document" if model.causal else "full_document"
    base = named(mask, length, seed=seed, lengths=lengths, heads=model.heads) if mask is not None else None
    samples = fit.fit(known) if known is not None and there else None
    groups = []
    for layers in model.groups:
        problem = _problem(model, layers, base, length, batch, kind, phase, place)
        latent = _latent_bytes(model, problem) if phase == "prefill" else 0
        found = [_option(way, place, samples, phase, latent) for way in ways(problem, layers, model, place)]
        text = _written(problem.mask, mask if layers.limit is None else None, lengths, length)
        groups.append(_group(problem, layers, found, text, seed))
    notes = [] if wanted in (None, kind) else [f"{place.name} has no rate for the config's {wanted}: {kind} instead"]
    notes += [*model.notes, *_notes(model, length, phase, place, results, there)]
    if model.causal and base is not None and later_key(base, length, length) is not None:
        notes.append(f"{mask} lets a token see later ones, which the model itself does not")
    return Advice(
        model=model.line(),
        machine=place.name,
        source=place.source,
        measured_rates=place.measured,
        rates=place.rates(),
        phase=phase,
        length=length,
        batch=batch,
        dtype=kind,
        groups=tuple(groups),
        totals=_totals(groups, place),
        notes=tuple(notes),
    )


# --- what was asked -------------------------------------------------------------------------------------------------


def _check(model: Architecture, length: int | None, phase: str, batch: int) -> int:
    if phase not in PHASES:
        raise unknown("phase", phase, PHASES)
    if phase == "decode" and not model.causal:
        raise ValueError(
            f"phase: decode needs a causal model; in {model.name} every token sees the later ones, so nothing can be "
            "kept from token to token: ask for prefill or train"
        )
    if length is None:
        if model.tokens is None:
            raise ValueError(f"length: {model.name} takes any number of tokens; say which with length")
        length = model.tokens
    if length < 1:
        raise ValueError(f"length: expected at least one token, got {length}")
    if batch < 1:
        raise ValueError(f"batch: expected at least one sequence, got {batch}")
    return length


def _machine(machine: str | Machine, known: store.Results | None, dtype: str | None) -> Machine:
    if isinstance(machine, Machine):
        return machine
    measured = None if known is None or "limits" not in known.header else machines.here((), known=known)
    if machine in machines.HERE:
        return machines.here([dtype or "float32"], kind=machine, known=known if machine == "here" else None)
    found = machines.find(machine)
    if measured is not None and machines.called(measured.name) is found:
        return measured  # the file was made on such a machine: its rates are better than published ones
    return found


def _wanted(asked: str | None, model: Architecture) -> str | None:
    """The dtype that was asked for, else the config's if attention can be computed in it."""
    if asked is not None and asked not in DTYPES:
        raise unknown("dtype", asked, DTYPES)
    return asked or (model.dtype if model.dtype in DTYPES else None)


def _dtype(asked: str | None, wanted: str | None, machine: Machine) -> str:
    rates = machine.limits.matrix
    usual = "bfloat16" if machine.kind == "gpu" and "bfloat16" in rates else "float32"
    found = asked or (wanted if wanted is not None and wanted in rates else usual)
    if found not in rates:
        known = ", ".join(machine.limits.matrix)
        raise ValueError(f"dtype: the rates of {machine.name} hold none for {found}; they hold {known}")
    return found


def _problem(
    model: Architecture,
    layers: Layers,
    base: Mask | None,
    length: int,
    batch: int,
    dtype: str,
    phase: str,
    machine: Machine,
) -> Problem:
    """The call of one layer."""
    mask = layers.mask if base is None else base if layers.limit is None else base & layers.limit
    problem = Problem(
        mask,
        1 if phase == "decode" else length,
        length if phase == "decode" else None,
        batch=batch,
        heads=model.heads,
        kv_heads=model.kv_heads,
        width=model.width,
        value_width=model.value_width,
        dtype=dtype,
        phase=PHASES[phase],
        device="cpu" if machine.kind == "cpu" else "cuda",
    )
    if phase == "decode" and model.latent:  # queries are taken into the latent, which all heads share
        return replace(problem, kv_heads=1, width=model.latent, value_width=model.latent - model.rotary)
    return problem


def _latent_bytes(model: Architecture, problem: Problem) -> int:
    """What a layer with latent attention keeps for later tokens, beside the keys and values that it makes for now."""
    size = torch.empty((), dtype=problem.torch_dtype).element_size()
    return problem.batch * problem.nk * (model.latent or 0) * size


# --- options --------------------------------------------------------------------------------------------------------


def _option(way: Way, machine: Machine, samples: Fit | None, phase: str, latent: int) -> Option:
    if way.reasons or way.work is None:
        return Option(way.name, way.provider, "refused", reasons=way.reasons, notes=way.notes)
    problem, work = way.problem, way.work
    if machine.memory_gib is not None and work.peak > machine.memory_gib * 2**30:
        why = f"needs {human(work.peak)} for one layer, the machine has {machine.memory_gib:g} GiB"
        return Option(way.name, way.provider, "refused", memory=work.peak, reasons=(why,), notes=way.notes)
    found = samples.efficiency(way.family, problem.dtype, problem.phase, way.kind) if samples is not None else None
    if found is None or "scores" in work.traffic:
        found = assumed(way, machine)
    guess = predict(work, machine.limits, problem.dtype, found, launch_ms=LAUNCH_MS[machine.kind])
    stays = ("q", "k and v", "out", "lse") if phase == "train" else () if latent else ("k and v",)
    kept = latent + sum(work.memory[name] for name in stays)
    option = Option(
        way.name,
        way.provider,
        "modelled",
        ms=guess.ms,
        low_ms=guess.low_ms,
        high_ms=guess.high_ms,
        modelled_ms=guess.ms,
        bound=guess.bound,
        memory=work.peak + latent,
        kept=kept,
        basis=f"efficiency {found.value:.2f} ({found.low:.2f} to {found.high:.2f}), {found.source}",
        notes=way.notes,
    )
    row = _measured(way, samples)
    if row is None or samples is None:
        return option
    basis = f"{row.rounds} rounds in {samples.source}; the model says {guess.ms:.3g} ms"
    return replace(
        option, status="measured", basis=basis, ms=row.median_ms, low_ms=row.p20_ms, high_ms=row.p80_ms
    )


def _measured(way: Way, samples: Fit | None) -> Row | None:
    """The last row of exactly this call."""
    if samples is None:
        return None
    tensor = way.name.endswith("mask tensor")
    ask = way.problem
    rows = [
        s.row
        for s in samples.samples
        if s.row.provider == way.provider
        and (s.problem.mask, s.problem.shape, s.problem.dtype, s.problem.phase)
        == (ask.mask, ask.shape, ask.dtype, ask.phase)
        and tensor == (s.row.provider == "sdpa" and s.kind == "masked")
    ]
    return rows[-1] if rows else None


def _written(mask: Mask, asked: str | None, lengths: str | None, length: int) -> str:
    """A mask as the benchmark takes it: by the name that was asked for where that means the same there."""
    usual = lengths in (None, default_distribution(length))
    return asked if asked is not None and usual else repr(mask)


def _group(problem: Problem, layers: Layers, options: Iterable[Option], text: str, seed: int) -> Group:
    ranked = sorted(options, key=lambda o: (o.ms is None, *_order(o.ms or 0.0, o.memory or 0)))
    seen = problem.mask.tiles(problem.queries, problem.nk, batch=problem.batch, heads=problem.heads)
    who = dict.fromkeys(o.provider for o in ranked if o.ms is not None)
    return Group(
        layers.kind,
        layers.count,
        text,
        problem.shape,
        seen.area,
        tuple(ranked),
        command(problem, text, who, seed=seed) if who and _can_be_asked(problem, text) else "",
    )


def _can_be_asked(problem: Problem, text: str) -> bool:
    """Whether a suite measures it, and its mask can be written on a line: bitmaps and long lists cannot."""
    return problem.queries == problem.nk and "<" not in text and len(text) <= _LONGEST_MASK


_LONGEST_MASK = 400


def command(problem: Problem, mask: str, who: Iterable[str], *, seed: int = 42) -> str:
    """The command that measures a problem.

    Args:
        problem: The call.
        mask: Its mask, as text or name.
        who: Names of providers.
        seed: Seed of what the mask draws.

    Returns:
        A line for a shell.

    Example:
        >>> from manyheads.mask import Causal
        >>> command(Problem(Causal(), 2048), "causal", ["flex"])
        'manyheads bench --suite masks --mask causal --length 2048 --heads 8 --width 64 --dtype float32 --provider flex'
    """
    heads = f"{problem.heads}" if problem.hkv == problem.heads else f"{problem.heads}:{problem.hkv}"
    words = ["manyheads", "bench", "--suite", "masks", "--mask", mask, "--length", str(problem.queries)]
    words += ["--heads", heads, "--width", str(problem.width), "--dtype", problem.dtype]
    words += ["--batch", str(problem.batch)] if problem.batch > 1 else []
    words += ["--phase", problem.phase] if problem.backward else []
    words += ["--device", "cuda"] if problem.on_gpu else []
    words += ["--seed", str(seed)] if seed != 42 else []
    words += [word for name in who for word in ("--provider", name)]
    return shlex.join(words)


def _totals(groups: Sequence[Group], machine: Machine) -> tuple[Total, ...]:
    """The best of each, and every provider that serves all kinds of layers, each with the best it has."""
    if any(group.best is None for group in groups):
        return ()
    best = [group.best for group in groups if group.best is not None]
    totals = [_total("the best of each", groups, best, machine)]
    for who in dict.fromkeys(o.provider for group in groups for o in group.options if o.ms is not None):
        each = [next((o for o in g.options if o.provider == who and o.ms is not None), None) for g in groups]
        if len(groups) > 1 and all(each):
            totals.append(_total(f"{who} in every layer", groups, [o for o in each if o is not None], machine))
    return tuple(sorted(totals, key=lambda total: _order(total.ms, total.memory)))


def _order(ms: float, memory: int) -> tuple[float, int, float]:
    """Faster is better; where times agree to two digits, less memory is."""
    return float(f"{ms:.2g}"), memory, ms


def _total(name: str, groups: Sequence[Group], options: Sequence[Option], machine: Machine) -> Total:
    counted = [(group.layers, option) for group, option in zip(groups, options, strict=True)]
    kept = sum(n * (o.kept or 0) for n, o in counted)
    memory = kept + max((o.memory or 0) - (o.kept or 0) for _, o in counted)
    times = [sum(n * (t or 0.0) for n, t in each) for each in (
        [(n, o.ms) for n, o in counted], [(n, o.low_ms) for n, o in counted], [(n, o.high_ms) for n, o in counted]
    )]  # fmt: skip
    fits = None if machine.memory_gib is None else memory <= machine.memory_gib * 2**30
    return Total(name, times[0], times[1], times[2], memory, fits)


def _notes(
    model: Architecture, length: int, phase: str, machine: Machine, results: str | Path | None, there: bool
) -> list[str]:
    notes = ["times and memory are those of attention alone: projections, other layers and weights are left out"]
    if model.positions is not None and length > model.positions:
        notes.append(f"the model was made for {model.positions} tokens; {length} need another rope or training")
    if not machine.measured:
        notes.append(f"{machine.name} is not here: published peaks and efficiencies, so every time is modelled")
    if results is not None and not there:
        notes.append(f"{results} is of another machine: its rows say nothing about {machine.name}")
    if phase == "decode":
        notes.append("one step: one new token for each sequence, against the whole cache")
        notes.append("unless measured, kernels share one guess for decoding: the order is that of the bytes they read")
        if model.latent:
            notes.append("queries go into the latent, so that the cache is read once for all heads")
    return notes

