"""What the kernels of this engine are made of.

Tokens go in tiles of ``TILE``, tiles in chunks of ``per``. ``sums`` leaves for every tile the inclusive prefix sums of
the log decays from its start, and the exclusive suffix sums up to its end (plus the input gate), so that every exponent
is a sum over the tokens between two places, never a difference of longer sums. Vectors over tokens are float32,
``(B * H, tiles * TILE)``.

Products with weights or with states are taken in bfloat16 for bfloat16 inputs. Sums without a softmax leave the range
of float16, so for float16 inputs they are taken in tf32, which has the digits of float16 and the range of float32.
"""

import triton
import triton.language as tl

UNSPECIALISED = ["tokens", "tiles", "per", "heads", "group"]
"""Arguments of which no value is worth a kernel of its own: lengths above all."""


@triton.jit
def load_tile(ptr, start, stride, tokens, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Tokens ``start`` to ``start + TILE`` and columns from ``column``, ``(TILE, BLOCK)``.

    Columns beyond the width are 0; past the end of the tokens the last row comes again, for the caller to weigh by 0.
    """
    row = tl.minimum(tl.arange(0, TILE), tokens - 1 - start)
    d = column + tl.arange(0, BLOCK)
    at = ptr + start * tl.cast(stride, tl.int64) + row[:, None] * stride + d[None, :]
    if WIDTH % BLOCK == 0:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
def load_matrix(
    ptr, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """A block ``(ROWS, COLS)`` of a matrix ``(HEIGHT, WIDTH)`` whose rows lie ``STRIDE`` apart, 0 beyond its edges."""
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLS)
    at = ptr + r[:, None] * STRIDE + c[None, :]
    return tl.load(at, mask=(r < HEIGHT)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def operand(x, like):
    """A factor of a product with weights: bfloat16 beside bfloat16, else float32."""
    if like.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def finite(m):
    """A running maximum to subtract: 0 where nothing was written yet."""
    return tl.where(m == float("-inf"), 0.0, m)
