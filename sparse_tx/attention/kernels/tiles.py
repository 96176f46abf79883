"""Pieces that the forward and the backward kernels share: which keys a query sees in each part, and loads of rows.

Names in all kernels: f counts the queries and keys of a chain (of the sequence, or of one column), at counts the keys
of a part, lo and hi (inclusive) bound the keys that a query sees.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def chain_bounds(f, valid, N, R, near, least, GROUPED: tl.constexpr):
    """lo, hi of the entries f of a chain: those of their group of N, R to `near` back, none before `least`."""
    lo = tl.maximum(f - R, least)
    if GROUPED:
        lo = tl.maximum(lo, f - f % N)
    return lo, tl.where(valid, f - near, -1)


@triton.jit
def chain_until(f, N, R, least, GROUPED: tl.constexpr):
    """The last entry of a chain that sees the entries f as keys, `near` aside; -1 if they lie before `least`."""
    until = f + R
    if GROUPED:
        until = tl.minimum(until, f - f % N + N - 1)
    return tl.where(f < least, -1, until)


@triton.jit
def column_of(tile, per, S, L, tokens, skip_lo, skip_hi):
    """Of the tile-th tile, `per` a column: its column and place in it, the entries of the column, and the first that
    is a key of the column's own: global tokens, and the columns [skip_lo, skip_hi) of a summary, belong to other parts.
    """
    r = tile // per
    F = (S - r + L - 1) // L
    least = tl.maximum(tokens - r + L - 1, 0) // L
    least = tl.where((r >= skip_lo) & (r < skip_hi), F, tl.minimum(least, F))
    return r, tile % per, F, least


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
def load_block(
    X, b, head, r, start, rows, stride, valid,
    W: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """BN rows from `start` on: by descriptor (B, H, L, N, D) of column r if COPIED, else by pointer to the sequence."""
    if COPIED:
        x = X.load([b, head, r, start, 0]).reshape(BN, BW)
    else:
        x = load_rows(X, rows, stride, valid, W, BW)
    return x


@triton.jit
def compact_keys(
    K, V, b, head, start, sks, svs, count, L, C, first,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """k and v of the keys start .. start + BN - 1 of a compact part; zeros (or any keys, if COPIED) from `count` on.

    COPIED: by descriptors (B, H, S / L, L, D) in blocks of BN keys: whole rows of C keys, or a share of one row.
    """
    if COPIED:
        k = K.load([b, head, start // C, first + start % C, 0]).reshape(BN, BDQ)
        v = V.load([b, head, start // C, first + start % C, 0]).reshape(BN, BDV)
    else:
        at = start + tl.arange(0, BN)
        p = compact_position(at, L, C, first)
        k = load_rows(K, p, sks, at < count, DQ, BDQ)
        v = load_rows(V, p, svs, at < count, DV, BDV)
    return k, v


@triton.jit
def store_rows(base, rows, stride, valid, x, W: tl.constexpr, BW: tl.constexpr, ADD: tl.constexpr):
    d = tl.arange(0, BW)
    ptr = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    mask = valid[:, None] & (d < W)[None, :]
    if ADD:
        x += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptr, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def pair_is_masked(far: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr, R: tl.constexpr):
    """Whether a tile of queries fails to see some key of the tile of keys `far` tiles before it."""
    return far * BT - (BT - 1) < NEAR or far * BT + BT - 1 > R


@triton.jit
def pair_seen(i, j, far: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr, R: tl.constexpr):
    """Whether query i sees key j, NEAR to R steps before it; both counted within tiles that are `far` tiles apart."""
    if far * BT + BT - 1 <= R:
        return i - j >= NEAR - far * BT
    if far * BT - (BT - 1) >= NEAR:
        return i - j <= R - far * BT
    return (i - j >= NEAR - far * BT) & (i - j <= R - far * BT)


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


@triton.jit
def column_turns(units):
    """How many of `units` columns of all heads this program has: every one that is a whole round of programs later.

    Columns and heads beside each other are worked on at a time, and what is read and written then lies together.
    """
    return tl.cdiv(units - tl.program_id(0), tl.num_programs(0))


@triton.jit
def column_unit(turn, first, step, heads, L: tl.constexpr):
    """Batch entry, head and column of a turn: of the columns of so many heads every `step`-th from `first` on."""
    unit = turn * step + first
    column = unit // heads
    return column // L, unit % heads, column % L


@triton.jit
def own_column(turn, heads, L: tl.constexpr):
    """As `column_unit`, of this program, of as many as `column_turns` tells."""
    return column_unit(turn, tl.program_id(0), tl.num_programs(0), heads, L)
