"""Calls of every function whose signature names shapes, under jaxtyping's import hook: run by test_shapes.py.

The hook rewrites modules while they are imported, so this runs in a process of its own, which prints what it found.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import sys
from pathlib import Path

import beartype
import jaxtyping
import torch

SOURCE = Path(__file__).resolve().parents[1] / "src"
SHAPED = ("Float[", "Float64[", "Bool[", "Int[", "Integer[")
called: set[str] = set()


def typechecked(function):
    """What the hook puts around every function: checks the ones that name shapes, and notes that they ran."""
    if not any(map(_named, function.__annotations__.values())):
        return function
    check = beartype.beartype(function, conf=beartype.BeartypeConf(is_pep484_tower=True))

    @functools.wraps(function)
    def noted(*args, **options):
        called.add(f"{function.__module__}.{function.__qualname__}")
        return check(*args, **options)

    return noted


def _named(annotation):
    """Whether an annotation holds a shape."""
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_named, getattr(annotation, "__args__", ())))


def annotated():
    """Module and name of every function of the sources whose signature names shapes, but for overloads."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, node in _functions(ast.parse(path.read_text(encoding="utf-8")), ""):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            hints = [ast.unparse(a.annotation) for a in every if a is not None and a.annotation is not None]
            hints += [] if node.returns is None else [ast.unparse(node.returns)]
            if any(word in hint for hint in hints for word in SHAPED):
                yield module, name


def _functions(node, prefix):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and "overload" not in map(ast.unparse, child.decorator_list):
            yield f"{prefix}{child.name}", child


def typical():
    """Calls that must pass: every mechanism as far as it declares, and what is no mechanism."""
    import manyheads as mh
    from manyheads import testing
    from manyheads.common.rope import RoPE
    from manyheads.engine.gather import gather
    from manyheads.engine.tiled import tiled
    from manyheads.integration.transformers import attention_function
    from manyheads.mechanism.regression import interpolate, ridge_regression
    from manyheads.spec import Size, registry

    for slug, spec in registry().items():
        sizes = {"self": {}, "gqa": {"heads": 6, "kv_heads": 2}, "value_width": {"value_width": 5}}
        sizes |= {"noncausal_cross": {"queries": 5, "keys": 9}, "backward": {"dtype": torch.float64}}
        for what, size in sizes.items():
            if what == "self" or spec.declares(what):
                case = spec.inputs(Size(causal=not spec.declares("noncausal_self"), **size))
                options = case.options | ({"return_lse": True} if spec.declares("lse") else {})
                yield f"{slug} {what}", functools.partial(spec.fn, *case[:3], **options)
                yield f"{slug} {what} by its reference", functools.partial(spec.reference, *case[:3], **options)
                if spec.selection is not None:
                    yield f"{slug} {what}, its choice", functools.partial(spec.selection, *case[:3], **case.options)
        if spec.step is not None:
            yield f"{slug} step", functools.partial(stepped, spec, spec.inputs(Size(heads=6, causal=True)))
    q, k, v = testing.sample_qkv(2, 6, 5, kv_heads=2, keys=9, value_width=4, seed=0)
    padding, sink = torch.ones(2, 9, dtype=torch.bool), torch.zeros(6)
    some = {"mask": "causal", "key_padding": padding, "sink": sink, "scale": 1, "bias": mh.ALiBi(sink)}
    for positions in (torch.arange(4, 9), torch.arange(9)), (torch.arange(10).view(2, 5), torch.arange(9)):
        for function in (mh.attention, mh.explain, tiled):
            yield function.__name__, functools.partial(function, q, k, v, positions=positions, **some)
        yield "weights", functools.partial(mh.attention_weights, q, k, positions=positions, rows=[0, -1], **some)
    for dtype in (torch.float16, torch.bfloat16):
        halves = [t.to(dtype) for t in (q, k, v)]
        yield str(dtype), functools.partial(mh.attention, *halves, return_lse=True, mask=torch.ones(5, 9).bool())
    part = mh.attention(q, k, v, return_lse=True)
    yield "merge", functools.partial(mh.merge, part, tuple(part))
    yield "budget", functools.partial(testing.assert_within_budget, q, q.double(), q)
    yield "rope", functools.partial(RoPE(), q, torch.arange(5))
    yield "transformers", functools.partial(attention_function, torch.nn.Module(), q, k, v, None)
    yield from features()
    yield from gated()
    yield from grids()
    yield from selectors()
    yield from chosen()
    yield from indexed()
    yield from skipping()
    yield "slope", functools.partial(interpolate, q, k, v, torch.zeros(2, 6, q.shape[3], v.shape[3]), mask="causal")
    for heads in (1, 2, 6):
        ids = torch.full((1, heads, 5, 3), 8, dtype=torch.int32)
        yield "gather", functools.partial(gather, q, k, v, ids, sink=sink, return_lse=heads == 1)
    yield "ridge", functools.partial(ridge_regression, *testing.sample_qkv(2, 6, 5, kv_heads=2, keys=9), ridge=1.0)


