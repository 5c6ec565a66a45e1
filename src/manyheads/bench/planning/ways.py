"""The ways in which one layer's attention can be computed, and what speaks against each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.bench import providers
from manyheads.bench.planning.architecture import Architecture, Layers
from manyheads.bench.planning.fit import kind_of, work_of
from manyheads.bench.planning.machines import NOW, Machine
from manyheads.bench.planning.model import Efficiency, Work, count
from manyheads.bench.providers import form_of
from manyheads.bench.workload import Problem
from manyheads.mask import Causal, Full, Mask, Window

WIDEST = 256
"""Widest head of torch's fused kernels on a GPU."""


@dataclass(frozen=True)
class Way:
    """One way of computing a layer's attention.

    Attributes:
        name: In words.
        provider: The provider that the benchmark measures it with.
        problem: The call that it makes; not always the layer's own (padding, a rolling cache).
        work: What it has to do, ``None`` where it was not counted because it cannot run.
        family: Whose efficiency it has, the best match first: names of providers in results files.
        kind: Kind of mask, for the efficiency.
        reasons: Why it cannot run; empty if it can.
        notes: What else to know.
    """

    name: str
    provider: str
    problem: Problem
    work: Work | None
    family: tuple[str, ...]
    kind: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Needs(NamedTuple):
    """What a model's layers ask of an attention function besides its mask."""

    softcap: float | None = None
    sinks: bool = False


def ways(problem: Problem, layers: Layers, model: Architecture, machine: Machine) -> list[Way]:
    """Every way to compute a layer's attention on a machine.

    Args:
        problem: The layer's call, on the machine's kind of device.
        layers: The layer.
        model: The model, for what its layers ask for besides a mask.
        machine: The machine.

    Returns:
        The ways in no order, those that cannot run with their reasons.
    """
    needs = Needs(model.softcap, model.sinks)
    found = [
        *_ours(problem, needs, machine),
        *_sdpa(problem, needs, machine),
        _flex(problem, needs, machine),
        *_varlen(problem, needs, machine),
        *_padded(problem, needs, machine),
    ]
    slides = layers.kind == "sliding" and problem.mask == layers.mask
    if problem.queries == 1 and slides and layers.reach is not None and layers.reach < problem.nk:
        found.append(_rolling(problem, layers.reach, needs, machine))
    if problem.queries == 1 and model.latent:
        found = [replace(way, work=_values_in_keys(way.problem, way.work)) for way in found]
        found.append(_expanded(problem, model, machine))
    return found


def assumed(way: Way, machine: Machine) -> Efficiency:
    """The efficiency where nothing was measured.

    Args:
        way: The way.
        machine: The machine.

    Returns:
        A stated assumption with a wide range.
    """
    if "scores" in (way.work.traffic if way.work else ()):
        key = "plain path"
    elif way.kind == "decode":
        key = "decode"
    elif way.kind == "masked" and way.family[0] == "sdpa":
        key = "sdpa, mask tensor"
    else:
        key = next(name for name in (*way.family, "manyheads-blocked") if (machine.kind, name) in _ASSUMED)
    value, low, high, why = _ASSUMED[machine.kind, key]
    return Efficiency(value, low, high, 0, f"assumed: {why}")


