"""One declarative object beside each mechanism; tests, benchmark, documents and adapters are driven by it."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.common.errors import UnsupportedError, unknown

CAPABILITIES: Mapping[str, str] = MappingProxyType(
    {
        "noncausal_self": "every token may look both ways in one sequence",
        "causal_self": "a token looks at itself and earlier tokens of one sequence",
        "noncausal_cross": "queries and keys of different lengths, no order between them",
        "causal_cross": "queries are the last tokens of a longer sequence of keys",
        "mask": "any mask of the algebra",
        "gqa": "fewer key heads than query heads",
        "value_width": "values of another width than keys",
        "positions": "logical positions given by the caller",
        "key_padding": "padded keys, which may hold NaN",
        "bias": "terms added to the scores",
        "softcap": "capped scores",
        "sink": "a logit per head that takes weight and gives nothing",
        "dropout": "dropped weights",
        "lse": "the logarithm of the normaliser of every row",
        "backward": "gradients of queries, keys and values",
        "decode": "few queries over a state or cache",
        "context_parallel": "a sequence spread over several devices",
    }
)
"""What a mechanism can declare, and what each word means. What is not declared is refused."""

INVARIANCES: Mapping[str, str] = MappingProxyType(
    {
        "packed": "packed documents equal a loop over them",
        "padding": "what padded keys hold is invisible",
        "batch": "permuting the batch permutes the result",
        "heads": "permuting the heads permutes the result",
        "split": "splitting the sequence anywhere and carrying the state equals one call",
        "causal_selection": "later keys do not change which earlier keys are selected",
        "own_selected": "every query selects the key at its own position",
        "first_selected": "every query selects the first key that it may see",
    }
)
"""What a mechanism can promise; the conformance suite tests each promise."""

_OF_SELECTIONS = {"causal_selection", "own_selected", "first_selected"}
BACKENDS = ("reference", "blocked", "sdpa", "triton")
AXES = ("carrier", "kernel", "estimator", "execution")
LETTERS: Mapping[str, str] = MappingProxyType(
    {
        "B": "batch",
        "H": "query heads",
        "G": "key heads",
        "N": "tokens of keys",
        "Q": "tokens of queries",
        "D": "width of queries and keys",
        "E": "width of values",
    }
)
"""Axes that a gate may have, in the notation of ``Spec.gates``."""

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Size:
    """How large and how sharp a case should be.

    Attributes:
        batch: Batch size B.
        heads: Query heads Hq.
        queries: Query tokens Nq.
        kv_heads: Key heads Hkv; default Hq.
        keys: Key tokens Nk; default Nq.
        width: Width D of queries and keys.
        value_width: Width Dv of values; default D.
        deviation: Standard deviation of the logits.
        dtype: Dtype of the tensors.
        device: Where they live.
        seed: Seed of the draw; default the seed of the day.
        causal: Whether the call shall let no query see later keys.
    """

    batch: int = 2
    heads: int = 2
    queries: int = 33
    kv_heads: int | None = None
    keys: int | None = None
    width: int = 16
    value_width: int | None = None
    deviation: float = 1.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int | None = None
    causal: bool = False


class Case(NamedTuple):
    """One call of a mechanism.

    Attributes:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        options: The keyword arguments of the call.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


def qkv(**options: Any) -> Callable[[Size], Case]:
    """Builds the usual input factory: normal queries, keys and values, and fixed keyword arguments.

    Args:
        options: Keyword arguments of every call; one that is a function of the size is called with it.

    Returns:
        A function from a :class:`Size` to a :class:`Case`.

    Example:
        >>> case = qkv(mask="causal", window=lambda size: size.queries // 2)(Size(queries=12))
        >>> case.q.shape, case.options
        (torch.Size([2, 2, 12, 16]), {'mask': 'causal', 'window': 6})
    """

    def inputs(size: Size) -> Case:
        from manyheads.testing import sample_qkv

        drawn = sample_qkv(**{f.name: getattr(size, f.name) for f in fields(size) if f.name != "causal"})
        chosen = {
            name: value(size) if callable(value) and not isinstance(value, type) else value
            for name, value in options.items()
        }
        return Case(*drawn, chosen)

    return inputs