def features():
    """Calls of feature maps and what is made of them."""
    from manyheads import testing
    from manyheads.common.features import FeatureMap, Positive, gaussian, orthogonal
    from manyheads.mechanism.linear import Performer
    from manyheads.mechanism.linear.taylor import weights

    q, k, v = testing.sample_qkv(2, 6, 5, kv_heads=2, width=4, seed=0)
    core = Performer(4, 7)
    yield "core", functools.partial(core, q, k, v, mask="causal")
    yield "step of a core", functools.partial(core.step, q[:, :, 0], k[:, :, 0], v[:, :, 0])
    yield "identity", functools.partial(FeatureMap(), q)
    for draw in (gaussian, orthogonal):
        yield draw.__name__, functools.partial(draw, 7, 4)
        yield f"features of {draw.__name__} rows", functools.partial(Positive(draw(7, 4)), q)
    yield "weights", functools.partial(weights, q, (0, 2))


def gated():
    """Calls of the parts of gated recurrences."""
    from manyheads.engine.scan.elementwise import elementwise
    from manyheads.mechanism.linear.gated_delta import gates, unit_length
    from manyheads.mechanism.linear.natsl import choose, gated_norm, split_channels

    x, mix = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5, 2)
    yield "elementwise", functools.partial(elementwise, x, x, x[:, :, 0])
    yield "unit length", functools.partial(unit_length, x)
    yield "gates", functools.partial(gates, x, x, x[0, :, 0, 0], x[0, :, 0, 1])
    yield "choose", functools.partial(choose, mix)
    yield "gated norm", functools.partial(gated_norm, x, x, mix=mix, gate=x)
    yield "channels", functools.partial(split_channels, x, 2)


def chosen():
    """Calls of what mechanisms that choose blocks share, and of how they learn."""
    from manyheads import Causal, Document
    from manyheads.mechanism.sparse import train_msa
    from manyheads.spec import Size, find

    case = find("msa").inputs(Size(heads=6, kv_heads=2, causal=True))
    for warm in (False, True):
        yield "training step", functools.partial(train_msa, *case[:3], **case.options, warm=warm)
    for slug, spec in (("msa", find("msa")), ("fsa", find("fsa"))):
        packed = spec.inputs(Size(batch=1, queries=30, causal=True))
        options = packed.options | {"mask": Document([11, 19]) & Causal()}
        yield f"{slug}, documents", functools.partial(spec.fn, *packed[:3], **options)
        yield f"{slug}, its choice in documents", functools.partial(spec.selection, *packed[:3], **options)


def indexed():
    """Calls of the parts of indexers that score tokens."""
    from manyheads.mechanism.sparse import indexer
    from manyheads.mechanism.sparse.misa import head_contributions

    index, pooled = indexer.clustered_index(20, 5, heads=3, width=4), indexer.PooledKeys(8)
    yield "scores of tokens", functools.partial(indexer.index_scores, *index)
    yield "heads as an indexer", functools.partial(indexer.index_of_heads, index.q, index.q)
    yield "contributions", functools.partial(head_contributions, index.q[0, :, 0], index.k[0], index.w[0, :, 0], 8)
    ids = indexer.index_tokens(index, keep=4)
    yield "recall", functools.partial(indexer.recall, ids, ids[..., :3])
    yield "pooled keys", functools.partial(pooled.append, index.k)
    for part in ("keys", "means"):
        yield part, functools.partial(getattr, pooled, part)


def grids():
    """Calls of what stands beside neighbourhood attention."""
    from manyheads import Neighborhood
    from manyheads.mechanism import sparse
    from manyheads.mechanism.sparse.neighborhood import grid_mask, in_order_of_boxes

    q, k, v = torch.rand(2, 6, 12, 8), torch.rand(2, 2, 12, 8), torch.rand(2, 2, 12, 5)
    grid, extra = {"shape": (3, 4), "window": 2}, (torch.rand(2, 2, 3, 8), torch.rand(2, 2, 3, 5))
    yield "extra keys", functools.partial(sparse.neighborhood_attention, q, k, v, **grid, extra=extra)
    weights = sparse.neighborhood_scores(q, k, **grid).softmax(-1)
    yield "scores", functools.partial(sparse.neighborhood_scores, q, k, **grid)
    yield "average", functools.partial(sparse.neighborhood_average, weights, v, **grid)
    yield "mask", functools.partial(grid_mask, q, **grid)
    yield "boxes", functools.partial(in_order_of_boxes, q, k, v, Neighborhood((3, 4), 2), box=2)
    order = {"shape": (3, 4), "box": 2, "dilation": (1, 2)}
    yield "permute", functools.partial(sparse.permute_tokens, q, **order)
    moved = sparse.permute_tokens(q, **order)[0]
    yield "unpermute", functools.partial(sparse.unpermute_tokens, moved, **order)


