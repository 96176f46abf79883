"""Log-sum-exp and delta of queries, by two warps of their own in the backward passes by roles.

In Gluon for compute capability 9.0. Delta, the sum of the output times its gradient less the gradient of the
log-sum-exp, is made of the gradients that are in shared memory anyway and of the output, which a place or two are kept
for: a launch of its own would bring both once more.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sparse_tx.attention.kernels.tiles import LOG2E, column_unit


@gluon.jit
def place(m, b, head, first, step, heads, L: gl.constexpr, BT: gl.constexpr, FIRST: gl.constexpr, NT: gl.constexpr):
    """Batch entry, head, column and row of the program's tile m: of a window (NT = 0) of batch entry b from tile
    `first` on, or of columns of so many heads from `head` on, as of `column_unit`, of each NT tiles after FIRST others.
    """
    if NT == 0:
        column = 0
        row = (first + m) * BT
    else:
        b, h, column = column_unit(m // NT, first, step, heads, L)
        head += h
        row = (FIRST + m % NT) * BT
    return b, head, column, row


@gluon.jit
def _loaded(LSE, DELTA, b, head, row, column, local, S, H, L: gl.constexpr, DELTA_HERE: gl.constexpr):
    """Log-sum-exp of a tile of queries, and delta unless it is made here; zero beyond the sequence."""
    rows = (row + local) * L + column
    of_head = (b.to(gl.int64) * H + head) * S
    lse = gl.load(LSE + of_head + rows, mask=rows < S, other=0.0)
    if DELTA_HERE:
        delta = lse
    else:
        delta = gl.load(DELTA + of_head + rows, mask=rows < S, other=0.0)
    return lse, delta


@gluon.jit
def numbers(
    LSE, DLSE, DELTA, g, o, lse_at, delta_at, q_full, q_empty, o_full, o_empty, numbers_full,
    b, head, first, step, heads, count, S, H,
    L: gl.constexpr, BT: gl.constexpr, BDV: gl.constexpr, BACK: gl.constexpr, FIRST: gl.constexpr, NT: gl.constexpr,
    NQ: gl.constexpr, NO: gl.constexpr, DELTA_HERE: gl.constexpr, STORE_DELTA: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """Log-sum-exp in base 2 and delta of each tile of queries; those of the next are on their way.

    BACK: as of `roles_narrow`. FIRST, NT: as of `place`. NQ, NO: tiles of queries and of the output in shared memory at
    a time.
    """
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    block: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BDV, BDV // 8], [2, 1], [1, 0])
    ROWS: gl.constexpr = BT * 32 // BDV  # at a time: more would not fit the registers
    local = gl.arange(0, BT, flat)
    of_block = gl.arange(0, ROWS, gl.SliceLayout(1, block))
    tiles = count + (BACK if NT == 0 else 0)
    of, at_head, column, row = place(0, b, head, first, step, heads, L, BT, FIRST, NT)
    lse, delta = _loaded(LSE, DELTA, of, at_head, row, column, local, S, H, L, DELTA_HERE)
    for i in range(tiles):
        at = i % NQ
        of, at_head, column, row = place(gl.minimum(i + 1, tiles - 1), b, head, first, step, heads, L, BT, FIRST, NT)
        next_lse, next_delta = _loaded(LSE, DELTA, of, at_head, row, column, local, S, H, L, DELTA_HERE)
        of, at_head, column, row = place(i, b, head, first, step, heads, L, BT, FIRST, NT)
        of_head = (of.to(gl.int64) * H + at_head) * S
        mbarrier.wait(q_empty.index(at), (i // NQ & 1) ^ 1)
        lse_at.index(at).store(lse * LOG2E)
        if DELTA_HERE:
            mbarrier.wait(q_full.index(at), i // NQ & 1)
            mbarrier.wait(o_full.index(i % NO), i // NO & 1)
            for part in gl.static_range(BDV // 32):
                rows = (row + part * ROWS + of_block) * L + column
                grads = g.index(at).reshape([BT, BDV]).slice(part * ROWS, ROWS).load(block)
                outs = o.index(i % NO).reshape([BT, BDV]).slice(part * ROWS, ROWS).load(block)
                made = gl.sum(outs.to(gl.float32) * grads.to(gl.float32), 1)
                if HAS_DLSE:
                    made -= gl.load(DLSE + of_head + rows, mask=rows < S, other=0.0)
                delta_at.index(at).slice(part * ROWS, ROWS).store(made)
            mbarrier.arrive(o_empty.index(i % NO), count=1)
        else:
            delta_at.index(at).store(delta)
        lse, delta = next_lse, next_delta
        mbarrier.arrive(numbers_full.index(at), count=1)
        if DELTA_HERE and STORE_DELTA:  # last, or the others would wait for these, of columns many small stores
            rows = (row + local) * L + column
            gl.store(DELTA + of_head + rows, delta_at.index(at).load(flat), mask=rows < S)
