"""Residual, dropout and LayerNorm in one pass: h' = h + drop(a + bias), x = LN(h').

One kernel each way where plain torch has five: the forward pass moves h, a, h' and x once, the backward pass the
gradients of h' and x, h', and the gradients of h and a. The mask is drawn from its counter in both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_tx.attention.kernels import interpreted  # noqa: F401

# Programs of a backward pass, at most, each of which adds up its rows' share of the gradients of bias and gain, and
# elements that one holds at a time. Tuned on an H100: 57 us for 49,152 rows of 256 where 528 programs take 65.
PROGRAMS = 264
TILE = 2048


@triton.jit
def mix(x, inject):
    """`counter.mix` in 32 bits. x, inject: uint32."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD + inject
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def keep(KEY, rows, valid, columns, S, C: tl.constexpr, THRESHOLD: tl.constexpr):
    """`dropout._drop`'s mask for rows of (B S, C). KEY: (B, 2) int64."""
    b = rows // S
    first = tl.load(KEY + b * 2, mask=valid, other=0).to(tl.uint32)
    second = tl.load(KEY + b * 2 + 1, mask=valid, other=0).to(tl.uint32)
    element = (rows - b * S).to(tl.uint32)[:, None] * C + columns.to(tl.uint32)[None, :]
    return mix(element ^ first[:, None], second[:, None]) >= THRESHOLD


