"""The backward pass of columns of a few tiles by warps with roles, in Gluon for GPUs of compute capability 9.0.

As `roles` does with a window, a program goes along columns one after the other: one warp brings tiles of queries,
another those of keys and the gradients of another pass, two make delta, two groups of four take turns in the weights of
a pair and the gradients of its scores, a further group makes dq, dk and dv of them, in registers. A pass has NT tiles
of queries of each column, FIRST tiles from its beginning: their pairs are a rectangle with the keys before them, and a
triangle.

Names: c counts the program's columns, t the tiles of keys of a column, n the pairs in the order of `_pair`. Tensors are
(B, H, L, N, D) by descriptor, in blocks of (1, 1, 1, BT, D).
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
from sparse_tx.attention.kernels.tiles import column_turns, own_column


@gluon.jit
def _pair(n, FIRST: gl.constexpr, NT: gl.constexpr):
    """Of the n-th pair of a column: its tile of keys, and of queries among the NT."""
    corner = n - FIRST * NT
    t = gl.where(corner >= NT, 1, 0)
    if NT > 2:
        t += gl.where(corner >= 2 * NT - 1, 1, 0)
    if NT > 3:
        t += gl.where(corner >= 3 * NT - 3, 1, 0)
    i = corner - (t * NT - t * (t + 1) // 2)
    t += FIRST
    if FIRST > 0:
        i = gl.where(corner < 0, n % NT, i)
        t = gl.where(corner < 0, n // NT, t)
    return t, i


@gluon.jit
def _visit(n, FIRST: gl.constexpr, NT: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr):
    """Of pair n of all columns: far, and as of `roles`."""
    PAIRS: gl.constexpr = FIRST * NT + NT * (NT + 1) // 2
    t, i = _pair(n % PAIRS, FIRST, NT)
    of_keys = n // PAIRS * (FIRST + NT) + t
    of_queries = n // PAIRS * NT + i
    return FIRST + i - t, of_keys % NKV, of_keys // NKV & 1, of_queries % NQ, of_queries // NQ & 1


@gluon.jit
def _bring_queries(
    Q, O, G, q, o, g, q_full, q_empty, o_full, o_empty, h0, heads, units,
    L: gl.constexpr, FIRST: gl.constexpr, NT: gl.constexpr, NQ: gl.constexpr, NO: gl.constexpr,
):  # fmt: skip
    BT: gl.constexpr = Q.block_shape[3]
    for c in range(column_turns(units)):
        b, h, column = own_column(c, heads, L)
        for i in gl.static_range(NT):
            row = (FIRST + i) * BT
            bring_two(Q, G, q, g, q_full, q_empty, [b, h0 + h, column, row, 0], c * NT + i, NQ)
            bring(O, o, o_full, o_empty, [b, h0 + h, column, row, 0], c * NT + i, NO)


@gluon.jit
def _bring_keys(
    K, V, DK, DV, k, v, dk_at, dv_at, kv_full, kv_empty, old_full, old_empty, h0, heads, units,
    L: gl.constexpr, TILES: gl.constexpr, NKV: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """ADD: and gradients of keys and values of another pass, to which these are added, wanted some two tiles later."""
    BT: gl.constexpr = K.block_shape[3]
    LATER: gl.constexpr = 2 if ADD else 0
    for m in range(column_turns(units) * TILES + LATER):
        if m < column_turns(units) * TILES:
            b, h, column = own_column(m // TILES, heads, L)
            bring_two(K, V, k, v, kv_full, kv_empty, [b, h0 + h, column, m % TILES * BT, 0], m, NKV)
        if ADD and m >= LATER:
            n = m - LATER
            b, h, column = own_column(n // TILES, heads, L)
            bring_two(DK, DV, dk_at, dv_at, old_full, old_empty, [b, h0 + h, column, n % TILES * BT, 0], n, 1)


@gluon.jit
def _weights(
    WHICH: gl.constexpr, q, k, v, g, lse_at, delta_at, weights, scores,
    q_full, kv_full, numbers_full, pair_full, pair_empty, units, scale,
    BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr,
    FIRST: gl.constexpr, NT: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr,
):  # fmt: skip
    """Weights and gradients of scores, (queries, keys), of every second pair."""
    PAIRS: gl.constexpr = FIRST * NT + NT * (NT + 1) // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    zero = gl.zeros([BT, BT], gl.float32, layout)
    query = gl.arange(0, BT, gl.SliceLayout(1, layout))
    key = gl.arange(0, BT, gl.SliceLayout(0, layout))
    for n in range(WHICH, column_turns(units) * PAIRS, 2):
        far, of_keys, keys_phase, of_queries, queries_phase = _visit(n, FIRST, NT, NQ, NKV)
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
def _of_keys(
    DQ, DK, DV, q, k, g, weights, scores, dq_at, dk_at, dv_at, sums,
    q_full, q_empty, kv_full, kv_empty, pair_full, pair_empty, old_full, old_empty,
    b, head, column, t, keys, i, n, softmax_scale,
    BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, DONE: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr,
    NP: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dk and dv of tile t of a column, the program's tile `keys`, from pair n on. sums: dq so far of as many tiles of
    queries, from the i-th on; returned with these keys, less that of the first if they are its last (DONE).
    """
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDQ, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    TILES: gl.constexpr = len(sums)
    mbarrier.wait(kv_full.index(keys % NKV), keys // NKV & 1)
    own = k.index(keys % NKV).reshape([BT, BDQ])
    dk = gl.zeros([BT, BDQ], gl.float32, narrow)
    dv = gl.zeros([BT, BDV], gl.float32, wide)
    rest = ()
    for j in gl.static_range(TILES):
        at = (i + j) % NQ
        mbarrier.wait(q_full.index(at), (i + j) // NQ & 1)
        mbarrier.wait(pair_full.index((n + j) % NP), (n + j) // NP & 1)
        p, ds = weights.index((n + j) % NP), scores.index((n + j) % NP)
        grads, queries = g.index(at).reshape([BT, BDV]), q.index(at).reshape([BT, BDQ])
        dv = warpgroup_mma(p.permute([1, 0]), grads, dv, use_acc=j > 0, is_async=True)
        dk = warpgroup_mma(ds.permute([1, 0]), queries, dk, use_acc=j > 0, is_async=True)
        rest += (warpgroup_mma(ds, own, sums[j], is_async=True),)
        if j > 0:  # what is waited for is the pair before: this one's products run on
            dv, dk = warpgroup_mma_wait(3, deps=[dv, dk])
            mbarrier.arrive(pair_empty.index((n + j - 1) % NP), count=1)
        if j == 1 and DONE:
            mbarrier.arrive(q_empty.index(i % NQ), count=1)
        if ADD and j == min(1, TILES - 1):
            tma.store_wait(0)
            if keys > 0:
                mbarrier.arrive(old_empty.index(0), count=1)
    done = warpgroup_mma_wait(0, deps=(dk, dv) + rest)  # noqa: RUF005
    if TILES == 1 and DONE:
        mbarrier.arrive(q_empty.index(i % NQ), count=1)
    mbarrier.arrive(pair_empty.index((n + TILES - 1) % NP), count=1)
    mbarrier.arrive(kv_empty.index(keys % NKV), count=1)
    if ADD:
        mbarrier.wait(old_full.index(0), keys & 1)
    else:
        tma.store_wait(0)
    if DONE:
        written(dq_at.index(0), done[2] * softmax_scale, False)
    written(dk_at.index(0), done[0] * softmax_scale, ADD)
    written(dv_at.index(0), done[1], ADD)
    fence_async_shared()
    if DONE:
        tma.async_copy_shared_to_global(DQ, [b, head, column, t * BT, 0], dq_at.index(0))
    tma.async_copy_shared_to_global(DK, [b, head, column, t * BT, 0], dk_at.index(0))
    tma.async_copy_shared_to_global(DV, [b, head, column, t * BT, 0], dv_at.index(0))
    return done[3 if DONE else 2 :]


@gluon.jit
def _gradients(
    DQ, DK, DV, q, k, g, weights, scores, dq_at, dk_at, dv_at,
    q_full, q_empty, kv_full, kv_empty, pair_full, pair_empty, old_full, old_empty,
    h0, heads, units, softmax_scale,
    L: gl.constexpr, BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, FIRST: gl.constexpr, NT: gl.constexpr,
    NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys after the other; dq of the queries that see it waits in registers."""
    PAIRS: gl.constexpr = FIRST * NT + NT * (NT + 1) // 2
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDQ, 16])
    for c in range(column_turns(units)):
        b, h, column = own_column(c, heads, L)
        head = h0 + h
        sums = ()
        for _ in gl.static_range(NT):
            sums += (gl.zeros([BT, BDQ], gl.float32, narrow),)
        for t in range(FIRST):
            sums = _of_keys(
                DQ, DK, DV, q, k, g, weights, scores, dq_at, dk_at, dv_at, sums,
                q_full, q_empty, kv_full, kv_empty, pair_full, pair_empty, old_full, old_empty,
                b, head, column, t, c * (FIRST + NT) + t, c * NT, c * PAIRS + t * NT, softmax_scale,
                BT, BDQ, BDV, False, NQ, NKV, NP, ADD,
            )  # fmt: skip
        for i in gl.static_range(NT):
            t = FIRST + i
            sums = _of_keys(
                DQ, DK, DV, q, k, g, weights, scores, dq_at, dk_at, dv_at, sums,
                q_full, q_empty, kv_full, kv_empty, pair_full, pair_empty, old_full, old_empty,
                b, head, column, t, c * (FIRST + NT) + t, c * NT + i, c * PAIRS + t * NT - i * (i - 1) // 2,
                softmax_scale, BT, BDQ, BDV, True, NQ, NKV, NP, ADD,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def column_backward_by_roles(
    Q, K, V, O, LSE, G, DLSE, DELTA, DQ, DK, DV, S, H, h0, heads, units, scale, softmax_scale,
    L: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr, FIRST: gl.constexpr, NT: gl.constexpr,
    NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr, NO: gl.constexpr, REGISTERS: gl.constexpr,
    ADD: gl.constexpr, STORE_DELTA: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """dq, dk, dv of `units` columns of all heads, as `column_backward`, and delta for another part, of NT tiles of
    queries after FIRST others; LSE, DLSE and DELTA are pointers to (B, H, S).

    ADD: to the dk and dv of another pass, of later queries. NQ, NKV, NP, REGISTERS: as of
    `roles.window_backward_by_roles`; NQ is more than NT. NO: tiles of the output in shared memory at a time. A barrier
    tells its last phase from the next alone. The last tile of keys of a column has one pair, which one of the groups
    that make weights sees: of two tiles or less NKV is even, so that the other does not look at its place; of more the
    other has seen by then that all pairs of the column are done.
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
    dq_at = gl.allocate_shared_memory(dtype, [1, 1, 1, 1, BT, BDQ], DQ.layout)
    dk_at = gl.allocate_shared_memory(dtype, [1, 1, 1, 1, BT, BDQ], DK.layout)
    dv_at = gl.allocate_shared_memory(dtype, [1, 1, 1, 1, BT, BDV], DV.layout)
    lse_at = gl.allocate_shared_memory(gl.float32, [NQ, BT], plain)
    delta_at = gl.allocate_shared_memory(gl.float32, [NQ, BT], plain)
    q_full, q_empty = barriers(NQ), barriers(NQ)
    kv_full, kv_empty = barriers(NKV), barriers(NKV)
    o_full, o_empty = barriers(NO), barriers(NO)
    pair_full, pair_empty = barriers(NP), barriers(NP)
    numbers_full = barriers(NQ)
    old_full, old_empty = barriers(1), barriers(1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_gradients, (DQ, DK, DV, q, k, g, weights, scores, dq_at, dk_at, dv_at, q_full, q_empty, kv_full, kv_empty,
                          pair_full, pair_empty, old_full, old_empty, h0, heads, units, softmax_scale,
                          L, BT, BDQ, BDV, FIRST, NT, NQ, NKV, NP, ADD)),
            (_weights, (0, q, k, v, g, lse_at, delta_at, weights, scores, q_full, kv_full, numbers_full, pair_full,
                        pair_empty, units, scale, BT, BDQ, BDV, NEAR, R, FIRST, NT, NQ, NKV, NP)),
            (_weights, (1, q, k, v, g, lse_at, delta_at, weights, scores, q_full, kv_full, numbers_full, pair_full,
                        pair_empty, units, scale, BT, BDQ, BDV, NEAR, R, FIRST, NT, NQ, NKV, NP)),
            (_bring_queries, (Q, O, G, q, o, g, q_full, q_empty, o_full, o_empty, h0, heads, units,
                              L, FIRST, NT, NQ, NO)),
            (numbers, (LSE, DLSE, DELTA, g, o, lse_at, delta_at, q_full, q_empty, o_full, o_empty, numbers_full,
                       0, h0, gl.program_id(0), gl.num_programs(0), heads, column_turns(units) * NT, S, H,
                       L, BT, BDV, NT - 1, FIRST, NT, NQ, NO, True, STORE_DELTA, HAS_DLSE)),
            (_bring_keys, (K, V, DK, DV, k, v, dk_at, dv_at, kv_full, kv_empty, old_full, old_empty, h0, heads, units,
                           L, FIRST + NT, NKV, ADD)),
        ],
        [4, 4, 1, 2, 1], [REGISTERS, REGISTERS, 40, 40, 40],
    )  # fmt: skip
