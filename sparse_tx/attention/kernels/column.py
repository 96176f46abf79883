"""Short columns: one program walks along neighbouring columns and holds each of them whole, forward and backward.

A column of N <= NT BT positions is NT tiles whose rows lie L apart. Every tensor is read and written once; while one
column is worked on the copy engine brings the next. Tensors come as descriptors, (B, H, L, N, D) in blocks of
(1, 1, 1, BT, D), which needs a length that is a multiple of L.
"""

import triton
import triton.language as tl

from sparse_tx.attention.kernels.tiles import LN2, LOG2E, pair_is_masked, pair_seen, program


@triton.jit
def column_forward(
    Q, K, V, O, LSE, S, H, h0, heads, chunks, length, L, scale,
    NEAR: tl.constexpr, R: tl.constexpr, NT: tl.constexpr,
    BDQ: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Query i sees i - NEAR L, i - (NEAR + 1) L, ... i - R L. A program walks over `length` columns.

    scale is in base 2.
    """
    chunk, b, h = program(chunks, heads, False)
    head = h0 + h
    LSE += (b.to(tl.int64) * H + head) * S
    local = tl.arange(0, BT)
    first = chunk * length
    for r in tl.range(first, tl.minimum(first + length, L), num_stages=STAGES):
        qs, ks, vs = (), (), ()
        for n in tl.static_range(NT):
            qs += (Q.load([b, head, r, n * BT, 0]).reshape(BT, BDQ),)
            ks += (K.load([b, head, r, n * BT, 0]).reshape(BT, BDQ),)
            vs += (V.load([b, head, r, n * BT, 0]).reshape(BT, BDV),)
        for n in tl.static_range(NT):
            # Lower than any score: a row without a key keeps it, and inf - inf never arises.
            top = tl.full([BT], -1e38, tl.float32)
            total = tl.zeros([BT], tl.float32)
            acc = tl.zeros([BT, BDV], tl.float32)
            for far in tl.static_range(n + 1):
                if far * BT - (BT - 1) <= R:
                    s = tl.dot(qs[n], tl.trans(ks[n - far]), input_precision="ieee")
                    if pair_is_masked(far, BT, NEAR, R):
                        s = tl.where(pair_seen(local[:, None], local[None, :], far, BT, NEAR, R), s, float("-inf"))
                    new = tl.maximum(top, tl.max(s, 1) * scale)
                    p = tl.exp2(s * scale - new[:, None])
                    alpha = tl.exp2(top - new)
                    total = total * alpha + tl.sum(p, 1)
                    v = vs[n - far]
                    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
                    top = new
            empty = total == 0.0
            some = tl.where(empty, 1.0, total)
            lse = tl.where(empty, float("-inf"), (top + tl.log2(some)) * LN2)
            rows = (n * BT + local) * L + r
            tl.store(LSE + rows, lse, mask=rows < S)
            O.store([b, head, r, n * BT, 0], (acc / some[:, None]).to(O.dtype).reshape(1, 1, 1, BT, BDV))


@triton.jit
def column_backward(
    Q, K, V, O, LSE, G, DLSE, DELTA, DQ, DK, DV, S, H, h0, heads, chunks, length, L, scale, softmax_scale,
    NEAR: tl.constexpr, R: tl.constexpr, NT: tl.constexpr,
    BDQ: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr,
    STORE_DELTA: tl.constexpr, HAS_DLSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of `length` columns, and delta for another part. LSE, DLSE, DELTA: pointers to (B, H, S)."""
    chunk, b, h = program(chunks, heads, False)
    head = h0 + h
    numbers = (b.to(tl.int64) * H + head) * S
    LSE += numbers
    DELTA += numbers
    DLSE += numbers
    local = tl.arange(0, BT)
    first = chunk * length
    for r in tl.range(first, tl.minimum(first + length, L), num_stages=STAGES):
        qs, gs, lses, deltas, sums = (), (), (), (), ()
        for n in tl.static_range(NT):
            rows = (n * BT + local) * L + r
            g = G.load([b, head, r, n * BT, 0]).reshape(BT, BDV)
            o = O.load([b, head, r, n * BT, 0]).reshape(BT, BDV)
            delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
            if HAS_DLSE:
                delta -= tl.load(DLSE + rows, mask=rows < S, other=0.0)
            if STORE_DELTA:
                tl.store(DELTA + rows, delta, mask=rows < S)
            qs += (Q.load([b, head, r, n * BT, 0]).reshape(BT, BDQ),)
            gs += (g,)
            # A query without a key anywhere has lse -inf; none of its pairs is seen.
            lses += (tl.load(LSE + rows, mask=rows < S, other=0.0) * LOG2E,)
            deltas += (delta,)
            sums += (tl.zeros([BT, BDQ], tl.float32),)
        # Keys in order: the queries of tile n have all their keys once tile n is done.
        for n in tl.static_range(NT):
            k = K.load([b, head, r, n * BT, 0]).reshape(BT, BDQ)
            v = V.load([b, head, r, n * BT, 0]).reshape(BT, BDV)
            dk = tl.zeros([BT, BDQ], tl.float32)
            dv = tl.zeros([BT, BDV], tl.float32)
            rest = ()
            for far in tl.static_range(NT - n):
                q, g, dq = qs[n + far], gs[n + far], sums[far]
                if far * BT - (BT - 1) <= R:
                    # Transposed, (keys, queries): the weights then are an operand of dk and dv as they lie.
                    s = tl.dot(k, tl.trans(q), input_precision="ieee")
                    p = tl.exp2(s * scale - lses[n + far][None, :])
                    if pair_is_masked(far, BT, NEAR, R):
                        p = tl.where(pair_seen(local[None, :], local[:, None], far, BT, NEAR, R), p, 0.0)
                    dp = tl.dot(v, tl.trans(g), input_precision="ieee")
                    ds = (p * (dp - deltas[n + far][None, :])).to(q.dtype)
                    dv = tl.dot(p.to(q.dtype), g, dv, input_precision="ieee")
                    dk = tl.dot(ds, q, dk, input_precision="ieee")
                    dq = tl.dot(tl.trans(ds), k, dq, input_precision="ieee")
                rest += (dq,)
            DQ.store([b, head, r, n * BT, 0], (rest[0] * softmax_scale).to(DQ.dtype).reshape(1, 1, 1, BT, BDQ))
            DK.store([b, head, r, n * BT, 0], (dk * softmax_scale).to(DK.dtype).reshape(1, 1, 1, BT, BDQ))
            DV.store([b, head, r, n * BT, 0], dv.to(DV.dtype).reshape(1, 1, 1, BT, BDV))
            sums = rest[1:]
