"""MISA: the indexer of DeepSeek Sparse Attention with a few of its heads, chosen anew for every query."""

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
class MISA:
    """Sizes of the router.

    Attributes:
        heads: Index heads that score the tokens of a query.
        block: Tokens whose mean key stands for them where heads are chosen.
        rerank: Tokens that the chosen heads leave over for all heads to choose from (the hierarchical variant); 0 for
            the choice of the few heads alone.
        flat_below: Position in a document before which all heads score instead; None for where that is faster
            (:mod:`manyheads.mechanism.sparse.indexer.crossing`). 0 for never.

    Raises:
        ValueError: Numbers out of range.

    Example:
        >>> MISA(heads=4)
        MISA(heads=4, block=128, rerank=0, flat_below=None)
    """

    heads: int = 8
    block: int = 128
    rerank: int = 0
    flat_below: int | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        method.check_sizes(self, heads=1, block=1, rerank=0)

    def call(self, keep: int) -> tuple[str, list[int]]:
        """Its name and the integers that the operator takes.

        Args:
            keep: Tokens to choose.

        Raises:
            ValueError: Fewer tokens are left over than are to be kept.
        """
        if 0 < self.rerank < keep:
            raise ValueError(f"rerank: expected at least the keep={keep} tokens to choose, or 0, got {self.rerank}")
        return "misa", [self.block, self.heads, self.rerank, -1 if self.flat_below is None else self.flat_below]


_DEFAULT = MISA()


