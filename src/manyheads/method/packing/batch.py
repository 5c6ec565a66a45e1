"""Packed rows of tokens, and the way back from packed outputs to sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.mask import Document
from manyheads.method.packing.result import Packing


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rows of tokens in which several sequences lie one after the other.

    What is left of a row after its last sequence is padding, which forms a document of its own: it sees no
    sequence, and no sequence sees it.

    Attributes:
        input_ids: ``(B, S)`` int64.
        position_ids: ``(B, S)`` int64, from 0 in every sequence; 0 in the padding.
        sequence_ids: ``(B, S)`` int64, the index of each token's sequence; -1 in the padding.
        document_lengths: ``(B, n)`` int64, lengths of the documents of each row with its padding as the last one,
            filled with zeros; each row sums to ``S``.
        sequences: ``(m,)`` int64, the indices of the sequences, row by row; all results are in this order.
        starts: ``(m,)`` int64, where each sequence begins in the flattened batch.
        lengths: ``(m,)`` int64, how long it is.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequence_ids: Tensor
    document_lengths: Tensor
    sequences: Tensor
    starts: Tensor
    lengths: Tensor

    @property
    def waste(self) -> float:
        """Share of tokens that are padding."""
        return 1.0 - int(self.lengths.sum()) / max(1, self.input_ids.numel())

    # Which token may attend to which

    def mask(self) -> Document:
        """The mask that keeps sequences apart, for an attention call on ``(B, H, S, D)``."""
        with torch.inference_mode(False):  # the mask outlives the pass that it is made in
            return Document(self.document_lengths)

    def dense(self) -> Tensor:
        """The same mask as booleans ``(B, 1, S, S)``, ``M[i, j] = (sequence_ids[i] == sequence_ids[j])``."""
        return self.sequence_ids[:, None, :, None] == self.sequence_ids[:, None, None, :]

    def cu_seqlens(self) -> Tensor:
        """Where documents begin in the flattened batch ``(1, B * S)``, the end included; paddings are documents.

        Returns:
            ``(documents + 1,)`` int32, as variable-length attention kernels take it.
        """
        sizes = self.document_lengths.flatten()
        return torch.nn.functional.pad(sizes[sizes > 0].cumsum(0), (1, 0)).to(torch.int32)

    # From tokens to sequences

    def lay(self, values: Sequence[Any], fill: float) -> Tensor:
        """Lays out one value per token (labels, token types, weights) as the tokens are.

        Args:
            values: For every sequence of the data set, by index, a list or tensor of its length.
            fill: The value of padding, such as -100 for labels.

        Returns:
            ``(B, S)`` in the dtype of the values.

        Raises:
            ValueError: A sequence has another number of values than tokens.
        """
        return torch.from_numpy(_lay(values, self.sequences.numpy(), self, fill))

    def unpack(self, outputs: Tensor) -> list[Tensor]:
        """Cuts outputs per token into one tensor per sequence.

        Args:
            outputs: ``(B, S, ...)``.

        Returns:
            Views ``(length, ...)``, in the order of ``sequences``.
        """
        flat = self._flat(outputs)
        return [flat[start : start + size] for start, size in self._cuts()]

    def first(self, outputs: Tensor) -> Tensor:
        """Gathers the output at the first token of every sequence, where encoders put ``[CLS]``.

        Args:
            outputs: ``(B, S, ...)``.

        Returns:
            ``(m, ...)``, in the order of ``sequences``.
        """
        return self._flat(outputs)[self.starts.to(outputs.device)]

    def mean(self, outputs: Tensor, weights: Tensor | None = None) -> Tensor:
        """Averages outputs over the tokens of each sequence.

        Args:
            outputs: ``(B, S, ...)`` floating point.
            weights: ``(B, S)`` non-negative; a sequence without weight gives 0. Default: 1 everywhere.

        Returns:
            ``(m, ...)``, in the order of ``sequences``, float32 for narrower outputs.
        """
        flat = self._flat(outputs).to(torch.promote_types(outputs.dtype, torch.float32))
        owner = self._owner().to(flat.device)
        shape = (len(self.sequences) + 1, *flat.shape[1:])
        if weights is None:
            total = self.lengths.to(flat)
        else:
            scale = self._flat(weights).to(flat)
            flat = flat * scale.view(-1, *[1] * (flat.ndim - 1))
            total = scale.new_zeros(shape[0]).index_add(0, owner, scale)[:-1].clamp_min(torch.finfo(flat.dtype).tiny)
        summed = flat.new_zeros(shape).index_add(0, owner, flat)[:-1]
        return summed / total.view(-1, *[1] * (summed.ndim - 1))

    def loss(self, losses: Tensor, weights: Tensor | None = None, *, over: str = "sequences") -> Tensor:
        """Averages losses per token as an unpacked batch of the same sequences would.

        Args:
            losses: ``(B, S)``, one loss per token.
            weights: ``(B, S)``, such as 1 where a token was masked for prediction and 0 elsewhere. Default: 1
                on every real token.
            over: ``"sequences"``: the mean over the tokens of each sequence, then the mean over the sequences
                that have any weight; ``"tokens"``: the mean over all tokens at once.

        Returns:
            A scalar.

        Raises:
            ValueError: ``over`` is another word.

        Source:
            Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027, section 3.
        """
        if over not in ("sequences", "tokens"):
            raise ValueError(f"over: expected 'sequences' or 'tokens', got {over!r}")
        real = (self.sequence_ids >= 0).to(losses)
        weight = real if weights is None else weights.to(losses) * real
        if over == "tokens":
            return (losses * weight).sum() / weight.sum().clamp_min(torch.finfo(losses.dtype).tiny)
        means = self.mean(losses, weight)
        counted = self.mean(weight) > 0
        return means[counted].mean() if bool(counted.any()) else means.sum()

    def _flat(self, outputs: Tensor) -> Tensor:
        if outputs.shape[:2] != self.input_ids.shape:
            expected, got = tuple(self.input_ids.shape), tuple(outputs.shape)
            raise ValueError(f"outputs: expected (B, S, ...) with (B, S) = {expected}, got {got}")
        return outputs.flatten(0, 1)

    def _cuts(self) -> list[tuple[int, int]]:
        return list(zip(self.starts.tolist(), self.lengths.tolist(), strict=True))

    def _owner(self) -> Tensor:
        """Which result each token of the flattened batch adds to; padding adds to one beyond the last."""
        owner = torch.full((self.input_ids.numel(),), len(self.sequences))
        owner[_spread(self.starts.numpy(), self.lengths.numpy())] = torch.repeat_interleave(self.lengths)
        return owner


def collate(
    sequences: Sequence[Any],
    packing: Packing,
    *,
    rows: Sequence[int] | None = None,
    pad: int = 0,
    end_to_end: bool = False,
) -> PackedBatch:
    """Lays out the sequences of some rows of a packing.

    Args:
        sequences: Token ids of every sequence, by index: lists, arrays or tensors.
        packing: Which sequences share a row.
        rows: Which rows of the packing; all by default.
        pad: Token id of padding.
        end_to_end: Whether to lay the rows one after the other into a single one without any padding,
            ``(1, tokens)``. A ``Document`` mask needs no rows of equal length, so nothing is then computed in vain.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: A sequence has another length than in the packing, or a row is out of range.

    Example:
        >>> from manyheads.method.packing import greedy
        >>> tokens = [[5, 6, 7], [8], [9, 9]]
        >>> batch = collate(tokens, greedy([3, 1, 2], 4))
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([[5, 6, 7, 8], [9, 9, 0, 0]], [[0, 1, 2, 0], [0, 1, 0, 0]])
        >>> batch.mask()
        document([[3, 1], [2, 2]])
    """
    chosen = range(len(packing.packs)) if rows is None else rows
    if bad := [row for row in chosen if not 0 <= row < len(packing.packs)]:
        raise ValueError(f"rows: expected 0 to {len(packing.packs) - 1}, got {bad[0]}")
    packs = [packing.packs[row] for row in chosen]
    size = packing.capacity
    if end_to_end:
        packs = [tuple(index for pack in packs for index in pack)] if packs else []
        size = sum(packing.lengths[index] for pack in packs for index in pack)
    order = np.array([index for pack in packs for index in pack], dtype=np.int64)
    lengths = np.asarray(packing.lengths, dtype=np.int64)[order]
    depth = np.array([len(pack) for pack in packs], dtype=np.int64)
    row = np.repeat(np.arange(len(packs)), depth)
    place = np.arange(order.size) - np.repeat(depth.cumsum() - depth, depth)
    documents = np.zeros((len(packs), int(depth.max(initial=0)) + 1), dtype=np.int64)
    documents[row, place] = lengths
    starts = (documents.cumsum(1) - documents)[row, place] + row * size
    documents[np.arange(len(packs)), depth] = size - documents.sum(1)
    if not documents[:, -1:].any():
        documents = documents[:, :-1]
    where = _spread(starts, lengths)
    positions, owners = np.zeros(len(packs) * size, dtype=np.int64), np.full(len(packs) * size, -1)
    positions[where] = where - np.repeat(starts, lengths)
    owners[where] = np.repeat(order, lengths)
    shape = (len(packs), size)
    batch = PackedBatch(
        input_ids=torch.empty(shape, dtype=torch.int64),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        sequence_ids=torch.from_numpy(owners.reshape(shape)),
        document_lengths=torch.from_numpy(documents),
        sequences=torch.from_numpy(order),
        starts=torch.from_numpy(starts),
        lengths=torch.from_numpy(lengths),
    )
    batch.input_ids.copy_(batch.lay(sequences, pad))
    return batch


def _spread(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of all tokens of runs given by where they start and how long they are."""
    before = lengths.cumsum() - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def _lay(values: Sequence[Any], order: NDArray[np.int64], batch: PackedBatch, fill: float) -> NDArray[Any]:
    found = [np.asarray(values[index]) for index in order.tolist()]
    lengths = batch.lengths.numpy()
    for index, one, length in zip(order.tolist(), found, lengths.tolist(), strict=True):
        if one.shape != (length,):
            raise ValueError(f"sequence {index}: expected {length} values, got shape {one.shape}")
    flat = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    out = np.full(batch.input_ids.numel(), fill, dtype=flat.dtype)
    out[_spread(batch.starts.numpy(), lengths)] = flat
    return out.reshape(tuple(batch.input_ids.shape))
