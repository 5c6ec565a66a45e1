"""Pooled top-k: the choice is that of the definition, everything kept is dense, and blocks are cut in each document."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document, attention
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.sparse.pooled import pooled_topk, reference, selection
from manyheads.testing import sample_qkv


def inputs(n=101, nk=None, **more):
    return sample_qkv(2, 6, n, keys=nk, **{"kv_heads": 2, "deviation": 4.0, "dtype": torch.float64, "seed": 3, **more})


@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize(("n", "nk"), [(101, 101), (48, 48), (37, 130), (9, 10)])
def test_the_choice_is_that_of_the_definition(share, mask, n, nk):
    q, k, v = inputs(n, nk)
    for how in ("mean", "max", "norm"):
        options = {"keep": 3, "block": 8, "share": share, "how": how, "mask": mask}
        got, want = pooled_topk(q, k, v, **options), reference(q, k, v, **options)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", ["group", "head"])
def test_all_blocks_are_dense_attention_with_its_gradients(share):
    q, k, v = inputs()
    for mask in ("causal", "full"):
        found = []
        for fn, more in ((pooled_topk, {"keep": 13, "block": 8, "share": share}), (attention, {})):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = fn(*leaves, mask=mask, **more)
            found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_query_heads_of_a_group_share_their_blocks_or_not():
    q, k, v = inputs()
    for share, count in (("group", 2), ("head", 6)):
        seen = selection(q, k, v, keep=3, block=8, share=share).dense().expand(2, 6, -1, -1)
        sets = {seen[0, h].numpy().tobytes() for h in range(6)}
        assert len(sets) == count


def test_rows_keep_so_many_blocks_the_first_and_their_own_among_them():
    q, k, v = inputs()
    seen = selection(q, k, v, keep=4, block=8).dense()
    blocks = torch.stack([part.any(-1) for part in seen.split(8, -1)], -1)
    assert blocks[:, :, 40:].sum(-1).eq(4).all() and blocks[..., 0].all()
    assert all(blocks[:, :, i, i // 8].all() for i in range(101))
    assert not seen.triu(1).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lens", [[30, 1, 45, 25], [101], [8, 16, 0, 77]])
def test_packed_documents_equal_a_loop(lens, causal):
    q, k, v = (t[:1] for t in inputs())
    mask = Document(lens) & Causal() if causal else Document(lens)
    packed = pooled_topk(q, k, v, keep=3, block=8, mask=mask, return_lse=True)
    assert torch.allclose(packed.out, reference(q, k, v, keep=3, block=8, mask=mask), atol=1e-10)
    at = 0
    for n in lens:
        own = [t[:, :, at : at + n] for t in (q, k, v)]
        if n:
            alone = pooled_topk(*own, keep=3, block=8, mask="causal" if causal else "full", return_lse=True)
            torch.testing.assert_close(packed.out[:, :, at : at + n], alone.out, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(packed.lse[:, :, at : at + n], alone.lse, rtol=1e-10, atol=1e-10)
        at += n


def test_a_choice_given_to_the_reference_is_used():
    q, k, v = inputs()
    mask = Document([30, 1, 45, 25]) & Causal()
    for options in ({"mask": "causal"}, {"mask": mask}):
        chosen = selection(q, k, v, keep=3, block=8, **options)
        want = reference(q, k, v, keep=5, block=8, chosen=chosen, **options)  # its own would be another
        torch.testing.assert_close(pooled_topk(q, k, v, keep=3, block=8, **options), want, rtol=1e-10, atol=1e-10)


def test_a_heavy_block_is_found():
    q, k, v = inputs(256, deviation=1.0)
    k[:, :, 96:104] = 3 * q[:, ::3, 200:208].mean(2, keepdim=True)
    seen = selection(q, k, v, keep=3, block=8, share="head").dense()
    assert seen[:, ::3, 200, 96].all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep: expected at least 1 block"),
        ({"keep": 1}, ValueError, "keep: expected at least the 2 blocks"),
        ({"block": 0}, ValueError, "block: expected at least 1 token"),
        ({"share": "groups"}, ValueError, "did you mean 'group'"),
        ({"how": "mena"}, ValueError, "did you mean 'mean'"),
        ({"mask": "window(3)"}, UnsupportedError, "pooled-topk does not support mask"),
        ({"mask": Document([3, 4])}, ValueError, "documents must sum to the N=101"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        pooled_topk(*inputs(), **{"keep": 3, "block": 8, **options})
