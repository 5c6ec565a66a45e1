"""One measurement: a flat record, the same for every suite."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

SCHEMA = 1
"""Version of the file format; a reader refuses a newer one."""

GATES = ("green", "red", "lossy", "unchecked")
STATUSES = ("measured", "refused", "failed")
CACHES = ("warm", "cold")


@dataclass(frozen=True)
class Row:
    """One line of a results file.

    A field that does not apply is ``None`` and is left out of the file. Times are milliseconds, memory is
    mebibytes (2**20 bytes), shares and fractions are between 0 and 1.

    Attributes:
        suite: Name of the suite.
        case: Name of the case in its suite; rows of one case were run interleaved on the same inputs.
        provider: Who did the work.
        phase: ``"forward"``, ``"forward+backward"``, ``"build"`` or another word of the suite.
        status: ``"measured"``, ``"refused"`` (see ``reason``) or ``"failed"`` (see ``reason``).
        reason: Why nothing was measured.
        shape: The problem in words, ``"1x8x8192x64"`` for batch x heads x tokens x width.
        length: Tokens, for plots over length.
        dtype: ``"float32"``, ``"bfloat16"`` ...
        layout: How query and key heads are grouped: ``"mha"``, ``"gqa 8:2"`` or ``"mqa 8:1"`` (query : key heads).
        mask: Canonical text of the mask, data left out.
        lengths: What the lengths of packed documents were drawn from: ``"pile"``, ``"prolong64k"``,
            ``"prolong512k"``, ``"1-8 blocks of 1024"``.
        input: Where q, k, v came from: ``"normal"``, ``"normal, logit deviation 8"``, ``"captured <file>"``.
        device: Where it ran: ``"cpu"`` or the name of the GPU.
        threads: Threads of the CPU that the row was allowed; 1 is a single-core run.
        cache: ``"warm"`` (the same inputs again) or ``"cold"`` (the last-level cache was emptied before each
            sample).
        version: Version of the provider's package.
        median_ms: Median over interleaved rounds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        rounds: Number of rounds.
        noisy: Whether the spread is too large for the median to be trusted.
        first_ms: The first call apart: compilation, layout, probing.
        peak_mib: Peak memory of one call beyond q, k, v and results, in a process of its own; mask tensors and
            layouts are counted.
        process_mib: Peak memory of that whole process.
        unique_tiles: Distinct bitmaps of a layout.
        error: Largest absolute difference from float64.
        error_norm: Frobenius norm of the difference over that of the float64 result.
        error_limit: What ``error`` may be.
        gate: ``"green"``, ``"red"``, ``"lossy"`` (the provider approximates: its error is shown, and its place is the
            speed-error plane) or ``"unchecked"``; only green rows have a ratio.
        pairs: Exact number of visible (query, key) pairs over batch and heads.
        flops: Floating-point operations that these pairs need.
        gflops: Those over the median time, in 1e9 per second.
        of_matrix_rate: ``gflops`` as a share of the measured matrix rate in this dtype.
        of_copy_rate: Bytes of inputs and results over time, as a share of the measured copy bandwidth.
        of_exp_rate: Exponentials over time (one for each visible pair, two with gradients, which recompute the scores),
            as a share of the measured rate of float32 exponentials.
        density: Share of tiles visited.
        area: Share of pairs visible.
        baseline: The provider that ``ratio`` divides.
        ratio: Time of the baseline over time of this row (above 1 is faster).
        overhead_us: Microseconds above the bare call, the median of differences within a round.
        rate: Items per second, where the work has items.
        rate_unit: What the items are: ``"sentences/s"``.
        waste: Share of tokens computed for nothing.
        agreement: Smallest cosine between this row's results and the baseline's.
        bar: In ``targets``: the bar in words.
        target: In ``targets``: what the bar asks, with its unit and direction.
        measured: In ``targets``: the number that was found.
        verdict: In ``targets``: ``"met"``, ``"missed"`` or ``"not measured"``.
        task: In ``quality``: what a model was trained on.
        score: In ``quality``: how well it did on held-out examples, in ``score_unit``.
        score_unit: ``"accuracy"``, ``"bits a byte"`` or ``"relative error"`` (squared, over the
            variance of the targets).
        better: Whether a ``"higher"`` or a ``"lower"`` score is better.
        chance: The score of a model that has learned nothing but frequencies.
        parameters: Numbers that the model learned.
        steps: Updates of the training.
        learning_rate: Its highest learning rate.
        curve: Mean training loss of each twentieth of the steps.
        ranks: In ``parallel``: processes, or planned devices.
        deal: In ``parallel``: how tokens were dealt to them.
        imbalance: In ``parallel``: visible pairs of the busiest rank over the mean.
        sent_mib: In ``parallel``: most that a rank sent, or all ranks together in a plan.
        overlap: In ``parallel``: share of the smaller of compute and communication that the other one hid.
        setting: In ``sparse``: what the mechanism was told to keep, such as ``"10%"`` of the blocks or ``"0.001"``, its
            threshold.
        mass: In ``sparse``: share of dense attention's weight that lies on the kept keys.
        recall: In ``sparse``: share of the keys with the largest weights that are kept.
        selection: In ``sparse``: time of choosing as a share of the whole.
        speed: In ``sparse``: time of dense attention, the faster of ours and torch's, over that of this row, which
            approximates it: worth nothing without ``error_norm`` beside it.
        note: Anything else a reader must know.
        seed: Seed of the inputs.
    """

    suite: str
    case: str
    provider: str
    phase: str = "forward"
    status: str = "measured"
    reason: str | None = None
    shape: str | None = None
    length: int | None = None
    dtype: str | None = None
    layout: str | None = None
    mask: str | None = None
    lengths: str | None = None
    input: str | None = None
    device: str | None = None
    threads: int | None = None
    cache: str | None = None
    version: str | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    noisy: bool | None = None
    first_ms: float | None = None
    peak_mib: float | None = None
    process_mib: float | None = None
    unique_tiles: int | None = None
    error: float | None = None
    error_norm: float | None = None
    error_limit: float | None = None
    gate: str = "unchecked"
    pairs: int | None = None
    flops: int | None = None
    gflops: float | None = None
    of_matrix_rate: float | None = None
    of_copy_rate: float | None = None
    of_exp_rate: float | None = None
    density: float | None = None
    area: float | None = None
    baseline: str | None = None
    ratio: float | None = None
    overhead_us: float | None = None
    rate: float | None = None
    rate_unit: str | None = None
    waste: float | None = None
    agreement: float | None = None
    bar: str | None = None
    target: str | None = None
    measured: float | None = None
    verdict: str | None = None
    task: str | None = None
    score: float | None = None
    score_unit: str | None = None
    better: str | None = None
    chance: float | None = None
    parameters: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    curve: tuple[float, ...] | None = None
    ranks: int | None = None
    deal: str | None = None
    imbalance: float | None = None
    sent_mib: float | None = None
    overlap: float | None = None
    setting: str | None = None
    mass: float | None = None
    recall: float | None = None
    selection: float | None = None
    speed: float | None = None
    note: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Holds the rules that no row may break: known words, and no speed-up without fidelity."""
        if self.status not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES}, got {self.status!r}")
        if self.gate not in GATES:
            raise ValueError(f"gate: expected one of {GATES}, got {self.gate!r}")
        if self.cache not in (None, *CACHES):
            raise ValueError(f"cache: expected one of {CACHES}, got {self.cache!r}")
        if self.ratio is not None and self.gate != "green":
            raise ValueError(f"ratio: a row whose gate is {self.gate} reports no speed-up")
        if self.speed is not None and self.error_norm is None:
            raise ValueError("speed: a row that approximates says by how much in error_norm")
        if self.status != "measured" and not self.reason:
            raise ValueError(f"reason: a {self.status} row says why")

    def replace(self, **changes: Any) -> Row:
        """Returns the row with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Writes the row as one line of JSON, empty fields left out.

        Example:
            >>> Row("masks", "causal", "sdpa", median_ms=1.5).to_json()
            '{"kind": "row", "suite": "masks", "case": "causal", "provider": "sdpa", "phase": "forward", \
"status": "measured", "median_ms": 1.5, "gate": "unchecked"}'
        """
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return json.dumps({"kind": "row", **values}, allow_nan=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """Reads a row back; fields that this version does not know are an error.

        Args:
            values: The parsed line.

        Raises:
            ValueError: A field is unknown or missing, or breaks a rule of the row.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "kind"}
        if extra := sorted(set(given) - known):
            raise ValueError(f"row: unknown fields {extra}; was the file written by a newer version?")
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"row: {error}") from None


def against(row: Row, baseline: Row) -> Row:
    """Adds the ratio of a baseline's time to this row's, if both may be believed.

    Args:
        row: The row that claims to be faster.
        baseline: The row that it is compared with, of the same case.

    Returns:
        The row with ``baseline`` named, and ``ratio`` set only when both rows were measured and both gates
        are green.

    Example:
        >>> ours = Row("masks", "causal", "ours", median_ms=2.0, gate="green")
        >>> theirs = Row("masks", "causal", "sdpa", median_ms=5.0, gate="green")
        >>> against(ours, theirs).ratio
        2.5
        >>> against(ours.replace(gate="red"), theirs).ratio is None
        True
    """
    believed = row.gate == baseline.gate == "green" and row.median_ms and baseline.median_ms
    ratio = baseline.median_ms / row.median_ms if believed else None  # type: ignore[operator]
    return row.replace(baseline=baseline.provider, ratio=ratio)
