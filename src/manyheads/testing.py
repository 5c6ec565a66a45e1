"""What a test of attention needs: an error budget, sharp inputs, the seed of the day, poisoned memory."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

SEED_VARIABLE = "MANYHEADS_SEED"


def assert_within_budget(
    actual: Float[Tensor, "*shape"],
    reference64: Float64[Tensor, "*shape"],
    same_dtype_reference: Float[Tensor, "*shape"],
    *,
    what: str = "result",
) -> None:
    r"""Asserts that a result is about as accurate as its plain reference in the same dtype.

    With $a$ the result, $r$ the reference in float64 and $s$ the reference in the dtype of the inputs
    (scores in float32), both of the following must hold in the maximum norm and in the Frobenius norm:

    $$\|a - r\| \le 2\,\|s - r\| + 2\,\varepsilon\,\|r\|$$

    so that no tolerance is typed by hand. Infinite entries (the lse of an empty row) must agree exactly and
    then take no part; NaN is never within budget.

    Args:
        actual: The result to judge, any shape, floating.
        reference64: The reference computed in float64, same shape.
        same_dtype_reference: The reference computed in the dtype of the inputs, same shape.
        what: How to call the result in the message.

    Raises:
        AssertionError: Outside the budget, not finite where the reference is, or of another shape.
        TypeError: ``reference64`` is not float64.

    Example:
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> assert_within_budget(exact.float(), exact, exact.float())
        >>> assert_within_budget(exact.float() + 1e-3, exact, exact.float())
        Traceback (most recent call last):
        ...
        AssertionError: result: max error 0.001 exceeds its budget 4.77e-07 ...
    """
    if reference64.dtype != torch.float64:
        raise TypeError(f"reference64: expected float64, got {reference64.dtype}")
    for name, other in (("reference64", reference64), ("same_dtype_reference", same_dtype_reference)):
        if actual.shape != other.shape:
            raise AssertionError(f"{what}: shape {tuple(actual.shape)} but {name} has {tuple(other.shape)}")
    eps = torch.finfo(actual.dtype).eps
    a, r, s = (t.detach().to("cpu", torch.float64) for t in (actual, reference64, same_dtype_reference))
    finite = r.isfinite()
    if not torch.equal(a[~finite].nan_to_num(nan=0.5), r[~finite].nan_to_num(nan=0.5)):
        raise AssertionError(f"{what}: differs from the reference where that is not finite")
    if not bool(a[finite].isfinite().all()):
        bad = int((~a[finite].isfinite()).sum())
        raise AssertionError(f"{what}: {bad} of {int(finite.sum())} values are not finite, the reference is")
    a, r, s = a[finite], r[finite], s[finite]
    if a.numel() == 0:
        return
    for norm, order in (("max", float("inf")), ("Frobenius", 2.0)):
        size = functools.partial(torch.linalg.vector_norm, ord=order)
        error, plain = float(size(a - r)), float(size(s - r))
        budget = 2 * plain + 2 * eps * float(size(r))
        if not error <= budget:
            raise AssertionError(
                f"{what}: {norm} error {error:.3g} exceeds its budget {budget:.3g} "
                f"(the plain reference in {same_dtype_reference.dtype} errs by {plain:.3g})"
            )


def seed_of_the_day() -> int:
    """Returns the seed that randomised tests derive theirs from: one a day, or the one to replay.

    Set the environment variable ``MANYHEADS_SEED`` to the printed number to repeat a day's run.

    Returns:
        The replayed seed, or the number of the day.

    Raises:
        ValueError: ``MANYHEADS_SEED`` is set to something that is not an integer.

    Example:
        >>> seed_of_the_day() == seed_of_the_day()
        True
    """
    given = os.environ.get(SEED_VARIABLE)
    if given is None:
        return datetime.date.today().toordinal()
    try:
        return int(given)
    except ValueError:
        raise ValueError(f"{SEED_VARIABLE}: expected an integer, got {given!r}") from None


def seed_for(name: str) -> int:
    """Returns the seed of the day for one test, so that no test depends on the order of the others.

    Args:
        name: Any text that names the test.

    Returns:
        An integer in [0, 2^31).

    Example:
        >>> seed_for("a") != seed_for("b")
        True
    """
    return zlib.crc32(f"{seed_of_the_day()}:{name}".encode()) & 0x7FFFFFFF


def sample_qkv(
    batch: int = 2,
    heads: int = 2,
    queries: int = 33,
    *,
    kv_heads: int | None = None,
    keys: int | None = None,
    width: int = 16,
    value_width: int | None = None,
    deviation: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int | None = None,
) -> tuple[Float[Tensor, "B Hq Nq D"], Float[Tensor, "B Hkv Nk D"], Float[Tensor, "B Hkv Nk Dv"]]:
    """Draws normal queries, keys and values whose default-scaled logits have a given standard deviation.

    At deviation 1 attention is nearly uniform and forgives bad arithmetic; at 8 few keys take all the weight.
    The values are drawn in float64 and rounded once, so that every dtype sees the same numbers.

    Args:
        batch: Batch size B.
        heads: Query heads Hq.
        queries: Query tokens Nq.
        kv_heads: Key and value heads Hkv; default Hq.
        keys: Key tokens Nk; default Nq.
        width: Head width D of queries and keys.
        value_width: Head width Dv of values; default D.
        deviation: Standard deviation of the logits under the default scale.
        dtype: Floating dtype of the three tensors.
        device: Where to put them.
        seed: Seed of the draw; default the seed of the day.

    Returns:
        q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv).

    Example:
        >>> q, k, v = sample_qkv(1, 4, 64, kv_heads=2, deviation=8.0, seed=0)
        >>> k.shape, 6 < (q[:, ::2] @ k.mT * 16**-0.5).std() < 10
        (torch.Size([1, 2, 64, 16]), tensor(True))
    """
    generator = torch.Generator().manual_seed(seed_of_the_day() if seed is None else seed)
    kv_heads = heads if kv_heads is None else kv_heads
    keys = queries if keys is None else keys
    value_width = width if value_width is None else value_width
    shapes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value_width))
    drawn = [torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[0] *= deviation
    q, k, v = (t.to(device, dtype) for t in drawn)
    return q, k, v


@contextlib.contextmanager
def nan_poisoned() -> Iterator[None]:
    """Fills every uninitialised tensor that manyheads allocates inside the block with NaN.

    A result that reads memory before writing it then turns NaN instead of being right by luck. Allocations of
    ``torch.empty``, ``empty_like``, ``empty_strided``, ``Tensor.new_empty`` and their kin are caught when the
    calling code belongs to this package; integers are filled with their largest value, booleans with True.

    Yields:
        Nothing; the poison is in force inside the block, in this process.

    Example:
        >>> with nan_poisoned():
        ...     t = torch.empty(3)          # not allocated by the package: left alone
    """
    names = ("empty", "empty_like", "empty_strided", "empty_permuted")
    methods = ("new_empty", "new_empty_strided")
    with contextlib.ExitStack() as undo:
        for owner, attributes in ((torch, names), (torch.Tensor, methods)):
            for attribute in attributes:
                original = getattr(owner, attribute)
                undo.callback(setattr, owner, attribute, original)
                setattr(owner, attribute, _poisoning(original))
        yield


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps an allocator so that what it gives to this package is poison."""

    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] != "manyheads" or tensor.is_meta or kwargs.get("out") is not None:
            return tensor
        with torch.no_grad():
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).max)

    return poisoned
