"""Windows of narrow heads by warps that work alone, in Gluon for GPUs of compute capability 9.0.

Heads 32 wide leave little to multiply: exponentials and the numbers around them take the time, so no key should be
looked at in vain. A warp has one head and walks along it in blocks of T = 16 queries or keys: of the pairs of blocks
that it visits two at most need a mask; tiles of 64 look at a third more. W warps have heads beside each other, which
lie beside each other in memory too, and meet only where the copy engine brings and takes a block of all of them.

Names: tensors are (B, H, S, D) by descriptor, in blocks of (1, W, T, D); t counts the program's blocks of keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparse_tx.attention.kernels.shared_memory import barriers
from sparse_tx.attention.kernels.tiles import LN2, pair_is_masked, pair_seen, program


@gluon.jit
def _bring_two(X, Y, x, y, full, b, head, row, at):
    """Rows of two tensors to place `at`."""
    rows: gl.constexpr = X.block_shape[1] * X.block_shape[2]
    mbarrier.expect(full.index(at), 2 * rows * (X.block_shape[3] + Y.block_shape[3]))
    tma.async_copy_global_to_shared(X, [b, head, row, 0], full.index(at), x.index(at))
    tma.async_copy_global_to_shared(Y, [b, head, row, 0], full.index(at), y.index(at))


@gluon.jit
def _bring_queries(Q, O, q, o, q_full, b, head, row, i, MERGE: gl.constexpr):
    rows: gl.constexpr = Q.block_shape[1] * Q.block_shape[2]
    full = q_full.index(i % 2)
    mbarrier.expect(full, 2 * rows * (Q.block_shape[3] + (O.block_shape[3] if MERGE else 0)))
    tma.async_copy_global_to_shared(Q, [b, head, row, 0], full, q.index(i % 2))
    if MERGE:
        tma.async_copy_global_to_shared(O, [b, head, row, 0], full, o.index(i % 3))


@gluon.jit
def window_forward_by_warps(
    Q, K, V, O, LSE, S, H, h0, groups, chunks, length, scale, log2e,
    R: gl.constexpr, RING: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """As `window_forward`, `length` blocks of W heads a program. groups: of W heads. RING: blocks of keys in shared
    memory at a time, more than a query sees. log2e: as of `roles.window_backward_by_roles`.
    """
    W: gl.constexpr = Q.block_shape[1]
    T: gl.constexpr = Q.block_shape[2]
    BDQ: gl.constexpr = Q.block_shape[3]
    BDV: gl.constexpr = V.block_shape[3]
    BACK: gl.constexpr = (R + T - 1) // T
    EARLY: gl.constexpr = RING - BACK - 1  # blocks that are brought before their step
    dtype: gl.constexpr = Q.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    q = gl.allocate_shared_memory(dtype, [2, 1, W, T, BDQ], Q.layout)
    o = gl.allocate_shared_memory(dtype, [3, 1, W, T, BDV], O.layout)
    k = gl.allocate_shared_memory(dtype, [RING, 1, W, T, BDQ], K.layout)
    v = gl.allocate_shared_memory(dtype, [RING, 1, W, T, BDV], V.layout)
    q_full, kv_full = barriers(2), barriers(RING)
    fence_async_shared()
    chunk, b, group = program(chunks, groups, False)
    head = h0 + group * W
    own = chunk * length
    count = gl.minimum(length, (S + T - 1) // T - own)
    heads = head + gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    row = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    query = row[:, :, None]
    key = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    LSE += ((b.to(gl.int64) * H + heads.to(gl.int64)) * S)[:, None]
    zero = gl.zeros([W, T, T], gl.float32, layout)
    # Block t of the keys lies BACK blocks before the program's block t of the queries.
    for early in gl.static_range(BACK + EARLY):
        if early < count + BACK:
            _bring_two(K, V, k, v, kv_full, b, head, (own - BACK + early) * T, early)
    _bring_queries(Q, O, q, o, q_full, b, head, own * T, 0, MERGE)
    for early in gl.static_range(BACK):
        mbarrier.wait(kv_full.index(early), 0)
    if MERGE:
        rows = own * T + row
        next_old = gl.load(LSE + rows, mask=rows < S, other=float("-inf"))
    for i in range(count):
        t = i + BACK
        if i + EARLY < count:  # where the keys lay that the queries before saw last
            later = t + EARLY
            _bring_two(K, V, k, v, kv_full, b, head, (own + i + EARLY) * T, later % RING)
        tma.store_wait(1)  # the output of two steps before has left its place
        if i + 1 < count:
            _bring_queries(Q, O, q, o, q_full, b, head, (own + i + 1) * T, i + 1, MERGE)
        rows = (own + i) * T + row
        valid = rows < S
        if MERGE:  # that of the next queries is on its way
            old = next_old
            next_old = gl.load(LSE + rows + T, mask=rows + T < S, other=float("-inf"))
        mbarrier.wait(q_full.index(i % 2), i // 2 & 1)
        mbarrier.wait(kv_full.index(t % RING), t // RING & 1)
        queries = q.index(i % 2).reshape([W, T, BDQ]).load(left)
        out = o.index(i % 3).reshape([W, T, BDV])
        scores = ()
        for back in gl.static_range(BACK + 1):
            keys = k.index((t - back) % RING).reshape([W, T, BDQ])
            s = mma_v2(queries, keys.permute([0, 2, 1]).load(right), zero)
            if pair_is_masked(back, T, 0, R):
                s = gl.where(pair_seen(query, key, back, T, 0, R), s, float("-inf"))
            scores += (s,)
        if own + i < BACK:  # keys before the sequence begins: zeros were brought for them
            there = ()
            for back in gl.static_range(BACK + 1):
                there += (scores[back] + gl.where(own + i >= back, 0.0, float("-inf")),)
            scores = there
        most = scores[0]  # a query sees itself: finite
        for back in gl.static_range(1, BACK + 1):
            most = gl.maximum(most, scores[back])
        new = gl.max(most, 2) * scale
        if MERGE:
            top = old * log2e
            new = gl.maximum(top, new)
            share = gl.exp2(top - new)
            acc = out.load(layout).to(gl.float32) * share[:, :, None]
        else:
            acc = gl.zeros([W, T, BDV], gl.float32, layout)
        sums = zero
        for back in gl.static_range(BACK + 1):
            p = gl.exp2(scores[back] * scale - new[:, :, None])
            sums += p
            values = v.index((t - back) % RING).reshape([W, T, BDV]).load(right)
            acc = mma_v2(gl.convert_layout(p.to(dtype), left), values, acc)
        total = gl.sum(sums, 2)
        if MERGE:
            total += share
        out.store((acc * (1.0 / total)[:, :, None]).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(O, [b, head, (own + i) * T, 0], o.index(i % 3))
        gl.store(LSE + rows, (new + gl.log2(total)) * LN2, mask=valid)  # after the fence, or that would wait for it
    tma.store_wait(0)
