"""Short columns of narrow heads by warps that work alone, in Gluon for GPUs of compute capability 9.0.

A warp has a whole column of one head, in NT blocks of T = 16 rows, and W warps those of W heads beside each other,
which lie beside each other in memory too: whole lines are read, and of a causal column no block of pairs is looked at
in vain. Enough columns are on their way at a time that memory alone should take the time.

Names: tensors are (B, L, H, N, D) by descriptor, in blocks of (1, 1, W, T, D).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparse_tx.attention.kernels.shared_memory import barriers
from sparse_tx.attention.kernels.tiles import LN2, column_turns, own_column, pair_is_masked, pair_seen


@gluon.jit
def _bring(X, x, full, b, r, head, NT: gl.constexpr):
    T: gl.constexpr = X.block_shape[3]
    for n in gl.static_range(NT):
        tma.async_copy_global_to_shared(X, [b, r, head, n * T, 0], full.index(0), x.index(n))


@gluon.jit
def column_forward_by_warps(
    Q, K, V, O, LSE, S, H, h0, groups, units, scale,
    L: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr, NT: gl.constexpr,
):  # fmt: skip
    """As `column_forward`, of `units` columns, each of W heads. groups: of W heads."""
    W: gl.constexpr = Q.block_shape[2]
    T: gl.constexpr = Q.block_shape[3]
    BDQ: gl.constexpr = Q.block_shape[4]
    BDV: gl.constexpr = V.block_shape[4]
    dtype: gl.constexpr = Q.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    q = gl.allocate_shared_memory(dtype, [NT, 1, 1, W, T, BDQ], Q.layout)
    k = gl.allocate_shared_memory(dtype, [NT, 1, 1, W, T, BDQ], K.layout)
    v = gl.allocate_shared_memory(dtype, [NT, 1, 1, W, T, BDV], V.layout)
    o = gl.allocate_shared_memory(dtype, [NT, 1, 1, W, T, BDV], O.layout)
    full = barriers(1)
    fence_async_shared()
    rows = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    local = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    query = rows[None, :, None]
    key = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    zero = gl.zeros([W, T, T], gl.float32, layout)
    for i in range(column_turns(units)):
        b, group, r = own_column(i, groups, L)
        head = h0 + group * W
        of_heads = ((b.to(gl.int64) * H + (head + local).to(gl.int64)) * S)[:, None]
        tma.store_wait(0)
        mbarrier.expect(full.index(0), 2 * NT * W * T * (2 * BDQ + BDV))
        _bring(Q, q, full, b, r, head, NT)
        _bring(K, k, full, b, r, head, NT)
        _bring(V, v, full, b, r, head, NT)
        mbarrier.wait(full.index(0), i & 1)
        for n in gl.static_range(NT):
            queries = q.index(n).reshape([W, T, BDQ]).load(left)
            scores = ()
            # Lower than any score: a row without a key keeps it, and inf - inf never arises.
            most = gl.full([W, T, T], -1e38, gl.float32, layout)
            for far in gl.static_range(n + 1):
                if far * T - (T - 1) <= R:
                    s = mma_v2(queries, k.index(n - far).reshape([W, T, BDQ]).permute([0, 2, 1]).load(right), zero)
                    if pair_is_masked(far, T, NEAR, R):
                        s = gl.where(pair_seen(query, key, far, T, NEAR, R), s, float("-inf"))
                    most = gl.maximum(most, s)
                    scores += (s,)
            top = gl.max(most, 2) * scale
            sums = zero
            acc = gl.zeros([W, T, BDV], gl.float32, layout)
            for far in gl.static_range(len(scores)):
                p = gl.exp2(scores[far] * scale - top[:, :, None])
                sums += p
                values = v.index(n - far).reshape([W, T, BDV]).load(right)
                acc = mma_v2(gl.convert_layout(p.to(dtype), left), values, acc)
            total = gl.sum(sums, 2)
            empty = total == 0.0
            some = gl.where(empty, 1.0, total)
            lse = gl.where(empty, float("-inf"), (top + gl.log2(some)) * LN2)
            at = (n * T + rows)[None, :] * L + r
            gl.store(LSE + of_heads + at, lse, mask=at < S)
            o.index(n).reshape([W, T, BDV]).store((acc * (1.0 / some)[:, :, None]).to(dtype))
        fence_async_shared()
        for n in gl.static_range(NT):
            tma.async_copy_shared_to_global(O, [b, r, head, n * T, 0], o.index(n))
    tma.store_wait(0)
