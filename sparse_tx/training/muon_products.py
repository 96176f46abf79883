"""A step of Muon's iteration (Jordan et al. 2024) in three launches: g = x x', h = b g + c g g, x <- a x + h x.

torch.baddbmm copies what it adds before it multiplies, and torch works out both halves of a symmetric product. Here
what is added meets the sums in float32, rounded once, and a tile below the diagonal is written a second time, turned.

Names: N matrices, x (N, R, C), g and h (N, S, S), S the smaller of R and C: x' x and x h where matrices are tall. Tiles
of BM rows and BN columns, BK deep. Where COPIED the factors come by descriptor, zero beyond the ends of their matrix;
all else is met by pointer. WHOLE: rows are of whole 16 bytes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_tx.attention.kernels import (
    has_copy_engine,
    interpreted,  # noqa: F401
    is_large,
)
from sparse_tx.attention.kernels.handles import Described, Launch, Operand
from sparse_tx.model.fused.products import Tiles


class Chosen(NamedTuple):
    """Tiles of the three products. The first two are symmetric: as many rows as columns."""

    gram: Tiles
    square: Tiles
    update: Tiles


# Two programs of 128 x 128 share a multiprocessor: 96 KiB and at most 128 registers a thread each. Best of 9 to 14 on
# an H100 but for small matrices (by 1 us). 16 of 2,048 x 512, us: x x' 26, the last product 45; by torch 26 and 73. All
# of a step's iterations for 16 layers 512 wide: 1,670 us for 2,260.
LARGE = Chosen(*[Tiles(128, 128, 64, 8, 3)] * 3)
SMALL = Chosen(*[Tiles(128, 128, 32, 8, 3)] * 3)
ODD = Chosen(*[Tiles(64, 64, 32, 4, 2)] * 3)  # rows of no whole 16 bytes come element by element


@triton.jit
def lower_tile(t, count):
    """Row and column of tile t of the count (count + 1) / 2 on and below the diagonal; those of a row are neighbours.

    Rows p and count - 1 - p have count + 1 tiles together, whatever p. An odd count's middle row comes last, alone.
    """
    p, q = t // (count + 1), t % (count + 1)
    return tl.where(q <= p, p, count - 1 - p), tl.where(q <= p, q, q - p - 1)


@triton.jit
def _places(row, column, R, C, BR: tl.constexpr, BC: tl.constexpr):
    """Offsets of a tile in a matrix (R, C), and which of them are inside."""
    rows, columns = row + tl.arange(0, BR), column + tl.arange(0, BC)
    return rows[:, None] * C + columns[None, :], (rows < R)[:, None] & (columns < C)[None, :]


@triton.jit
def _tile(X, n, row, column, R, C, BR: tl.constexpr, BC: tl.constexpr, TURNED: tl.constexpr, COPIED: tl.constexpr):
    """(BR, BC) of matrix n of (N, R, C), which is X, or its matrices transposed if TURNED; zero beyond its ends."""
    if COPIED:
        if TURNED:
            x = X.load([n, column, row]).reshape(BC, BR).T
        else:
            x = X.load([n, row, column]).reshape(BR, BC)
    else:
        rows, columns = row + tl.arange(0, BR)[:, None], column + tl.arange(0, BC)[None, :]
        at = columns * R + rows if TURNED else rows * C + columns
        x = tl.load(X + n.to(tl.int64) * R * C + at, mask=(rows < R) & (columns < C), other=0.0)
    return x


@triton.jit
def muon_symmetric(
    X, ADDED, OUT, b, c, S, K,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TALL: tl.constexpr, ADD: tl.constexpr,
    COPIED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """OUT (N, S, S) = X X', X (N, S, K); X' X, X (N, K, S), if TALL. If ADD, b ADDED + c X X', ADDED symmetric too."""
    if WHOLE:  # tells Triton so, which sees multiples of 16 elements by itself, not of 8
        S = S // 8 * 8
        if not TALL:
            K = K // 8 * 8
    count = tl.cdiv(S, BM)
    each = count * (count + 1) // 2
    program = tl.program_id(0)
    if not ADD:  # from the last x on, which the launch before left in the L2 cache; the first stay there for the update
        program = tl.num_programs(0) - 1 - program
    n = program // each
    i, j = lower_tile(program % each, count)
    row, column = i * BM, j * BM
    acc = tl.zeros([BM, BM], tl.float32)
    if COPIED and row == column:  # one tile for both factors, which only wgmma takes in both layouts
        for k in tl.range(0, K, BK, num_stages=STAGES):
            x = _tile(X, n, row, k, S, K, BM, BK, TALL, COPIED)
            acc = tl.dot(x, x.T, acc, input_precision="ieee")
    else:
        for k in tl.range(0, K, BK, num_stages=STAGES):
            x = _tile(X, n, row, k, S, K, BM, BK, TALL, COPIED)
            y = _tile(X, n, k, column, K, S, BK, BM, not TALL, COPIED)
            acc = tl.dot(x, y, acc, input_precision="ieee")
    at, inside = _places(row, column, S, S, BM, BM)
    start = n.to(tl.int64) * S * S
    if ADD:
        acc = b * tl.load(ADDED + start + at, mask=inside, other=0.0).to(tl.float32) + c * acc
    low = acc.to(OUT.dtype.element_ty)
    if row == column:  # sums on both sides of the diagonal may differ by their order: one side for both
        below = tl.arange(0, BM)[:, None] >= tl.arange(0, BM)[None, :]
        tl.store(OUT + start + at, tl.where(below, low, low.T), mask=inside)
    else:
        tl.store(OUT + start + at, low, mask=inside)
        at, inside = _places(column, row, S, S, BM, BM)
        tl.store(OUT + start + at, low.T, mask=inside)


