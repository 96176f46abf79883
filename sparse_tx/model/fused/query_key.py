"""Queries and keys normed and turned where they lie in the projection: `model/query_key.py` in one trip to memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_tx.attention.kernels import interpreted  # noqa: F401
from sparse_tx.model.query_key import EPS, QueryKey

_TILE = 4096  # elements that a program holds at a time; not tuned


@triton.jit
def _halves(m, MORE, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr):
    """Offsets of both halves of the heads m, and which of their numbers are there."""
    i = tl.arange(0, BP)
    first: tl.constexpr = (D + 1) // 2
    at = ((m // HEADS).to(tl.int64) * WIDTH + m % HEADS * D)[:, None] + i[None, :]
    inside = (m < MORE)[:, None]
    return at, inside & (i < first)[None, :], at + first, inside & (i < D - first)[None, :]


@triton.jit
def _load(X, at, mask):
    return tl.load(X + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _angles(
    TURNS, m, MORE, S, HEADS: tl.constexpr, D: tl.constexpr, BP: tl.constexpr, N0, N1, INNER, ROTARY: tl.constexpr
):
    """Cosine and sine for each pair of the heads m: half of the pairs by row and half by column, or all by both."""
    i = tl.arange(0, BP)
    place = m // HEADS % S
    row, column = place // (N1 * INNER), place // INNER % N1
    inside = (m < MORE)[:, None] & (i < D // 2)[None, :]
    if ROTARY == "axes":
        quarter: tl.constexpr = D // 4
        line = tl.where((i < quarter)[None, :], row[:, None], N0 + column[:, None])
        at = 2 * (line * quarter + (i % quarter)[None, :])
        cos, sin = _load(TURNS, at, inside), _load(TURNS, at + 1, inside)
    else:
        half: tl.constexpr = D // 2
        at = 2 * (row[:, None] * half + i[None, :])
        a, b = _load(TURNS, at, inside), _load(TURNS, at + 1, inside)
        at = 2 * ((N0 + column)[:, None] * half + i[None, :])
        c, d = _load(TURNS, at, inside), _load(TURNS, at + 1, inside)
        cos, sin = a * c - b * d, b * c + a * d
    return cos, sin


@triton.jit
def _turned(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def query_key_forward(
    X, SCALE, TURNS, STDS, MORE, S, N0, N1, INNER, eps,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr, R: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """X (T, WIDTH) in place, of which the first 2 H heads of D numbers are queries and keys. MORE: T 2 H heads in all.

    SCALE (H,): exp of the temperatures. STDS (T, 2 H): 1 / root mean square. Grid (cdiv(MORE, R),).
    """
    m = tl.program_id(0) * R + tl.arange(0, R)
    at_a, in_a, at_b, in_b = _halves(m, MORE, 2 * H, D, WIDTH, BP)
    a, b = _load(X, at_a, in_a), _load(X, at_b, in_b)
    if NORM:
        std = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)
        tl.store(STDS + m, std, mask=m < MORE)
        head = m % (2 * H)
        std *= tl.load(SCALE + head, mask=head < H, other=1.0)
        a *= std[:, None]
        b *= std[:, None]
    if ROTARY != "none":
        cos, sin = _angles(TURNS, m, MORE, S, 2 * H, D, BP, N0, N1, INNER, ROTARY)
        a, b = _turned(a, b, cos, sin)
    tl.store(X + at_a, a.to(X.dtype.element_ty), mask=in_a)
    tl.store(X + at_b, b.to(X.dtype.element_ty), mask=in_b)


@triton.jit
def query_key_backward(
    Y, DY, SCALE, TURNS, STDS, DOTS, MORE, S, N0, N1, INNER,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr, R: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """DY (T, WIDTH) in place: the gradient of the outputs Y becomes that of the inputs.

    A rotation keeps lengths, so with y = s turn(x / rms) and d its gradient, that of x is
    turn^-1(s d - y mean(y d) / s) / rms, and that of the temperature ln s is sum(y d): DOTS (T, H), of queries.
    """
    m = tl.program_id(0) * R + tl.arange(0, R)
    at_a, in_a, at_b, in_b = _halves(m, MORE, 2 * H, D, WIDTH, BP)
    da, db = _load(DY, at_a, in_a), _load(DY, at_b, in_b)
    if NORM:
        a, b = _load(Y, at_a, in_a), _load(Y, at_b, in_b)
        dot = tl.sum(a * da, 1) + tl.sum(b * db, 1)
        head = m % (2 * H)
        tl.store(DOTS + m // (2 * H) * H + head, dot, mask=(m < MORE) & (head < H))
        scale = tl.load(SCALE + head, mask=head < H, other=1.0)
        std = tl.load(STDS + m, mask=m < MORE, other=0.0)
        own = (scale * std)[:, None]
        along = (dot / D / scale * std)[:, None]
        da = da * own - a * along
        db = db * own - b * along
    if ROTARY != "none":
        cos, sin = _angles(TURNS, m, MORE, S, 2 * H, D, BP, N0, N1, INNER, ROTARY)
        da, db = _turned(da, db, cos, -sin)
    tl.store(DY + at_a, da.to(DY.dtype.element_ty), mask=in_a)
    tl.store(DY + at_b, db.to(DY.dtype.element_ty), mask=in_b)


class _QueryKey(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, temperature, layer: QueryKey):
        ctx.layer, scale, stds = layer, None, None
        if layer.norm:
            scale = temperature.detach().float().exp()
            stds = torch.empty(qkv.shape[:-1].numel(), 2 * layer.heads, dtype=torch.float32, device=qkv.device)
        grid, numbers, sizes = _launch(layer, qkv)
        query_key_forward[grid](
            qkv, _given(scale, qkv), _given(layer.turns, qkv), _given(stds, qkv), *numbers, EPS, **sizes
        )
        ctx.save_for_backward(qkv if layer.norm else None, scale, stds)
        ctx.mark_dirty(qkv)
        return qkv

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        (y, scale, stds), layer = ctx.saved_tensors, ctx.layer
        d = d.contiguous()  # of attention alone, which has no further use for it: it is changed in place
        dots = None
        if layer.norm:
            dots = torch.empty(len(stds), layer.heads, dtype=torch.float32, device=d.device)
        grid, numbers, sizes = _launch(layer, d)
        query_key_backward[grid](
            _given(y, d), d, _given(scale, d), _given(layer.turns, d), _given(stds, d), _given(dots, d),
            *numbers, **sizes,
        )  # fmt: skip
        d_temperature = None if dots is None else dots.sum(0).to(layer.temperature.dtype)
        return d, d_temperature, None


def _given(t: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is handed where it takes nothing."""
    return other if t is None else t


def _launch(layer: QueryKey, qkv: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """Grid, numbers and sizes of a launch over qkv (B, S, 2 qk + C)."""
    S, width = qkv.shape[-2:]
    H = layer.heads
    D = layer.qk // H
    many = qkv.shape[:-1].numel() * 2 * H
    BP = triton.next_power_of_2((D + 1) // 2)
    R = max(1, _TILE // (2 * BP))
    sizes = {"H": H, "D": D, "WIDTH": width, "BP": BP, "R": R, "NORM": layer.norm, "ROTARY": layer.rotary}
    return (triton.cdiv(many, R),), (many, S, *layer.axes), {**sizes, "num_warps": 4}


def prepared(qkv: Tensor, layer: QueryKey) -> Tensor:
    """layer(qkv), in the memory of qkv (B, S, 2 qk + C), contiguous and of no further use to others."""
    return _QueryKey.apply(qkv, layer.temperature if layer.norm else None, layer)
