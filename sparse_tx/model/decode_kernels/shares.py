"""All between two attentions of a decoding step in two launches, for fewer rows than fill a GPU.

In Gluon for compute capability 9.0. One program for all matrices of a layer (`hopper`) takes as long as a
multiprocessor needs to bring its weights. Here programs share them: of the first launch each makes the sum after
attention again and adds what UNITS of the hidden units give, a share of the residual stream; of the second each adds up
the shares and makes OUTS outputs of the next projection. All weights of a program lie in shared memory at once, on
their way before the kernel ahead has ended.

Names: C width, F hidden units, N outputs of the next projection; products are transposed, (outputs, rows).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

from sparse_tx.attention.kernels.shared_memory import barriers
from sparse_tx.model.activation import activated
from sparse_tx.model.decode_kernels.configs import SHARE_ROWS, SHARE_UNITS
from sparse_tx.model.decode_kernels.hopper import WIDEST, normal, tiles, vectors, wait_for_previous

if TYPE_CHECKING:
    from sparse_tx.model.decoder import LayerWeights, Pair

OUTS = 128  # outputs of a program
DEPTH = 64  # inputs of a tile of weights


@gluon.jit
def _bring(W, w, full, row, column, PARTS: gl.constexpr):
    """PARTS tiles side by side."""
    mbarrier.expect(full.index(0), 2 * PARTS * W.block_shape[0] * W.block_shape[1])
    for part in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(W, [row, column + part * W.block_shape[1]], full.index(0), w.index(part))


@gluon.jit
def _multiply(acc, w, full, x, PARTS: gl.constexpr):
    """acc (outputs, rows) + w x^T. w: (PARTS, outputs, DEPTH), x: (rows, at least PARTS DEPTH) in shared memory."""
    DEPTH: gl.constexpr = w.shape[2]
    mbarrier.wait(full.index(0), 0)
    for part in gl.static_range(PARTS):
        acc = warpgroup_mma(w.index(part), x.slice(part * DEPTH, DEPTH, 1).permute([1, 0]), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def feedforward_share(
    OUT, W, BIAS, X, GAIN, SHIFT, W1, BIAS1, W2, BIAS2, SHARES, rows, eps,
    C: gl.constexpr, F: gl.constexpr, ACTIVATION: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """SHARES (cdiv(F, UNITS), rows, C) float32, whose sum is x + W2 act(W1 LN(x) + b1) + b2 with x = X + W OUT + b.

    Grid (shares, cdiv(rows, ROWS)). By descriptor, zero beyond their ends: OUT (rows, C); W (C, C), W1 (F, C), W2
    (C, F) in tiles.
    """
    ROWS: gl.constexpr = OUT.block_shape[0]
    WIDE: gl.constexpr = W.block_shape[0]
    DEPTH: gl.constexpr = W.block_shape[1]
    UNITS: gl.constexpr = W1.block_shape[0]
    PARTS: gl.constexpr = (C + DEPTH - 1) // DEPTH
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, ROWS, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, ROWS // 2, 16])
    w = gl.allocate_shared_memory(OUT.dtype, [PARTS, WIDE, DEPTH], W.layout)
    w1 = gl.allocate_shared_memory(OUT.dtype, [PARTS, UNITS, DEPTH], W1.layout)
    w2 = gl.allocate_shared_memory(OUT.dtype, [1, WIDE, UNITS], W2.layout)
    x = gl.allocate_shared_memory(OUT.dtype, [ROWS, WIDE], OUT.layout)
    hidden_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, UNITS], OUT.dtype)
    hidden = gl.allocate_shared_memory(OUT.dtype, [ROWS, UNITS], hidden_layout)
    w_full, w1_full, w2_full, x_full = barriers(1), barriers(1), barriers(1), barriers(1)
    fence_async_shared()
    share = gl.program_id(0)
    first = gl.program_id(1) * ROWS
    _bring(W, w, w_full, 0, 0, PARTS)
    _bring(W1, w1, w1_full, share * UNITS, 0, PARTS)
    _bring(W2, w2, w2_full, 0, share * UNITS, 1)
    c = gl.arange(0, WIDE, gl.SliceLayout(1, layout))
    m = first + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    at = m.to(gl.int64)[None, :] * C + c[:, None]
    inside = (m < rows)[None, :] & (c < C)[:, None]
    bias = gl.load(BIAS + c, mask=c < C, other=0.0).to(gl.float32)
    bias2 = gl.load(BIAS2 + c, mask=(c < C) & (share == 0), other=0.0).to(gl.float32)
    unit = gl.arange(0, UNITS, gl.SliceLayout(1, narrow))
    bias1 = gl.load(BIAS1 + share * UNITS + unit, mask=share * UNITS + unit < F, other=0.0).to(gl.float32)
    gain, shift = vectors(GAIN, SHIFT, c, C)
    wait_for_previous(DEPENDENT)
    mbarrier.expect(x_full.index(0), 2 * ROWS * WIDE)
    tma.async_copy_global_to_shared(OUT, [first, 0], x_full.index(0), x)
    h = gl.load(X + at, mask=inside, other=0.0) + bias[:, None]
    mbarrier.wait(x_full.index(0), 0)
    h = _multiply(h, w, w_full, x, PARTS)
    x.permute([1, 0]).store(normal(h, gain, shift, c, eps, C).to(x.dtype))
    fence_async_shared()
    u = _multiply(gl.zeros([UNITS, ROWS], gl.float32, narrow), w1, w1_full, x, PARTS) + bias1[:, None]
    hidden.permute([1, 0]).store(activated(u, ACTIVATION).to(x.dtype))
    fence_async_shared()
    # The first share has the stream itself.
    start = gl.where(share == 0, h + bias2[:, None], 0.0)
    y = _multiply(start, w2, w2_full, hidden, 1)
    gl.store(SHARES + share.to(gl.int64) * rows * C + at, y, mask=inside)


@gluon.jit
def project_shares(
    SHARES, X, GAIN, SHIFT, W, BIAS, Y, rows, eps,
    ALL: gl.constexpr, C: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, WIDE: gl.constexpr, BIASED: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    """X (rows, C) = the sum of SHARES (ALL, rows, C); Y (rows, N) = W LN(X) + b.

    Grid (cdiv(N, OUTS), cdiv(rows, ROWS)). W (N, C) by descriptor, zero beyond its ends.
    """
    OUTS: gl.constexpr = W.block_shape[0]
    DEPTH: gl.constexpr = W.block_shape[1]
    PARTS: gl.constexpr = (C + DEPTH - 1) // DEPTH
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, ROWS, 16])
    w = gl.allocate_shared_memory(W.dtype, [PARTS, OUTS, DEPTH], W.layout)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDE], W.dtype)
    x = gl.allocate_shared_memory(W.dtype, [ROWS, WIDE], x_layout)
    full = barriers(1)
    fence_async_shared()
    out = gl.program_id(0) * OUTS
    first = gl.program_id(1) * ROWS
    _bring(W, w, full, out, 0, PARTS)
    c = gl.arange(0, WIDE, gl.SliceLayout(1, layout))
    n = out + gl.arange(0, OUTS, gl.SliceLayout(1, layout))
    m = first + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    at = m.to(gl.int64)[None, :] * C + c[:, None]
    inside = (m < rows)[None, :] & (c < C)[:, None]
    gain, shift = vectors(GAIN, SHIFT, c, C)
    y = gl.zeros([OUTS, ROWS], gl.float32, layout)
    if BIASED:
        y += gl.load(BIAS + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    wait_for_previous(DEPENDENT)
    h = gl.load(SHARES + at, mask=inside, other=0.0)
    for share in gl.static_range(1, ALL):
        h += gl.load(SHARES + share * (rows.to(gl.int64) * C) + at, mask=inside, other=0.0)
    gl.store(X + at, h, mask=inside & (out == 0))
    x.permute([1, 0]).store(normal(h, gain, shift, c, eps, C).to(x.dtype))
    fence_async_shared()
    y = _multiply(y, w, full, x, PARTS)
    to = Y + m.to(gl.int64)[None, :] * N + n[:, None]
    gl.store(to, y.to(Y.dtype.element_ty), mask=(m < rows)[None, :] & (n < N)[:, None])


def between(
    out: Tensor, w: LayerWeights, x: Tensor, shares: Tensor, norm: Pair, after: tuple[Tensor, Tensor | None], y: Tensor,
    eps: float, dependent: bool,
) -> None:  # fmt: skip
    """As `hopper.between`. shares: (cdiv(F, SHARE_UNITS), rows, C) float32, written over."""
    rows, C = out.shape
    weight, bias = after
    options = {"num_warps": 8, **({"launch_pdl": True} if dependent else {})}

    blocks = triton.cdiv(rows, SHARE_ROWS)
    feedforward_share[(len(shares), blocks)](
        tiles(out, SHARE_ROWS, WIDEST), tiles(w.out[0], WIDEST, DEPTH), w.out[1], x,
        *w.ff_norm, tiles(w.expand[0], SHARE_UNITS, DEPTH), w.expand[1], tiles(w.contract[0], WIDEST, DEPTH),
        w.contract[1], shares, rows, eps, C=C, F=len(w.expand[0]), ACTIVATION=w.activation, DEPENDENT=dependent,
        **options,
    )  # fmt: skip
    project_shares[(triton.cdiv(len(weight), OUTS), blocks)](
        shares, x, *norm, tiles(weight, OUTS, DEPTH), weight if bias is None else bias, y, rows, eps,
        ALL=len(shares), C=C, N=len(weight), ROWS=SHARE_ROWS, WIDE=WIDEST, BIASED=bias is not None,
        DEPENDENT=dependent, **options,
    )  # fmt: skip