def selectors():
    """Calls of the functions that choose blocks and keys."""
    from manyheads.common.kmeans import kmeans, nearest
    from manyheads.mechanism import select

    q, k = torch.rand(2, 6, 9, 4), torch.rand(2, 2, 9, 4)
    for lens in (None, torch.tensor([4, 5]), torch.tensor([[4, 5], [9, 0]])):
        parts = select.cut(lens, q, block=4)
        yield "key padding", functools.partial(parts.key_padding, 2)
        yield "pool", functools.partial(select.pool, parts.tensors[0], 4, real=parts.real)
        yield "documents", functools.partial(select.block_documents, parts, 4, 2)
    causal, own = select.block_causal(9, 9, 4, 4), select.own_blocks(9, 9, 4, 4)
    yield "forced", functools.partial(select.Forced(1).mask, causal, own)
    scores, keys = select.pooled_scores(q, k, q_block=4, k_block=4), select.scores_at
    ids = select.top_k(scores, 2, visible=causal, budgets=torch.tensor([1, 2]))
    yield "top p", functools.partial(select.top_p, scores, torch.tensor([0.5, 0.9]), 2, visible=causal)
    yield "above", functools.partial(select.above, scores, 0.1, force=causal)
    tokens = select.expand(ids.repeat_interleave(4, 2)[:, :, :9], 4, 9, last=torch.arange(9))
    yield "best of a block", functools.partial(select.max_scores, q, k, k_block=4)
    yield "refine", functools.partial(select.refine, keys(q, k, tokens), tokens, 3)
    fine = {"blocks": 2, "ratio": 3, "count": 9}
    yield "coarse to fine", functools.partial(select.coarse_to_fine, scores, lambda at: at.float(), 3, **fine)
    yield "pairs", functools.partial(select.pairs, tokens, q, k)
    found = kmeans(k, 3)
    yield "means", functools.partial(found.means, k)
    yield "nearest", functools.partial(nearest, k, found.centroids)
    weights = select.centroid_weights(select.centroid_scores(q, found.centroids), found.sizes)
    yield "centroids", functools.partial(select.nearest_centroids, q, found.centroids, 2, sizes=found.sizes)
    yield "members", functools.partial(select.members, weights > 0.1, found.labels)
    yield "ids", functools.partial(select.ids_of, causal[None, None])
    yield "few bits", functools.partial(select.low_bit_scores, q, k)
    order = select.reorder(q[..., 0], 4)
    yield "permute", functools.partial(select.permute, k, order)
    yield "inverse", functools.partial(select.inverse, order)
    yield "gate of branches", functools.partial(select.gated, [q, q], torch.rand(2, 1, 9, 2))
    yield "straight through", functools.partial(select.straight_through, q)
    yield "loss beside", functools.partial(select.with_loss, q, q.sum())
    yield "index loss", functools.partial(select.index_loss, q, k, q[:, :2], k[:, :1], tokens, lens=[4, 5])


def stepped(spec, case):
    """Takes the first two tokens of a call one after the other."""
    from tests.conformance.harness import step

    _, state = step(spec, case, 0, None)
    return step(spec, case, 1, state)


