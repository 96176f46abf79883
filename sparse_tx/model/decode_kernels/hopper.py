"""All between two attentions of a decoding step in one launch, in Gluon for GPUs of compute capability 9.0.

No row of the batch asks for another there, so a program takes BM rows through a layer's four matrices and meets nobody.
One warp streams the weights through shared memory by the copy engine, from before the kernel ahead has ended; eight
multiply. Products are transposed, (outputs, rows): tensor cores take 64 outputs by 8 rows or more, not 64 rows.

Names: C width, F hidden units, N outputs of the next projection; a tile is WIDEST outputs by DEPTH inputs of a matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
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

from sparse_tx.attention.kernels.shared_memory import barriers, block_descriptor, bring
from sparse_tx.model.activation import activated
from sparse_tx.model.decode_kernels.configs import Between

if TYPE_CHECKING:
    from sparse_tx.model.decoder import LayerWeights, Pair

WIDEST = 256  # model, and outputs of a tile


@gluon.jit
def wait_for_previous(DEPENDENT: gl.constexpr):
    """As `decode.after_previous`, for each role."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@gluon.jit
def _bring(
    OUT, W, W1, W2, W3, ring, x, full, empty, x_full, first,
    PARTS: gl.constexpr, GROUPS: gl.constexpr, NEXT: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Tiles in the order of `_multiply`'s calls, and the rows of OUT once the kernel ahead has ended."""
    WIDE: gl.constexpr = W.block_shape[0]
    DEPTH: gl.constexpr = W.block_shape[1]
    HIDDEN: gl.constexpr = WIDE // DEPTH
    for part in gl.static_range(PARTS):
        bring(W, ring, full, empty, [0, part * DEPTH], part, STAGES)
    wait_for_previous(DEPENDENT)
    mbarrier.expect(x_full.index(0), 2 * OUT.block_shape[0] * OUT.block_shape[1])
    tma.async_copy_global_to_shared(OUT, [first, 0], x_full.index(0), x)
    for group in range(GROUPS):
        i = PARTS + group * (PARTS + HIDDEN)
        for part in gl.static_range(PARTS):
            bring(W1, ring, full, empty, [group * WIDE, part * DEPTH], i + part, STAGES)
        for part in gl.static_range(HIDDEN):
            bring(W2, ring, full, empty, [0, group * WIDE + part * DEPTH], i + PARTS + part, STAGES)
    for group in range(NEXT):
        i = PARTS + GROUPS * (PARTS + HIDDEN) + group * PARTS
        for part in gl.static_range(PARTS):
            bring(W3, ring, full, empty, [group * WIDE, part * DEPTH], i + part, STAGES)


@gluon.jit
def _multiply(acc, x, i, ring, full, empty, PARTS: gl.constexpr, STAGES: gl.constexpr):
    """acc (WIDEST, BM) + the tiles i to i + PARTS - 1 times x^T; x: (BM, WIDEST) in shared memory."""
    DEPTH: gl.constexpr = ring.shape[2]
    for part in gl.static_range(PARTS):
        at = (i + part) % STAGES
        mbarrier.wait(full.index(at), (i + part) // STAGES & 1)
        acc = warpgroup_mma(ring.index(at), x.slice(part * DEPTH, DEPTH, 1).permute([1, 0]), acc, is_async=True)
        if part > 0:
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((i + part - 1) % STAGES), count=1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((i + PARTS - 1) % STAGES), count=1)
    return acc


@gluon.jit
def normal(x, gain, shift, c, eps, C: gl.constexpr):
    """LayerNorm of the columns of x (len(c), rows), zero from C on."""
    x = gl.where((c < C)[:, None], x - (gl.sum(x, 0) / C)[None, :], 0.0)
    return x * gl.rsqrt(gl.sum(x * x, 0) / C + eps)[None, :] * gain[:, None] + shift[:, None]


@gluon.jit
def vectors(GAIN, SHIFT, c, C: gl.constexpr):
    return gl.load(GAIN + c, mask=c < C, other=0.0), gl.load(SHIFT + c, mask=c < C, other=0.0)


@gluon.jit
def _compute(
    BIAS, X, GAIN, SHIFT, BIAS1, BIAS2, NEXT_GAIN, NEXT_SHIFT, BIAS3, Y, ring, x, hidden, full, empty, x_full,
    first, rows, eps,
    C: gl.constexpr, F: gl.constexpr, N: gl.constexpr, BM: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    BIASED: gl.constexpr, ACTIVATION: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    WIDE: gl.constexpr = ring.shape[1]
    HIDDEN: gl.constexpr = WIDE // ring.shape[2]
    GROUPS: gl.constexpr = (F + WIDE - 1) // WIDE
    NEXT: gl.constexpr = (N + WIDE - 1) // WIDE
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])
    c = gl.arange(0, WIDE, gl.SliceLayout(1, layout))
    m = first + gl.arange(0, BM, gl.SliceLayout(0, layout))
    zero = gl.zeros([WIDE, BM], gl.float32, layout)
    stream = X + m.to(gl.int64)[None, :] * C + c[:, None]
    inside = (m < rows)[None, :] & (c < C)[:, None]
    bias = gl.load(BIAS + c, mask=c < C, other=0.0).to(gl.float32)
    wait_for_previous(DEPENDENT)
    h = gl.load(stream, mask=inside, other=0.0) + bias[:, None]
    mbarrier.wait(x_full.index(0), 0)
    h = _multiply(h, x, 0, ring, full, empty, PARTS, STAGES)
    bias2 = gl.load(BIAS2 + c, mask=c < C, other=0.0).to(gl.float32)
    gain, shift = vectors(GAIN, SHIFT, c, C)
    x.permute([1, 0]).store(normal(h, gain, shift, c, eps, C).to(x.dtype))
    fence_async_shared()
    h += bias2[:, None]
    for group in range(GROUPS):
        i = PARTS + group * (PARTS + HIDDEN)
        f = group * WIDE + c
        bias1 = gl.load(BIAS1 + f, mask=f < F, other=0.0).to(gl.float32)
        u = _multiply(zero, x, i, ring, full, empty, PARTS, STAGES) + bias1[:, None]
        hidden.permute([1, 0]).store(activated(u, ACTIVATION).to(x.dtype))
        fence_async_shared()
        h = _multiply(h, hidden, i + PARTS, ring, full, empty, HIDDEN, STAGES)
    gl.store(stream, h, mask=inside)
    gain, shift = vectors(NEXT_GAIN, NEXT_SHIFT, c, C)
    x.permute([1, 0]).store(normal(h, gain, shift, c, eps, C).to(x.dtype))
    fence_async_shared()
    for group in range(NEXT):
        i = PARTS + GROUPS * (PARTS + HIDDEN) + group * PARTS
        n = group * WIDE + c
        y = zero
        if BIASED:
            y += gl.load(BIAS3 + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        y = _multiply(y, x, i, ring, full, empty, PARTS, STAGES)
        to = Y + m.to(gl.int64)[None, :] * N + n[:, None]
        gl.store(to, y.to(Y.dtype.element_ty), mask=(m < rows)[None, :] & (n < N)[:, None])


@gluon.jit
def between_by_roles(
    OUT, W, BIAS, X, GAIN, SHIFT, W1, BIAS1, W2, BIAS2, NEXT_GAIN, NEXT_SHIFT, W3, BIAS3, Y, rows, eps,
    C: gl.constexpr, F: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    BIASED: gl.constexpr, ACTIVATION: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """x += W OUT + b, then x += W2 act(W1 LN(x) + b1) + b2, then Y = W3 LN(x) + b3. Grid (cdiv(rows, BM),).

    By descriptor, zero beyond their ends: OUT (rows, C) in blocks of BM rows; W (C, C), W1 (F, C), W2 (C, F), W3 (N, C)
    in tiles, of which STAGES lie in shared memory at a time. X (rows, C) float32 is the residual stream, Y (rows, N).
    """
    BM: gl.constexpr = OUT.block_shape[0]
    WIDE: gl.constexpr = W.block_shape[0]
    DEPTH: gl.constexpr = W.block_shape[1]
    PARTS: gl.constexpr = (C + DEPTH - 1) // DEPTH
    ring = gl.allocate_shared_memory(OUT.dtype, [STAGES, WIDE, DEPTH], W.layout)
    x = gl.allocate_shared_memory(OUT.dtype, [BM, WIDE], OUT.layout)
    hidden = gl.allocate_shared_memory(OUT.dtype, [BM, WIDE], OUT.layout)
    full, empty, x_full = barriers(STAGES), barriers(STAGES), barriers(1)
    fence_async_shared()
    first = gl.program_id(0) * BM
    gl.warp_specialize(
        [
            (_compute, (BIAS, X, GAIN, SHIFT, BIAS1, BIAS2, NEXT_GAIN, NEXT_SHIFT, BIAS3, Y, ring, x, hidden,
                        full, empty, x_full, first, rows, eps,
                        C, F, N, BM, PARTS, STAGES, BIASED, ACTIVATION, DEPENDENT)),
            (_bring, (OUT, W, W1, W2, W3, ring, x, full, empty, x_full, first,
                      PARTS, (F + WIDE - 1) // WIDE, (N + WIDE - 1) // WIDE, STAGES, DEPENDENT)),
        ],
        [1], [24],
    )  # fmt: skip


def tiles(weight: Tensor, outputs: int, depth: int) -> TensorDescriptor:
    return block_descriptor(weight, weight.shape, weight.stride(), [outputs, depth])


def between(
    out: Tensor, w: LayerWeights, x: Tensor, norm: Pair, after: tuple[Tensor, Tensor | None], y: Tensor, t: Between,
    eps: float, dependent: bool,
) -> None:  # fmt: skip
    """From the output of a layer's attention, out (rows, C), to the next projection y (rows, N) of x, which is changed.

    norm, after: of that projection, weight (N, C) and bias. eps: of both LayerNorms. dependent: as of `FusedSteps`.
    """
    rows, C = out.shape
    weight, bias = after
    between_by_roles[(triton.cdiv(rows, t.rows),)](
        tiles(out, t.rows, WIDEST),
        tiles(w.out[0], WIDEST, t.inputs), w.out[1], x, *w.ff_norm, tiles(w.expand[0], WIDEST, t.inputs), w.expand[1],
        tiles(w.contract[0], WIDEST, t.inputs), w.contract[1], *norm, tiles(weight, WIDEST, t.inputs),
        weight if bias is None else bias, y, rows, eps,
        C=C, F=len(w.expand[0]), N=len(weight), STAGES=t.stages, BIASED=bias is not None, ACTIVATION=w.activation,
        DEPENDENT=dependent, num_warps=8, **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
