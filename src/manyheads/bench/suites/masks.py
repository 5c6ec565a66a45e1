"""Suite ``masks``: twelve static masks and two of random blocks, by length, head layout, dtype and phase.

Names of cases are ``<mask>-<length>-<dtype>``, with ``-<heads>x<width>`` for other than 8 heads of width 64,
``-batch<n>`` and the phase where it is not forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from manyheads.bench import providers
from manyheads.bench.measure import attention_rows
from manyheads.bench.providers.base import MASK_PAIRS
from manyheads.bench.providers.ours import REFERENCE_PAIRS
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.suites import real
from manyheads.bench.suites.patterns import (
    BLOCKS,
    KEPT,
    MASKS,
    SIZES,
    Sparse,
    lengths_from,
    likely_area,
    resolve,
    sparse,
)
from manyheads.bench.workload import PASSES, PHASES, Captured, Problem, read_captured
from manyheads.common.errors import unknown
from manyheads.mask import Mask
from manyheads.mask.longca import STATIC

LONG_FROM = 2048
"""Tokens from which FlexAttention is worth its compilation, and a boolean mask no longer worth waiting for."""
COMPILE_S = {"cpu": 3.0, "cuda": 8.0}
"""What compiling FlexAttention for one mask takes, roughly."""
SPEED = {
    "cpu": {"float32": 180e9, "bfloat16": 500e9, "float16": 150e9, "float64": 40e9},
    "cuda": {"float32": 30e12, "bfloat16": 300e12, "float16": 300e12, "float64": 20e12},
}
"""Operations per second that estimates of time assume, before anything is measured."""


@dataclass(frozen=True)
class Heads:
    """A head layout.

    Attributes:
        heads: Query heads.
        kv_heads: Key heads.
        width: Head width.
    """

    heads: int = 8
    kv_heads: int = 8
    width: int = 64

    @property
    def suffix(self) -> str:
        """What it adds to the name of a case."""
        grouped = f"{self.heads}:{self.kv_heads}" if self.kv_heads != self.heads else f"{self.heads}"
        return "" if self == Heads() else f"-{grouped}x{self.width}"


MHA, GQA = Heads(), Heads(kv_heads=2)
"""On a processor: the 64:64 and 64:8 heads of the benchmark's authors, fewer and narrower."""
GPU_MHA, GPU_GQA = Heads(64, 64, 128), Heads(64, 8, 128)


