"""The backward pass of a narrow feed-forward's second product as one kernel, whose warps have roles of their own.

Of a = f(u) W2^T: du = (da W2) f'(u), the sums of its columns, and dW2 = da^T f(u). f(u) never reaches memory, and what
is read serves all three. A program has BN hidden units and walks over rows, BM at a time. One warp brings them by the
copy engine; two groups of four take turns in the gradient of u, which is mostly arithmetic on single numbers; a fourth
adds to dW2, all of whose rows it holds in registers. They meet at barriers in shared memory alone, so products, numbers
and copies overlap. Deterministic: which rows a program has depends on sizes and on the number of multiprocessors.

Written in Gluon for GPUs of compute capability 9.0, whose tensor instructions others lack; `products` serves those.

Names: T rows, C width, F hidden units.
"""

from __future__ import annotations

from functools import cache

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

from sparse_tx.model.activation import activated_and_slope
from sparse_tx.model.fused import WIDEST, products
from sparse_tx.model.fused.norm import total

BM, BN, BK = 64, 64, 128
# Tiles of da, of u and of f(u) that lie in shared memory at a time, and registers of a thread that computes. On an
# H100, 49,152 rows of 256 with 512 hidden units in bf16, us: 64 and 6 for the shares of programs, where `products` and
# the library take 128. Lost: chunks of 128 hidden units, which need half of the copies from the L2 cache but leave too
# few registers (78; by two groups that do both 86).
DA_TILES, TILES = 4, 4
REGISTERS = 152
_GROUPS = 2  # that take turns in the gradient of u


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
        at = i % TILES
        mbarrier.wait(u_empty.index(at), (i // TILES & 1) ^ 1)
        mbarrier.expect(u_full.index(at), BM * BN * 2)
        tma.async_copy_global_to_shared(U, [row, column], u_full.index(at), u.index(at))


@gluon.jit
def _own_rows(x):
    """(BM, BN) -> (BM / 16, 8, BN): of each 16 rows a thread holds two, 8 apart, and adds them."""
    return gl.sum(x.reshape([x.shape[0] // 16, 2, 8, x.shape[1]]), 1)


@gluon.jit
def _gradients(
    WHICH: gl.constexpr, DU, SUMS, da, w, u, y, da_full, da_empty, u_full, u_empty, y_full, y_empty, w_full,
    first, step, count, column, F,
    PARTS: gl.constexpr, DA_TILES: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """du of every GROUPS-th tile from tile WHICH on, written over u, and f(u) for `_weight`.

    SUMS (shares GROUPS 4, F): one row of sums for each warp.
    """
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
    of_warps = gl.sum(sums, 1)
    rows = (first * GROUPS + WHICH) * (BM // 16) + gl.arange(0, BM // 16, gl.SliceLayout(1, of_warps.type.layout))
    columns = column + gl.arange(0, BN, gl.SliceLayout(0, of_warps.type.layout))
    gl.store(SUMS + rows[:, None] * F + columns[None, :], of_warps, mask=(rows >= 0)[:, None] & (columns < F)[None, :])
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
    da_full = gl.allocate_shared_memory(gl.int64, [DA_TILES, 1], mbarrier.MBarrierLayout())
    da_empty = gl.allocate_shared_memory(gl.int64, [DA_TILES, 1], mbarrier.MBarrierLayout())
    u_full = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    u_empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    y_full = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    y_empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(DA_TILES):
        mbarrier.init(da_full.index(i), count=1)
        mbarrier.init(da_empty.index(i), count=2)  # one group that makes du, and the one that adds to dW2
    for i in gl.static_range(TILES):
        mbarrier.init(u_full.index(i), count=1)
        mbarrier.init(u_empty.index(i), count=1)
        mbarrier.init(y_full.index(i), count=1)
        mbarrier.init(y_empty.index(i), count=1)
    mbarrier.init(w_full.index(0), count=1)
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


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], getattr(gl, str(dtype).removeprefix("torch.")))


def _block(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns], _layout(rows, columns, t.dtype))


@cache
def _multiprocessors(device: torch.device) -> int:
    """0 where the kernel does not run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def usable(d_a: Tensor, weight: Tensor, u: Tensor) -> bool:
    """Whether the kernel takes these: 16 bits, at most WIDEST wide, on a GPU of compute capability 9.0."""
    return d_a.shape[1] <= WIDEST and _multiprocessors(d_a.device) > 0 and products.usable(d_a, weight, u)


def contract_gradients(d_a: Tensor, weight: Tensor, u: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of a = f(u) weight^T: the gradient of u, the sums of its columns (F,) and the gradient of weight, float32.

    d_a (T, C): gradient of a. weight (C, F), u (T, F).
    """
    (T, C), F = d_a.shape, u.shape[1]
    across = triton.cdiv(F, BN)
    shares = max(1, min(_multiprocessors(d_a.device) // across, triton.cdiv(T, BM)))
    d_u = torch.empty_like(u)
    sums = torch.empty(shares * _GROUPS * BM // 16, F, dtype=torch.float32, device=u.device)
    d_weight = torch.empty(shares, C, F, dtype=torch.float32, device=u.device)
    contract_backward_by_roles[(shares * across,)](
        _block(d_a, BM, BK), _block(weight, BK, BN), _block(u, BM, BN), _block(d_u, BM, BN), sums, d_weight, T, C, F,
        across, PARTS=triton.cdiv(C, BK), DA_TILES=DA_TILES, TILES=TILES, GROUPS=_GROUPS, KIND=kind,
        REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip
    return d_u, total(sums), total(d_weight)
