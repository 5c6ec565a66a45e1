"""Models of transformers on sequences that span several processes train as on one."""

from __future__ import annotations

import pytest
import torch

import manyheads.parallel as parallel
from manyheads.integration.parallel import sequence_loss
from manyheads.integration.transformers import enable
from manyheads.mask import Causal, Document
from tests.parallel import processes

transformers = pytest.importorskip("transformers")

N, LENGTHS = 53, [20, 1, 32]
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
MODELS = {
    "Llama": {},
    "Gemma2": {
        "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def made(name):
    """A model with weights that every process draws alike."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MODELS[name]})
    return enable(transformers.AutoModelForCausalLM.from_config(config).double())


def ids():
    """Two sequences, with labels of which some do not count."""
    generator = torch.Generator().manual_seed(6)
    drawn = torch.randint(40, (2, N), generator=generator)
    return drawn, drawn.masked_fill(torch.rand(2, N, generator=generator) < 0.2, -100)


def one_device(name, lengths):
    """Loss and gradients of a plain loop over documents in one process."""
    model, (tokens, labels) = made(name), ids()
    shifted = parallel.next_tokens(labels, lengths=lengths)
    pieces = [tokens] if lengths is None else tokens.split(lengths, 1)
    logits = torch.cat([model(input_ids=piece, use_cache=False).logits for piece in pieces], 1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def prepare(world):
    """What one process finds."""
    return {(name, packed): one_device(name, LENGTHS if packed else None) for name in MODELS for packed in (0, 1)}


def cases(world):
    """Every model, plain and packed, with another scheme each."""
    found = {}
    for i, name in enumerate(MODELS):
        for packed in (0, 1):
            scheme = ("ulysses", "groupcast")[i]

            def case(ranks, name=name, packed=packed, scheme=scheme):
                trains(ranks, name, packed, scheme)

            found[f"{name}-{packed}"] = case
    return found


def trains(ranks, name, packed, scheme):
    """Shares of loss and gradients add up to those of one process."""
    want, grads = ranks.prepared[name, packed]
    lengths = LENGTHS if packed else None
    mask = Causal() & Document(LENGTHS) if packed else Causal()
    model, (tokens, labels) = made(name), ids()
    with parallel.context(ranks.group, scheme=scheme, mask=mask):
        loss = sequence_loss(model, tokens, labels=labels, lengths=lengths)
    loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    torch.testing.assert_close(total, want, rtol=1e-7, atol=1e-7)  # these models normalise in float32
    for key, parameter in model.named_parameters():
        if key in grads:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.distributed.all_reduce(own)
            torch.testing.assert_close(own, grads[key], rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Outcomes of two processes."""
    return processes.outcomes(2, "tests.integration.test_parallel", prepare, tmp_path_factory)


@pytest.mark.parametrize("name", cases(2))
def test_two_processes_train_like_one(name, two):
    processes.judge(name, two)


def test_outside_a_context_it_says_so():
    with pytest.raises(ValueError, match="sequence_loss: expected to be called inside"):
        sequence_loss(made("Llama"), ids()[0])
    with pytest.raises(ValueError, match=r"input_ids: expected \(B, N\)"):
        sequence_loss(made("Llama"), ids()[0][0])