@dataclass(frozen=True)
class Part:
    """Some masks at some lengths, all combinations of which are cases.

    Attributes:
        lengths: Tokens.
        layouts: Head layouts.
        phases: Phases.
        dtypes: Names of dtypes.
        masks: Names of masks.
        real: Whether the input is what an encoder's layers received, instead of drawn.
    """

    lengths: tuple[int, ...] = ()
    layouts: tuple[Heads, ...] = (MHA,)
    phases: tuple[str, ...] = ("forward",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    masks: tuple[str, ...] = MASKS
    real: bool = False


KEEPING = tuple(Sparse(name, kept, size).text for name in BLOCKS for size in SIZES[name] for kept in KEPT)
"""Random blocks of every size, at every share that is kept."""
BOTH = ("forward", "forward+backward")
PARTS = {
    "quick": (Part((1024,)),),
    "default": (
        Part((8192,), dtypes=("float32",), masks=STATIC),
        Part((8192,), dtypes=("bfloat16",)),
        Part((1024,), dtypes=("float32",)),
        Part((1024,), (GQA,), dtypes=("bfloat16",)),
        Part((1024,), phases=("forward+backward",), dtypes=("float32",)),
        Part((1024,), dtypes=("float32",), real=True),
    ),
    "full": (
        Part((1024, 2048, 4096, 8192, 16_384, 32_768)),
        Part((1024, 4096, 16_384), (GQA,)),
        Part((1024, 4096, 8192), (MHA, GQA), ("forward+backward",)),
        Part((8192,), masks=KEEPING),
        Part((1024, 4096), phases=BOTH, real=True),
    ),
}
HALF = ("bfloat16",)
APART = ("forward", "backward")
GPU_PARTS = {
    "quick": (Part((4096,), (GPU_GQA,), dtypes=HALF),),
    "default": (
        Part((16_384,), (GPU_GQA,), APART, HALF),
        Part((4096,), (GPU_MHA,), dtypes=HALF),
        Part((4096,), dtypes=HALF, real=True),
    ),
    "full": (
        Part((1024, 2048, 4096, 8192, 16_384, 32_768, 49_152), (GPU_MHA, GPU_GQA), BOTH, HALF),
        Part((65_536, 131_072), (GPU_GQA,), BOTH, HALF),
        Part((16_384,), (GPU_MHA, GPU_GQA), ("backward",), HALF),
        Part((4096, 16_384), (GPU_GQA,), BOTH, ("float16", "float32")),
        Part((16_384, 32_768), (GPU_GQA,), BOTH, HALF, KEEPING),
        Part((4096, 16_384), phases=BOTH, dtypes=HALF, real=True),
    ),
}
"""What each level measures. On a GPU shapes and masks are those of the benchmark's authors: D 128, bfloat16."""


def cases(options: Options) -> list[Case]:
    """Every mask, length, layout, dtype and phase of the level; with ``--input`` on captured layers instead."""
    for mask in options.masks:
        resolve(mask, 1024, options.seed)
    for phase in options.phases:
        if phase not in PHASES:
            raise unknown("phase", phase, PHASES)
    chosen = tuple(head_layout(text, options) for text in options.heads)
    found: dict[str, Case] = {}
    shaped = bool(options.heads or options.width or options.batch > 1)  # real input has the shape that it has
    for part in (GPU_PARTS if options.on_gpu else PARTS)[options.level]:
        if part.real and shaped:
            continue
        asked = replace(
            part,
            masks=options.masks or part.masks,
            lengths=options.lengths or part.lengths,
            layouts=chosen or tuple(_resized(layout, options) for layout in part.layouts),
            phases=options.phases or part.phases,
            dtypes=options.dtypes or part.dtypes,
        )
        for case_ in _captured(asked, options) if options.input is not None or part.real else _drawn(asked, options):
            found.setdefault(case_.name, case_)
    return list(found.values())


def head_layout(text: str, options: Options) -> Heads:
    """Reads a head layout from the command line.

    Args:
        text: ``"8"`` or ``"8:2"``, query heads to key heads.
        options: For the width.

    Returns:
        The layout.

    Raises:
        ValueError: Not numbers, or query heads that are no multiple of key heads.

    Example:
        >>> head_layout("32:8", Options(width=128))
        Heads(heads=32, kv_heads=8, width=128)
    """
    parts = text.split(":")
    numbers = [int(part) for part in parts if part.isdigit() and int(part) > 0]
    if len(numbers) != len(parts) or len(parts) > 2 or numbers[0] % numbers[-1]:
        raise ValueError(f"heads: expected 8, or 8:2 with the first a multiple of the second, got {text!r}")
    usual = GPU_MHA.width if options.on_gpu else MHA.width
    return Heads(numbers[0], numbers[-1], options.width or usual)


def case(
    mask: str,
    length: int,
    dtype: str,
    options: Options,
    *,
    heads: int = 8,
    kv_heads: int | None = None,
    width: int = 64,
    phase: str = "forward",
) -> Case:
    """One mask on drawn input, all providers.

    Args:
        mask: Name of a mask, or the text of any.
        length: Tokens.
        dtype: Name of the dtype.
        options: Level, seed, device and chosen providers.
        heads: Query heads.
        kv_heads: Key heads; as many as query heads by default.
        width: Head width.
        phase: ``"forward"``, ``"backward"`` or ``"forward+backward"``.

    Returns:
        The case. Below ``--full`` a long sequence goes through FlexAttention, which has to be compiled for each
        mask, and a short one through the quadratic providers.
    """
    layout = Heads(heads, heads if kv_heads is None else kv_heads, width)
    usual = layout == MHA and phase == "forward"
    everybody = providers.STANDARD if options.level == "full" else _worthwhile(mask, length, options, usual)
    who = options.chosen(everybody)
    name = f"{mask}-{length}-{dtype}{layout.suffix}"
    name += f"-batch{options.batch}" if options.batch > 1 else ""
    name += f"-{phase}" if phase != "forward" else ""
    joining = _volunteers(length, options, usual)

    def run(context: Context) -> list[Row]:
        problem = Problem(
            resolve(mask, length, options.seed, layout.heads),
            length,
            batch=options.batch,
            heads=layout.heads,
            kv_heads=layout.kv_heads,
            width=layout.width,
            dtype=dtype,
            phase=phase,
            seed=options.seed,
            device=options.device,
        )
        lasting = ("manyheads", "sdpa") if options.level == "full" else ()
        row = Row("masks", name, "-", lengths=lengths_from(mask, length))
        return attention_rows(context, row, problem, who, volunteers=joining, with_memory=lasting)

    work = 2 * length**2 * layout.heads * layout.width * PASSES[phase] * options.batch
    took = seconds((*who, *joining), work, mask, length, dtype, options)
    return Case("masks", name, run, took, (*who, *joining))


def seconds(who: Sequence[str], work: float, mask: str, length: int, dtype: str, options: Options) -> float:
    """A rough duration of one case, for the dry run and the progress bar.

    Args:
        who: Providers.
        work: Operations without a mask.
        mask: Name or text of the mask.
        length: Tokens.
        dtype: Name of the dtype.
        options: Device and budget.
    """
    kind = "cuda" if options.on_gpu else "cpu"
    speed = SPEED[kind][dtype]
    spent = compiling = 0.0
    for name in who:
        plain = mask in ("full", "causal")
        if name in ("fla", "performer") and not plain:
            continue  # they refuse other masks
        masked = name in ("sdpa", "reference", "x-transformers") and not plain
        if (masked and length**2 > MASK_PAIRS) or (name == "reference" and 8 * length**2 > REFERENCE_PAIRS):
            continue
        slower = {"sdpa": 2.0, "reference": 8.0, "fla": 8.0, "performer": 4.0}.get(name, 1.0)
        share = 1.0 if masked else likely_area(mask)
        one = work * share * slower / speed + 1e-4
        spent += 2 * one + min(max(options.seconds, 5 * one), 50 * one)
        compiling += COMPILE_S[kind] if name == "flex" else 0.0
    return 0.3 + compiling + spent + length / 40_000


def _resized(layout: Heads, options: Options) -> Heads:
    return replace(layout, width=options.width) if options.width else layout


def _worthwhile(mask: str, length: int, options: Options, usual: bool) -> tuple[str, ...]:
    """Who takes part where minutes count."""
    if options.on_gpu:
        return ("manyheads", "manyheads-triton", "sdpa", "flex")
    if length < LONG_FROM:
        plainly = usual and (options.level == "quick" or mask in ("full", "causal"))
        return ("manyheads", "sdpa", "reference") if plainly else ("manyheads", "sdpa")
    # random blocks cost so much to skip that torch's dense kernel under a boolean mask may be the faster way
    dense = mask in ("full", "causal") or sparse(mask) is not None
    return ("manyheads", "sdpa", "flex") if dense else ("manyheads", "flex")


def _volunteers(length: int, options: Options, usual: bool) -> tuple[str, ...]:
    """Installed packages, where nobody was named: everywhere on a GPU, on a processor where they are quick."""
    if options.providers or options.level == "quick":
        return ()
    wanted = options.on_gpu or options.level == "full" or (usual and length < LONG_FROM)
    return providers.volunteers(options.device) if wanted else ()


def _drawn(part: Part, options: Options) -> list[Case]:
    return [
        case(
            mask,
            length,
            dtype,
            options,
            heads=layout.heads,
            kv_heads=layout.kv_heads,
            width=layout.width,
            phase=phase,
        )
        for layout in part.layouts
        for phase in part.phases
        for length in part.lengths
        for dtype in part.dtypes
        for mask in part.masks
    ]


def _captured(part: Part, options: Options) -> list[Case]:
    """Layers of the file that was named; else of the encoder that the tests and the packing suite use."""
    if options.input is None:
        count = {"quick": 1, "default": 1, "full": real.LAYERS}[options.level]
        first = (real.LAYERS - count + 1) // 2
        sources = [real.Layer(number) for number in range(first, first + count)]
        lengths = part.lengths
    else:
        layers = read_captured(options.input)
        picked = {"quick": [len(layers) // 2], "default": [0, len(layers) // 2, len(layers) - 1]}
        some = [layers[i] for i in dict.fromkeys(picked.get(options.level, range(len(layers))))]
        most = min(layer.q.shape[2] for layer in some)
        for length in options.lengths:
            if length > most:
                raise ValueError(f"length: {options.input.name} holds {most} tokens a layer, got {length}")
        sources = [real.Layer(layer.name, layer) for layer in some]
        lengths = options.lengths or (most,)
    return [
        _captured_case(source, mask, length, dtype, phase, options)
        for source in sources
        for phase in part.phases
        for length in lengths
        for dtype in part.dtypes
        for mask in options.masks or part.masks
    ]


def _captured_case(source: real.Layer, mask: str, length: int, dtype: str, phase: str, options: Options) -> Case:
    usual = ("manyheads", "sdpa") if options.on_gpu or options.input is None else ("manyheads", "sdpa", "reference")
    who = options.chosen(providers.STANDARD if options.level == "full" else usual)
    name = f"{mask}-{source.name}-{length}-{dtype}" + (f"-{phase}" if phase != "forward" else "")

    def run(context: Context) -> list[Row]:
        row = Row("masks", name, "-", lengths=lengths_from(mask, length))
        try:
            layer: Captured = source.read(length)
        except (ImportError, OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            return [row.replace(provider=provider, status="refused", reason=why) for provider in who]
        drawn: Mask = resolve(mask, length, options.seed, layer.q.shape[1])
        problem = layer.problem(drawn, length, dtype, options.seed, phase=phase, device=options.device)
        inputs = layer.tensors(length, problem.torch_dtype, options.device)
        row = row.replace(input=f"captured from {layer.source}, {layer.name}")
        return attention_rows(context, row, problem, who, inputs=inputs)

    work = 2 * length**2 * 12 * 32 * PASSES[phase]
    return Case("masks", name, run, seconds(who, work, mask, length, dtype, options), who)


SUITE = Suite(
    "masks",
    "Attention under 14 masks of long-context training, by length, head layout, dtype and phase.",
    cases,
    providers.names(),
)