def drawn(
    axes: str, through: Callable[[Tensor], Tensor] | None = None, *, salt: int = 0, wide: bool = True
) -> Callable[[Size], Tensor]:
    """Builds a gate for :func:`qkv`: normal numbers over some axes, through a function.

    Args:
        axes: Letters out of ``LETTERS``, such as ``"BHN"``.
        through: Makes a gate of standard normal numbers (float64), such as ``logsigmoid``; the identity by default.
        salt: Gates of one case with the same axes take different numbers, to be drawn differently.
        wide: Keep float32 where queries are in half precision, as log decays want.

    Returns:
        A function from a :class:`Size` to the tensor, the same for the same seed.

    Raises:
        ValueError: A letter that does not exist.

    Example:
        >>> case = qkv(decay=drawn("BHN", torch.nn.functional.logsigmoid))(Size(queries=5))
        >>> case.options["decay"].shape, bool((case.options["decay"] < 0).all())
        (torch.Size([2, 2, 5]), True)
    """
    _known("axis letter", axes, LETTERS)

    def draw(size: Size) -> Tensor:
        from manyheads.testing import seed_of_the_day

        seed = seed_of_the_day() if size.seed is None else size.seed
        generator = torch.Generator().manual_seed((seed << 8) + 1 + salt)
        shape = [sizes_of(size)[letter] for letter in axes]
        gate = torch.randn(*shape, generator=generator, dtype=torch.float64)
        half = size.dtype.itemsize == 2
        return (gate if through is None else through(gate)).to(
            size.device, torch.float32 if half and wide else size.dtype
        )

    return draw


def sizes_of(size: Size) -> dict[str, int]:
    """From each letter of ``LETTERS`` to the length of that axis.

    Args:
        size: The size of a case.

    Returns:
        Lengths.

    Example:
        >>> sizes_of(Size(batch=3, heads=4, kv_heads=2, queries=7))
        {'B': 3, 'H': 4, 'G': 2, 'N': 7, 'Q': 7, 'D': 16, 'E': 16}
    """
    return {
        "B": size.batch,
        "H": size.heads,
        "G": size.heads if size.kv_heads is None else size.kv_heads,
        "N": size.queries if size.keys is None else size.keys,
        "Q": size.queries,
        "D": size.width,
        "E": size.width if size.value_width is None else size.value_width,
    }


def _no_formula(case: Case) -> int:
    raise NotImplementedError("this mechanism gives no formula")


