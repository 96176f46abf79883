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
from sparse_tx.attention.kernels.tiles import LN2, LOG2E, pair_is_masked, pair_seen, program


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
    Q, K, V, O, LSE, S, H, h0, groups, chunks, length, scale,
    R: gl.constexpr, RING: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """As `window_forward`, `length` blocks of W heads a program. groups: of W heads. RING: blocks of keys in shared
    memory at a time, more than a query sees.
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
        if MERGE:
            top = gl.load(LSE + rows, mask=valid, other=float("-inf")) * LOG2E
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
        gl.store(LSE + rows, (new + gl.log2(total)) * LN2, mask=valid)
        out.store((acc * (1.0 / total)[:, :, None]).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(O, [b, head, (own + i) * T, 0], o.index(i % 3))
    tma.store_wait(0)


@gluon.jit
def _written(at, x, ADD: gl.constexpr):
    """Puts x (W, T, D) where the copy engine takes it from; ADD: added to what lies there."""
    block = at.reshape([x.shape[0], x.shape[1], x.shape[2]])
    if ADD:
        x += block.load(x.type.layout).to(gl.float32)
    block.store(x.to(at.dtype))


@gluon.jit
def window_backward_by_warps(
    Q, K, V, LSE, G, DELTA, DQ, DK, DV, S, H, h0, groups, chunks, length, scale, softmax_scale,
    R: gl.constexpr, RING: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dq, dk, dv of `length` blocks of W heads, as `window_backward_by_roles`: each pair of blocks is visited once, and
    dq of the queries that have not seen all their keys waits in registers. RING: blocks of queries in shared memory.
    """
    W: gl.constexpr = Q.block_shape[1]
    T: gl.constexpr = Q.block_shape[2]
    BDQ: gl.constexpr = Q.block_shape[3]
    BDV: gl.constexpr = V.block_shape[3]
    BACK: gl.constexpr = (R + T - 1) // T
    EARLY: gl.constexpr = RING - BACK - 1
    dtype: gl.constexpr = Q.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    across: gl.constexpr = gl.SliceLayout(1, layout)
    pair: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, W, T, T], dtype)
    numbers: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    threads: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [W, 1], [1, 0])
    q = gl.allocate_shared_memory(dtype, [RING, 1, W, T, BDQ], Q.layout)
    g = gl.allocate_shared_memory(dtype, [RING, 1, W, T, BDV], G.layout)
    lse = gl.allocate_shared_memory(gl.float32, [RING, W, T], numbers)  # in base 2
    less = gl.allocate_shared_memory(gl.float32, [RING, W, T], numbers)  # -delta
    k = gl.allocate_shared_memory(dtype, [2, 1, W, T, BDQ], K.layout)
    v = gl.allocate_shared_memory(dtype, [2, 1, W, T, BDV], V.layout)
    scores = gl.allocate_shared_memory(dtype, [BACK + 1, 1, W, T, T], pair)
    dq_at = gl.allocate_shared_memory(dtype, [1, W, T, BDQ], DQ.layout)
    dk_at = gl.allocate_shared_memory(dtype, [1, W, T, BDQ], DK.layout)
    dv_at = gl.allocate_shared_memory(dtype, [1, W, T, BDV], DV.layout)
    qg_full, kv_full, old_full = barriers(RING), barriers(2), barriers(1)
    fence_async_shared()
    chunk, b, group = program(chunks, groups, False)
    head = h0 + group * W
    own = chunk * length
    begin = gl.maximum(own - BACK, 0)
    count = gl.minimum(own + length, (S + T - 1) // T) - begin
    heads = head + gl.arange(0, W, gl.SliceLayout(1, threads))
    column = gl.arange(0, T, gl.SliceLayout(0, threads))[None, :]
    of_heads = ((b.to(gl.int64) * H + heads.to(gl.int64)) * S)[:, None]
    LSE += of_heads
    DELTA += of_heads
    key = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    query = gl.arange(0, T, gl.SliceLayout(0, across))[None, None, :]
    zero = gl.zeros([W, T, T], gl.float32, layout)
    none = gl.zeros([W, T, BDQ], gl.float32, layout)
    sums = ()  # dq of the queries `far` blocks after the keys
    for _ in gl.static_range(BACK + 1):
        sums += (none,)
    for early in gl.static_range(BACK + EARLY):
        _bring_two(Q, G, q, g, qg_full, b, head, (begin + early) * T, early)
        rows = (begin + early) * T + column
        lse.index(early).store(gl.load(LSE + rows, mask=rows < S, other=0.0) * LOG2E)
        less.index(early).store(-gl.load(DELTA + rows, mask=rows < S, other=0.0))
    _bring_two(K, V, k, v, kv_full, b, head, begin * T, 0)
    for early in gl.static_range(BACK):
        mbarrier.wait(qg_full.index(early), 0)
    for t in range(count):
        newest = t + BACK
        later = newest + EARLY
        # Queries beyond the sequence are zeros, and add nothing.
        _bring_two(Q, G, q, g, qg_full, b, head, (begin + later) * T, later % RING)
        rows = (begin + later) * T + column
        later_lse = gl.load(LSE + rows, mask=rows < S, other=0.0) * LOG2E
        later_delta = gl.load(DELTA + rows, mask=rows < S, other=0.0)
        if t + 1 < count:
            _bring_two(K, V, k, v, kv_full, b, head, (begin + t + 1) * T, (t + 1) % 2)
        # Blocks of another program are stored beyond the end, and brought from there.
        to = gl.where(begin + t >= own, (begin + t) * T, S)
        tma.store_wait(0)
        if ADD:
            mbarrier.expect(old_full.index(0), 2 * W * T * (2 * BDQ + BDV))
            tma.async_copy_global_to_shared(DQ, [b, head, to, 0], old_full.index(0), dq_at)
            tma.async_copy_global_to_shared(DK, [b, head, to, 0], old_full.index(0), dk_at)
            tma.async_copy_global_to_shared(DV, [b, head, to, 0], old_full.index(0), dv_at)
        mbarrier.wait(kv_full.index(t % 2), t // 2 & 1)
        mbarrier.wait(qg_full.index(newest % RING), newest // RING & 1)
        keys = k.index(t % 2).reshape([W, T, BDQ])
        keys_left = keys.load(left)
        values_left = v.index(t % 2).reshape([W, T, BDV]).load(left)
        dk = none
        dv = gl.zeros([W, T, BDV], gl.float32, layout)
        for far in gl.static_range(BACK + 1):
            at = (t + far) % RING
            queries = q.index(at).reshape([W, T, BDQ])
            grads = g.index(at).reshape([W, T, BDV])
            # Transposed, (keys, queries): the weights then are an operand of dk and dv as they lie.
            s = mma_v2(keys_left, queries.permute([0, 2, 1]).load(right), zero)
            p = gl.exp2(s * scale - lse.index(at).load(across)[:, None, :])
            if pair_is_masked(far, T, 0, R):
                p = gl.where(pair_seen(query, key, far, T, 0, R), p, 0.0)
            start = zero + less.index(at).load(across)[:, None, :]
            ds = (p * mma_v2(values_left, grads.permute([0, 2, 1]).load(right), start)).to(dtype)
            dv = mma_v2(gl.convert_layout(p.to(dtype), left), grads.load(right), dv)
            dk = mma_v2(gl.convert_layout(ds, left), queries.load(right), dk)
            scores.index(far).reshape([W, T, T]).store(ds)
        keys_right = keys.load(right)
        after = ()
        for far in gl.static_range(BACK + 1):
            ds_left = scores.index(far).reshape([W, T, T]).permute([0, 2, 1]).load(left)
            after += (mma_v2(ds_left, keys_right, sums[far]),)
        if ADD:
            mbarrier.wait(old_full.index(0), t & 1)
        _written(dq_at, after[0] * softmax_scale, ADD)
        _written(dk_at, dk * softmax_scale, ADD)
        _written(dv_at, dv, ADD)
        fence_async_shared()
        tma.async_copy_shared_to_global(DQ, [b, head, to, 0], dq_at)
        tma.async_copy_shared_to_global(DK, [b, head, to, 0], dk_at)
        tma.async_copy_shared_to_global(DV, [b, head, to, 0], dv_at)
        lse.index(later % RING).store(later_lse)
        less.index(later % RING).store(-later_delta)
        sums = after[1:] + (none,)  # noqa: RUF005
    for early in gl.static_range(EARLY):  # what was brought for nobody
        last = count + BACK + early
        mbarrier.wait(qg_full.index(last % RING), last // RING & 1)
    tma.store_wait(0)
