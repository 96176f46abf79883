"""The backward pass of columns of a few tiles by warps with roles, in Gluon for GPUs of compute capability 9.0.

As `roles` does with a window, a program goes along columns one after the other: one warp brings tiles, two make delta,
two groups of four take turns in the weights of a pair and the gradients of its scores, a further group makes dq, dk and
dv of them, in registers. Queries of a column see all its tiles up to their own, so that its pairs are a triangle of NT
tiles.

Names: c counts the program's columns, n the pairs of a column in the order of `_pair`: of tile t of the keys and tile
t + far of the queries. Tensors are (B, H, L, N, D) by descriptor, in blocks of (1, 1, 1, BT, D).
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

from sparse_tx.attention.kernels.pairs import leave_weights, scores_of, written
from sparse_tx.attention.kernels.roles_numbers import numbers
from sparse_tx.attention.kernels.shared_memory import barriers, bring, bring_two
from sparse_tx.attention.kernels.tiles import column_program, column_unit


@gluon.jit
def _pair(n, NT: gl.constexpr):
    """t and far of the n-th pair."""
    t = gl.where(n >= NT, 1, 0)
    if NT > 2:
        t += gl.where(n >= 2 * NT - 1, 1, 0)
    if NT > 3:
        t += gl.where(n >= 3 * NT - 3, 1, 0)
    return t, n - (t * NT - t * (t - 1) // 2)


@gluon.jit
def _visit(n, NT: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr):
    """Of pair n of all columns: far, and as of `roles`."""
    PAIRS: gl.constexpr = NT * (NT + 1) // 2
    t, far = _pair(n % PAIRS, NT)
    of_keys = n // PAIRS * NT + t
    of_queries = of_keys + far
    return far, of_keys % NKV, of_keys // NKV & 1, of_queries % NQ, of_queries // NQ & 1


@gluon.jit
def _bring(
    Q, K, V, O, G, q, k, v, o, g, q_full, q_empty, kv_full, kv_empty, o_full, o_empty, head, index, programs, count,
    L: gl.constexpr, NT: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr, NO: gl.constexpr,
):  # fmt: skip
    BT: gl.constexpr = Q.block_shape[3]
    for c in range(count):
        b, column = column_unit(c, index, programs, L)
        bring_two(K, V, k, v, kv_full, kv_empty, [b, head, column, 0, 0], c * NT, NKV)
        for i in gl.static_range(NT):
            bring_two(Q, G, q, g, q_full, q_empty, [b, head, column, i * BT, 0], c * NT + i, NQ)
            bring(O, o, o_full, o_empty, [b, head, column, i * BT, 0], c * NT + i, NO)
        for t in gl.static_range(1, NT):
            bring_two(K, V, k, v, kv_full, kv_empty, [b, head, column, t * BT, 0], c * NT + t, NKV)


@gluon.jit
def _weights(
    WHICH: gl.constexpr, q, k, v, g, lse_at, delta_at, weights, scores,
    q_full, kv_full, numbers_full, pair_full, pair_empty, count, scale,
    BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr, NT: gl.constexpr,
    NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr,
):  # fmt: skip
    """Weights and gradients of scores, (queries, keys), of every second pair."""
    PAIRS: gl.constexpr = NT * (NT + 1) // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    zero = gl.zeros([BT, BT], gl.float32, layout)
    query = gl.arange(0, BT, gl.SliceLayout(1, layout))
    key = gl.arange(0, BT, gl.SliceLayout(0, layout))
    for n in range(WHICH, count * PAIRS, 2):
        far, of_keys, keys_phase, of_queries, queries_phase = _visit(n, NT, NQ, NKV)
        mbarrier.wait(kv_full.index(of_keys), keys_phase)
        mbarrier.wait(q_full.index(of_queries), queries_phase)
        s, dp = scores_of(q, k, v, g, of_queries, of_keys, zero, BT, BDQ, BDV)
        mbarrier.wait(numbers_full.index(of_queries), queries_phase)
        lse = lse_at.index(of_queries).load(gl.SliceLayout(1, layout))
        delta = delta_at.index(of_queries).load(gl.SliceLayout(1, layout))
        leave_weights(
            s, dp, lse, delta, query, key, far, n, weights, scores, pair_full, pair_empty, scale, BT, NEAR, R, NP
        )


@gluon.jit
def _gradients(
    DQ, DK, DV, q, k, g, weights, scores, dq_at, dk_at, dv_at,
    q_full, q_empty, kv_full, kv_empty, pair_full, pair_empty, head, index, programs, count, softmax_scale,
    L: gl.constexpr, BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, NT: gl.constexpr,
    NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys after the other; dq of the queries that see it waits in registers."""
    PAIRS: gl.constexpr = NT * (NT + 1) // 2
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDQ, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    none = gl.zeros([BT, BDQ], gl.float32, narrow)
    for c in range(count):
        b, column = column_unit(c, index, programs, L)
        sums = ()
        for _ in gl.static_range(NT):
            sums += (none,)
        for t in gl.static_range(NT):
            of_keys = c * NT + t
            mbarrier.wait(kv_full.index(of_keys % NKV), of_keys // NKV & 1)
            keys = k.index(of_keys % NKV).reshape([BT, BDQ])
            dk = none
            dv = gl.zeros([BT, BDV], gl.float32, wide)
            rest = ()
            for far in gl.static_range(NT - t):
                n = c * PAIRS + t * NT - t * (t - 1) // 2 + far
                at = (of_keys + far) % NQ
                mbarrier.wait(q_full.index(at), (of_keys + far) // NQ & 1)
                mbarrier.wait(pair_full.index(n % NP), n // NP & 1)
                p, ds = weights.index(n % NP), scores.index(n % NP)
                grads, queries = g.index(at).reshape([BT, BDV]), q.index(at).reshape([BT, BDQ])
                dv = warpgroup_mma(p.permute([1, 0]), grads, dv, use_acc=far > 0, is_async=True)
                dk = warpgroup_mma(ds.permute([1, 0]), queries, dk, use_acc=far > 0, is_async=True)
                rest += (warpgroup_mma(ds, keys, sums[far], use_acc=t > 0, is_async=True),)
                if far > 0:  # what is waited for is the pair before: this one's products run on
                    dv, dk = warpgroup_mma_wait(3, deps=[dv, dk])
                    mbarrier.arrive(pair_empty.index((n - 1) % NP), count=1)
                if far == 1:
                    mbarrier.arrive(q_empty.index(of_keys % NQ), count=1)
            done = warpgroup_mma_wait(0, deps=(dk, dv) + rest)  # noqa: RUF005
            if t == NT - 1:
                mbarrier.arrive(q_empty.index(of_keys % NQ), count=1)
            last = c * PAIRS + (t + 1) * NT - t * (t + 1) // 2 - 1
            mbarrier.arrive(pair_empty.index(last % NP), count=1)
            mbarrier.arrive(kv_empty.index(of_keys % NKV), count=1)
            tma.store_wait(0)
            written(dq_at, done[2] * softmax_scale, False)
            written(dk_at, done[0] * softmax_scale, False)
            written(dv_at, done[1], False)
            fence_async_shared()
            tma.async_copy_shared_to_global(DQ, [b, head, column, t * BT, 0], dq_at)
            tma.async_copy_shared_to_global(DK, [b, head, column, t * BT, 0], dk_at)
            tma.async_copy_shared_to_global(DV, [b, head, column, t * BT, 0], dv_at)
            sums = done[3:]
    tma.store_wait(0)


@gluon.jit
def column_backward_by_roles(
    Q, K, V, O, LSE, G, DLSE, DELTA, DQ, DK, DV, S, H, h0, heads, programs, units, scale, softmax_scale,
    L: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr, NT: gl.constexpr,
    NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr, NO: gl.constexpr, REGISTERS: gl.constexpr,
    STORE_DELTA: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """dq, dk, dv of every `programs`-th of `units` columns of at most NT tiles, as `column_backward`, and delta for
    another part; LSE, DLSE and DELTA are pointers to (B, H, S).

    NQ, NKV, NP, REGISTERS: as of `roles.window_backward_by_roles`; NQ is more than NT. NO: tiles of the output in
    shared memory at a time.
    """
    BT: gl.constexpr = Q.block_shape[3]
    BDQ: gl.constexpr = Q.block_shape[4]
    BDV: gl.constexpr = V.block_shape[4]
    dtype: gl.constexpr = Q.dtype
    pair: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BT], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(dtype, [NQ, 1, 1, 1, BT, BDQ], Q.layout)
    g = gl.allocate_shared_memory(dtype, [NQ, 1, 1, 1, BT, BDV], G.layout)
    k = gl.allocate_shared_memory(dtype, [NKV, 1, 1, 1, BT, BDQ], K.layout)
    v = gl.allocate_shared_memory(dtype, [NKV, 1, 1, 1, BT, BDV], V.layout)
    o = gl.allocate_shared_memory(dtype, [NO, 1, 1, 1, BT, BDV], O.layout)
    weights = gl.allocate_shared_memory(dtype, [NP, BT, BT], pair)
    scores = gl.allocate_shared_memory(dtype, [NP, BT, BT], pair)
    dq_at = gl.allocate_shared_memory(dtype, [1, 1, 1, BT, BDQ], DQ.layout)
    dk_at = gl.allocate_shared_memory(dtype, [1, 1, 1, BT, BDQ], DK.layout)
    dv_at = gl.allocate_shared_memory(dtype, [1, 1, 1, BT, BDV], DV.layout)
    lse_at = gl.allocate_shared_memory(gl.float32, [NQ, BT], plain)
    delta_at = gl.allocate_shared_memory(gl.float32, [NQ, BT], plain)
    q_full, q_empty = barriers(NQ), barriers(NQ)
    kv_full, kv_empty = barriers(NKV), barriers(NKV)
    o_full, o_empty = barriers(NO), barriers(NO)
    pair_full, pair_empty = barriers(NP), barriers(NP)
    numbers_full = barriers(NQ)
    fence_async_shared()
    h, index, count = column_program(heads, programs, units)
    head = h0 + h
    gl.warp_specialize(
        [
            (_gradients, (DQ, DK, DV, q, k, g, weights, scores, dq_at, dk_at, dv_at, q_full, q_empty, kv_full, kv_empty,
                          pair_full, pair_empty, head, index, programs, count, softmax_scale,
                          L, BT, BDQ, BDV, NT, NQ, NKV, NP)),
            (_weights, (0, q, k, v, g, lse_at, delta_at, weights, scores, q_full, kv_full, numbers_full, pair_full,
                        pair_empty, count, scale, BT, BDQ, BDV, NEAR, R, NT, NQ, NKV, NP)),
            (_weights, (1, q, k, v, g, lse_at, delta_at, weights, scores, q_full, kv_full, numbers_full, pair_full,
                        pair_empty, count, scale, BT, BDQ, BDV, NEAR, R, NT, NQ, NKV, NP)),
            (_bring, (Q, K, V, O, G, q, k, v, o, g, q_full, q_empty, kv_full, kv_empty, o_full, o_empty,
                      head, index, programs, count, L, NT, NQ, NKV, NO)),
            (numbers, (LSE, DLSE, DELTA, g, o, lse_at, delta_at, q_full, q_empty, o_full, o_empty, numbers_full,
                       0, head, index, programs, count * NT, S, H, L, BT, BDV, NT - 1, NT, NQ, NO,
                       True, STORE_DELTA, HAS_DLSE)),
        ],
        [4, 4, 1, 2], [REGISTERS, REGISTERS, 40, 40],
    )  # fmt: skip