@dataclass(frozen=True, eq=False)
class Spec:
    """What a mechanism is, what it declares, and where each claim is tested.

    Args:
        slug: Its name, lower case with hyphens.
        fn: The mechanism: ``fn(q, k, v, *, ...)``.
        reference: The same function, plain and dense, taking the same arguments but for ``backend``. Where there is
            a ``selection`` it also takes ``chosen=None``: what that returned, to use instead of choosing again.
        paper: Where it comes from: authors, title, identifier.
        inputs: From a size to a typical call; see :func:`qkv`.
        supports: Names out of ``CAPABILITIES``, or a mapping from them to booleans.
        hf_name: Its name in Hugging Face transformers, or None; never containing "flash", which
            transformers takes for the name of a downloadable kernel, and no "/".
        gates: Tensor arguments of ``fn`` beside q, k and v, and their axes as ``LETTERS``: ``{"decay": "BHN"}``.
            ``inputs`` draws each of them (see :func:`drawn`); the floating ones take gradients where ``backward`` is
            declared.
        step: One token: ``step(q (B, H, D), k (B, Hkv, D), v (B, Hkv, Dv), state=None, *, ...) -> (out, state)``, its
            gates without the token axis. Given exactly when ``decode`` is declared; ``fn`` then takes ``state`` and
            ``return_state``.
        selection: For a mechanism that selects by content: ``selection(q, k, v, *, ...)``, taking what ``fn`` takes but
            ``backend`` and ``return_lse``, and returning what ``fn`` visits: a :class:`manyheads.mask.TileLayout`,
            token ids ``(B|1, 1|Hkv|Hq, Nq, K)`` with -1 for none, a NamedTuple ``(layout, order)`` whose key column c
            is key ``order[b, h, c]``, or pairs, bool ``(B|1, 1|Hkv|Hq, Nq, Nk)``, where nothing else fits, as for
            packed documents that were padded. References turn any into a matrix by
            :func:`manyheads.mechanism.select.pairs`.
        backends: The backends that it can run on, out of ``BACKENDS``; empty when it takes no ``backend=``.
        invariances: Names out of ``INVARIANCES``.
        axes: Short words for its carrier, kernel, estimator, execution.
        flops: Floating-point operations of a forward call.
        bytes: Bytes that a forward call has to move.
        evidence: From the number of a check in the catalogue to the ids of the tests that hold it,
            such as ``"test_exact::test_all_blocks_is_dense"``.

    Raises:
        ValueError: A name that does not exist, a slug or Hugging Face name of the wrong form, ``decode`` without a
            ``step`` or a ``step`` without ``decode``, a promise about selections without a ``selection``.
        TypeError: ``fn``, ``reference``, ``inputs``, ``step``, ``selection`` and the formulas must be callable.

    Example:
        >>> from torch.nn.functional import scaled_dot_product_attention as sdpa
        >>> spec = Spec("plain", fn=sdpa, reference=sdpa, paper="none", inputs=qkv(), supports={"backward"})
        >>> spec.declares("backward"), spec.declares("gqa")
        (True, False)
    """

    slug: str
    fn: Callable[..., Any] = field(kw_only=True)
    reference: Callable[..., Any] = field(kw_only=True)
    paper: str = field(kw_only=True)
    inputs: Callable[[Size], Case] = field(kw_only=True)
    supports: frozenset[str] | Mapping[str, bool] | Iterable[str] = field(kw_only=True)
    gates: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    step: Callable[..., Any] | None = field(default=None, kw_only=True)
    selection: Callable[..., Any] | None = field(default=None, kw_only=True)
    hf_name: str | None = field(default=None, kw_only=True)
    backends: tuple[str, ...] = field(default=(), kw_only=True)
    invariances: tuple[str, ...] = field(default=(), kw_only=True)
    axes: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    flops: Callable[[Case], int] = field(default=_no_formula, kw_only=True)
    bytes: Callable[[Case], int] = field(default=_no_formula, kw_only=True)
    evidence: Mapping[int, str | Iterable[str]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.slug):
            raise ValueError(f"slug: expected lower-case words joined by hyphens, got {self.slug!r}")
        for name in ("fn", "reference", "inputs", "flops", "bytes"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}: expected a callable, got {type(getattr(self, name)).__name__}")
        if self.hf_name is not None and ("flash" in self.hf_name.lower() or "/" in self.hf_name):
            raise ValueError(f"hf_name: may contain neither 'flash' nor '/', got {self.hf_name!r}")
        given = self.supports
        if isinstance(given, Mapping):
            _known("capability", given, CAPABILITIES)
            given = (name for name, yes in given.items() if yes)
        put = functools.partial(object.__setattr__, self)
        put("supports", frozenset(given))
        put("backends", tuple(self.backends))
        put("invariances", tuple(self.invariances))
        _known("capability", self.supports, CAPABILITIES)
        _known("backend", self.backends, BACKENDS)
        _known("invariance", self.invariances, INVARIANCES)
        _known("axis", self.axes, AXES)
        put("axes", MappingProxyType(dict(self.axes)))
        put("gates", MappingProxyType(dict(self.gates)))
        for name, letters in self.gates.items():
            _known(f"axis letter of gate {name!r}", letters, LETTERS)
        for name in ("step", "selection"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name}: expected a callable or None, got {type(getattr(self, name)).__name__}")
        if self.selection is None and (promised := sorted(_OF_SELECTIONS & set(self.invariances))):
            raise ValueError(f"selection: none is given, but {', '.join(promised)} is promised of what it selects")
        if ("decode" in self.supports) != (self.step is not None):
            which = "'decode' is declared" if self.step is None else "it is given, but 'decode' is not declared"
            raise ValueError(f"step: {which}; a mechanism that decodes gives both")
        put("evidence", MappingProxyType(_test_ids(self.evidence)))

    def declares(self, capability: str) -> bool:
        """Says whether a capability is declared.

        Args:
            capability: A name out of ``CAPABILITIES``.

        Returns:
            Whether this mechanism supports it.

        Raises:
            ValueError: No capability has this name.
        """
        _known("capability", (capability,), CAPABILITIES)
        return capability in self.supports

    def require(self, capability: str) -> None:
        """Refuses a capability that is not declared.

        Args:
            capability: A name out of ``CAPABILITIES``.

        Raises:
            UnsupportedError: Not declared; the message names the mechanism, the feature and who supports it.
            ValueError: No capability has this name.
        """
        if self.declares(capability):
            return
        others = sorted(s.slug for s in registry().values() if s.declares(capability))
        raise UnsupportedError(
            f"{self.slug} does not support {capability} ({CAPABILITIES[capability]}); "
            f"supported by: {', '.join(others) or 'no mechanism'}"
        )

    def check(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **asked: Any) -> None:
        """Refuses a call that needs something undeclared; a mechanism calls it first.

        Args:
            q: (B, Hq, Nq, D).
            k: (B, Hkv, Nk, D).
            v: (B, Hkv, Nk, Dv).
            causal: Whether the call lets no query see later keys.
            asked: Arguments named as capabilities (``lse=return_lse, key_padding=key_padding, ...``), each
                asked for unless it is None, False or zero.

        Raises:
            UnsupportedError: The call needs a capability that is not declared.
        """
        order = "causal" if causal else "noncausal"
        self.require(f"{order}_{'self' if q.shape[2] == k.shape[2] else 'cross'}")
        if q.shape[1] != k.shape[1]:
            self.require("gqa")
        if k.shape[3] != v.shape[3]:
            self.require("value_width")
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            self.require("backward")
        for capability, value in asked.items():
            if isinstance(value, Tensor) or (value is not None and value is not False and value != 0):
                self.require(capability)


