"""DeepSeek Sparse Attention: a light indexer scores every earlier token, and attention reads the best few."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from manyheads.engine.result import Attn
from manyheads.mask import Mask
from manyheads.mechanism import exact
from manyheads.spec import Case, Spec, drawn, qkv

from .indexer import method
from .indexer.method import Flat, Index


def dsa(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hi Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    index_w: Float[Tensor, "B Hi Nq"],
    keep: int = 2048,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""Softmax attention of each query to the tokens up to its own that an indexer scores highest.

    $$I_{ts} = \sum_j w_{tj}\,\mathrm{ReLU}(q^I_{tj} \cdot k^I_s), \qquad
    o_t = \sum_{s \in \mathrm{top}_k I_{t\cdot}} \mathrm{softmax}_s(\mathrm{scale}\; q_t \cdot k_s)\, v_s$$

    All heads read the same tokens. In the published models they also read the same keys: one latent per token, which
    is key and, in its first channels, value (``Hkv = 1``, ``v = k[..., :Dv]``). The scan costs as many products as
    attention does, with few channels and in pieces of bounded memory; :func:`~manyheads.mechanism.sparse.hisa` and
    :func:`~manyheads.mechanism.sparse.misa` make it cheaper.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        index_q: (B, Hi, Nq, Di), queries of the indexer.
        index_k: (B, Nk, Di), its keys, which all its heads share.
        index_w: (B, Hi, Nq), weights of its heads, any sign.
        keep: Tokens that each query reads, at least 1; a query that sees fewer reads all of them.
        mask: None or ``"causal"``; ``Document(lengths) & Causal()`` for packed documents. Queries are the last tokens.
        scale: Multiplies the scores of attention; ``D ** -0.5`` by default.
        return_lse: Also return the logarithm of the normaliser.
        backend: ``"auto"``, ``"triton"``, ``"blocked"`` or ``"reference"``, for attention; the choice is the same.

    Returns:
        (B, Hq, Nq, Dv) in the dtype of ``v``, or :class:`manyheads.Attn` with lse (B, Hq, Nq).

    Raises:
        ValueError: For shapes that do not fit, naming the argument, or a ``keep`` below 1.
        TypeError: For wrong dtypes.
        UnsupportedError: For a mask other than those above.

    Conventions:
        Scores are float32; of equal ones the earlier token wins. Choosing gives the indexer no gradient: it learns
        from a loss of its own, see :class:`manyheads.nn.DSA`.

    Source:
        DeepSeek-AI, DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention, 2025.

    Example:
        >>> import torch
        >>> q = k = v = torch.ones(1, 1, 4, 8)
        >>> index = dict(index_q=torch.ones(1, 1, 4, 2), index_k=torch.ones(1, 4, 2), index_w=torch.ones(1, 1, 4))
        >>> dsa(q, k, v, **index, keep=2, scale=0.0, return_lse=True).lse.exp().round()[0, 0]
        tensor([1., 2., 2., 2.])
    """
    SPEC.check(q, k, v, causal=True, lse=return_lse)
    ids = selection(q, k, v, index_q=index_q, index_k=index_k, index_w=index_w, keep=keep, mask=mask)
    return method.attend(q, k, v, ids, scale, return_lse, backend)


def selection(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hi Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    index_w: Float[Tensor, "B Hi Nq"],
    keep: int = 2048,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
) -> Int[Tensor, "B 1 Nq k"]:
    """The tokens that :func:`dsa` reads: ids (B, 1, Nq, keep), ascending, -1 after the last; arguments as there."""
    return method.choose(SPEC, q, k, Index(index_q, index_k, index_w), keep, Flat(), mask)


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hi Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    index_w: Float[Tensor, "B Hi Nq"],
    keep: int = 2048,
    mask: Mask | str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    chosen: Tensor | None = None,
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """Every score of the indexer, sorted; then exact attention under the matrix of chosen pairs."""
    index = Index(index_q, index_k, index_w)
    seen = method.pairs(chosen, method.flat_rule, SPEC, q, k, index, keep, mask)
    return exact.reference(q, k, v, mask=seen, scale=scale, return_lse=return_lse)


def flops(case: Case) -> int:
    """Counts the operations of a forward call: the scan of all earlier tokens, and attention to those kept.

    Args:
        case: The call.

    Returns:
        ``2 * B * (Hi * Di * pairs + Hq * (D + Dv) * kept pairs)``.
    """
    heads, width = case.options["index_q"].shape[1::2]
    scanned = sum(method.lengths(SPEC, case))
    return 2 * case.q.shape[0] * heads * width * scanned + method.attention_flops(SPEC, case)


SPEC = Spec(
    "dsa",
    fn=dsa,
    reference=reference,
    selection=selection,
    paper="DeepSeek-AI, DeepSeek-V3.2-Exp: DeepSeek Sparse Attention, 2025",
    inputs=qkv(
        mask=lambda size: "causal" if size.causal else "full",
        keep=7,
        index_q=drawn("BHQD", salt=1, wide=False),
        index_k=drawn("BND", salt=2, wide=False),
        index_w=drawn("BHQ", salt=3, wide=False),
    ),
    gates={"index_q": "BHQD", "index_k": "BND", "index_w": "BHQ"},
    backends=("reference", "blocked"),  # "triton" too, which the tests of `gather` hold: interpreted it takes minutes
    supports={"causal_self", "causal_cross", "gqa", "value_width", "lse", "backward"},
    invariances=("packed", "batch", "heads", "causal_selection"),
    axes={"carrier": "best tokens of an indexer", "kernel": "exp", "estimator": "average", "execution": "token ids"},
    flops=flops,
    bytes=exact.traffic,
)
