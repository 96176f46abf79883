"""The backward pass of a feed-forward's second product by kernels whose warps have roles of their own.

Of a = f(u) W2^T: du = (da W2) f'(u), the sums of its columns, and dW2 = da^T f(u). A program has BN hidden units, whose
part of W2 stays in shared memory, and walks over rows, BM at a time. Single warps bring them by the copy engine; groups
of four take turns in the gradient of u, which is mostly arithmetic on single numbers. They meet at barriers in shared
memory alone, so products, numbers and copies overlap. Deterministic: which rows a program has depends on sizes and on
the number of multiprocessors.

Of a narrow model one kernel does it all: f(u) never reaches memory, and what is read serves all three; one more group
adds to dW2, all of whose rows it holds in registers. Those of a wide one fit none: dW2 is left to the library.

Written in Gluon for GPUs of compute capability 9.0, whose tensor instructions others lack; `products` serves those.

Names: T rows, C width, F hidden units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_tx.attention.kernels import has_roles, multiprocessors
from sparse_tx.attention.kernels.shared_memory import barriers, block_descriptor, bring
from sparse_tx.model.activation import activated_and_slope
from sparse_tx.model.fused import WIDEST, products
from sparse_tx.model.fused.norm import total

BM, BN, BK = 64, 64, 128
# Tiles of da, of u and of f(u) that lie in shared memory at a time, in multiples of _GROUPS (see `_bring_rows`), and
# registers of a thread that computes. On an H100, 49,152 rows of 256 with 512 hidden units in bf16, us: 62 and 5 for
# the shares of programs, where `products` and the library take 128. Lost: chunks of 128 hidden units, which need half
# of the copies from the L2 cache but leave too few registers (78; by two groups that do both 86).
DA_TILES, TILES = 4, 4
REGISTERS = 152
_GROUPS = 2  # that take turns in the gradient of u


class Wide(NamedTuple):
    """How a wide model's kernel is laid out. Each pair: with f(u) kept, and with it made again."""

    columns: int  # hidden units of a program
    depth: int  # columns of a slice of da
    slices: tuple[int, int]  # of da that lie in shared memory at a time, of each group
    registers: int


# What 227 KiB hold beside the 128 of W2 that a program of a model 512 wide has, whose groups spill no register. A group
# gives back a slice of da when the products of the next have begun: there are two or more. On an H100, 49,152 rows of
# 512 with 2,048 hidden units, us, in parentheses `products`: 274 (325), f(u) made again 384 (382); relu2 254 (296), 392
# (354). Slices of 128 columns 291, three of 64 in place of four 320.
WIDE = Wide(128, 64, (4, 3), 232)
_WIDER = 512