class Evidence(NamedTuple):
    """The tests of a system that is not a mechanism, such as a tool or a training method.

    Attributes:
        slug: Its slug in the catalogue.
        table: From the number of a check to the ids of the tests that hold it.
        object: Dotted path of what a user imports.
        unbuilt: Parts of the system that do not exist yet, in words; while there are any it does not count as working.
    """

    slug: str
    table: Mapping[int, tuple[str, ...]]
    object: str
    unbuilt: tuple[str, ...] = ()


_EVIDENCE: dict[str, Evidence] = {}
_REGISTERED: dict[str, Spec] = {}


def evidence(
    slug: str, table: Mapping[int, str | Iterable[str]], *, object: str, unbuilt: Iterable[str] = ()
) -> Evidence:
    """Registers which tests hold the numbered checks of a system that has no :class:`Spec`.

    Call it in a module named ``evidence`` beside the code: the catalogue imports those modules and no others.

    Args:
        slug: Slug of the system in the catalogue.
        table: From the number of a check to one test id or several.
        object: Dotted path of what a user imports, such as ``"manyheads.method.packing"``.
        unbuilt: Parts that do not exist yet, in words. A system that lacks parts does not work, whatever its checks.

    Returns:
        What was registered.

    Raises:
        ValueError: A check number that is not a positive integer or a test id of the wrong form.

    Example:
        >>> evidence("packing", {1: "test_packing::test_each_once"}, object="manyheads.method.packing").slug
        'packing'
    """
    _EVIDENCE[slug] = Evidence(slug, _test_ids(table), object, tuple(unbuilt))
    return _EVIDENCE[slug]


def evidence_tables() -> dict[str, Evidence]:
    """Returns the registered evidence of every system without a :class:`Spec`, by slug."""
    for name in _modules():
        if name.rpartition(".")[2] == "evidence":
            importlib.import_module(name)
    return dict(_EVIDENCE)


def register(spec: Spec) -> Spec:
    """Adds a mechanism that lives outside this package to the registry.

    Args:
        spec: Its declaration.

    Returns:
        The same object.

    Raises:
        ValueError: Another mechanism has this slug.
    """
    if registry().get(spec.slug, spec) is not spec:
        raise ValueError(f"spec: another mechanism is called {spec.slug!r}")
    _REGISTERED[spec.slug] = spec
    return spec


def registry() -> dict[str, Spec]:
    """Returns every known mechanism by slug: those of this package, then those registered by others.

    The modules below ``manyheads.mechanism`` are imported at the first call; a module declares its mechanisms
    as ``SPEC`` or, when there are several, as a tuple ``SPECS``.

    Returns:
        A new dictionary from slug to :class:`Spec`.

    Example:
        >>> "exact" in registry()
        True
    """
    return {**_builtin(), **_REGISTERED}


def find(slug: str) -> Spec:
    """Returns one mechanism.

    Args:
        slug: Its name.

    Returns:
        Its declaration.

    Raises:
        ValueError: No mechanism has this name; the nearest are suggested.
    """
    known = registry()
    if slug not in known:
        raise unknown("mechanism", slug, known)
    return known[slug]


@functools.cache
def _builtin() -> Mapping[str, Spec]:
    found: dict[str, Spec] = {}
    for name in _modules("mechanism"):
        for spec in _declared(importlib.import_module(name)):
            if found.setdefault(spec.slug, spec) is not spec:
                raise ValueError(f"{name}: another mechanism is called {spec.slug!r}")
    return MappingProxyType(found)


def _declared(module: ModuleType) -> tuple[Spec, ...]:
    if hasattr(module, "SPEC"):
        return (module.SPEC,)
    return tuple(getattr(module, "SPECS", ()))


def _modules(below: str = "") -> list[str]:
    """Names of the modules of this package below a subpackage, without importing any."""
    names: list[str] = []

    def walk(folder: Path, package: str) -> None:
        for found in pkgutil.iter_modules([str(folder)]):
            names.append(f"{package}.{found.name}")
            if found.ispkg:
                walk(folder / found.name, names[-1])

    root = Path(__file__).parent / below
    if root.is_dir():
        walk(root, ".".join(filter(None, ("manyheads", below))))
    return sorted(names)


def _known(kind: str, names: Iterable[str], options: Iterable[str]) -> None:
    options = tuple(options)
    for name in names:
        if name not in options:
            raise unknown(kind, name, options)


def _test_ids(table: Mapping[int, str | Iterable[str]]) -> dict[int, tuple[str, ...]]:
    out = {}
    for number, ids in table.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"evidence: expected check numbers from 1, got {number!r}")
        out[number] = (ids,) if isinstance(ids, str) else tuple(ids)
        for test in out[number]:
            if not re.fullmatch(r"[\w./-]*test_\w+(\.py)?(::\w+)+", test):
                raise ValueError(f"evidence: expected 'test_file::test_name', got {test!r}")
    return out
