"""A window of few tiles: one program walks along the sequence and visits each pair of tiles once.

A window of R keys reaches back BACK = ceil(R / BT) tiles. The masks are known when the kernel is compiled, and while
one tile is worked on the copy engine brings the next. The backward pass keeps the dq of the last BACK tiles in
registers: five products a pair of tiles, where two passes, one for dq and one for dk and dv, need seven and every
exponential twice. Tensors come as descriptors, (B, H, S, D) in blocks of (1, 1, BT, D): rows beyond the sequence read
as zeros, and nothing is stored there.
"""

import triton
import triton.language as tl

from sparse_tx.attention.kernels.tiles import LN2, LOG2E, pair_is_masked, pair_seen, program


@triton.jit
def _forward_tile(
    t, b, head, Q, K, V, O, LSE, S, scale,
    R: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr, MERGE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """FIRST: the window may reach back before the sequence begins."""
    local = tl.arange(0, BT)
    row = t * BT
    valid = local < S - row
    q = Q.load([b, head, row, 0]).reshape(BT, BDQ)
    if MERGE:
        top = tl.load(LSE + row + local, mask=valid, other=float("-inf")) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = O.load([b, head, row, 0]).reshape(BT, BDV).to(tl.float32)
    else:
        top = tl.full([BT], float("-inf"), tl.float32)
        total = tl.zeros([BT], tl.float32)
        acc = tl.zeros([BT, BDV], tl.float32)
    # A query sees itself, in the first tile visited: from there on the maximum is finite.
    for far in tl.static_range((R + BT - 1) // BT + 1):
        k = K.load([b, head, row - far * BT, 0]).reshape(BT, BDQ)
        v = V.load([b, head, row - far * BT, 0]).reshape(BT, BDV)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if pair_is_masked(far, BT, 0, R):
            s = tl.where(pair_seen(local[:, None], local[None, :], far, BT, 0, R), s, float("-inf"))
        if FIRST and far > 0:
            s = tl.where((local >= far * BT - row)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new[:, None])
        alpha = tl.exp2(top - new)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        top = new
    tl.store(LSE + row + local, (top + tl.log2(total)) * LN2, mask=valid)
    O.store([b, head, row, 0], (acc / total[:, None]).to(O.dtype).reshape(1, 1, BT, BDV))


@triton.jit
def window_forward(
    Q, K, V, O, LSE, S, H, h0, heads, chunks, length, scale,
    R: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr,
    MERGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Query i sees i - R .. i. A program walks over `length` tiles.

    MERGE: O and LSE hold the result over other keys, with which the softmax begins. scale is in base 2.
    """
    chunk, b, h = program(chunks, heads, False)
    head = h0 + h
    LSE += (b.to(tl.int64) * H + head) * S
    begin = chunk * length
    end = tl.minimum(begin + length, tl.cdiv(S, BT))
    BACK: tl.constexpr = (R + BT - 1) // BT
    for t in tl.range(begin, tl.minimum(end, BACK), num_stages=1):
        _forward_tile(t, b, head, Q, K, V, O, LSE, S, scale, R, BDQ, BDV, BT, MERGE, FIRST=True)
    for t in tl.range(tl.maximum(begin, BACK), end, num_stages=STAGES):
        _forward_tile(t, b, head, Q, K, V, O, LSE, S, scale, R, BDQ, BDV, BT, MERGE, FIRST=False)


@triton.jit
def _delta(O, G, DLSE, b, head, row, BDV: tl.constexpr, BT: tl.constexpr, HAS_DLSE: tl.constexpr):
    """sum(out * dout) - dlse of each query: what every part's softmax subtracts."""
    o = O.load([b, head, row, 0]).reshape(BT, BDV)
    g = G.load([b, head, row, 0]).reshape(BT, BDV)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= DLSE.load([b, head, row]).reshape(BT)
    return delta


@triton.jit
def window_backward(
    Q, K, V, O, LSE, G, DLSE, DELTA, DQ, DK, DV, S, H, h0, heads, chunks, length, scale, softmax_scale,
    R: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr,
    ADD: tl.constexpr, DELTA_HERE: tl.constexpr, HAS_DLSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of `length` tiles. The walk begins BACK tiles earlier, for the dq that it owns alone.

    ADD: the gradients hold those of another part, which are added. DELTA_HERE: take delta from O and G, not DELTA.
    LSE, DLSE, DELTA: descriptors of (B, H, S).
    """
    chunk, b, h = program(chunks, heads, False)
    head = h0 + h
    BACK: tl.constexpr = (R + BT - 1) // BT
    local = tl.arange(0, BT)
    own = chunk * length
    begin = tl.maximum(own - BACK, 0)
    end = tl.minimum(own + length, tl.cdiv(S, BT))
    dq_ring = ()  # of the tiles t, t + 1, ... t + BACK - 1
    delta_ring = ()
    for far in tl.static_range(BACK):
        dq_ring += (tl.zeros([BT, BDQ], tl.float32),)
        if DELTA_HERE:
            delta_ring += (_delta(O, G, DLSE, b, head, (begin + far) * BT, BDV, BT, HAS_DLSE),)
    for t in tl.range(begin, end, num_stages=STAGES):
        row = t * BT
        k = K.load([b, head, row, 0]).reshape(BT, BDQ)
        v = V.load([b, head, row, 0]).reshape(BT, BDV)
        dk = tl.zeros([BT, BDQ], tl.float32)
        dv = tl.zeros([BT, BDV], tl.float32)
        dq_ring += (tl.zeros([BT, BDQ], tl.float32),)
        summed = ()
        later = ()
        # Queries beyond the end load zeros, which add nothing.
        for far in tl.static_range(BACK + 1):
            i = row + far * BT
            q = Q.load([b, head, i, 0]).reshape(BT, BDQ)
            g = G.load([b, head, i, 0]).reshape(BT, BDV)
            lse = LSE.load([b, head, i]).reshape(BT) * LOG2E
            if not DELTA_HERE:
                delta = DELTA.load([b, head, i]).reshape(BT)
            elif far < BACK:
                delta = delta_ring[far]
            else:
                delta = _delta(O, G, DLSE, b, head, i, BDV, BT, HAS_DLSE)
            # Transposed, (keys, queries): the weights then are an operand of dk and dv as they lie.
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            p = tl.exp2(s * scale - lse[None, :])
            if pair_is_masked(far, BT, 0, R):
                p = tl.where(pair_seen(local[None, :], local[:, None], far, BT, 0, R), p, 0.0)
            dp = tl.dot(v, tl.trans(g), input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dv = tl.dot(p.to(q.dtype), g, dv, input_precision="ieee")
            dk = tl.dot(ds, q, dk, input_precision="ieee")
            summed += (tl.dot(tl.trans(ds), k, dq_ring[far], input_precision="ieee"),)
            if DELTA_HERE and far > 0:
                later += (delta + 0.0,)  # a value that goes on as it is would keep Triton from pipelining the loop
        dq = summed[0] * softmax_scale
        dk *= softmax_scale
        to = tl.where(t >= own, row, S)  # a tile of another program is stored beyond the end: nowhere
        if ADD:
            dq += DQ.load([b, head, row, 0]).reshape(BT, BDQ).to(tl.float32)
            dk += DK.load([b, head, row, 0]).reshape(BT, BDQ).to(tl.float32)
            dv += DV.load([b, head, row, 0]).reshape(BT, BDV).to(tl.float32)
        DQ.store([b, head, to, 0], dq.to(DQ.dtype).reshape(1, 1, BT, BDQ))
        DK.store([b, head, to, 0], dk.to(DK.dtype).reshape(1, 1, BT, BDQ))
        DV.store([b, head, to, 0], dv.to(DV.dtype).reshape(1, 1, BT, BDV))
        dq_ring = summed[1:]
        delta_ring = later
