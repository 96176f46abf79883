"""Products of the feed-forward that take the activation, or its gradient, with them: u = x W1^T + b1, y = f(u), y W2^T.

The library's products write what a kernel of ours then reads again: of a feed-forward twice as wide as the model, the
activation moves 4 of the 10 (T, C) that go through memory forwards, 6 to 8 of 15 to 17 backwards. Here it is done where
the numbers are: as they come to the second product, and as their gradient leaves one.

Names: T rows, C width, F hidden units; tiles of BM rows and BN columns, BK deep. Matrices come by descriptor, zero
beyond their ends, where the activations are zero too; what is added to a product by pointer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_tx.attention.kernels import (
    has_copy_engine,
    interpreted,  # noqa: F401
)
from sparse_tx.model.activation import activated, activated_and_slope
from sparse_tx.model.fused.norm import total


class Tiles(NamedTuple):
    rows: int
    columns: int
    depth: int  # of a step
    warps: int
    stages: int


# Tuned on an H200 for 49,152 rows in bf16, us; in parentheses the library's product and a kernel of ours beside it.
# 256 wide with 512 hidden units (`contract` serves models up to fused.WIDEST): 36.5 (52.6); with tiles of 128 rows 49
# to 60, with steps of 64 41.9.
CONTRACT = Tiles(64, 256, 32, 4, 3)
# The same: 84.3 with f(u) made again (91.6), 74.9 without (77.0). 512 wide with 2,048: 360.9 (378.7), 316.7 (315.4; of
# 4 warps 311.6). With u read before the loop and no halves 92 to 146, but 303.4 for 512 wide without f(u). The same for
# both, as the number of warps decides the order of sums: recomputed blocks have the bits of kept ones.
BACKWARD = Tiles(128, 128, 64, 8, 3)


@triton.jit
def contract_product(
    U, W, A, F, across,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A = f(U) W^T. U (T, F), W (C, F). f is taken once for every BN columns of A."""
    row, column = tl.program_id(0) // across * BM, tl.program_id(0) % across * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, F, BK, num_stages=STAGES):
        y = activated(U.load([row, k]).to(tl.float32), KIND).to(W.dtype)
        acc = tl.dot(y, W.load([column, k]).T, acc, input_precision="ieee")
    A.store([row, column], acc.to(A.dtype))


@triton.jit
def _gradient_of_columns(
    acc, row, column, U, DU, Y, SUMS, T, F,
    BM: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """From `acc`, the gradient of f(U) in some rows and columns, to what is kept."""
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    inside = (rows < T)[:, None] & (columns < F)[None, :]
    u = tl.load(U + rows.to(tl.int64)[:, None] * F + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    y, slope = activated_and_slope(u, KIND)
    # Rounded first as the library's product leaves it, and the sums are of what is kept.
    d = (acc.to(DU.dtype).to(tl.float32) * slope).to(DU.dtype)
    DU.store([row, column], d)
    if AGAIN:
        Y.store([row, column], y.to(Y.dtype))
    tl.store(SUMS + (row // BM).to(tl.int64) * F + columns, tl.sum(d.to(tl.float32), 0), mask=columns < F)


@triton.jit
def contract_backward(
    DA, W, U, DU, Y, SUMS, T, C, F, across,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """DU = (DA W) f'(U), and Y = f(U) once more if AGAIN. DA (T, C), W (C, F), U (T, F), which is a pointer.

    SUMS (tiles of rows, F): sums of DU over the rows of a tile. Rows beyond T have no DA, so they add zero.
    """
    row, column = tl.program_id(0) // across * BM, tl.program_id(0) % across * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, C, BK, num_stages=STAGES):
        acc = tl.dot(DA.load([row, k]), W.load([k, column]), acc, input_precision="ieee")
    # By halves: u, f(u), f'(u) and the product of a whole tile do not fit the registers.
    left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
    _gradient_of_columns(left, row, column, U, DU, Y, SUMS, T, F, BM, BN // 2, KIND, AGAIN)
    _gradient_of_columns(right, row, column + BN // 2, U, DU, Y, SUMS, T, F, BM, BN // 2, KIND, AGAIN)


def usable(*matrices: Tensor) -> bool:
    """Whether the products take these: 16 bits on a GPU with a copy engine (or interpreted), rows of whole 16 bytes."""
    first = matrices[0]
    if (first.is_cuda and first.element_size() != 2) or not has_copy_engine(first.device):
        return False
    return all(
        t.is_contiguous() and t.shape[1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices
    )


def _block(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])


def contract(u: Tensor, weight: Tensor, kind: str, out: Tensor, tiles: Tiles = CONTRACT) -> None:
    """out becomes f(u) weight^T. u (T, F), weight (C, F), out (T, C)."""
    (T, F), C = u.shape, len(weight)
    across = triton.cdiv(C, tiles.columns)
    contract_product[(triton.cdiv(T, tiles.rows) * across,)](
        _block(u, tiles.rows, tiles.depth), _block(weight, tiles.columns, tiles.depth),
        _block(out, tiles.rows, tiles.columns), F, across,
        BM=tiles.rows, BN=tiles.columns, BK=tiles.depth, STAGES=tiles.stages, KIND=kind, num_warps=tiles.warps,
    )  # fmt: skip


def hidden_gradient(
    d_a: Tensor, weight: Tensor, u: Tensor, kind: str, *, again: bool, tiles: Tiles = BACKWARD
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradient of u, f(u) once more if `again`, and the sums of the gradient's columns, in a fixed order, (F,) float32.

    d_a (T, C): gradient of f(u) weight^T. weight (C, F), u (T, F).
    """
    (T, C), F = d_a.shape, u.shape[1]
    d_u = torch.empty_like(u)
    y = torch.empty_like(u) if again else None
    sums = torch.empty(triton.cdiv(T, tiles.rows), F, dtype=torch.float32, device=u.device)
    half = tiles.columns // 2
    across = triton.cdiv(F, tiles.columns)
    contract_backward[(len(sums) * across,)](
        _block(d_a, tiles.rows, tiles.depth), _block(weight, tiles.depth, tiles.columns), u,
        _block(d_u, tiles.rows, half), _block(d_u if y is None else y, tiles.rows, half), sums, T, C, F, across,
        BM=tiles.rows, BN=tiles.columns, BK=tiles.depth, STAGES=tiles.stages, KIND=kind, AGAIN=again,
        num_warps=tiles.warps,
    )  # fmt: skip
    return d_u, y, total(sums)
