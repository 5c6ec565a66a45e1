"""Training a model of transformers on sequences that span many devices, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.integration.masking import documents
from manyheads.integration.transformers import enable, is_enabled
from manyheads.parallel.context import current
from manyheads.parallel.loss import next_tokens, token_loss

__all__ = ["sequence_loss"]


def sequence_loss(
    model: nn.Module,
    input_ids: Tensor,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    labels: Tensor | None = None,
    averaged: int = 1,
    groups: Sequence[object] = (),
    **inputs: Any,
) -> Tensor:
    """The next-token loss of a causal language model on a sequence that is dealt to all ranks of a context.

    Every rank gives the whole sequence and runs the model on its own tokens. Labels are shifted before they are dealt,
    the loss is divided by the labels of all ranks, and position ids are those of the whole sequence, or of each
    document when there are several.

    Args:
        model: A causal language model of transformers; its attention is enabled if it was not.
        input_ids: int64 ``(B, N)``, the whole sequence, the same on every rank.
        lengths: Lengths of packed documents, which sum to N: attention and labels stay inside each.
        labels: int64 ``(B, N)`` as transformers takes them, not shifted, -100 for what does not count; the ids by
            default.
        averaged: Ranks over which gradients will be averaged rather than summed: those of the mesh of FSDP2 or DDP.
        groups: More process groups over whose ranks labels are counted, such as that of data parallelism.
        **inputs: What else the model takes, as it is.

    Returns:
        This rank's share of the mean loss, differentiable; the shares of all ranks add up to it.

    Raises:
        ValueError: Outside a context, or lengths that do not sum to N.
        TypeError: Not a model of transformers.

    Conventions:
        Gradients of weights are shares too: sum them over the ranks (``all_reduce``), or let FSDP2 or DDP average them
        and say ``averaged=`` how many ranks they divide by.

    Example:
        >>> import tempfile
        >>> import torch.distributed as dist
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import manyheads.parallel as parallel
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        >>> tiny = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                    num_attention_heads=2)
        >>> model, ids = LlamaForCausalLM(tiny), torch.randint(40, (1, 12))
        >>> with parallel.context(dist.group.WORLD, scheme="ring", mask="causal & document([5, 7])"):
        ...     loss = sequence_loss(model, ids, lengths=[5, 7])
        >>> loss.backward()
        >>> dist.destroy_process_group()
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected (B, N), got shape {tuple(input_ids.shape)}")
    here = current("sequence_loss")
    if not is_enabled(model):
        enable(model)
    n = input_ids.shape[1]
    shifted = next_tokens(input_ids if labels is None else labels, lengths=lengths)
    own, target = here.shard(input_ids), here.shard(shifted)
    at = here.shard(_positions(n, lengths).to(input_ids.device)[None])
    # a mask of ones: without one, gaps in the positions of a rank would be taken for the ends of documents
    given = {"attention_mask": torch.ones_like(own), "position_ids": at.expand(len(own), -1), "use_cache": False}
    if lengths is None:
        logits = model(input_ids=own, **given, **inputs).logits
    else:
        with documents(lengths):
            logits = model(input_ids=own, **given, **inputs).logits
    return token_loss(logits, target, groups=groups, averaged=averaged)


def _positions(n: int, lengths: Sequence[int] | Tensor | None) -> Tensor:
    """int64 ``(N,)``: where each token is in its document."""
    at = torch.arange(n)
    if lengths is None:
        return at
    sizes = torch.as_tensor(lengths).cpu()
    return at - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
