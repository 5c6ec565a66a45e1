"""Measures configurations of the kernels on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manyheads.bench import device as devices
from manyheads.bench.timing import interleave
from manyheads.cli import measure_entries, measure_gather, measure_scan
from manyheads.engine import configs
from manyheads.engine.configs import Config
from manyheads.engine.gather.launch import KERNELS as LISTED
from manyheads.engine.tiled import ALiBi, Bias, Pair, Term, tiled
from manyheads.engine.tiled import configs as tiled_configs
from manyheads.lab.search import Place
from manyheads.testing import assert_within_budget, sample_qkv

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
MASK = "causal"


def architecture(device: str) -> str:
    """The column of the table that serves a GPU.

    Args:
        device: ``"cuda"`` or ``"cuda:<number>"``.

    Returns:
        One of ``configs.ARCHITECTURES``.
    """
    if getattr(torch.version, "hip", None) is not None:
        return configs.family("hip", torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return configs.family("cuda", 10 * major + minor)


@dataclass
class Gpu:
    """Checks and times configurations by calling the engine with them.

    A backward is timed whole, with one of its two kernels changed.

    Attributes:
        device: Where.
        tokens: Queries and keys of the timed problem, causal.
        programs: About how many rows of heads, so that the GPU is full: batch times heads.
        budget_s: Seconds for the rounds of one configuration in a heat; a final takes three times as long.
    """

    device: str = "cuda"
    tokens: int = 8192
    programs: int = 32
    budget_s: float = 0.3
    _problems: dict[Any, Any] = field(default_factory=dict, repr=False)

    def header(self) -> dict[str, Any]:
        """What the times depend on besides the device and the versions."""
        return {"tokens": self.tokens, "heads": self.programs, "mask": MASK}

    def check(self, place: Place, config: Config) -> str:
        """Compares a configuration with the reference on a small, odd problem."""
        try:
            with configs.using({place.key: config}):
                if place.kernel in tiled_configs.KERNELS:
                    _agrees(place, self.device)
                else:
                    other: Any = _other(place)
                    other.agrees(place, self.device, _DTYPES[place.itemsize])
        except AssertionError as error:
            return f"wrong: {error}"
        except Exception as error:  # a launch fails in many ways, and none of them may end the run
            words = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {words[0]}"
        return ""

    def times(self, place: Place, some: Sequence[Config], *, final: bool = False) -> list[float]:
        """Median milliseconds of each configuration, interleaved, with cold caches."""
        problem = self._problem(place)
        calls: dict[str, Callable[[], object]] = {}
        for number, config in enumerate(some):
            calls[str(number)] = _under(place, config, problem)
        times = interleave(
            calls,
            budget_s=self.budget_s * (3 if final else 1),
            rounds=(7, 100 if final else 30),
            watch=devices.stopwatch(self.device),
            before=devices.eviction(self.device),
        )
        return [times[str(number)].median_ms for number in range(len(some))]

    def _problem(self, place: Place) -> Callable[[], object]:
        ours = place.kernel in tiled_configs.KERNELS
        key = (ours, place.kernel in ("forward", "listed", "entries_forward"), place.width, place.itemsize, place.kind)
        if key not in self._problems:
            self._problems.clear()  # one at a time: each holds gigabytes
            tokens = self.tokens if place.itemsize == 2 and place.kind != "heavy" else max(self.tokens // 4, 256)
            heads = max(1, self.programs * 128 // max(place.width, 64) // 2)
            if ours:
                self._problems[key] = _call(place, self.device, (2, heads, heads), (tokens, tokens))
            elif _other(place) is not measure_scan:
                self._problems[key] = _other(place).problem(place, tokens, _DTYPES[place.itemsize], self.device)
            else:
                drawn = sample_qkv(2, heads, tokens, width=place.width, dtype=_DTYPES[place.itemsize], seed=7)
                self._problems[key] = measure_scan.call(place, tuple(t.to(self.device) for t in drawn))
        return self._problems[key]


def _other(place: Place) -> Any:
    """What measures the kernels of a row that is not one of ``tiled`` by query tiles."""
    if place.kernel in measure_entries.KERNELS:
        return measure_entries
    return measure_gather if place.kernel in LISTED else measure_scan


def _under(place: Place, config: Config, problem: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with configs.using({place.key: config}):
            return problem()

    return call


def _call(
    place: Place, device: str, shape: tuple[int, int, int], lengths: tuple[int, int], backend: str = "triton"
) -> Callable[[], object]:
    """The engine's forward or backward on a fresh problem."""
    (batch, heads, kv_heads), (queries, keys) = shape, lengths
    drawn = sample_qkv(
        batch, heads, queries, kv_heads=kv_heads, keys=keys, width=place.width, dtype=_DTYPES[place.itemsize], seed=7
    )
    q, k, v = (t.to(device) for t in drawn)
    options = options_of(place.kind, heads, queries, keys, q)
    if place.kernel == "forward":
        return lambda: tiled(q, k, v, MASK, backend=backend, **options)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = tiled(q, k, v, MASK, backend=backend, **options)
    assert isinstance(out, Tensor)
    dout = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def options_of(kind: str, heads: int, queries: int, keys: int, like: Tensor) -> dict[str, Any]:
    """What makes a call one of its kind.

    Args:
        kind: As in ``configs``.
        heads, queries, keys: Of the problem.
        like: Where the option's tensors go, and their dtype.

    Returns:
        Keyword arguments of the engine.

    Example:
        >>> options_of("plain", 2, 8, 8, torch.zeros(1))
        {}
    """
    if kind == "plain":
        return {}
    bias: Term | Bias = ALiBi(torch.logspace(0, -8, heads, base=2.0).to(like.device))
    if kind == "heavy":
        values = torch.linspace(-1, 1, queries * keys).view(1, 1, queries, keys)
        bias = bias + Pair(values.to(like.device, like.dtype))
    return {"bias": bias}


def _agrees(place: Place, device: str) -> None:
    shape, (queries, keys) = (2, 4, 2), (200, 333)
    dtype = _DTYPES[place.itemsize]
    q, k, v = sample_qkv(2, 4, queries, kv_heads=2, keys=keys, width=place.width, dtype=dtype, seed=11)

    def results(backend: str, where: str, kind: torch.dtype) -> list[Tensor]:
        leaves = a, b, c = tuple(t.to(where, kind).requires_grad_() for t in (q, k, v))
        bias = options_of(place.kind, shape[1], queries, keys, a)
        out = tiled(a, b, c, MASK, backend=backend, **bias)
        assert isinstance(out, Tensor)
        if place.kernel == "forward":
            return [out.detach()]
        return list(torch.autograd.grad(out.double().square().sum(), leaves))

    exact = results("reference", "cpu", torch.float64)
    plain = results("reference", "cpu", dtype)
    got = results("triton", device, dtype)
    names = ("out",) if place.kernel == "forward" else ("dq", "dk", "dv")
    for name, a, r, s in zip(names, got, exact, plain, strict=True):
        assert_within_budget(a.cpu(), r.double(), s, what=name)
