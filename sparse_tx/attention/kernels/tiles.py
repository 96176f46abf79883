"""Pieces that the forward and the backward kernels share: which keys a query sees in each part, and loads of rows.

Names in all kernels: f counts queries and keys in the order of the chain (position, or column-major), at counts the
keys of a part, lo and hi (inclusive) bound the keys that a query sees.
"""

import triton
import triton.language as tl


@triton.jit
def position(f, N, L, STRIDED: tl.constexpr):
    """Position in the sequence of entry f of the chain."""
    if STRIDED:
        return f % N * L + f // N
    return f


@triton.jit
def chain_bounds(f, valid, S, N, R, near, L, tokens, skip_lo, skip_hi, STRIDED: tl.constexpr, GROUPED: tl.constexpr):
    """lo, hi of the entries f of a chain: those of the same group of N, from R back to `near` back.

    In a column, global tokens and the columns [skip_lo, skip_hi) of a summary belong to other parts.
    """
    lo = tl.maximum(f - R, 0)
    if GROUPED:
        lo = tl.maximum(lo, f - f % N)
    hi = f - near
    if STRIDED:
        r = f // N
        lo = tl.maximum(lo, r * N + (tl.maximum(tokens - r, 0) + L - 1) // L)
        valid = valid & ((r < skip_lo) | (r >= skip_hi))
        lo = tl.where(valid, lo, 1 << 30)
    return lo, tl.where(valid, hi, -1)


@triton.jit
def chain_until(f, S, N, R, L, tokens, skip_lo, skip_hi, STRIDED: tl.constexpr, GROUPED: tl.constexpr):
    """The last entry of a chain that sees the entries f as keys, `near` aside; -1 if they belong to other parts."""
    until = f + R
    if GROUPED:
        until = tl.minimum(until, f - f % N + N - 1)
    if STRIDED:
        r = f // N
        until = tl.where((f % N * L + r < tokens) | ((r >= skip_lo) & (r < skip_hi)), -1, until)
    return until


@triton.jit
def keys_before(p, L, C, first):
    """How many keys of a compact part (columns first .. first + C - 1 of blocks of L) lie before position p."""
    return p // L * C + tl.minimum(tl.maximum(p % L - first, 0), C)


@triton.jit
def compact_position(at, L, C, first):
    return at // C * L + first + at % C


@triton.jit
def load_rows(base, rows, stride, valid, W: tl.constexpr, BW: tl.constexpr):
    """(len(rows), BW): rows of width W, zero where invalid or beyond W."""
    d = tl.arange(0, BW)
    ptr = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if W == BW:
        return tl.load(ptr, mask=valid[:, None], other=0.0)
    return tl.load(ptr, mask=valid[:, None] & (d < W)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, stride, valid, x, W: tl.constexpr, BW: tl.constexpr, ADD: tl.constexpr):
    d = tl.arange(0, BW)
    ptr = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    mask = valid[:, None] & (d < W)[None, :]
    if ADD:
        x += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptr, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def program(tiles, heads, HEAVY_LAST: tl.constexpr):
    """tile, batch entry and head of this program: heads fastest, since they are neighbours in memory.

    Where later tiles see more keys (HEAVY_LAST) they come first, for all batch entries, so that the last wave is short.
    """
    pid = tl.program_id(0)
    h = pid % heads
    rest = pid // heads
    if HEAVY_LAST:
        batch = tl.num_programs(0) // (tiles * heads)
        return tiles - 1 - rest // batch, rest % batch, h
    return rest % tiles, rest // tiles, h
