"""Windows of narrow heads by warps that work alone, in Gluon for GPUs of compute capability 9.0.

Heads 32 wide leave little to multiply: exponentials and the numbers around them take the time, so no key should be
looked at in vain. A warp has 16 queries of one head at a time and walks along it; A of them have blocks beside each
other and share blocks of T = 16 keys: of the pairs of blocks that they visit few need a mask, while tiles of 64 look at
a third more. W heads lie beside each other in memory too. Warps meet only where the copy engine brings and takes a
block of all of them.

Names: tensors are (B, H, S, D) by descriptor, in blocks of (1, W, T, D), and of (1, W, A T, D) with the queries; t
counts the program's blocks of keys, i its blocks of queries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparse_tx.attention.kernels.shared_memory import barriers
from sparse_tx.attention.kernels.tiles import LN2, program


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
def _only_seen(s, query, key, back, T: gl.constexpr, A: gl.constexpr, R: gl.constexpr):
    """s (W, A T queries, T keys), and -inf where a query does not see a key; the keys' block ends `back` blocks before
    the queries'.
    """
    steps: gl.constexpr = (back - A + 1) * T
    if steps < T - 1:
        s = gl.where(query - key >= -steps, s, float("-inf"))
    if back * T + T - 1 > R:
        s = gl.where(query - key <= R - steps, s, float("-inf"))
    return s


@gluon.jit
def window_forward_by_warps(
    Q, K, V, O, LSE, S, H, h0, groups, chunks, length, scale, log2e,
    R: gl.constexpr, RING: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """As `window_forward`, `length` blocks of queries and W heads a program. groups: of W heads. RING: blocks of keys in
    shared memory at a time, those that queries see and those of the next blocks of queries. log2e: as of
    `window_backward_by_roles`.
    """
    W: gl.constexpr = Q.block_shape[1]
    T: gl.constexpr = K.block_shape[2]
    A: gl.constexpr = Q.block_shape[2] // T
    ROWS: gl.constexpr = A * T
    BDQ: gl.constexpr = Q.block_shape[3]
    BDV: gl.constexpr = V.block_shape[3]
    BACK: gl.constexpr = (R + T - 1) // T
    EARLY: gl.constexpr = (RING - BACK) // A - 1  # blocks of queries whose keys are brought before their step
    dtype: gl.constexpr = Q.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, A, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    q = gl.allocate_shared_memory(dtype, [2, 1, W, ROWS, BDQ], Q.layout)
    o = gl.allocate_shared_memory(dtype, [3, 1, W, ROWS, BDV], O.layout)
    k = gl.allocate_shared_memory(dtype, [RING, 1, W, T, BDQ], K.layout)
    v = gl.allocate_shared_memory(dtype, [RING, 1, W, T, BDV], V.layout)
    q_full, kv_full = barriers(2), barriers(RING)
    fence_async_shared()
    chunk, b, group = program(chunks, groups, False)
    head = h0 + group * W
    own = chunk * length
    count = gl.minimum(length, (S + ROWS - 1) // ROWS - own)
    heads = head + gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    query = row[:, :, None]
    key = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    LSE += ((b.to(gl.int64) * H + heads.to(gl.int64)) * S)[:, None]
    zero = gl.zeros([W, ROWS, T], gl.float32, layout)
    # Block t of the keys lies BACK blocks before the program's block t of the queries, counted by T.
    first = own * A - BACK
    for early in gl.static_range(BACK + EARLY * A):
        if early < count * A + BACK:
            _bring_two(K, V, k, v, kv_full, b, head, (first + early) * T, early)
    _bring_queries(Q, O, q, o, q_full, b, head, own * ROWS, 0, MERGE)
    for early in gl.static_range(BACK):
        mbarrier.wait(kv_full.index(early), 0)
    if MERGE:
        rows = own * ROWS + row
        next_old = gl.load(LSE + rows, mask=rows < S, other=float("-inf"))
    for i in range(count):
        last = i * A + BACK + A - 1  # of the blocks of keys that are seen now
        if i + EARLY < count:  # where the keys lay that the queries before saw last
            for more in gl.static_range(A):
                later = last + EARLY * A - more
                _bring_two(K, V, k, v, kv_full, b, head, (first + later) * T, later % RING)
        tma.store_wait(1)  # the output of two steps before has left its place
        if i + 1 < count:
            _bring_queries(Q, O, q, o, q_full, b, head, (own + i + 1) * ROWS, i + 1, MERGE)
        rows = (own + i) * ROWS + row
        valid = rows < S
        if MERGE:  # that of the next queries is on its way
            old = next_old
            next_old = gl.load(LSE + rows + ROWS, mask=rows + ROWS < S, other=float("-inf"))
        mbarrier.wait(q_full.index(i % 2), i // 2 & 1)
        for more in gl.static_range(A):
            mbarrier.wait(kv_full.index((last - more) % RING), (last - more) // RING & 1)
        queries = q.index(i % 2).reshape([W, ROWS, BDQ]).load(left)
        out = o.index(i % 3).reshape([W, ROWS, BDV])
        scores = ()
        for back in gl.static_range(BACK + A):
            keys = k.index((last - back) % RING).reshape([W, T, BDQ])
            s = mma_v2(queries, keys.permute([0, 2, 1]).load(right), zero)
            scores += (_only_seen(s, query, key, back, T, A, R),)
        at = (own + i) * A + A - 1
        if at < BACK + A - 1:  # keys before the sequence begins: zeros were brought for them
            there = ()
            for back in gl.static_range(BACK + A):
                there += (scores[back] + gl.where(at >= back, 0.0, float("-inf")),)
            scores = there
        most = scores[0]  # a query sees itself: the greatest of all is finite
        for back in gl.static_range(1, BACK + A):
            most = gl.maximum(most, scores[back])
        new = gl.max(most, 2) * scale
        if MERGE:
            top = old * log2e
            new = gl.maximum(top, new)
            share = gl.exp2(top - new)
            acc = out.load(layout).to(gl.float32) * share[:, :, None]
        else:
            acc = gl.zeros([W, ROWS, BDV], gl.float32, layout)
        sums = zero
        for back in gl.static_range(BACK + A):
            p = gl.exp2(scores[back] * scale - new[:, :, None])
            sums += p
            values = v.index((last - back) % RING).reshape([W, T, BDV]).load(right)
            acc = mma_v2(gl.convert_layout(p.to(dtype), left), values, acc)
        total = gl.sum(sums, 2)
        if MERGE:
            total += share
        gl.store(LSE + rows, (new + gl.log2(total)) * LN2, mask=valid)
        out.store((acc * (1.0 / total)[:, :, None]).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(O, [b, head, (own + i) * ROWS, 0], o.index(i % 3))
    tma.store_wait(0)