@triton.jit
def add_norm_forward(
    H, A, BIAS, KEY, GAIN, SHIFT, OUT, X, MEAN, RSTD, T, S, eps, scale,
    C: tl.constexpr, BC: tl.constexpr, R: tl.constexpr,
    ADD: tl.constexpr, DROP: tl.constexpr, NORM: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """OUT = H + drop(A + BIAS), X = LN(OUT), by rows of C."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, BC)
    valid = rows < T
    inside = valid[:, None] & (columns < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    h = tl.load(H + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        a = tl.load(A + at, mask=inside, other=0.0).to(tl.float32)
        a += tl.load(BIAS + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
        if DROP:
            a = tl.where(keep(KEY, rows, valid, columns, S, C, THRESHOLD), a * scale, 0.0)
        # What is normalised is the sum as it is kept, so that the backward pass finds the same numbers.
        h = (h + a).to(OUT.dtype.element_ty)
        tl.store(OUT + at, h, mask=inside)
        h = h.to(tl.float32)
    if NORM:
        mean = tl.sum(tl.where(inside, h, 0.0), 1) / C
        centred = tl.where(inside, h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        gain = tl.load(GAIN + columns, mask=columns < C, other=0.0).to(tl.float32)
        shift = tl.load(SHIFT + columns, mask=columns < C, other=0.0).to(tl.float32)
        x = centred * rstd[:, None] * gain[None, :] + shift[None, :]
        tl.store(X + at, x.to(X.dtype.element_ty), mask=inside)
        tl.store(MEAN + rows, mean, mask=valid)
        tl.store(RSTD + rows, rstd, mask=valid)


@triton.jit
def add_norm_backward(
    D_OUT, D_X, OUT, MEAN, RSTD, GAIN, KEY, D_H, D_A, SUMS, T, S, added, scale, blocks,
    C: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
    ADD: tl.constexpr, DROP: tl.constexpr, NORM: tl.constexpr, GIVEN: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """SUMS: (programs, 3, BC) this program's share of the gradients of gain, shift and bias. added: rows of D_A.

    Where nothing was added none are written, but the store is there: Triton lays a tile out by what it writes, and the
    layout decides the order of a row's sums. So a norm by itself, as where blocks are run again, has the bits of one
    that follows a sum.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BC)
    gain = tl.zeros([BC], tl.float32)
    if NORM:
        gain = tl.load(GAIN + columns, mask=columns < C, other=0.0).to(tl.float32)
    d_gain = tl.zeros([R, BC], tl.float32)
    d_shift = tl.zeros([R, BC], tl.float32)
    d_bias = tl.zeros([R, BC], tl.float32)
    for block in tl.range(program, blocks, tl.num_programs(0), num_stages=STAGES):
        rows = block * R + tl.arange(0, R)
        valid = rows < T
        inside = valid[:, None] & (columns < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + columns[None, :]
        d_h = tl.zeros([R, BC], tl.float32)
        if GIVEN:
            d_h += tl.load(D_OUT + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            d_x = tl.load(D_X + at, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(OUT + at, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(MEAN + rows, mask=valid, other=0.0)
            rstd = tl.load(RSTD + rows, mask=valid, other=0.0)
            normed = tl.where(inside, (h - mean[:, None]) * rstd[:, None], 0.0)
            d_gain += d_x * normed
            d_shift += d_x
            d_normed = d_x * gain[None, :]
            along = tl.sum(d_normed * normed, 1) / C
            mean_d = tl.sum(d_normed, 1) / C
            d_h += (d_normed - normed * along[:, None] - mean_d[:, None]) * rstd[:, None]
        tl.store(D_H + at, d_h.to(D_H.dtype.element_ty), mask=inside)
        d_a = d_h
        if DROP:
            d_a = tl.where(keep(KEY, rows, valid, columns, S, C, THRESHOLD), d_h * scale, 0.0)
        d_a = d_a.to(D_A.dtype.element_ty)
        tl.store(D_A + at, d_a, mask=inside & (rows < added)[:, None])
        if ADD:
            d_bias += tl.where(inside, d_a.to(tl.float32), 0.0)
    SUMS += program.to(tl.int64) * 3 * BC
    tl.store(SUMS + columns, tl.sum(d_gain, 0))
    tl.store(SUMS + BC + columns, tl.sum(d_shift, 0))
    tl.store(SUMS + 2 * BC + columns, tl.sum(d_bias, 0))


@triton.jit
def add_shares(SHARES, OUT, P, N, BP: tl.constexpr, BN: tl.constexpr):
    """OUT (N): sums over the programs of SHARES (P, N), in a fixed order."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BP, BN], tl.float32)
    for start in tl.range(0, P, BP, num_stages=2):
        rows = start + tl.arange(0, BP)
        inside = (rows < P)[:, None] & (columns < N)[None, :]
        total += tl.load(SHARES + rows[:, None] * N + columns[None, :], mask=inside, other=0.0)
    tl.store(OUT + columns, tl.sum(total, 0), mask=columns < N)


def total(shares: Tensor) -> Tensor:
    """(P, ...) float32 -> (...), in a fixed order. torch's sum takes 13 us for what this does in 3."""
    out = torch.empty(shares.shape[1:], dtype=torch.float32, device=shares.device)
    P, N = len(shares), out.numel()
    BP = min(64, triton.next_power_of_2(P))
    # Of many columns few shares, by whole lines: 16 of 131,072 take 5.2 us, 12.2 by tiles of (64, 16).
    BN, warps = (1024 // BP, 2) if N >= 1 << 16 else (16, 4)
    add_shares[(triton.cdiv(N, BN),)](shares, out, P, N, BP=BP, BN=BN, num_warps=warps)
    return out


def tile_of(C: int, elements: int = TILE) -> tuple[int, int]:
    """Columns of a tile and its rows."""
    BC = triton.next_power_of_2(C)
    return BC, max(1, elements // BC)  # a row of more elements is not brought ahead: it would not fit shared memory


class Kept(NamedTuple):
    """What the backward pass needs of a sum and its norm. key: None if nothing was dropped."""

    h: Tensor | None
    mean: Tensor
    rstd: Tensor
    gain: Tensor | None
    key: Tensor | None


class Sum(NamedTuple):
    """What follows a product: bias (C,), dropout with probability p by `key` (B, 2) or none, and a norm or none."""

    bias: Tensor | None
    key: Tensor | None
    p: float
    gain: Tensor | None
    shift: Tensor | None
    eps: float


def _scale(p: float, drops: bool) -> float:
    return 1 / (1 - p) if drops else 1.0


def _threshold(p: float) -> int:
    """Of the hash, below which an element is dropped: see `dropout._drop`."""
    return int(p * 2**32)


def sum_forward(h: Tensor, a: Tensor | None, sum: Sum, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Kept]:
    """h' = h + drop(a + bias) in the dtype of h, and LN(h') in `dtype`. h: (B, S, C), a: (B S, C) or None."""
    B, S, C = h.shape
    T = B * S
    BC, R = tile_of(C)
    h = h.contiguous()
    out = h if a is None else torch.empty_like(h)
    normed = sum.gain is not None
    drops = sum.bias is not None and sum.key is not None and sum.p > 0
    x = torch.empty(B, S, C, dtype=dtype, device=h.device) if normed else None
    mean, rstd = (torch.empty(T if normed else 0, dtype=torch.float32, device=h.device) for _ in range(2))
    ends = (
        h if sum.bias is None else sum.bias, sum.key if drops else h, sum.gain if normed else h,
        sum.shift if normed else h, out, h if x is None else x, mean, rstd, T, S, sum.eps,
        _scale(sum.p, drops),
    )  # fmt: skip
    flags = {"DROP": drops, "NORM": normed, "THRESHOLD": _threshold(sum.p)}
    add_norm_forward[(triton.cdiv(T, R),)](
        h, h if a is None else a, *ends, C=C, BC=BC, R=R, ADD=a is not None, **flags, num_warps=4
    )
    return out, x, Kept(out if normed else None, mean, rstd, sum.gain, sum.key if drops else None)


def sum_backward(
    d_out: Tensor | None, d_x: Tensor | None, kept: Kept, p: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of h, a (B S, C) in `dtype` (None if nothing was added), bias, gain and shift. One of d_out, d_x is."""
    given = d_x if d_out is None else d_out
    assert given is not None  # autograd calls for at least one
    B, S, C = given.shape
    T = B * S
    BC, R = tile_of(C)
    blocks = triton.cdiv(T, R)
    programs = min(PROGRAMS, blocks)
    d_h = torch.empty(B, S, C, dtype=given.dtype if kept.h is None else kept.h.dtype, device=given.device)
    d_a = None if dtype is None else torch.empty(T, C, dtype=dtype, device=given.device)
    shares = torch.empty(programs, 3, BC, dtype=torch.float32, device=given.device)
    normed, drops = d_x is not None, kept.key is not None
    like_a = d_a if d_a is not None else d_h if d_x is None else d_x  # the dtype of a, not written if nothing was added
    add_norm_backward[(programs,)](
        given.contiguous(), d_h if d_x is None else d_x.contiguous(), kept.h if normed else d_h, kept.mean, kept.rstd,
        kept.gain if normed else d_h, kept.key if drops else d_h, d_h, like_a, shares,
        T, S, 0 if d_a is None else T, _scale(p, drops), blocks, C=C, BC=BC, R=R, STAGES=3 if BC <= TILE else 1,
        ADD=d_a is not None, DROP=drops, NORM=normed, GIVEN=d_out is not None, THRESHOLD=_threshold(p), num_warps=4,
    )  # fmt: skip
    d_gain, d_shift, d_bias = total(shares)[:, :C]
    return d_h, d_a, None if d_a is None else d_bias, d_gain if normed else None, d_shift if normed else None


class _Norm(torch.autograd.Function):
    """h and LN(h), so that the gradients of both uses of h meet in one kernel."""

    @staticmethod
    def forward(ctx, h, gain, shift, eps, dtype):
        out, x, kept = sum_forward(h, None, Sum(None, None, 0.0, gain, shift, eps), dtype)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_x):
        d_h, _, _, d_gain, d_shift = sum_backward(d_out, d_x, Kept(*ctx.saved_tensors), 0.0, None)
        return d_h, d_gain, d_shift, None, None


def norm(h: Tensor, layer: torch.nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h (B, S, C) again, to be used for what follows, and its norm in `dtype`."""
    return _Norm.apply(h, layer.weight, layer.bias, layer.eps, dtype)
