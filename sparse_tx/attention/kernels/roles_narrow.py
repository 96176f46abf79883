"""The backward pass of narrow heads by warps with roles, in Gluon for GPUs of compute capability 9.0.

Products of heads 32 wide are so short that shared memory, not the tensor cores, sets their time, wherever both operands
come from it. Two groups of four warps therefore own tiles of keys and have all they can in registers: scores are made
with keys in rows, so that weights and gradients of scores are operands of dv and dk as they lie. Only the latter go
through shared memory, to a third group, which makes dq of them, query by query. One warp brings tiles by the copy
engine, another the gradients of another part, two more log-sum-exp and delta.

The same kernel takes windows and short columns. Names: m counts the program's tiles of keys, i its tiles of queries: of
tile m those are i = m + far. Of a window queries see BACK tiles back, and a group has every second tile; a column has
NT tiles, of which queries see all up to their own, and a group has every second column. n counts pairs of tiles.
Tensors are (B, H, L, N, D) by descriptor, in blocks of (1, 1, 1, BT, D); of a window L is 1.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_tx.attention.kernels.pairs import written
from sparse_tx.attention.kernels.roles_numbers import numbers, place
from sparse_tx.attention.kernels.shared_memory import barriers, bring, bring_two
from sparse_tx.attention.kernels.tiles import pair_is_masked, pair_seen, program


@gluon.jit
def _pair(m, far, BACK: gl.constexpr, NT: gl.constexpr):
    """n of tile m of the keys and tile m + far of the queries."""
    if NT == 0:
        n = m * (BACK + 1) + far
    else:
        t = m % NT
        n = m // NT * (NT * (NT + 1) // 2) + t * NT - t * (t - 1) // 2 + far
    return n


@gluon.jit
def _bring(
    Q, K, V, O, G, q, k, v, o, g, q_full, q_empty, kv_full, kv_empty, o_full, o_empty, b, head, first, count,
    L: gl.constexpr, BACK: gl.constexpr, NT: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr, NO: gl.constexpr,
    DELTA_HERE: gl.constexpr,
):  # fmt: skip
    BT: gl.constexpr = Q.block_shape[3]
    tiles = count + (BACK if NT == 0 else 0)
    for i in range(count + BACK):
        m = i - BACK
        if m >= 0:
            of, _, column, row = place(m, b, head, first, 1, 1, L, BT, 0, NT)
            bring_two(K, V, k, v, kv_full, kv_empty, [of, head, column, row, 0], m, NKV)
        if i < tiles:
            of, _, column, row = place(i, b, head, first, 1, 1, L, BT, 0, NT)
            bring_two(Q, G, q, g, q_full, q_empty, [of, head, column, row, 0], i, NQ)
            if DELTA_HERE:
                bring(O, o, o_full, o_empty, [of, head, column, row, 0], i, NO)


@gluon.jit
def _bring_old(
    DQ, DK, DV, dq_at, dk_at, dv_at, old_full, old_empty, b, head, first, own, count, N,
    GROUPS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Gradients of another part, to which those of a window are added; by a warp of its own, or the tiles above would
    wait too.
    """
    if ADD:
        BT: gl.constexpr = DQ.block_shape[3]
        for m in range(count):
            row = gl.where(first + m >= own, (first + m) * BT, N)  # of a program's own tiles
            bring_two(DK, DV, dk_at, dv_at, old_full, old_empty, [b, head, 0, row, 0], m, GROUPS)
            mbarrier.wait(old_empty.index(GROUPS), (m & 1) ^ 1)
            mbarrier.expect(old_full.index(GROUPS), 2 * BT * DQ.block_shape[4])
            tma.async_copy_global_to_shared(DQ, [b, head, 0, row, 0], old_full.index(GROUPS), dq_at)