def cache_of(problem: Problem, machine: Machine) -> int:
    """Bytes of cache that the keys and values of one head can use while rows of several heads run at once.

    Args:
        problem: The call.
        machine: The machine.

    Returns:
        On a CPU a core's own cache; on a GPU the shared cache over the key heads that are in flight.
    """
    if machine.kind == "cpu":
        return machine.cache
    rows = max(1, -(-problem.queries // 128) * (problem.heads // problem.hkv))
    return machine.cache // max(1, min(problem.batch * problem.hkv, -(-machine.units // rows)))


# --- ours -----------------------------------------------------------------------------------------------------------


def _ours(problem: Problem, needs: Needs, machine: Machine) -> Iterator[Way]:
    taken, refusals, notes = _asked(problem, needs, machine)
    if taken == "sdpa" and plain_path(problem, machine):
        notes = ("its plain path keeps all scores: say backend='blocked'", *notes)
    yield _one_of_ours(f"manyheads ({taken})", "manyheads", taken, problem, needs, machine, (), notes)
    for backend in ("triton", "blocked"):
        if backend != taken:
            name, provider = f"manyheads, backend={backend!r}", f"manyheads-{backend}"
            reasons = refusals[backend] or _refusal(provider, problem)
            yield _one_of_ours(name, provider, backend, problem, needs, machine, reasons, ())


def _asked(
    problem: Problem, needs: Needs, machine: Machine
) -> tuple[str, dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Which backend takes the call on the machine, the reasons of all, and notes: what ``explain`` says of it.

    For another machine it is asked about tensors without storage, on a device that has no kernels; what the backends
    say of that device is left out again.
    """
    from manyheads.dispatch import explain

    now = machine.source == NOW and machine.kind == "cpu"
    q, k, v = _unallocated(problem, "cpu" if now else "meta")
    sink = torch.zeros(problem.heads, device=q.device) if needs.sinks else None
    said = explain(q, k, v, mask=problem.mask, softcap=needs.softcap, sink=sink)
    easy = torch.zeros((), dtype=torch.float16, device="meta").expand(1, 1, 64, 64)
    of_the_device = {} if now else explain(easy, easy, easy).refusals
    refusals = {
        name: tuple(r for r in said.refusals.get(name, ()) if r not in of_the_device.get(name, ()))
        for name in ("sdpa", "triton", "blocked")
    }
    if machine.kind == "cpu":
        refusals["triton"] = refusals["triton"] or _refusal("manyheads-triton", problem)
    notes = tuple(note for note in said.notes if note.startswith("warning"))
    taken = said.taken if now else next(name for name, reasons in refusals.items() if not reasons)
    return taken, refusals, notes


def _one_of_ours(
    name: str,
    provider: str,
    backend: str,
    problem: Problem,
    needs: Needs,
    machine: Machine,
    reasons: tuple[str, ...],
    notes: tuple[str, ...],
) -> Way:
    if backend == "sdpa":
        work = None if reasons else _counted("sdpa", problem, machine)
        return Way(name, provider, problem, work, ("manyheads", "sdpa"), kind_of(problem), reasons, notes)
    engine = f"manyheads-{backend}"
    work = None if reasons else work_of(engine, problem, cache=cache_of(problem, machine), kind=machine.kind)
    more = ("capped scores take separate products and passes",) if needs.softcap and backend == "blocked" else ()
    kind = "decode" if problem.queries == 1 else "masked"
    usual = backend == ("blocked" if machine.kind == "cpu" else "triton")  # what rows of plain "manyheads" ran on
    family = (engine, "manyheads") if usual else (engine,)
    return Way(name, provider, problem, work, family, kind, reasons, more + notes)


def _unallocated(problem: Problem, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors with the shapes of the call and the storage of one number."""
    one = torch.zeros((), dtype=problem.torch_dtype, device=device, requires_grad=problem.backward)
    q = one.expand(problem.batch, problem.heads, problem.queries, problem.width)
    k = one.expand(problem.batch, problem.hkv, problem.nk, problem.width)
    return q, k, one.expand(problem.batch, problem.hkv, problem.nk, problem.dv)


# --- torch ----------------------------------------------------------------------------------------------------------


def _sdpa(problem: Problem, needs: Needs, machine: Machine) -> Iterator[Way]:
    whole = kind_of(problem) != "masked" and problem.mask.text in ("full", "causal")
    asks = _unknown_to_torch(needs)
    word = "is_causal" if problem.mask.text == "causal" and problem.queries > 1 else "no mask"
    if whole:
        work = None if asks else _counted("sdpa", problem, machine)
        yield Way(f"sdpa, {word}", "sdpa", problem, work, ("sdpa", "manyheads"), kind_of(problem), asks)
    else:
        hidden = f"it would compute something else: {_short(problem.mask)} is more than the order of tokens"
        yield Way("sdpa, is_causal", "sdpa", problem, None, ("sdpa",), "whole", (*asks, hidden))
    if problem.mask.text == "full" or (problem.queries == 1 and whole):
        return
    # the same pairs in words that torch has none for, so that its adapter answers for a tensor
    spelt = problem if not whole else replace(problem, mask=problem.mask & Window(left=problem.nk))
    reasons = asks or _refusal("sdpa", spelt)
    work = None
    if not reasons:
        work = count(problem, dense=True, cache=cache_of(problem, machine))
        work = _with_scores(problem, work) if plain_path(problem, machine) else work
    kind = "decode" if problem.queries == 1 else "masked"
    yield Way("sdpa, mask tensor", "sdpa", problem, work, ("sdpa",), kind, reasons, _scores_note(problem, machine))


def _flex(problem: Problem, needs: Needs, machine: Machine) -> Way:
    reasons = _refusal("flex", problem)
    notes = ["compiled once for each mask and length"]
    notes += ["the soft cap goes into its score_mod"] if needs.softcap else []
    notes += ["sinks are applied to its output afterwards, from its lse"] if needs.sinks else []
    work = None if reasons else work_of("flex", problem, cache=cache_of(problem, machine), kind=machine.kind)
    return Way("flex", "flex", problem, work, ("flex",), kind_of(problem), reasons, tuple(notes))


def _varlen(problem: Problem, needs: Needs, machine: Machine) -> Iterator[Way]:
    """Torch's packed attention: worth a line only where there are documents and a GPU."""
    form = form_of(problem.mask)
    if machine.kind != "gpu" or form is None or form.lengths is None or problem.queries == 1:
        return
    reasons = _unknown_to_torch(needs) or _refusal("varlen", problem)
    work = None if reasons else work_of("varlen", problem, cache=cache_of(problem, machine), kind="gpu")
    yield Way("varlen_attn", "varlen", problem, work, ("varlen", "sdpa"), "whole", reasons)


def _padded(problem: Problem, needs: Needs, machine: Machine) -> Iterator[Way]:
    """Documents as rows of a batch, padded to the longest: what packing saves."""
    form = form_of(problem.mask)
    if form is None or form.lengths is None or len(form.lengths) < 2 or problem.queries != problem.nk:
        return
    longest, documents = max(form.lengths), len(form.lengths)
    if form.plain or (form.left is None and form.right in (None, 0)):
        mask: Mask = Causal() if form.causal else Full()
    else:
        return  # a window inside documents: padded, it would need a mask tensor of its own
    rows = replace(problem, mask=mask, queries=longest, keys=None, batch=problem.batch * documents)
    waste = 1 - sum(form.lengths) / (documents * longest)
    reasons = _unknown_to_torch(needs)
    notes = [f"{documents} documents, {waste:.0%} of the tokens are padding"]
    notes += [] if form.causal else ["a padding mask is needed besides"]
    work = None if reasons else _counted("sdpa", rows, machine)
    yield Way(
        "padded documents, sdpa", "sdpa", rows, work, ("sdpa", "manyheads"), kind_of(rows), reasons, tuple(notes)
    )


def _rolling(problem: Problem, reach: int, needs: Needs, machine: Machine) -> Way:
    """A cache that keeps the window only."""
    kept = replace(problem, mask=Full(), keys=reach)
    reasons = _unknown_to_torch(needs)
    work = None if reasons else _counted("sdpa", kept, machine)
    note = (f"the cache keeps the last {reach} of {problem.nk} tokens",)
    return Way("rolling cache, sdpa", "sdpa", kept, work, ("sdpa", "manyheads"), "decode", reasons, note)


def _values_in_keys(problem: Problem, work: Work | None) -> Work | None:
    """In the latent form, values are a part of the keys: they are neither stored nor read from memory a second time."""
    if work is None:
        return None
    share = problem.width / (problem.width + problem.dv)

    def less(amounts: Mapping[str, int]) -> dict[str, int]:
        return {what: int(n * share) if what == "k and v" else n for what, n in amounts.items()}

    return replace(work, traffic=less(work.traffic), memory=less(work.memory))


def _expanded(problem: Problem, model: Architecture, machine: Machine) -> Way:
    """Keys and values of every head kept, instead of the latent that they are made of."""
    whole = replace(problem, kv_heads=model.kv_heads, width=model.width, value_width=model.value_width)
    note = ("keeps keys and values of every head instead of the latent", *_scores_note(whole, machine))
    work = _counted("sdpa", whole, machine)
    return Way("expanded keys and values, sdpa", "sdpa", whole, work, ("sdpa",), "decode", (), note)


# --- shared ---------------------------------------------------------------------------------------------------------


def plain_path(problem: Problem, machine: Machine) -> bool:
    """Whether ``scaled_dot_product_attention`` has no fused kernel for these widths and falls back to plain products.

    Args:
        problem: The call.
        machine: Where it runs.

    Returns:
        True on a CPU for values of another width than keys, on a GPU for heads wider than its kernels.
    """
    if machine.kind == "cpu":
        return problem.width != problem.dv
    return max(problem.width, problem.dv) > WIDEST


def _counted(provider: str, problem: Problem, machine: Machine) -> Work:
    work = work_of(provider, problem, cache=cache_of(problem, machine), kind=machine.kind)
    return _with_scores(problem, work) if plain_path(problem, machine) else work


def _with_scores(problem: Problem, work: Work) -> Work:
    """The plain path: every pair, its scores written and read by the products, the mask and the softmax."""
    cells = problem.batch * problem.heads * problem.queries * problem.nk
    return replace(
        work,
        computed=cells,
        computed_flops=problem.flops(cells),
        exponentials=problem.exps(cells),
        traffic={**work.traffic, "scores": problem.exps(1) * _PASSES * 4 * cells},
        memory={**work.memory, "scores": 2 * 4 * cells},
    )


_PASSES = 8


def _scores_note(problem: Problem, machine: Machine) -> tuple[str, ...]:
    if not plain_path(problem, machine):
        return ()
    widths = f"width {problem.width}" + (f" and {problem.dv}" if problem.dv != problem.width else "")
    return (f"{widths}: no fused kernel of torch takes this, so all scores are kept",)


def _unknown_to_torch(needs: Needs) -> tuple[str, ...]:
    found = ["it has no soft cap"] if needs.softcap else []
    return tuple(found + (["it has no sink logits"] if needs.sinks else []))


def _refusal(provider: str, problem: Problem) -> tuple[str, ...]:
    reason = providers.get(provider).refuse(problem)
    return () if reason is None else (reason,)


def _short(mask: Mask) -> str:
    text = repr(mask)
    return text if len(text) <= 60 else mask.text


_PUBLISHED = (
    "between FlashAttention-2 (35%) and FlashAttention-3 (75% of the matrix rate of an H100, arXiv 2407.08608)"
)
_COMMITTED = "as the committed runs of a processor with AMX"
_ASSUMED: dict[tuple[str, str], tuple[float, float, float, str]] = {
    ("gpu", "sdpa"): (0.5, 0.35, 0.75, _PUBLISHED),
    ("gpu", "sdpa, mask tensor"): (0.3, 0.2, 0.5, "a mask to read, and no kernel of the newest generation"),
    ("gpu", "varlen"): (0.45, 0.3, 0.75, _PUBLISHED),
    ("gpu", "flex"): (0.4, 0.3, 0.65, "85 to 90% of FlashAttention-2, as its authors report"),
    ("gpu", "manyheads-triton"): (0.4, 0.25, 0.65, "as other Triton kernels"),
    ("gpu", "manyheads-blocked"): (0.1, 0.05, 0.25, "separate products and passes, bound by memory"),
    ("gpu", "plain path"): (0.6, 0.3, 0.9, "passes over scores in memory"),
    ("gpu", "decode"): (0.6, 0.4, 0.85, "a share of the memory bandwidth"),
    ("cpu", "sdpa"): (0.7, 0.5, 1.2, _COMMITTED),
    ("cpu", "sdpa, mask tensor"): (0.6, 0.4, 0.95, _COMMITTED),
    ("cpu", "flex"): (0.3, 0.2, 0.8, _COMMITTED),
    ("cpu", "manyheads-blocked"): (0.55, 0.4, 1.0, _COMMITTED),
    ("cpu", "plain path"): (0.6, 0.3, 0.9, "passes over scores in memory"),
    ("cpu", "decode"): (0.5, 0.25, 0.9, "a share of the copy bandwidth"),
}
"""Efficiency, its range and why, by kind of machine and family, for where nothing was measured."""
