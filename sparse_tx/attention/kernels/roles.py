"""The backward pass of a window by warps with roles of their own, in Gluon for GPUs of compute capability 9.0.

A program walks along the sequence as `window.window_backward` does and visits each pair of tiles, one of keys and one
of queries, once. One warp brings tiles by the copy engine, another the gradients of another part; two groups of four
take turns in the weights of a pair and the gradients of its scores, which they leave in shared memory in 16 bits; a
further group makes dq, dk and dv of them, in registers. So the products of one pair, the exponentials of the next and
the copies of later ones overlap.

Names: t counts the program's tiles of keys and i those of queries, from its own first ones on; n counts pairs. Keys of
BACK tiles before the program's own, `before` in all (none at the beginning), are seen by its queries too: of them come
only dq, and only these pairs are visited.
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

from sparse_tx.attention.kernels.pairs import leave_weights, numbers_of, scores_of, written
from sparse_tx.attention.kernels.shared_memory import barriers, bring_two


@gluon.jit
def _bring(
    Q, K, V, G, q, k, v, g, q_full, q_empty, kv_full, kv_empty, b, head, own, before, count,
    BACK: gl.constexpr, AHEAD: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr,
):  # fmt: skip
    BT: gl.constexpr = Q.block_shape[2]
    for i in range(count + BACK):
        t = i - BACK
        if t >= -before:
            bring_two(K, V, k, v, kv_full, kv_empty, [b, head, (own + t) * BT, 0], t + before, NKV)
        bring_two(Q, G, q, g, q_full, q_empty, [b, head, (own + AHEAD + i) * BT, 0], i, NQ)


@gluon.jit
def _bring_old(
    DQ, DK, DV, dq_at, dk_at, dv_at, old_full, old_empty, b, head, own, count, S,
    AHEAD: gl.constexpr, NS: gl.constexpr, ADD: gl.constexpr, LACK: gl.constexpr,
):  # fmt: skip
    """Gradients of another part, to which these are added; by a warp of its own, or the tiles above would wait too."""
    if ADD:
        BT: gl.constexpr = DQ.block_shape[2]
        for t in range(count):
            of_keys = (own + t) * BT
            of_queries = of_keys + AHEAD * BT
            if LACK > 0:  # zeros are brought from beyond the end
                of_keys = gl.where(own + t < (S + BT - 1) // BT - LACK, of_keys, S)
                of_queries = gl.where(own + t >= LACK - AHEAD, of_queries, S)
            at = t % NS
            mbarrier.wait(old_empty.index(at), (t // NS & 1) ^ 1)
            mbarrier.expect(old_full.index(at), 2 * BT * (2 * DQ.block_shape[3] + DV.block_shape[3]))
            tma.async_copy_global_to_shared(DQ, [b, head, of_queries, 0], old_full.index(at), dq_at.index(at))
            tma.async_copy_global_to_shared(DK, [b, head, of_keys, 0], old_full.index(at), dk_at.index(at))
            tma.async_copy_global_to_shared(DV, [b, head, of_keys, 0], old_full.index(at), dv_at.index(at))


@gluon.jit
def _pairs_before(before, BACK: gl.constexpr):
    """Pairs of own queries and keys before the program's own: one of the first of these, one more of each next."""
    return gl.where(before > 0, BACK * (BACK + 1) // 2, 0)


@gluon.jit
def _visit(n, before, BACK: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr):
    """Of pair n: far, i, the place and the phase of its keys, those of its queries."""
    own = n - _pairs_before(before, BACK)
    t = gl.where(n >= 1, 1, 0)
    if BACK > 2:
        t += gl.where(n >= 3, 1, 0)
    if BACK > 3:
        t += gl.where(n >= 6, 1, 0)
    i = n - t * (t + 1) // 2
    far = BACK - t + i
    if own >= 0:
        far = own % (BACK + 1)
        t = own // (BACK + 1)
        i = t + far
        t += before
    return far, i, t % NKV, t // NKV & 1, i % NQ, i // NQ & 1


@gluon.jit
def _weights(
    WHICH: gl.constexpr, LSE, DELTA, q, k, v, g, weights, scores,
    q_full, kv_full, pair_full, pair_empty, own, before, count, S, scale, log2e,
    BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, R: gl.constexpr, BACK: gl.constexpr, AHEAD: gl.constexpr,
    NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr,
):  # fmt: skip
    """Weights and gradients of scores, (queries, keys), of every second pair."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    zero = gl.zeros([BT, BT], gl.float32, layout)
    query = gl.arange(0, BT, gl.SliceLayout(1, layout))
    key = gl.arange(0, BT, gl.SliceLayout(0, layout))
    if WHICH == 1 and before > 0:
        # Of these keys the other group has the one pair. A barrier tells its last phase from the next alone: this one
        # must have seen them too, before `_gradients` lets others take their place.
        mbarrier.wait(kv_full.index(0), 0)
    visit = _visit(WHICH, before, BACK, NQ, NKV)
    lse, delta = numbers_of(LSE, DELTA, (own + AHEAD + visit[1]) * BT + query, S)
    for n in range(WHICH, _pairs_before(before, BACK) + count * (BACK + 1), 2):
        far, _, of_keys, keys_phase, of_queries, queries_phase = visit
        mbarrier.wait(kv_full.index(of_keys), keys_phase)
        mbarrier.wait(q_full.index(of_queries), queries_phase)
        s, dp = scores_of(q, k, v, g, of_queries, of_keys, zero, BT, BDQ, BDV)
        # The next pair's numbers are on their way while this one is at work.
        visit = _visit(n + 2, before, BACK, NQ, NKV)
        next_lse, next_delta = numbers_of(LSE, DELTA, (own + AHEAD + visit[1]) * BT + query, S)
        leave_weights(
            s, dp, lse * log2e, delta, query, key, far + AHEAD, n, weights, scores, pair_full, pair_empty, scale,
            BT, 0, R, NP,
        )  # fmt: skip
        lse, delta = next_lse, next_delta


@gluon.jit
def _gradients(
    DQ, DK, DV, q, k, g, weights, scores, dq_at, dk_at, dv_at,
    q_full, q_empty, kv_full, kv_empty, pair_full, pair_empty, old_full, old_empty,
    b, head, own, before, count, softmax_scale,
    BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, BACK: gl.constexpr, AHEAD: gl.constexpr,
    NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr, NS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys after the other; dq_0 to dq_BACK of the queries that see it. dq_0 is done then."""
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDQ, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    none = gl.zeros([BT, BDQ], gl.float32, narrow)
    sums = ()  # dq of the queries `far` tiles after the keys
    for _ in gl.static_range(BACK + 1):
        sums += (none,)
    if before > 0:
        for t in gl.static_range(BACK):
            mbarrier.wait(kv_full.index(t % NKV), t // NKV & 1)
            keys = k.index(t % NKV).reshape([BT, BDQ])
            dqs = ()
            for i in gl.static_range(t + 1):
                n = t * (t + 1) // 2 + i
                mbarrier.wait(pair_full.index(n % NP), n // NP & 1)
                dqs += (warpgroup_mma(scores.index(n % NP), keys, sums[i], is_async=True),)
                if i > 0:
                    dqs = warpgroup_mma_wait(1, deps=dqs)
                    mbarrier.arrive(pair_empty.index((n - 1) % NP), count=1)
            done = warpgroup_mma_wait(0, deps=dqs + (none,))  # noqa: RUF005
            mbarrier.arrive(pair_empty.index((t * (t + 1) // 2 + t) % NP), count=1)
            if t == 0:  # the second group has seen these keys too
                mbarrier.wait(pair_full.index(1 % NP), 0)
            mbarrier.arrive(kv_empty.index(t % NKV), count=1)
            sums = done[: t + 1] + sums[t + 1 :]
    first = _pairs_before(before, BACK)
    for t in range(count):
        of_keys = before + t
        mbarrier.wait(kv_full.index(of_keys % NKV), of_keys // NKV & 1)
        keys = k.index(of_keys % NKV).reshape([BT, BDQ])
        dk = none
        dv = gl.zeros([BT, BDV], gl.float32, wide)
        dqs = ()
        for far in gl.static_range(BACK + 1):
            n = first + t * (BACK + 1) + far
            i = t + far
            mbarrier.wait(q_full.index(i % NQ), i // NQ & 1)
            mbarrier.wait(pair_full.index(n % NP), n // NP & 1)
            p, ds = weights.index(n % NP), scores.index(n % NP)
            grads, queries = g.index(i % NQ).reshape([BT, BDV]), q.index(i % NQ).reshape([BT, BDQ])
            dv = warpgroup_mma(p.permute([1, 0]), grads, dv, use_acc=far > 0, is_async=True)
            dk = warpgroup_mma(ds.permute([1, 0]), queries, dk, use_acc=far > 0, is_async=True)
            dqs += (warpgroup_mma(ds, keys, sums[far], use_acc=far < BACK, is_async=True),)
            if far > 0:  # what is waited for is the pair before: this one's products run on
                dv, dk = warpgroup_mma_wait(3, deps=[dv, dk])
                mbarrier.arrive(pair_empty.index((n - 1) % NP), count=1)
            if far == 1:
                mbarrier.arrive(q_empty.index(t % NQ), count=1)
                if ADD:
                    tma.store_wait(0)
                    if t > 0:
                        mbarrier.arrive(old_empty.index((t - 1) % NS), count=1)
        done = warpgroup_mma_wait(0, deps=(dk, dv) + dqs)  # noqa: RUF005
        mbarrier.arrive(pair_empty.index((first + t * (BACK + 1) + BACK) % NP), count=1)
        mbarrier.arrive(kv_empty.index(of_keys % NKV), count=1)
        at = t % NS
        if ADD:
            mbarrier.wait(old_full.index(at), t // NS & 1)
        else:
            tma.store_wait(0)
        written(dq_at.index(at), done[2] * softmax_scale, ADD)
        written(dk_at.index(at), done[0] * softmax_scale, ADD)
        written(dv_at.index(at), done[1], ADD)
        fence_async_shared()
        row = (own + t) * BT
        tma.async_copy_shared_to_global(DQ, [b, head, row + AHEAD * BT, 0], dq_at.index(at))
        tma.async_copy_shared_to_global(DK, [b, head, row, 0], dk_at.index(at))
        tma.async_copy_shared_to_global(DV, [b, head, row, 0], dv_at.index(at))
        sums = done[3:] + (none,)  # noqa: RUF005
    tma.store_wait(0)


@gluon.jit
def window_backward_by_roles(
    Q, K, V, LSE, G, DELTA, DQ, DK, DV, S, H, h0, heads, chunks, length, scale, softmax_scale, log2e,
    R: gl.constexpr, BACK: gl.constexpr, AHEAD: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr, NP: gl.constexpr,
    NS: gl.constexpr, REGISTERS: gl.constexpr, ADD: gl.constexpr, LACK: gl.constexpr,
):  # fmt: skip
    """dq, dk, dv of `length` tiles, BACK or more, as `window_backward`; LSE and DELTA are pointers.

    AHEAD, BACK: a tile of keys is seen here by the queries AHEAD to AHEAD + BACK tiles later; a window that reaches
    back farther takes several of these passes. LACK: what is added to lacks the first tiles of queries and the last of
    keys, so many: an earlier pass was LACK tiles ahead. NQ, NKV, NP, NS: tiles of queries and of keys, pairs, and tiles
    of gradients on their way, in shared memory at a time. REGISTERS: of a thread that makes weights; the group that
    makes gradients has the rest. log2e: a number that the compiler does not know, or it would multiply by it as soon as
    a log-sum-exp is asked for, and wait for that.
    """
    BT: gl.constexpr = Q.block_shape[2]
    BDQ: gl.constexpr = Q.block_shape[3]
    BDV: gl.constexpr = V.block_shape[3]
    dtype: gl.constexpr = Q.dtype
    pair: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BT], dtype)
    q = gl.allocate_shared_memory(dtype, [NQ, 1, 1, BT, BDQ], Q.layout)
    g = gl.allocate_shared_memory(dtype, [NQ, 1, 1, BT, BDV], G.layout)
    k = gl.allocate_shared_memory(dtype, [NKV, 1, 1, BT, BDQ], K.layout)
    v = gl.allocate_shared_memory(dtype, [NKV, 1, 1, BT, BDV], V.layout)
    weights = gl.allocate_shared_memory(dtype, [NP, BT, BT], pair)
    scores = gl.allocate_shared_memory(dtype, [NP, BT, BT], pair)
    dq_at = gl.allocate_shared_memory(dtype, [NS, 1, 1, BT, BDQ], DQ.layout)
    dk_at = gl.allocate_shared_memory(dtype, [NS, 1, 1, BT, BDQ], DK.layout)
    dv_at = gl.allocate_shared_memory(dtype, [NS, 1, 1, BT, BDV], DV.layout)
    q_full, q_empty = barriers(NQ), barriers(NQ)
    kv_full, kv_empty = barriers(NKV), barriers(NKV)
    pair_full, pair_empty = barriers(NP), barriers(NP)
    old_full, old_empty = barriers(NS), barriers(NS)
    fence_async_shared()
    pid = gl.program_id(0)
    chunk = pid % chunks
    head = h0 + pid // chunks % heads
    b = pid // chunks // heads
    numbers = (b.to(gl.int64) * H + head) * S
    LSE += numbers
    DELTA += numbers
    own = chunk * length
    before = gl.where(chunk > 0, BACK, 0)
    count = gl.minimum(length, (S + BT - 1) // BT - AHEAD - own)
    gl.warp_specialize(
        [
            (_gradients, (DQ, DK, DV, q, k, g, weights, scores, dq_at, dk_at, dv_at, q_full, q_empty, kv_full, kv_empty,
                          pair_full, pair_empty, old_full, old_empty, b, head, own, before, count,
                          softmax_scale, BT, BDQ, BDV, BACK, AHEAD, NQ, NKV, NP, NS, ADD)),
            (_weights, (0, LSE, DELTA, q, k, v, g, weights, scores, q_full, kv_full, pair_full, pair_empty,
                        own, before, count, S, scale, log2e, BT, BDQ, BDV, R, BACK, AHEAD, NQ, NKV, NP)),
            (_weights, (1, LSE, DELTA, q, k, v, g, weights, scores, q_full, kv_full, pair_full, pair_empty,
                        own, before, count, S, scale, log2e, BT, BDQ, BDV, R, BACK, AHEAD, NQ, NKV, NP)),
            (_bring, (Q, K, V, G, q, k, v, g, q_full, q_empty, kv_full, kv_empty, b, head, own, before, count,
                      BACK, AHEAD, NQ, NKV)),
            (_bring_old, (DQ, DK, DV, dq_at, dk_at, dv_at, old_full, old_empty, b, head, own, count, S,
                          AHEAD, NS, ADD, LACK)),
        ],
        [4, 4, 1, 1], [REGISTERS, REGISTERS, 24, 24],
    )  # fmt: skip