def misa(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hi Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    index_w: Float[Tensor, "B Hi Nq"],
    keep: int = method.KEEP,
    config: MISA = _DEFAULT,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""Attention to the best tokens by a few index heads, without training: :func:`~manyheads.mechanism.sparse.dsa`
    with a cheaper indexer.

    $$E_{tj} = \frac{1}{M_t} \sum_b \big| w_{tj}\,\mathrm{ReLU}(q^I_{tj} \cdot \bar k^I_b) \big|, \qquad
    I_{ts} = \sum_{j \in \mathrm{top}_h E_{t\cdot}} w_{tj}\,\mathrm{ReLU}(q^I_{tj} \cdot k^I_s)$$

    where $\bar k^I_b$ are the means of the $M_t$ blocks up to the query's own, which counts with its tokens so far.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        index_q: (B, Hi, Nq, Di), queries of the indexer.
        index_k: (B, Nk, Di), its keys.
        index_w: (B, Hi, Nq), weights of its heads.
        keep: Tokens that each query reads.
        config: How many heads score, and whether all heads choose again among what they leave over.
        mask, scale, return_lse, backend: As for :func:`~manyheads.mechanism.sparse.dsa`.

    Returns:
        (B, Hq, Nq, Dv) in the dtype of ``v``, or :class:`manyheads.Attn` with lse (B, Hq, Nq).

    Raises:
        ValueError: For shapes that do not fit, naming the argument, or a ``keep`` out of range.
        TypeError: For wrong dtypes.
        UnsupportedError: For a mask other than causal, with or without documents.

    Conventions:
        A head without weight is chosen after all others. Blocks begin at the start of each document. With all heads,
        or with as many tokens left over as are visible, the choice is that of ``dsa``.

    Source:
        MISA: Mixture of Indexer Sparse Attention, arXiv 2605.07363.

    Example:
        >>> q = k = v = torch.ones(1, 1, 4, 8)
        >>> index = dict(index_q=torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 1))
        >>> index |= dict(index_k=torch.tensor([[[3.0], [1.0], [2.0], [-1.0]]]), index_w=torch.ones(1, 2, 4))
        >>> sizes = MISA(heads=1, block=2, flat_below=0)
        >>> selection(q, k, v, **index, keep=2, config=sizes)[0, 0, -1]      # the head that looks for positive keys
        tensor([0, 2], dtype=torch.int32)
    """
    SPEC.check(q, k, v, causal=True, lse=return_lse)
    ids = selection(q, k, v, index_q=index_q, index_k=index_k, index_w=index_w, keep=keep, config=config, mask=mask)
    return method.attend(q, k, v, ids, scale, return_lse, backend)


def selection(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hi Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    index_w: Float[Tensor, "B Hi Nq"],
    keep: int = method.KEEP,
    config: MISA = _DEFAULT,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
) -> Int[Tensor, "B 1 Nq k"]:
    """The tokens that :func:`misa` reads: ids (B, 1, Nq, keep), ascending, -1 after the last; arguments as there."""
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
    config: MISA = _DEFAULT,
    mask: Mask | str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    chosen: Tensor | None = None,
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """The heads of each query, then every score; then exact attention under the matrix of chosen pairs."""
    border = crossing(*_described(config, keep))

    def rule(q: Tensor, k: Tensor, w: Tensor, keep: int) -> Tensor:
        before = k.shape[0] - q.shape[1]
        routed = w.clone()
        for i in range(max(0, -before), q.shape[1]):
            if (t := before + i) >= border:
                energy = head_contributions(q[:, i], k[: t + 1], w[:, i], config.block).masked_fill(w[:, i] == 0, -1.0)
                routed[:, i] *= method.best(energy, config.heads)
        hidden = ~method.visible(q, k)
        scores = method.plain_scores(q, k, routed).masked_fill(hidden, -torch.inf)
        if not config.rerank:
            return method.best(scores, keep)
        unlisted = ~method.best(scores, config.rerank)
        unlisted[max(0, -before) : max(0, border - before)] = False
        return method.best(method.plain_scores(q, k, w).masked_fill(hidden | unlisted, -torch.inf), keep)

    seen = method.pairs(chosen, rule, SPEC, q, k, Index(index_q, index_k, index_w), keep, mask)
    return exact.reference(q, k, v, mask=seen, scale=scale, return_lse=return_lse)


def head_contributions(
    index_q: Float[Tensor, "Hi Di"], index_k: Float[Tensor, "n Di"], index_w: Float[Tensor, " Hi"], block: int
) -> Float[Tensor, " Hi"]:
    """What each head contributes to the scores of the means of blocks, for one query: the router of :func:`misa`.

    Args:
        index_q: (Hi, Di), the query.
        index_k: (n, Di), the keys up to it.
        index_w: (Hi,), weights of the heads.
        block: Tokens of a block; the last one has what is left.

    Returns:
        (Hi,), at least 0.

    Example:
        >>> head_contributions(torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [3.0]]), torch.ones(2), 2)
        tensor([2., 0.])
    """
    means = torch.stack([part.mean(0) for part in index_k.split(block)])
    return (index_w[:, None] * (index_q @ means.mT).relu()).abs().mean(1)


def flops(case: Case) -> int:
    """Counts the operations of a forward call: the router, the scan with few heads, and attention to those kept.

    Args:
        case: The call.

    Returns:
        ``2 * B * (Di * scored products + Hq * (D + Dv) * kept pairs)``.
    """
    config, keep = case.options.get("config", _DEFAULT), case.options.get("keep", method.KEEP)
    (heads, width), border = case.options["index_q"].shape[1::2], crossing(*_described(config, keep))
    few = min(config.heads, heads)
    products = sum(
        heads * n if n <= border else heads * (-(-n // config.block) + min(n, config.rerank)) + few * n
        for n in method.lengths(SPEC, case)
    )
    return 2 * case.q.shape[0] * width * products + method.attention_flops(SPEC, case)


def _described(config: MISA, keep: int) -> tuple[str, int, list[int]]:
    name, options = config.call(keep)
    return name, keep, options


SPEC = Spec(
    "misa",
    fn=misa,
    reference=reference,
    selection=selection,
    paper="MISA: Mixture of Indexer Sparse Attention, arXiv 2605.07363",
    inputs=qkv(
        mask=lambda size: "causal" if size.causal else "full",
        keep=7,
        config=MISA(heads=1, block=5, rerank=9, flat_below=20),
        index_q=drawn("BHQD", salt=1, wide=False),
        index_k=drawn("BND", salt=2, wide=False),
        index_w=drawn("BHQ", salt=3, wide=False),
    ),
    gates={"index_q": "BHQD", "index_k": "BND", "index_w": "BHQ"},
    backends=("reference", "blocked"),  # "triton" too, which the tests of `gather` hold: interpreted it takes minutes
    supports={"causal_self", "causal_cross", "gqa", "value_width", "lse", "backward"},
    invariances=("packed", "batch", "heads", "causal_selection"),
    axes={"carrier": "best tokens of a few heads", "kernel": "exp", "estimator": "average", "execution": "token ids"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_misa::test_all_heads_give_the_flat_choice",
        2: "test_misa::test_leaving_over_every_visible_token_gives_the_flat_choice",
        3: "test_misa::test_with_blocks_of_one_token_contributions_are_exact_means",
        4: "test_misa::test_a_head_without_weight_is_active_only_where_no_other_is_left",
        5: "test_misa::test_recall_grows_with_the_heads_on_average",
    },
)