@triton.jit
def muon_update(
    A, B, X, OUT, a, R, C, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TALL: tl.constexpr,
    COPIED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """OUT = a X + A B. A (N, R, K), B (N, K, C), X and OUT (N, R, C)."""
    if WHOLE:
        C, K = C // 8 * 8, K // 8 * 8
    down, across = tl.cdiv(R, BM), tl.cdiv(C, BN)
    n, t = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    if TALL:  # neighbours share their rows of X, or columns: all share the small factor
        row, column = t // across * BM, t % across * BN
    else:
        row, column = t % down * BM, t // down * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        x = _tile(A, n, row, k, R, K, BM, BK, False, COPIED)
        y = _tile(B, n, k, column, K, C, BK, BN, False, COPIED)
        acc = tl.dot(x, y, acc, input_precision="ieee")
    at, inside = _places(row, column, R, C, BM, BN)
    start = n.to(tl.int64) * R * C
    acc += a * tl.load(X + start + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + start + at, acc.to(OUT.dtype.element_ty), mask=inside)


def iterated(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """x after so many steps of Newton-Schulz. x: (N, R, C), dense, its singular values at most 1; is written over."""
    assert x.is_contiguous()
    assert x.data_ptr() % 16 == 0
    if x.numel() == 0:
        return x
    N, R, C = x.shape
    a, b, c = coefficients
    planned = _planned((N, R, C), x.dtype, x.device, (a, b, c))
    g = x.new_empty(N, min(R, C), min(R, C))
    h, out = torch.empty_like(g), torch.empty_like(x)
    for _ in range(steps):
        for launch in planned:
            launch((x, g, h, out))
        x, out = out, x
    return x


def launches(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    coefficients: tuple[float, float, float],
    chosen: Chosen | None = None,
) -> tuple[Launch, Launch, Launch]:
    """Of (x, g, h, the next x), all dense and aligned: they make g, h and the next x. shape: of x, (N, R, C)."""
    N, R, C = shape
    a, b, c = map(float, coefficients)  # whole numbers would be constants
    tall = R > C
    S, K = min(R, C), max(R, C)
    whole = S * dtype.itemsize % 16 == 0 and C * dtype.itemsize % 16 == 0
    copied = whole and dtype.itemsize == 2 and has_copy_engine(device)
    chosen = chosen or (LARGE if copied and is_large(device) else SMALL if whole else ODD)

    def operand(place: int, rows: int, columns: int) -> Operand:
        return Operand(place, (N, rows, columns), (rows * columns, columns, 1), dtype, True, device)

    def factor(t: Operand, rows: int, columns: int) -> Operand | Described:
        return Described(t, list(t.shape), list(t.strides), [1, rows, columns]) if copied else t

    def symmetric(t: Operand, tall: bool, added: Operand | None, out: Operand, K: int, tiles: Tiles) -> Launch:
        BM, BN, BK, warps, stages = tiles
        assert BM == BN
        count = triton.cdiv(S, BM)
        return Launch(
            muon_symmetric, N * (count * (count + 1) // 2),
            factor(t, *((BK, BM) if tall else (BM, BK))), added or out, out, b, c, S, K,
            BM=BM, BK=BK, STAGES=stages, TALL=tall, ADD=added is not None, COPIED=copied, WHOLE=whole, num_warps=warps,
        )  # fmt: skip

    x, g, h, out = operand(0, R, C), operand(1, S, S), operand(2, S, S), operand(3, R, C)
    BM, BN, BK, warps, stages = chosen.update
    left, right = (x, h) if tall else (h, x)
    update = Launch(
        muon_update, N * triton.cdiv(R, BM) * triton.cdiv(C, BN),
        factor(left, BM, BK), factor(right, BK, BN), x, out, a, R, C, S,
        BM=BM, BN=BN, BK=BK, STAGES=stages, TALL=tall, COPIED=copied, WHOLE=whole, num_warps=warps,
    )  # fmt: skip
    return symmetric(x, tall, None, g, K, chosen.gram), symmetric(g, False, g, h, S, chosen.square), update


_planned = functools.lru_cache(64)(launches)