def wrong():
    """Calls that annotations forbid, with the argument that the library's own error must name."""
    import manyheads as mh
    from manyheads import testing
    from manyheads.common.rope import RoPE
    from manyheads.engine.gather import gather
    from manyheads.engine.tiled import tiled
    from manyheads.mechanism.sparse import neighborhood_attention

    q, k, v = testing.sample_qkv(2, 6, 5, kv_heads=2, keys=9, value_width=4, seed=0)
    at = torch.arange(5), torch.arange(9)
    inputs = [
        ("q", (q[0], k, v), {}),
        ("q", (q.long(), k, v), {}),
        ("q", (q.numpy(), k, v), {}),
        ("k", (q, k[..., :3], v), {}),
        ("k", (q, k[:1], v[:1]), {}),
        ("v", (q, k, v[:, :, :8]), {}),
        ("v", (q, k, v[:, :1]), {}),
        ("sink", (q, k, v), {"sink": torch.zeros(5)}),
        ("sink", (q, k, v), {"sink": torch.zeros(6).long()}),
        ("key_padding", (q, k, v), {"key_padding": torch.ones(2, 5, dtype=torch.bool)}),
        ("key_padding", (q, k, v), {"key_padding": torch.ones(2, 9)}),
        ("positions", (q, k, v), {"positions": (at[0].float(), at[1])}),
        ("positions", (q, k, v), {"positions": (at[1], at[1])}),
    ]
    for name, args, options in inputs:
        for function in (mh.attention, mh.explain, tiled):
            more = {"mask": "causal"} if function is tiled else {}
            yield name, function, args, options | more
        if name != "v":
            yield name, mh.attention_weights, args[:2], options
    for ids in (torch.zeros(1, 2, 4, 3, dtype=torch.int64), torch.zeros(1, 2, 5, 3), torch.zeros(2, 5, 3).long()):
        yield "ids", gather, (q, k, v, ids), {}
    part = mh.attention(q, k, v, return_lse=True)
    yield "merge", mh.merge, ((part.out, part.lse[:1]),), {}
    yield "merge", mh.merge, (part, (part.out[:1], part.lse[:1])), {}
    yield "reference64", testing.assert_within_budget, (q, q, q), {}
    yield "positions", RoPE.__call__, (RoPE(), q, at[0].float()), {}
    yield "positions", RoPE.__call__, (RoPE(), q, at[1]), {}
    yield "queries and keys", neighborhood_attention, (q, k, v), {"shape": (5,), "window": 2}


def main():
    """Runs all calls under the hook and prints what went wrong, what ran, and what should have."""
    shaped = sorted(annotated())
    jaxtyping.install_import_hook(sorted({module for module, _ in shaped}), "tests.shape_calls.typechecked")
    failures = []
    for label, call in typical():
        try:
            call()
        except jaxtyping.TypeCheckError as error:
            failures.append(f"{label}: {error}")
    for name, function, args, options in wrong():
        label = f"{function.__qualname__} with a wrong {name}"
        try:
            function(*args, **options)
            failures.append(f"{label}: the annotations let it pass")
        except jaxtyping.TypeCheckError:
            pass
        except Exception as error:
            failures.append(f"{label}: the annotations let it pass until {error!r}")
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            function(*args, **options)
            failures.append(f"{label}: the library lets it pass")
        except (ValueError, TypeError) as error:
            if name not in str(error):
                failures.append(f"{label}: the library says {error!r}")
        jaxtyping.config.update("jaxtyping_disable", False)
    names = [".".join(pair) for pair in shaped]
    print(json.dumps({"failures": failures, "called": sorted(called), "annotated": names}))


def skipping():
    """Calls of quantisation, and of what stands beside the mechanisms that skip tiles and blocks."""
    from manyheads import Causal, Document
    from manyheads.common.quantise import pack_int4, quantise, smoothed, unpack_int4
    from manyheads.mechanism.sparse import blasst, pbs, sale
    from manyheads.spec import find

    q, k, v = torch.rand(2, 6, 40, 8), torch.rand(2, 2, 40, 8), torch.rand(2, 2, 40, 5)
    low = quantise(k, 4, block=3)
    yield "steps", lambda: low.steps
    yield "dequantise", low.dequantise
    yield "packed", low.packed
    yield "smoothed", functools.partial(smoothed, q, k)
    yield "pack", functools.partial(pack_int4, low.values)
    yield "unpack", functools.partial(unpack_int4, pack_int4(low.values), 8)
    part = {name: sys.modules[f.__module__] for name, f in (("blasst", blasst), ("pbs", pbs), ("sale", sale))}
    counts = functools.partial(part["blasst"].skipped_tiles, q, k, [0.1, 0.5], tile=(8, 8))
    yield "skipped tiles", counts
    yield "sparsity", lambda: counts()[0].sparsity
    small = find("sale").inputs(_size()).options["config"]
    yield "calibrate sale", functools.partial(part["sale"].calibrate, q, k, v, config=small)
    small = find("pbs").inputs(_size()).options["config"]
    yield "key scores", functools.partial(part["pbs"].key_scores, q, k, small)
    yield "visited tiles", functools.partial(part["pbs"].visited_tiles, q, k, config=small)
    for slug in ("blasst", "pbs", "sale"):
        spec = find(slug)
        case = spec.inputs(_size())
        options = case.options | {"mask": Document([11, 22]) & Causal()}
        yield f"{slug}, documents", functools.partial(spec.fn, *case[:3], **options)
        yield f"{slug}, its choice in documents", functools.partial(spec.selection, *case[:3], **options)


def _size():
    from manyheads.spec import Size

    return Size(batch=1, causal=True)