@gluon.jit
def _scores(
    keys, values, q, g, q_full, i, zero, BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, NQ: gl.constexpr
):
    """Products of keys with the i-th tile of queries and of values with gradients of the output, both under way."""
    at = i % NQ
    mbarrier.wait(q_full.index(at), i // NQ & 1)
    s = warpgroup_mma(keys, q.index(at).reshape([BT, BDQ]).permute([1, 0]), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(values, g.index(at).reshape([BT, BDV]).permute([1, 0]), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _keys(
    WHICH: gl.constexpr, DK, DV, q, k, v, g, lse_at, delta_at, scores, dk_at, dv_at,
    q_full, q_empty, kv_full, numbers_full, pair_full, pair_empty, old_full, old_empty,
    b, head, first, own, count, N, scale, softmax_scale, L: gl.constexpr,
    BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr, BACK: gl.constexpr,
    NT: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr, GROUPS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dk and dv of every second tile, or of the tiles of every second column; gradients of scores (keys, queries)."""
    TILES: gl.constexpr = NT if NT > 0 else 1
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDQ, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    zero = gl.zeros([BT, BT], gl.float32, layout)
    query = gl.arange(0, BT, gl.SliceLayout(0, layout))
    key = gl.arange(0, BT, gl.SliceLayout(1, layout))
    if WHICH == 0 and NT == 0:
        # Fewer tiles of keys here are seen by the first queries: the others count as done.
        for early in gl.static_range(BACK):
            mbarrier.arrive(q_empty.index(early), count=BACK - early)
    for unit in range(WHICH, count // TILES, GROUPS):
        for t in gl.static_range(TILES):
            m = unit * TILES + t
            mbarrier.wait(kv_full.index(m % NKV), m // NKV & 1)
            keys = k.index(m % NKV).reshape([BT, BDQ]).load(left)
            values = v.index(m % NKV).reshape([BT, BDV]).load(left)
            dk = gl.zeros([BT, BDQ], gl.float32, narrow)
            dv = gl.zeros([BT, BDV], gl.float32, wide)
            s, dp = _scores(keys, values, q, g, q_full, m, zero, BT, BDQ, BDV, NQ)
            for far in gl.static_range(BACK + 1 - t):
                i = m + far
                at = i % NQ
                n = _pair(m, far, BACK, NT)
                mbarrier.wait(numbers_full.index(at), i // NQ & 1)
                lse = lse_at.index(at).load(gl.SliceLayout(0, layout))
                s, dk, dv = warpgroup_mma_wait(1, deps=[s, dk, dv])
                if far > 0:  # the products of the pair before are done too
                    mbarrier.arrive(q_empty.index((i - 1) % NQ), count=NT - t if far == 1 and NT > 0 else 1)
                if ADD and far == 1:
                    tma.store_wait(0)
                    if unit > WHICH:
                        mbarrier.arrive(old_empty.index(WHICH), count=1)
                p = gl.exp2(s * scale - lse[None, :])
                if pair_is_masked(far, BT, NEAR, R):
                    p = gl.where(pair_seen(query[None, :], key[:, None], far, BT, NEAR, R), p, 0.0)
                grads = g.index(at).reshape([BT, BDV])
                weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, wide, 2))
                delta = delta_at.index(at).load(gl.SliceLayout(0, layout))
                dv = warpgroup_mma(weights, grads, dv, use_acc=far > 0, is_async=True)
                dp = warpgroup_mma_wait(1, deps=[dp])
                ds = (p * (dp - delta[None, :])).to(q.dtype)
                queries = q.index(at).reshape([BT, BDQ])
                grad_scores = gl.convert_layout(ds, gl.DotOperandLayout(0, narrow, 2))
                dk = warpgroup_mma(grad_scores, queries, dk, use_acc=far > 0, is_async=True)
                if far < BACK - t:  # the next pair's scores are on their way while this one's gradients are left
                    s, dp = _scores(keys, values, q, g, q_full, i + 1, zero, BT, BDQ, BDV, NQ)
                if i < count:  # else the queries are of the next program
                    mbarrier.wait(pair_empty.index(n % NP), (n // NP & 1) ^ 1)
                    scores.index(n % NP).store(ds)
                    fence_async_shared()
                    mbarrier.arrive(pair_full.index(n % NP), count=1)
            dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
            mbarrier.arrive(q_empty.index((m + BACK - t) % NQ), count=1)
            if ADD:
                mbarrier.wait(old_full.index(WHICH), unit // GROUPS & 1)
            else:
                tma.store_wait(0)
            written(dk_at.index(WHICH), dk * softmax_scale, ADD)
            written(dv_at.index(WHICH), dv, ADD)
            fence_async_shared()
            of, _, column, row = place(m, b, head, first, 1, 1, L, BT, 0, NT)
            if NT == 0:
                row = gl.where(first + m >= own, row, N)  # a tile of another program is stored beyond the end
            tma.async_copy_shared_to_global(DK, [of, head, column, row, 0], dk_at.index(WHICH))
            tma.async_copy_shared_to_global(DV, [of, head, column, row, 0], dv_at.index(WHICH))
    tma.store_wait(0)


@gluon.jit
def _queries(
    DQ, k, scores, dq_at, kv_full, kv_empty, pair_full, pair_empty, old_full, old_empty,
    b, head, first, own, count, N, softmax_scale,
    L: gl.constexpr, BT: gl.constexpr, BDQ: gl.constexpr, BACK: gl.constexpr, NT: gl.constexpr,
    NKV: gl.constexpr, NP: gl.constexpr, GROUPS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dq of one tile after the other, from the gradients of scores of all tiles of keys that it sees."""
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDQ, 16])
    for i in range(count):
        mbarrier.wait(kv_full.index(i % NKV), i // NKV & 1)
        if ADD:
            tma.store_wait(0)
            if i > 0:
                mbarrier.arrive(old_empty.index(GROUPS), count=1)
        if NT == 0:
            most = gl.minimum(i, BACK)
        else:
            most = i % NT
        dq = gl.zeros([BT, BDQ], gl.float32, narrow)
        for step in range(most + 1):
            m = i - most + step
            n = _pair(m, most - step, BACK, NT)
            mbarrier.wait(pair_full.index(n % NP), n // NP & 1)
            keys = k.index(m % NKV).reshape([BT, BDQ])
            dq = warpgroup_mma(scores.index(n % NP).permute([1, 0]), keys, dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=[dq])
            mbarrier.arrive(pair_empty.index(n % NP), count=1)
        if NT == 0:
            if i >= BACK:
                mbarrier.arrive(kv_empty.index((i - BACK) % NKV), count=1)
        else:
            if most == NT - 1:
                for t in gl.static_range(NT):
                    mbarrier.arrive(kv_empty.index((i - t) % NKV), count=1)
        if ADD:
            mbarrier.wait(old_full.index(GROUPS), i & 1)
        else:
            tma.store_wait(0)
        written(dq_at, dq * softmax_scale, ADD)
        fence_async_shared()
        of, _, column, row = place(i, b, head, first, 1, 1, L, BT, 0, NT)
        if NT == 0:
            row = gl.where(first + i >= own, row, N)
        tma.async_copy_shared_to_global(DQ, [of, head, column, row, 0], dq_at)
    tma.store_wait(0)


@gluon.jit
def narrow_backward_by_roles(
    Q, K, V, O, LSE, G, DLSE, DELTA, DQ, DK, DV, S, H, h0, heads, programs, length, N, scale, softmax_scale,
    L: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr, NT: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr,
    NP: gl.constexpr, NO: gl.constexpr, REGISTERS: gl.constexpr, ADD: gl.constexpr, DELTA_HERE: gl.constexpr,
    STORE_DELTA: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """dq, dk, dv of `length` tiles of a window (NT = 0), as `window_backward`, or of a share of `length` columns of NT
    tiles, as `column_backward_by_roles`; here neighbours are a program's own.

    N: entries of a sequence or column. LSE, DLSE, DELTA: pointers to (B, H, S). NQ, NKV, NP, NO: tiles of queries and
    of keys, pairs, and tiles of the output, in shared memory at a time; the first three are multiples of those of two
    columns, and NP of those of two tiles of a window, or a barrier would have phases that a group has not seen.
    REGISTERS: of a thread of a group with keys.
    """
    GROUPS: gl.constexpr = 2
    BT: gl.constexpr = Q.block_shape[3]
    BDQ: gl.constexpr = Q.block_shape[4]
    BDV: gl.constexpr = V.block_shape[4]
    BACK: gl.constexpr = (R + BT - 1) // BT if NT == 0 else NT - 1
    dtype: gl.constexpr = Q.dtype
    pair: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BT], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(dtype, [NQ, 1, 1, 1, BT, BDQ], Q.layout)
    g = gl.allocate_shared_memory(dtype, [NQ, 1, 1, 1, BT, BDV], G.layout)
    o = gl.allocate_shared_memory(dtype, [NO, 1, 1, 1, BT, BDV], O.layout)
    k = gl.allocate_shared_memory(dtype, [NKV, 1, 1, 1, BT, BDQ], K.layout)
    v = gl.allocate_shared_memory(dtype, [NKV, 1, 1, 1, BT, BDV], V.layout)
    scores = gl.allocate_shared_memory(dtype, [NP, BT, BT], pair)
    dq_at = gl.allocate_shared_memory(dtype, [1, 1, 1, BT, BDQ], DQ.layout)
    dk_at = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 1, BT, BDQ], DK.layout)
    dv_at = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 1, BT, BDV], DV.layout)
    lse_at = gl.allocate_shared_memory(gl.float32, [NQ, BT], plain)
    delta_at = gl.allocate_shared_memory(gl.float32, [NQ, BT], plain)
    q_full, numbers_full = barriers(NQ), barriers(NQ)
    q_empty = gl.allocate_shared_memory(gl.int64, [NQ, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(NQ):
        mbarrier.init(q_empty.index(at), count=BACK + 1)  # the tiles of keys that see it
    kv_full, kv_empty = barriers(NKV), barriers(NKV)
    o_full, o_empty = barriers(NO), barriers(NO)
    pair_full, pair_empty = barriers(NP), barriers(NP)
    old_full, old_empty = barriers(GROUPS + 1), barriers(GROUPS + 1)
    fence_async_shared()
    index, b, h = program(programs, heads, False)
    head = h0 + h
    if NT == 0:
        own = index * length
        first = gl.maximum(own - BACK, 0)
        count = gl.minimum(own + length, (N + BT - 1) // BT) - first
    else:
        share = gl.cdiv(length, programs)
        own = index * share
        first = own
        count = gl.minimum(share, length - own) * NT
    gl.warp_specialize(
        [
            (_queries, (DQ, k, scores, dq_at, kv_full, kv_empty, pair_full, pair_empty, old_full, old_empty,
                        b, head, first, own, count, N, softmax_scale, L, BT, BDQ, BACK, NT, NKV, NP, GROUPS,
                        ADD)),
            (_keys, (0, DK, DV, q, k, v, g, lse_at, delta_at, scores, dk_at, dv_at, q_full, q_empty, kv_full,
                     numbers_full, pair_full, pair_empty, old_full, old_empty, b, head, first, own, count, N,
                     scale, softmax_scale, L, BT, BDQ, BDV, NEAR, R, BACK, NT, NQ, NKV, NP, GROUPS, ADD)),
            (_keys, (1, DK, DV, q, k, v, g, lse_at, delta_at, scores, dk_at, dv_at, q_full, q_empty, kv_full,
                     numbers_full, pair_full, pair_empty, old_full, old_empty, b, head, first, own, count, N,
                     scale, softmax_scale, L, BT, BDQ, BDV, NEAR, R, BACK, NT, NQ, NKV, NP, GROUPS, ADD)),
            (_bring, (Q, K, V, O, G, q, k, v, o, g, q_full, q_empty, kv_full, kv_empty, o_full, o_empty,
                      b, head, first, count, L, BACK, NT, NQ, NKV, NO, DELTA_HERE)),
            (_bring_old, (DQ, DK, DV, dq_at, dk_at, dv_at, old_full, old_empty, b, head, first, own, count, N,
                          GROUPS, ADD)),
            (numbers, (LSE, DLSE, DELTA, g, o, lse_at, delta_at, q_full, q_empty, o_full, o_empty, numbers_full,
                       b, head, first, 1, 1, count, S, H, L, BT, BDV, BACK, 0, NT, NQ, NO,
                       DELTA_HERE, STORE_DELTA, HAS_DLSE)),
        ],
        [4, 4, 1, 1, 2], [REGISTERS, REGISTERS, 40, 40, 40],
    )  # fmt: skip
