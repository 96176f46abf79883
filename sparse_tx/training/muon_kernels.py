"""What Muon does around its products, in two passes over many matrices of one shape: by a table of their addresses.

ADDRESSES (N, 3) int64: of a matrix's gradient, its momentum and its weights, float32 (R, C), dense. SCALE, FOUND_INF ()
float32. Shares that a schedule changes are floats, which Triton makes no constants of: 0.0 and 1.0 are like all others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, bfloat16

from sparse_tx.attention.kernels import interpreted  # noqa: F401

_BLOCK = 4096  # elements of a program


@triton.jit
def muon_gather(ADDRESSES, OUT, SCALE, FOUND_INF, momentum, n, BLOCK: tl.constexpr):
    """m <- m + (1 - momentum) kept (g / scale - m), and OUT (N, n) bfloat16 of it and the gradient (Nesterov).

    Of a block of one matrix of n elements. A step left out has a gradient of 0: what is not finite reaches nothing.
    """
    matrix = ADDRESSES + 3 * tl.program_id(1)
    gradient = tl.multiple_of(tl.load(matrix).to(tl.pointer_type(tl.float32)), 16)
    moment = tl.multiple_of(tl.load(matrix + 1).to(tl.pointer_type(tl.float32)), 16)
    kept = 1 - tl.load(FOUND_INF)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + at, mask=at < n) / tl.load(SCALE)
    g = tl.where(kept != 0, g, 0.0)
    m = tl.load(moment + at, mask=at < n)
    m += (1 - momentum) * kept * (g - m)
    tl.store(moment + at, m, mask=at < n)
    out = OUT + tl.program_id(1).to(tl.int64) * n
    tl.store(out + at, (g + momentum * (m - g)).to(tl.bfloat16), mask=at < n)


@triton.jit
def muon_apply(ADDRESSES, X, FOUND_INF, decay, step, start, n, BLOCK: tl.constexpr):
    """p <- p (1 - decay kept) - step kept x, of a block of n elements of one matrix from `start` on. X: (N, n)."""
    weights = tl.load(ADDRESSES + 3 * tl.program_id(1) + 2).to(tl.pointer_type(tl.float32))
    weights = tl.multiple_of(weights, 16) + start
    kept = 1 - tl.load(FOUND_INF)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + tl.program_id(1).to(tl.int64) * n + at, mask=at < n).to(tl.float32)
    p = tl.load(weights + at, mask=at < n)
    tl.store(weights + at, p * (1 - decay * kept) - step * kept * x, mask=at < n)


def gather(addresses: Tensor, shape: tuple[int, ...], scale: Tensor, found_inf: Tensor, momentum: float) -> Tensor:
    """addresses: (N, 3), shape: (R, C). Moves the momentum; returns what to make orthogonal, (N, R, C) bfloat16."""
    out = addresses.new_empty((len(addresses), *shape), dtype=bfloat16)
    n = out[0].numel()
    grid = triton.cdiv(n, _BLOCK), len(out)
    muon_gather[grid](addresses, out, scale, found_inf, float(momentum), n, BLOCK=_BLOCK, num_warps=4)
    return out


def apply(addresses: Tensor, x: Tensor, first: int, found_inf: Tensor, decay: float, step: float) -> None:
    """p <- p (1 - decay) - step x, of the rows from `first` on. x: (N, rows, C), dense."""
    assert x.is_contiguous()
    _, rows, C = x.shape
    grid = triton.cdiv(rows * C, _BLOCK), len(x)
    numbers = float(decay), float(step), first * C, rows * C
    muon_apply[grid](addresses, x, found_inf, *numbers, BLOCK=_BLOCK, num_warps=4)