@gluon.jit
def _bring(
    DA, W, U, da, w, u, da_full, da_empty, u_full, u_empty, w_full, first, step, count, column,
    PARTS: gl.constexpr, DA_TILES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Copies the chunk of W2 once, then each tile's rows of da, in PARTS of BK columns, and of u."""
    BM: gl.constexpr = DA.block_shape[0]
    BK: gl.constexpr = DA.block_shape[1]
    BN: gl.constexpr = W.block_shape[1]
    mbarrier.expect(w_full.index(0), PARTS * BK * BN * 2)
    for part in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(W, [part * BK, column], w_full.index(0), w.index(part))
    for i in range(count):
        row = (first + i * step) * BM
        at = i % DA_TILES
        mbarrier.wait(da_empty.index(at), (i // DA_TILES & 1) ^ 1)
        mbarrier.expect(da_full.index(at), PARTS * BM * BK * 2)
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(DA, [row, part * BK], da_full.index(at), da.index(at * PARTS + part))
        bring(U, u, u_full, u_empty, [row, column], i, TILES)


@gluon.jit
def _own_rows(x):
    """(BM, BN) -> (BM / 16, 8, BN): of each 16 rows a thread holds two, 8 apart, and adds them."""
    return gl.sum(x.reshape([x.shape[0] // 16, 2, 8, x.shape[1]]), 1)


@gluon.jit
def _keep_sums(SUMS, sums, row, column, F):
    """SUMS (shares GROUPS 4, F): one row of sums for each warp, from `row` on."""
    of_warps = gl.sum(sums, 1)
    rows = row + gl.arange(0, of_warps.shape[0], gl.SliceLayout(1, of_warps.type.layout))
    columns = column + gl.arange(0, of_warps.shape[1], gl.SliceLayout(0, of_warps.type.layout))
    gl.store(SUMS + rows[:, None] * F + columns[None, :], of_warps, mask=(rows >= 0)[:, None] & (columns < F)[None, :])


@gluon.jit
def _gradients(
    WHICH: gl.constexpr, DU, SUMS, da, w, u, y, da_full, da_empty, u_full, u_empty, y_full, y_empty, w_full,
    first, step, count, column, F,
    PARTS: gl.constexpr, DA_TILES: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """du of every GROUPS-th tile from tile WHICH on, written over u, and f(u) for `_weight`."""
    BM: gl.constexpr = DU.block_shape[0]
    BN: gl.constexpr = DU.block_shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    sums = _own_rows(gl.zeros([BM, BN], gl.float32, layout))
    mbarrier.wait(w_full.index(0), 0)
    for i in range(WHICH, count, GROUPS):
        at = i % DA_TILES
        mbarrier.wait(da_full.index(at), i // DA_TILES & 1)
        d_y = gl.zeros([BM, BN], gl.float32, layout)
        for part in gl.static_range(PARTS):
            d_y = warpgroup_mma(da.index(at * PARTS + part), w.index(part), d_y, use_acc=part > 0, is_async=True)
        # The copy of this group's du before has left shared memory by now: its place is free.
        tma.store_wait(0)
        if i >= GROUPS:
            mbarrier.arrive(u_empty.index((i - GROUPS) % TILES), count=1)
        here = i % TILES
        mbarrier.wait(u_full.index(here), i // TILES & 1)
        mbarrier.wait(y_empty.index(here), (i // TILES & 1) ^ 1)
        d_y = warpgroup_mma_wait(0, deps=[d_y])
        mbarrier.arrive(da_empty.index(at), count=1)
        f, slope = activated_and_slope(u.index(here).load(layout).to(gl.float32), KIND)
        d_u = d_y * slope
        sums += _own_rows(d_u)
        u.index(here).store(d_u.to(DU.dtype))
        y.index(here).store(f.to(DU.dtype))
        fence_async_shared()
        mbarrier.arrive(y_full.index(here), count=1)
        tma.async_copy_shared_to_global(DU, [(first + i * step) * BM, column], u.index(here))
    _keep_sums(SUMS, sums, (first * GROUPS + WHICH) * (BM // 16), column, F)
    tma.store_wait(0)


@gluon.jit
def _keep(DW, acc, row, column, C, F):
    rows = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    columns = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    gl.store(DW + rows[:, None] * F + columns[None, :], acc, mask=(rows < C)[:, None] & (columns < F)[None, :])


@gluon.jit
def _weight(
    DW, da, y, da_full, da_empty, y_full, y_empty, first, step, count, column, C, F,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    PARTS: gl.constexpr, DA_TILES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """DW (shares, C, F) float32: da^T f(u) over a share of the rows."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    low = gl.zeros([BK, BN], gl.float32, layout)
    high = low
    for i in range(count):
        at, here = i % DA_TILES, i % TILES
        mbarrier.wait(da_full.index(at), i // DA_TILES & 1)
        mbarrier.wait(y_full.index(here), i // TILES & 1)
        low = warpgroup_mma(da.index(at * PARTS).permute([1, 0]), y.index(here), low, is_async=True)
        if PARTS == 2:
            high = warpgroup_mma(da.index(at * PARTS + 1).permute([1, 0]), y.index(here), high, is_async=True)
        low, high = warpgroup_mma_wait(0, deps=[low, high])
        mbarrier.arrive(da_empty.index(at), count=1)
        mbarrier.arrive(y_empty.index(here), count=1)
    DW += first.to(gl.int64) * C * F
    _keep(DW, low, 0, column, C, F)
    if PARTS == 2:
        _keep(DW, high, BK, column, C, F)


@gluon.jit
def contract_backward_by_roles(
    DA, W, U, DU, SUMS, DW, T, C, F, across,
    PARTS: gl.constexpr, DA_TILES: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """DA (T, C), W (C, F), U and DU (T, F) by descriptor, zero beyond their ends. Programs: shares times `across`."""
    BM: gl.constexpr = DA.block_shape[0]
    BK: gl.constexpr = DA.block_shape[1]
    BN: gl.constexpr = W.block_shape[1]
    da = gl.allocate_shared_memory(DA.dtype, [DA_TILES * PARTS, BM, BK], DA.layout)
    w = gl.allocate_shared_memory(DA.dtype, [PARTS, BK, BN], W.layout)
    u = gl.allocate_shared_memory(DA.dtype, [TILES, BM, BN], U.layout)
    y = gl.allocate_shared_memory(DA.dtype, [TILES, BM, BN], U.layout)
    da_full, w_full = barriers(DA_TILES), barriers(1)
    da_empty = gl.allocate_shared_memory(gl.int64, [DA_TILES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(DA_TILES):
        mbarrier.init(da_empty.index(i), count=2)  # one group that makes du, and the one that adds to dW2
    u_full, u_empty = barriers(TILES), barriers(TILES)
    y_full, y_empty = barriers(TILES), barriers(TILES)
    fence_async_shared()
    first = gl.program_id(0) // across
    column = gl.program_id(0) % across * BN
    step = gl.num_programs(0) // across
    count = ((T + BM - 1) // BM - first + step - 1) // step  # of tiles: first, first + step, ...
    gl.warp_specialize(
        [
            (_weight, (DW, da, y, da_full, da_empty, y_full, y_empty, first, step, count, column, C, F,
                       BM, BN, BK, PARTS, DA_TILES, TILES)),
            (_gradients, (0, DU, SUMS, da, w, u, y, da_full, da_empty, u_full, u_empty, y_full, y_empty, w_full,
                          first, step, count, column, F, PARTS, DA_TILES, TILES, GROUPS, KIND)),
            (_gradients, (1, DU, SUMS, da, w, u, y, da_full, da_empty, u_full, u_empty, y_full, y_empty, w_full,
                          first, step, count, column, F, PARTS, DA_TILES, TILES, GROUPS, KIND)),
            (_bring, (DA, W, U, da, w, u, da_full, da_empty, u_full, u_empty, w_full,
                      first, step, count, column, PARTS, DA_TILES, TILES)),
        ],
        [4, 4, 1], [REGISTERS, REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _bring_rows(
    DA, W, da, w, da_full, da_empty, w_full, first, step, count, column,
    PARTS: gl.constexpr, SLICES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Copies the chunk of W2 once, then of each tile PARTS slices of da, BK columns each, to the places of its group.

    A barrier tells its last phase from the next alone. So no group may wait at one that another has passed since: a
    place serves one group.
    """
    BM: gl.constexpr = DA.block_shape[0]
    BK: gl.constexpr = DA.block_shape[1]
    BN: gl.constexpr = W.block_shape[1]
    mbarrier.expect(w_full.index(0), PARTS * BK * BN * 2)
    for part in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(W, [part * BK, column], w_full.index(0), w.index(part))
    for i in range(count):
        for part in gl.static_range(PARTS):
            slice = i // GROUPS * PARTS + part  # of the group's
            at = i % GROUPS * SLICES + slice % SLICES
            mbarrier.wait(da_empty.index(at), (slice // SLICES & 1) ^ 1)
            mbarrier.expect(da_full.index(at), BM * BK * 2)
            tma.async_copy_global_to_shared(DA, [(first + i * step) * BM, part * BK], da_full.index(at), da.index(at))


@gluon.jit
def _bring_hidden(U, u, u_full, u_empty, first, step, count, column, GROUPS: gl.constexpr):
    """Copies u of each tile, as two halves of its columns, to the place of its group."""
    BM: gl.constexpr = U.block_shape[0]
    HALF: gl.constexpr = U.block_shape[1]
    for i in range(count):
        at = i % GROUPS
        mbarrier.wait(u_empty.index(at), (i // GROUPS & 1) ^ 1)
        mbarrier.expect(u_full.index(at), 2 * BM * HALF * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                U, [(first + i * step) * BM, column + half * HALF], u_full.index(at), u.index(at * 2 + half)
            )


@gluon.jit
def _halves(x):
    """(BM, BN) -> two of (BM, BN / 2), columns in order: a thread has as many of each."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _gradient_of_half(d_y, sums, DU, Y, u, y, row, column, KIND: gl.constexpr, AGAIN: gl.constexpr):
    """Writes du over u and f(u) to y, sends them off, and returns the sums with those of this du."""
    f, slope = activated_and_slope(u.load(d_y.type.layout).to(gl.float32), KIND)
    d_u = d_y * slope
    if AGAIN:
        tma.store_wait(0)  # f(u) of the half before has left its place
        y.store(f.to(y.dtype))
    u.store(d_u.to(u.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(DU, [row, column], u)
    if AGAIN:
        tma.async_copy_shared_to_global(Y, [row, column], y)
    return sums + _own_rows(d_u)


@gluon.jit
def _wide_gradients(
    WHICH: gl.constexpr, DU, Y, SUMS, da, w, u, y, da_full, da_empty, u_full, u_empty, w_full,
    first, step, count, column, F,
    PARTS: gl.constexpr, SLICES: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr,
    AGAIN: gl.constexpr,
):  # fmt: skip
    """du of every GROUPS-th tile from tile WHICH on, written over u, and f(u) if AGAIN."""
    BM: gl.constexpr = DU.block_shape[0]
    HALF: gl.constexpr = DU.block_shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    left, right = _halves(gl.zeros([BM, 2 * HALF], gl.float32, layout))
    sums_left, sums_right = _own_rows(left), _own_rows(right)
    mbarrier.wait(w_full.index(0), 0)
    for i in range(WHICH, count, GROUPS):
        d_y = gl.zeros([BM, 2 * HALF], gl.float32, layout)
        # Not unrolled: the addresses of every part of W2 would be kept in registers, and spilled.
        for part in range(PARTS):
            slice = i // GROUPS * PARTS + part
            at = WHICH * SLICES + slice % SLICES
            mbarrier.wait(da_full.index(at), slice // SLICES & 1)
            d_y = warpgroup_mma(da.index(at), w.index(part), d_y, use_acc=part > 0, is_async=True)
            d_y = warpgroup_mma_wait(1, deps=[d_y])
            before = WHICH * SLICES + (slice + SLICES - 1) % SLICES
            mbarrier.arrive(da_empty.index(before), count=1, pred=part > 0)
        d_y = warpgroup_mma_wait(0, deps=[d_y])
        last = i // GROUPS * PARTS + PARTS - 1
        mbarrier.arrive(da_empty.index(WHICH * SLICES + last % SLICES), count=1)
        mbarrier.wait(u_full.index(WHICH), i // GROUPS & 1)
        row = (first + i * step) * BM
        left, right = _halves(d_y)
        sums_left = _gradient_of_half(
            left, sums_left, DU, Y, u.index(WHICH * 2), y.index(WHICH), row, column, KIND, AGAIN
        )
        sums_right = _gradient_of_half(
            right, sums_right, DU, Y, u.index(WHICH * 2 + 1), y.index(WHICH), row, column + HALF, KIND, AGAIN
        )
        # Before anything else is waited for: who brings u, and so every group, may be waiting for this place.
        tma.store_wait(0)
        mbarrier.arrive(u_empty.index(WHICH), count=1)
    _keep_sums(SUMS, sums_left, (first * GROUPS + WHICH) * (BM // 16), column, F)
    _keep_sums(SUMS, sums_right, (first * GROUPS + WHICH) * (BM // 16), column + HALF, F)


@gluon.jit
def hidden_gradient_by_roles(
    DA, W, U, DU, Y, SUMS, T, F, across,
    PARTS: gl.constexpr, SLICES: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr,
    AGAIN: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """DA (T, C), W (C, F), U, DU and Y (T, F) by descriptor, zero beyond their ends. Programs: shares times `across`.

    Every wait ends, for it is for an earlier tile: products of a tile wait for those of the tile before, which empty
    slices of da, and for all that its group did before; its du for its products, and for u, whose place its group's du
    before left. So da and u have a warp each: neither waits for the other's places.
    """
    BM: gl.constexpr = DA.block_shape[0]
    BK: gl.constexpr = DA.block_shape[1]
    BN: gl.constexpr = W.block_shape[1]
    HALF: gl.constexpr = U.block_shape[1]
    da = gl.allocate_shared_memory(DA.dtype, [GROUPS * SLICES, BM, BK], DA.layout)
    w = gl.allocate_shared_memory(DA.dtype, [PARTS, BK, BN], W.layout)
    u = gl.allocate_shared_memory(DA.dtype, [GROUPS * 2, BM, HALF], U.layout)
    y = u
    if AGAIN:
        y = gl.allocate_shared_memory(DA.dtype, [GROUPS, BM, HALF], U.layout)
    da_full, da_empty = barriers(GROUPS * SLICES), barriers(GROUPS * SLICES)
    u_full, u_empty = barriers(GROUPS), barriers(GROUPS)
    w_full = barriers(1)
    fence_async_shared()
    first = gl.program_id(0) // across
    column = gl.program_id(0) % across * BN
    step = gl.num_programs(0) // across
    count = ((T + BM - 1) // BM - first + step - 1) // step  # of tiles: first, first + step, ...
    gl.warp_specialize(
        [
            (_wide_gradients, (0, DU, Y, SUMS, da, w, u, y, da_full, da_empty, u_full, u_empty, w_full,
                               first, step, count, column, F, PARTS, SLICES, GROUPS, KIND, AGAIN)),
            (_wide_gradients, (1, DU, Y, SUMS, da, w, u, y, da_full, da_empty, u_full, u_empty, w_full,
                               first, step, count, column, F, PARTS, SLICES, GROUPS, KIND, AGAIN)),
            (_bring_rows, (DA, W, da, w, da_full, da_empty, w_full,
                           first, step, count, column, PARTS, SLICES, GROUPS)),
            (_bring_hidden, (U, u, u_full, u_empty, first, step, count, column, GROUPS)),
        ],
        [4, 1, 1], [REGISTERS, 24, 24],
    )  # fmt: skip


def _block(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return block_descriptor(t, t.shape, t.stride(), [rows, columns])


def usable(d_a: Tensor, weight: Tensor, u: Tensor) -> bool:
    """Whether the kernel takes these: 16 bits, at most WIDEST wide, on a GPU of compute capability 9.0."""
    return d_a.shape[1] <= WIDEST and has_roles(d_a.device) and products.usable(d_a, weight, u)


def usable_wide(d_a: Tensor, weight: Tensor, u: Tensor) -> bool:
    """The same of the wide model's kernel: more than WIDEST, and W2 fits the shared memory by parts of its columns."""
    return WIDEST < d_a.shape[1] <= _WIDER and has_roles(d_a.device) and products.usable(d_a, weight, u)


def contract_gradients(d_a: Tensor, weight: Tensor, u: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of a = f(u) weight^T: the gradient of u, the sums of its columns (F,) and the gradient of weight, float32.

    d_a (T, C): gradient of a. weight (C, F), u (T, F).
    """
    (T, C), F = d_a.shape, u.shape[1]
    across = triton.cdiv(F, BN)
    shares = max(1, min(multiprocessors(d_a.device.index) // across, triton.cdiv(T, BM)))
    d_u = torch.empty_like(u)
    sums = torch.empty(shares * _GROUPS * BM // 16, F, dtype=torch.float32, device=u.device)
    d_weight = torch.empty(shares, C, F, dtype=torch.float32, device=u.device)
    contract_backward_by_roles[(shares * across,)](
        _block(d_a, BM, BK), _block(weight, BK, BN), _block(u, BM, BN), _block(d_u, BM, BN), sums, d_weight, T, C, F,
        across, PARTS=triton.cdiv(C, BK), DA_TILES=DA_TILES, TILES=TILES, GROUPS=_GROUPS, KIND=kind,
        REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip
    return d_u, total(sums), total(d_weight)


def hidden_gradient(
    d_a: Tensor, weight: Tensor, u: Tensor, kind: str, *, again: bool, wide: Wide = WIDE
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `products.hidden_gradient` returns, for wide models. The gradient of f(u) is not rounded on the way."""
    (T, C), F = d_a.shape, u.shape[1]
    across = triton.cdiv(F, wide.columns)
    shares = max(1, min(multiprocessors(d_a.device.index) // across, triton.cdiv(T, BM)))
    d_u = torch.empty_like(u)
    y = torch.empty_like(u) if again else None
    sums = torch.empty(shares * _GROUPS * BM // 16, F, dtype=torch.float32, device=u.device)
    half = wide.columns // 2
    hidden_gradient_by_roles[(shares * across,)](
        _block(d_a, BM, wide.depth), _block(weight, wide.depth, wide.columns), _block(u, BM, half),
        _block(d_u, BM, half), _block(d_u if y is None else y, BM, half), sums, T, F, across,
        PARTS=triton.cdiv(C, wide.depth), SLICES=wide.slices[again], GROUPS=_GROUPS,
        KIND=kind, AGAIN=again, REGISTERS=wide.registers, num_warps=4,
    )  # fmt: skip
    return d_u, y, total(sums)
