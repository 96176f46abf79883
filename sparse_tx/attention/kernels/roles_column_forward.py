"""The forward pass of columns of a few tiles by warps with roles, in Gluon for GPUs of compute capability 9.0.

A program goes along columns. One warp brings tiles by the copy engine, each once; groups of four warps take turns in
tiles of queries, so that the products of one overlap the softmax of another.

Names: c counts the program's columns, turn its tiles of queries, NT a column; i and t are tiles of queries and of keys
within a column. Tensors are (B, H, L, N, D) by descriptor, in blocks of (1, 1, 1, BT, D).
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
from sparse_tx.attention.kernels.tiles import LN2, column_turns, own_column


@gluon.jit
def _bring(
    Q, K, V, q, k, v, q_full, q_empty, kv_full, kv_empty, h0, heads, units,
    L: gl.constexpr, NT: gl.constexpr, NQ: gl.constexpr, NC: gl.constexpr,
):  # fmt: skip
    BT: gl.constexpr = Q.block_shape[3]
    for c in range(column_turns(units)):
        b, h, column = own_column(c, heads, L)
        for i in gl.static_range(NT):
            bring_two(K, V, k, v, kv_full, kv_empty, [b, h0 + h, column, i * BT, 0], c * NT + i, NC * NT)
            bring(Q, q, q_full, q_empty, [b, h0 + h, column, i * BT, 0], c * NT + i, NQ)


@gluon.jit
def _attend(
    WHICH: gl.constexpr, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, h0, heads, units,
    S, H, scale,
    L: gl.constexpr, BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr,
    NT: gl.constexpr, NQ: gl.constexpr, NC: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Every GROUPS-th tile of queries from tile WHICH on."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    query = gl.arange(0, BT, gl.SliceLayout(1, layout))
    key = gl.arange(0, BT, gl.SliceLayout(0, layout))
    zero = gl.zeros([BT, BT], gl.float32, layout)
    out = o.index(WHICH).reshape([BT, BDV])
    for turn in range(WHICH, column_turns(units) * NT, GROUPS):
        c = turn // NT
        i = turn % NT
        b, h, column = own_column(c, heads, L)
        head = h0 + h
        rows = (i * BT + query) * L + column
        of_head = (b.to(gl.int64) * H + head) * S
        here = turn % NQ
        mbarrier.wait(q_full.index(here), turn // NQ & 1)
        queries = q.index(here).reshape([BT, BDQ])
        # Lower than any score: a row without a key keeps it, and inf - inf never arises.
        top = gl.full([BT], -1e38, gl.float32, gl.SliceLayout(1, layout))
        total = gl.zeros([BT], gl.float32, gl.SliceLayout(1, layout))
        acc = gl.zeros([BT, BDV], gl.float32, wide)
        for t in range(i + 1):  # the first first: their place is that of the next that come
            at = c % NC * NT + t
            mbarrier.wait(kv_full.index(at), c // NC & 1)
            keys = k.index(at).reshape([BT, BDQ]).permute([1, 0])
            s = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            s = only_seen(s, query, key, i - t, BT, NEAR, R, float("-inf"))
            acc, top, total = softmax_step(s, v.index(at).reshape([BT, BDV]), acc, top, total, scale)
            if (t == i) & (i + GROUPS >= NT):
                # The group's last look at this column. A barrier tells its last phase from the next alone: it waits for
                # the tiles that other groups look at while their places cannot have been given to another column.
                for late in range(i + 1, NT):
                    mbarrier.wait(kv_full.index(c % NC * NT + late), c // NC & 1)
            mbarrier.arrive(kv_empty.index(at), count=1)
        mbarrier.arrive(q_empty.index(here), count=1)
        empty = total == 0.0
        some = gl.where(empty, 1.0, total)
        tma.store_wait(0)
        out.store((acc / gl.convert_layout(some, gl.SliceLayout(1, wide))[:, None]).to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(O, [b, head, column, i * BT, 0], o.index(WHICH))
        # After the fence, or that would wait for these many small stores.
        gl.store(LSE + of_head + rows, gl.where(empty, float("-inf"), (top + gl.log2(some)) * LN2), mask=rows < S)
    tma.store_wait(0)


@gluon.jit
def column_forward_by_roles(
    Q, K, V, O, LSE, S, H, h0, heads, units, scale,
    L: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr, NT: gl.constexpr, NQ: gl.constexpr, NC: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `column_forward`, of `units` columns of all heads.

    NQ, NC: tiles of queries, and columns of keys, in shared memory at a time, multiples of GROUPS, but NC only where a
    group has no tile of some columns: a barrier tells its last phase from the next alone.
    """
    GROUPS: gl.constexpr = 3
    BT: gl.constexpr = Q.block_shape[3]
    BDQ: gl.constexpr = Q.block_shape[4]
    BDV: gl.constexpr = V.block_shape[4]
    q = gl.allocate_shared_memory(Q.dtype, [NQ, 1, 1, 1, BT, BDQ], Q.layout)
    o = gl.allocate_shared_memory(Q.dtype, [GROUPS, 1, 1, 1, BT, BDV], O.layout)
    k = gl.allocate_shared_memory(Q.dtype, [NC * NT, 1, 1, 1, BT, BDQ], K.layout)
    v = gl.allocate_shared_memory(Q.dtype, [NC * NT, 1, 1, 1, BT, BDV], V.layout)
    q_full, q_empty = barriers(NQ), barriers(NQ)
    kv_full = barriers(NC * NT)
    kv_empty = gl.allocate_shared_memory(gl.int64, [NC * NT, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(NC * NT):
        mbarrier.init(kv_empty.index(at), count=NT - at % NT)  # the tiles of queries that see it
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (0, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, h0, heads, units, S, H, scale,
                       L, BT, BDQ, BDV, NEAR, R, NT, NQ, NC, GROUPS)),
            (_attend, (1, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, h0, heads, units, S, H, scale,
                       L, BT, BDQ, BDV, NEAR, R, NT, NQ, NC, GROUPS)),
            (_attend, (2, O, LSE, q, k, v, o, q_full, q_empty, kv_full, kv_empty, h0, heads, units, S, H, scale,
                       L, BT, BDQ, BDV, NEAR, R, NT, NQ, NC, GROUPS)),
            (_bring, (Q, K, V, q, k, v, q_full, q_empty, kv_full, kv_empty, h0, heads, units, L, NT, NQ, NC)),
        ],
        [4, 4, 1], [REGISTERS, REGISTERS, 24],
    )  # fmt: skip
