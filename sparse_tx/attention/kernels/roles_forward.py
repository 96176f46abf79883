"""The forward pass of a window by warps with roles of their own, in Gluon for GPUs of compute capability 9.0.

A program walks along the sequence. One warp brings tiles by the copy engine, each tile of keys once, another the output
of another part; groups of four warps take turns in tiles of queries, so that the products of one overlap the softmax of
another.

Names: i counts the program's tiles of queries, from `own` on, t its tiles of keys, from BACK tiles before; far = i - t.
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

from sparse_tx.attention.kernels.pairs import only_seen, softmax_step
from sparse_tx.attention.kernels.shared_memory import barriers, bring, bring_two
from sparse_tx.attention.kernels.tiles import LN2, LOG2E


@gluon.jit
def _bring(
    Q, K, V, q, k, v, q_full, q_empty, kv_full, kv_empty, b, head, own, count,
    BACK: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr,
):  # fmt: skip
    BT: gl.constexpr = Q.block_shape[2]
    for t in range(count + BACK):
        i = t - BACK
        if i >= 0:
            bring(Q, q, q_full, q_empty, [b, head, (own + i) * BT, 0], i, NQ)
        bring_two(K, V, k, v, kv_full, kv_empty, [b, head, (own - BACK + t) * BT, 0], t, NKV)


@gluon.jit
def _bring_old(O, o, o_full, o_empty, b, head, own, count, GROUPS: gl.constexpr, MERGE: gl.constexpr):
    """The output of another part, by a warp of its own, or the tiles above would wait too."""
    if MERGE:
        BT: gl.constexpr = O.block_shape[2]
        for i in range(count):
            bring(O, o, o_full, o_empty, [b, head, (own + i) * BT, 0], i, GROUPS)


@gluon.jit
def _attend(
    WHICH: gl.constexpr, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, o_full, o_empty, b, head, own, count,
    S, scale,
    BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, R: gl.constexpr, BACK: gl.constexpr, NQ: gl.constexpr,
    NKV: gl.constexpr, GROUPS: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Every GROUPS-th tile of queries from tile WHICH on."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    query = gl.arange(0, BT, gl.SliceLayout(1, layout))
    key = gl.arange(0, BT, gl.SliceLayout(0, layout))
    zero = gl.zeros([BT, BT], gl.float32, layout)
    # The tiles before the program's own have fewer queries here: of those before them each group counts its share as
    # done. A barrier tells its last phase from the next alone: a group that looks only at later tiles of such a place
    # waits for the first one too.
    for early in gl.static_range(BACK):
        if (WHICH + BACK - early) // GROUPS > 0:
            if early < WHICH:
                mbarrier.wait(kv_full.index(early), 0)
            mbarrier.arrive(kv_empty.index(early), count=(WHICH + BACK - early) // GROUPS)
    out = o.index(WHICH).reshape([BT, BDV])
    for i in range(WHICH, count, GROUPS):
        row = (own + i) * BT
        rows = row + query
        valid = rows < S
        if MERGE:
            old = gl.load(LSE + rows, mask=valid, other=float("-inf"))
        # Lower than any score: keys that none of a row is allowed to see leave it, and inf - inf never arises.
        top = gl.full([BT], -1e38, gl.float32, gl.SliceLayout(1, layout))
        total = gl.zeros([BT], gl.float32, gl.SliceLayout(1, layout))
        acc = gl.zeros([BT, BDV], gl.float32, wide)
        here = i % NQ
        mbarrier.wait(q_full.index(here), i // NQ & 1)
        queries = q.index(here).reshape([BT, BDQ])
        # The farthest first: their place is that of the next that come. Not unrolled: each group has instructions of
        # its own, and together they must not miss the caches.
        for t in range(i, i + BACK + 1):
            far = i + BACK - t
            mbarrier.wait(kv_full.index(t % NKV), t // NKV & 1)
            keys = k.index(t % NKV).reshape([BT, BDQ]).permute([1, 0])
            s = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            s = only_seen(s, query, key, far, BT, 0, R, float("-inf"))
            if row < far * BT:  # there are keys before the sequence begins
                s = gl.where((key >= far * BT - row)[None, :], s, float("-inf"))
            acc, top, total = softmax_step(s, v.index(t % NKV).reshape([BT, BDV]), acc, top, total, scale)
            mbarrier.arrive(kv_empty.index(t % NKV), count=1)
            if MERGE and t == i:  # the output of the tile before is out: that of another part may take its place
                tma.store_wait(0)
                if i >= GROUPS:
                    mbarrier.arrive(o_empty.index(WHICH), count=1)
        mbarrier.arrive(q_empty.index(here), count=1)
        if MERGE:  # last, when it has long been there
            old *= LOG2E
            new = gl.maximum(top, old)
            alpha = gl.exp2(top - new)
            beta = gl.exp2(old - new)
            total = total * alpha + beta
            top = new
            mbarrier.wait(o_full.index(WHICH), i // GROUPS & 1)
            rows_of: gl.constexpr = gl.SliceLayout(1, wide)
            acc *= gl.convert_layout(alpha, rows_of)[:, None]
            acc += out.load(wide).to(gl.float32) * gl.convert_layout(beta, rows_of)[:, None]
        else:
            tma.store_wait(0)
        out.store((acc / gl.convert_layout(total, gl.SliceLayout(1, wide))[:, None]).to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(O, [b, head, row, 0], o.index(WHICH))
        gl.store(LSE + rows, (top + gl.log2(total)) * LN2, mask=valid)  # after the fence, or that would wait for it
    tma.store_wait(0)


@gluon.jit
def window_forward_by_roles(
    Q, K, V, O, LSE, S, H, h0, heads, chunks, length, scale,
    R: gl.constexpr, NQ: gl.constexpr, NKV: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr,
    MERGE: gl.constexpr,
):  # fmt: skip
    """As `window_forward`.

    NQ, NKV: tiles of queries and of keys in shared memory at a time, multiples of GROUPS, but NKV only where a group
    does not see every tile of keys: a barrier tells its last phase from the next alone.
    """
    BT: gl.constexpr = Q.block_shape[2]
    BDQ: gl.constexpr = Q.block_shape[3]
    BDV: gl.constexpr = V.block_shape[3]
    BACK: gl.constexpr = (R + BT - 1) // BT
    q = gl.allocate_shared_memory(Q.dtype, [NQ, 1, 1, BT, BDQ], Q.layout)
    o = gl.allocate_shared_memory(Q.dtype, [GROUPS, 1, 1, BT, BDV], O.layout)
    k = gl.allocate_shared_memory(Q.dtype, [NKV, 1, 1, BT, BDQ], K.layout)
    v = gl.allocate_shared_memory(Q.dtype, [NKV, 1, 1, BT, BDV], V.layout)
    q_full, q_empty = barriers(NQ), barriers(NQ)
    o_full, o_empty = barriers(GROUPS), barriers(GROUPS)
    kv_full = barriers(NKV)
    kv_empty = gl.allocate_shared_memory(gl.int64, [NKV, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(NKV):
        mbarrier.init(kv_empty.index(at), count=BACK + 1)
    fence_async_shared()
    pid = gl.program_id(0)
    chunk = pid % chunks
    head = h0 + pid // chunks % heads
    b = pid // chunks // heads
    LSE += (b.to(gl.int64) * H + head) * S
    own = chunk * length
    count = gl.minimum(length, (S + BT - 1) // BT - own)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (0, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, o_full, o_empty, b, head, own,
                           count, S, scale, BT, BDQ, BDV, R, BACK, NQ, NKV, GROUPS, MERGE)),
                (_attend, (1, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, o_full, o_empty, b, head, own,
                           count, S, scale, BT, BDQ, BDV, R, BACK, NQ, NKV, GROUPS, MERGE)),
                (_bring, (Q, K, V, q, k, v, q_full, q_empty, kv_full, kv_empty, b, head, own, count, BACK, NQ, NKV)),
                (_bring_old, (O, o, o_full, o_empty, b, head, own, count, GROUPS, MERGE)),
            ],
            [4, 1, 1], [REGISTERS, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (0, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, o_full, o_empty, b, head, own,
                           count, S, scale, BT, BDQ, BDV, R, BACK, NQ, NKV, GROUPS, MERGE)),
                (_attend, (1, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, o_full, o_empty, b, head, own,
                           count, S, scale, BT, BDQ, BDV, R, BACK, NQ, NKV, GROUPS, MERGE)),
                (_attend, (2, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, o_full, o_empty, b, head, own,
                           count, S, scale, BT, BDQ, BDV, R, BACK, NQ, NKV, GROUPS, MERGE)),
                (_bring, (Q, K, V, q, k, v, q_full, q_empty, kv_full, kv_empty, b, head, own, count, BACK, NQ, NKV)),
                (_bring_old, (O, o, o_full, o_empty, b, head, own, count, GROUPS, MERGE)),
            ],
            [4, 4, 1, 1], [REGISTERS, REGISTERS, 24, 24],
        )  # fmt: skip
