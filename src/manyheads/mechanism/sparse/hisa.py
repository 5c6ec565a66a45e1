"""HISA: the indexer of DeepSeek Sparse Attention in two stages, blocks by their mean key, then their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.engine.result import Attn
from manyheads.mask import Mask
from manyheads.mechanism import exact
from manyheads.spec import Case, Spec, drawn, qkv

from .indexer import method
from .indexer.crossing import crossing
from .indexer.method import Index


@dataclass(frozen=True)
class HISA:
    """Sizes of the two stages.

    Attributes:
        block: Tokens of a block.
        blocks: Blocks whose tokens a query scores, the first and its own one among them.
        flat_below: Position in a document before which all tokens are scored instead; None for where that is faster
            (:mod:`manyheads.mechanism.sparse.indexer.crossing`). 0 for never.

    Raises:
        ValueError: Numbers out of range.

    Example:
        >>> HISA().block * HISA().blocks
        8192
    """

    block: int = 128
    blocks: int = 64
    flat_below: int | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        method.check_sizes(self, block=1, blocks=1)

    def call(self, keep: int) -> tuple[str, list[int]]:
        """Its name and the integers that the operator takes.

        Args:
            keep: Tokens to choose.

        Raises:
            ValueError: The candidate blocks hold fewer tokens than are to be kept.
        """
        if self.block * self.blocks < keep:
            held = f"{self.blocks} blocks of {self.block} tokens hold {self.block * self.blocks}"
            raise ValueError(f"keep: expected at most the tokens of the candidate blocks, got {keep}; {held}")
        return "hisa", [self.block, self.blocks, -1 if self.flat_below is None else self.flat_below]


_DEFAULT = HISA()


def hisa(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hi Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    index_w: Float[Tensor, "B Hi Nq"],
    keep: int = method.KEEP,
    config: HISA = _DEFAULT,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""Attention to the best tokens of the best blocks, without training: :func:`~manyheads.mechanism.sparse.dsa` with
    a cheaper indexer.

    $$J_{tb} = \sum_j w_{tj}\,\mathrm{ReLU}(q^I_{tj} \cdot \bar k^I_b), \qquad
    I_{ts} = \sum_j w_{tj}\,\mathrm{ReLU}(q^I_{tj} \cdot k^I_s) \text{ for } s \text{ in the best blocks}$$

    Work for one query falls from all earlier tokens to one in ``block`` of them and ``blocks * block`` more.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        index_q: (B, Hi, Nq, Di), queries of the indexer.
        index_k: (B, Nk, Di), its keys.
        index_w: (B, Hi, Nq), weights of its heads.
        keep: Tokens that each query reads, at most ``config.blocks * config.block``.
        config: Sizes of the stages.
        mask, scale, return_lse, backend: As for :func:`~manyheads.mechanism.sparse.dsa`.

    Returns:
        (B, Hq, Nq, Dv) in the dtype of ``v``, or :class:`manyheads.Attn` with lse (B, Hq, Nq).

    Raises:
        ValueError: For shapes that do not fit, naming the argument, or a ``keep`` out of range.
        TypeError: For wrong dtypes.
        UnsupportedError: For a mask other than causal, with or without documents.

    Conventions:
        The first block and the query's own one count within ``config.blocks``; with one block it is the own one.
        Blocks begin at the start of each document. With ``keep = config.blocks * config.block`` blocks alone decide,
        and their tokens are not scored: the block-sparse baseline of the paper. With candidates for every visible token
        the choice is that of ``dsa``.

    Source:
        HISA: Hierarchical Indexed Sparse Attention, arXiv 2603.28458.

    Example:
        >>> q = k = v = torch.ones(1, 1, 6, 8)
        >>> index = dict(index_q=torch.ones(1, 1, 6, 1), index_k=torch.tensor([[[0.], [0.], [9.], [1.], [0.], [0.]]]))
        >>> index["index_w"] = torch.ones(1, 1, 6)
        >>> sizes = HISA(block=2, blocks=2, flat_below=0)
        >>> selection(q, k, v, **index, keep=2, config=sizes)[0, 0, -1]      # only first and own block are candidates
        tensor([0, 1], dtype=torch.int32)
    """
    SPEC.check(q, k, v, causal=True, lse=return_lse)
    index = Index(index_q, index_k, index_w)
    return method.attend(q, k, v, method.choose(SPEC, q, k, index, keep, config, mask), scale, return_lse, backend)


def selection(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hi Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    index_w: Float[Tensor, "B Hi Nq"],
    keep: int = method.KEEP,
    config: HISA = _DEFAULT,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
) -> Int[Tensor, "B 1 Nq k"]:
    """The tokens that :func:`hisa` reads: ids (B, 1, Nq, keep), ascending, -1 after the last; arguments as there."""
    return method.choose(SPEC, q, k, Index(index_q, index_k, index_w), keep, config, mask)


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hi Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    index_w: Float[Tensor, "B Hi Nq"],
    keep: int = method.KEEP,
    config: HISA = _DEFAULT,
    mask: Mask | str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    chosen: Tensor | None = None,
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """Every score of blocks and tokens, query by query; then exact attention under the matrix of chosen pairs."""
    border = crossing(*_described(config, keep))

    def rule(q: Tensor, k: Tensor, w: Tensor, keep: int) -> Tensor:
        scores = method.plain_scores(q, k, w).masked_fill(~method.visible(q, k), -torch.inf)
        for row in scores:
            seen = int((row > -torch.inf).sum())
            if seen > border:
                i = seen - 1 - (k.shape[0] - q.shape[1])
                means = torch.stack([part.mean(0) for part in k[:seen].split(config.block)])
                blocks = method.plain_scores(q[:, i : i + 1], means, w[:, i : i + 1])
                blocks[0, 0] = torch.inf if config.blocks > 1 else blocks[0, 0]
                blocks[0, -1] = torch.inf
                kept = method.best(blocks, config.blocks)[0].repeat_interleave(config.block)
                row[:seen].masked_fill_(~kept[:seen], -torch.inf)
        return method.best(scores, keep)

    seen = method.pairs(chosen, rule, SPEC, q, k, Index(index_q, index_k, index_w), keep, mask)
    return exact.reference(q, k, v, mask=seen, scale=scale, return_lse=return_lse)


def flops(case: Case) -> int:
    """Counts the operations of a forward call: scores of block means and of candidates, and attention to those kept.

    Args:
        case: The call.

    Returns:
        ``2 * B * (Hi * Di * scored + Hq * (D + Dv) * kept pairs)``.
    """
    config, keep = case.options.get("config", _DEFAULT), case.options.get("keep", method.KEEP)
    (heads, width), border = case.options["index_q"].shape[1::2], crossing(*_described(config, keep))
    most = config.blocks * config.block
    scored = sum(n if n <= border else -(-n // config.block) + min(n, most) for n in method.lengths(SPEC, case))
    return 2 * case.q.shape[0] * heads * width * scored + method.attention_flops(SPEC, case)


def _described(config: HISA, keep: int) -> tuple[str, int, list[int]]:
    name, options = config.call(keep)
    return name, keep, options


SPEC = Spec(
    "hisa",
    fn=hisa,
    reference=reference,
    selection=selection,
    paper="HISA: Hierarchical Indexed Sparse Attention, arXiv 2603.28458",
    inputs=qkv(
        mask=lambda size: "causal" if size.causal else "full",
        keep=7,
        config=HISA(block=5, blocks=3, flat_below=20),
        index_q=drawn("BHQD", salt=1, wide=False),
        index_k=drawn("BND", salt=2, wide=False),
        index_w=drawn("BHQ", salt=3, wide=False),
    ),
    gates={"index_q": "BHQD", "index_k": "BND", "index_w": "BHQ"},
    backends=("reference", "blocked"),  # "triton" too, which the tests of `gather` hold: interpreted it takes minutes
    supports={"causal_self", "causal_cross", "gqa", "value_width", "lse", "backward"},
    invariances=("packed", "batch", "heads", "causal_selection"),
    axes={"carrier": "best tokens of best blocks", "kernel": "exp", "estimator": "average", "execution": "token ids"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_hisa::test_a_short_prefix_is_taken_whole",
        2: "test_hisa::test_where_the_candidates_hold_the_prefix_the_choice_is_flat",
        3: "test_hisa::test_all_blocks_give_the_flat_choice",
        4: "test_hisa::test_first_and_own_block_are_candidates_and_nothing_lies_ahead",
        5: "test_hisa::test_blocks_of_one_token_give_the_flat_choice_up_to_the_forced_tokens",
    },
)
