"""The backward kernels. Weights come from the log-sum-exp over all parts, so the parts add up without a merge.

`chain_backward` owns one tile of the chain, as queries and as keys: the tile on the diagonal serves dq, dk and dv at
once, its other tiles are visited once for dk, dv and once for dq. No atomics: every element has one writer, in order.
"""

import triton
import triton.language as tl

from sparse_tx.attention.kernels.tiles import (
    LOG2E,
    chain_bounds,
    chain_until,
    column_of,
    compact_keys,
    compact_position,
    keys_before,
    load_block,
    load_rows,
    program,
    store_rows,
)


@triton.jit
def attention_delta(
    O, DO, DLSE, DELTA, sob, sos, soh, sgb, sgs, sgh, S, H, h0, heads,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * dout) - dlse of each query: what every part's softmax subtracts."""
    tile, b, h = program(tl.cdiv(S, BM), heads, False)
    head = h0 + h
    rows = tile * BM + tl.arange(0, BM)
    valid = rows < S
    o = load_rows(O + b.to(tl.int64) * sob + head.to(tl.int64) * soh, rows, sos, valid, DV, BDV)
    g = load_rows(DO + b.to(tl.int64) * sgb + head.to(tl.int64) * sgh, rows, sgs, valid, DV, BDV)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    at = (b.to(tl.int64) * H + head) * S + rows
    if HAS_DLSE:
        delta -= tl.load(DLSE + at, mask=valid, other=0.0)
    tl.store(DELTA + at, delta, mask=valid)


@triton.jit
def _row_numbers(
    LSE, DELTA, DLSE, O, g, rows, step, valid, sos, DV: tl.constexpr, BDV: tl.constexpr,
    DELTA_HERE: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta of some queries; g is their dout."""
    lse = tl.load(LSE + rows * step, mask=valid, other=0.0) * LOG2E
    if DELTA_HERE:
        o = load_rows(O, rows, sos, valid, DV, BDV)
        delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        if HAS_DLSE:
            delta -= tl.load(DLSE + rows * step, mask=valid, other=0.0)
    else:
        delta = tl.load(DELTA + rows * step, mask=valid, other=0.0)
    return lse, delta


@triton.jit
def _for_keys(k, v, q, g, lse, delta, seen, scale, MASKED: tl.constexpr):
    """Weights and score gradients, transposed: (keys, queries), in the inputs' dtype."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.exp2(s * scale - lse[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(v, tl.trans(g), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    return p.to(q.dtype), ds.to(q.dtype)


@triton.jit
def _for_queries(q, g, k, v, lse, delta, seen, scale, MASKED: tl.constexpr):
    """Score gradients (queries, keys)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(g, tl.trans(v), input_precision="ieee")
    return (p * (dp - delta[:, None])).to(q.dtype)


@triton.jit
def _compact_dq(
    dq, q, g, lse, delta, K, V, b, head, sks, svs, first_lim, last_lim, lim, skip, L, C, first, scale,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    COPIED: tl.constexpr,
):  # fmt: skip
    keys = tl.arange(0, BN)
    whole = skip + tl.maximum(first_lim - skip, 0) // BN * BN
    for start in tl.range(skip, whole, BN, num_stages=STAGES):
        k, v = compact_keys(K, V, b, head, start, sks, svs, last_lim, L, C, first, DQ, DV, BDQ, BDV, BN, COPIED)
        ds = _for_queries(q, g, k, v, lse, delta, None, scale, MASKED=False)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    for start in tl.range(whole, last_lim, BN, num_stages=1):
        k, v = compact_keys(K, V, b, head, start, sks, svs, last_lim, L, C, first, DQ, DV, BDQ, BDV, BN, COPIED)
        seen = (start + keys)[None, :] < lim[:, None]
        ds = _for_queries(q, g, k, v, lse, delta, seen, scale, MASKED=True)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    return dq


@triton.jit
def _chain_dq(
    dq, q, g, lse, delta, K, V, b, head, r, sks, svs, start, end, F, lo, hi, scale,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, FAR: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """Keys [start, end) of the chain, all before the tile. `start` may be negative."""
    for at0 in tl.range(start, end, BN, num_stages=STAGES):
        at = at0 + tl.arange(0, BN)
        there = (at >= 0) & (at < F)
        k = load_block(K, b, head, r, at0, at, sks, there, DQ, BDQ, BN, COPIED)
        v = load_block(V, b, head, r, at0, at, svs, there, DV, BDV, BN, COPIED)
        seen = at[None, :] >= lo[:, None]
        if FAR:
            seen = seen & (at[None, :] <= hi[:, None])
        ds = _for_queries(q, g, k, v, lse, delta, seen, scale, MASKED or FAR)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    return dq


@triton.jit
def _queries(
    Q, O, G, LSE, DELTA, DLSE, LSES, DELTAS, b, head, r, start, i, there, sqs, sos, sgs, step,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    DELTA_HERE: tl.constexpr, HAS_DLSE: tl.constexpr, STRIDED: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """q, dout, lse in base 2 and delta of the BN queries i from `start` on; zeros where there are none."""
    q = load_block(Q, b, head, r, start, i, sqs, there, DQ, BDQ, BN, COPIED)
    g = load_block(G, b, head, r, start, i, sgs, there, DV, BDV, BN, COPIED)
    if COPIED and not STRIDED and not DELTA_HERE:
        lse = LSES.load([b, head, start]).reshape(BN) * LOG2E
        delta = DELTAS.load([b, head, start]).reshape(BN)
    else:
        lse, delta = _row_numbers(LSE, DELTA, DLSE, O, g, i, step, there, sos, DV, BDV, DELTA_HERE, HAS_DLSE)
    return q, g, lse, delta


@triton.jit
def _chain_keys(
    dk, dv, k, v, Q, O, G, LSE, DELTA, DLSE, LSES, DELTAS, b, head, r, sqs, sos, sgs, step, start, end, F, f, until,
    near, scale,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    DELTA_HERE: tl.constexpr, HAS_DLSE: tl.constexpr, MASKED: tl.constexpr, FAR: tl.constexpr,
    STRIDED: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """dk, dv of the tile's keys f from the queries [start, end), all after the tile."""
    for start_i in tl.range(start, end, BN, num_stages=STAGES):
        i = start_i + tl.arange(0, BN)
        q, g, lse, delta = _queries(
            Q, O, G, LSE, DELTA, DLSE, LSES, DELTAS, b, head, r, start_i, i, i < F, sqs, sos, sgs, step,
            DQ, DV, BDQ, BDV, BN, DELTA_HERE, HAS_DLSE, STRIDED, COPIED,
        )  # fmt: skip
        seen = i[None, :] <= until[:, None]
        if FAR:
            seen = seen & (i[None, :] - near >= f[:, None])
        p, ds = _for_keys(k, v, q, g, lse, delta, seen, scale, MASKED or FAR)
        dv = tl.dot(p, g, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def chain_backward(
    Q, K, V, G, QS, KS, VS, GS, KC, VC, O, LSE, DLSE, DELTA, LSES, DELTAS, DQ_, DK_, DV_,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sob, sos, soh, sgb, sgs, sgh,
    dqb, dqs, dqh, dkb, dks, dkh, dvb, dvs, dvh,
    S, H, h0, heads, tiles, per, scale, softmax_scale,
    A, N, R, near, L, tokens, skip_lo, skip_hi, slot, slot_step,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    CHAIN: tl.constexpr, STRIDED: tl.constexpr, GROUPED: tl.constexpr, SINGLE: tl.constexpr,
    sumL: tl.constexpr, sumC: tl.constexpr,
    GLOBAL: tl.constexpr, ADD: tl.constexpr, DELTA_HERE: tl.constexpr, STORE_DELTA: tl.constexpr,
    HAS_DLSE: tl.constexpr, FAR: tl.constexpr, REACHES: tl.constexpr, HEAVY_LAST: tl.constexpr,
    COPIED: tl.constexpr, SUM_COPIED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq over all parts but the column (or over the column alone, if STRIDED); dk, dv of the chain.

    ADD: the gradients hold those of another part, which are added. DELTA_HERE: take delta from O and G, not DELTA.
    FAR: near > 1, so that keys of earlier tiles can be too near. REACHES: a query sees back to the start of its tile.
    QS, KS, VS, GS, LSES, DELTAS: of the chain's steps, KC, VC of the compact parts'. COPIED: those of the steps are
    descriptors, and Q, K, V, G too if BT = BN; SUM_COPIED: KC, VC are.
    """
    tile, b, h = program(tiles, heads, HEAVY_LAST)
    head = h0 + h
    batch = b.to(tl.int64)
    head64 = head.to(tl.int64)
    OWN_COPIED: tl.constexpr = COPIED and BT == BN
    if not OWN_COPIED:
        Q += batch * sqb + head64 * sqh
        K += batch * skb + head64 * skh
        V += batch * svb + head64 * svh
        G += batch * sgb + head64 * sgh
    if not SUM_COPIED:
        KC += batch * skb + head64 * skh
        VC += batch * svb + head64 * svh
    O += batch * sob + head64 * soh
    DQ_ += batch * dqb + head64 * dqh
    DK_ += batch * dkb + head64 * dkh
    DV_ += batch * dvb + head64 * dvh
    numbers = (batch * H + head) * S
    LSE += numbers
    DELTA += numbers
    DLSE += numbers
    F = S
    least = 0
    step = 1
    r = 0
    if STRIDED:
        r, tile, F, least = column_of(tile, per, S, L, tokens, skip_lo, skip_hi)
        r64 = r.to(tl.int64)
        step = r64 * 0 + L  # in 64 bits, also where Triton takes L or a stride for a constant
        if not OWN_COPIED:
            Q += r64 * sqs
            K += r64 * sks
            V += r64 * svs
            G += r64 * sgs
            sqs, sks, svs, sgs = step * sqs, step * sks, step * svs, step * sgs
        O += r64 * sos
        DQ_ += r64 * dqs
        DK_ += r64 * dks
        DV_ += r64 * dvs
        sos, dqs, dks, dvs = step * sos, step * dqs, step * dks, step * dvs
        LSE += r
        DELTA += r
        DLSE += r
    if not COPIED:
        QS, KS, VS, GS = Q, K, V, G

    f0 = tile * A
    f = f0 + tl.arange(0, BT)
    valid = f < tl.minimum(f0 + A, F)
    q = load_block(Q, b, head, r, f0, f, sqs, valid, DQ, BDQ, BT, OWN_COPIED)
    g = load_block(G, b, head, r, f0, f, sgs, valid, DV, BDV, BT, OWN_COPIED)
    lse, delta = _row_numbers(LSE, DELTA, DLSE, O, g, f, step, valid, sos, DV, BDV, DELTA_HERE, HAS_DLSE)
    if STORE_DELTA:
        tl.store(DELTA + f * step, delta, mask=valid)
    dq = tl.zeros([BT, BDQ], tl.float32)

    # dq is complete and stored before dk and dv begin: together they would not fit the registers.
    if CHAIN:
        lo, hi = chain_bounds(f, valid, N, R, near, least, GROUPED)
        upper_first = tl.maximum(f0 - R, least)
        last = tl.minimum(f0 + A, F) - 1
        upper_last = tl.maximum(last - R, least)
        if GROUPED:
            upper_first = tl.maximum(upper_first, f0 - f0 % N)
            upper_last = tl.maximum(upper_last, last - last % N)
        if not SINGLE:
            # Whole steps that end at the tile: then `lo` alone bounds them, unless `near` is more than one step.
            all_see = f0 - tl.maximum(f0 - upper_last, 0) // BN * BN
            start = all_see - tl.cdiv(tl.maximum(all_see - upper_first, 0), BN) * BN
            dq = _chain_dq(
                dq, q, g, lse, delta, KS, VS, b, head, r, sks, svs, start, all_see, F, lo, hi, scale,
                DQ, DV, BDQ, BDV, BN, STAGES, MASKED=True, FAR=FAR, COPIED=COPIED,
            )  # fmt: skip
            dq = _chain_dq(
                dq, q, g, lse, delta, KS, VS, b, head, r, sks, svs, all_see, f0, F, lo, hi, scale,
                DQ, DV, BDQ, BDV, BN, STAGES, MASKED=False, FAR=FAR, COPIED=COPIED,
            )  # fmt: skip
        upper = lo
    else:
        upper = f + 1
        upper_first = f0 + 1
        upper_last = tl.minimum(f0 + A, S)
    if GLOBAL:
        count = tl.minimum(tokens, S)
        dq = _compact_dq(
            dq, q, g, lse, delta, KC, VC, b, head, sks, svs, tl.minimum(upper_first, count),
            tl.minimum(upper_last, count), tl.minimum(upper, count), 0, S, count, 0, scale,
            DQ, DV, BDQ, BDV, BN, STAGES, COPIED=False,
        )  # fmt: skip
    if sumL > 0:
        first = sumL - ((slot + h * slot_step) % (sumL // sumC) + 1) * sumC
        dq = _compact_dq(
            dq, q, g, lse, delta, KC, VC, b, head, sks, svs, keys_before(upper_first, sumL, sumC, first),
            keys_before(upper_last, sumL, sumC, first), keys_before(upper, sumL, sumC, first),
            keys_before(tokens, sumL, sumC, first), sumL, sumC, first, scale, DQ, DV, BDQ, BDV, BN, STAGES,
            SUM_COPIED,
        )  # fmt: skip
    dk = tl.zeros([BT, BDQ], tl.float32)
    dv = tl.zeros([BT, BDV], tl.float32)
    if CHAIN:
        k = load_block(K, b, head, r, f0, f, sks, valid, DQ, BDQ, BT, OWN_COPIED)
        v = load_block(V, b, head, r, f0, f, svs, valid, DV, BDV, BT, OWN_COPIED)
        sees = f[:, None] <= hi[None, :]
        if not REACHES:
            sees = sees & (f[:, None] >= lo[None, :])
        p, ds = _for_keys(k, v, q, g, lse, delta, sees, scale, MASKED=True)
        dq = tl.dot(tl.trans(ds), k, dq, input_precision="ieee")
        store_rows(DQ_, f, dqs, valid, dq * softmax_scale, DQ, BDQ, ADD)
        dv = tl.dot(p, g, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if not SINGLE:
            # Queries that see all of the tile's keys, then those that see some.
            until = chain_until(f, N, R, least, GROUPED)
            until_first = f0 + R
            end = tl.minimum(f0 + BT + R, F)
            if GROUPED:
                until_first = tl.minimum(until_first, f0 - f0 % N + N - 1)
                end = tl.minimum(end, (f0 + BT - 1) // N * N + N)
            begin = f0 + BT
            if STRIDED:
                until_first = tl.where(f0 < least, -1, until_first)
            some_see = begin + tl.maximum(tl.minimum(until_first + 1, end) - begin, 0) // BN * BN
            dk, dv = _chain_keys(
                dk, dv, k, v, QS, O, GS, LSE, DELTA, DLSE, LSES, DELTAS, b, head, r, sqs, sos, sgs, step,
                begin, some_see, F, f, until, near, scale,
                DQ, DV, BDQ, BDV, BN, STAGES, DELTA_HERE, HAS_DLSE, MASKED=False, FAR=FAR,
                STRIDED=STRIDED, COPIED=COPIED,
            )  # fmt: skip
            dk, dv = _chain_keys(
                dk, dv, k, v, QS, O, GS, LSE, DELTA, DLSE, LSES, DELTAS, b, head, r, sqs, sos, sgs, step,
                some_see, end, F, f, until, near, scale,
                DQ, DV, BDQ, BDV, BN, STAGES, DELTA_HERE, HAS_DLSE, MASKED=True, FAR=FAR,
                STRIDED=STRIDED, COPIED=COPIED,
            )  # fmt: skip
    else:
        store_rows(DQ_, f, dqs, valid, dq * softmax_scale, DQ, BDQ, ADD)
    store_rows(DK_, f, dks, valid, dk * softmax_scale, DQ, BDQ, ADD)
    store_rows(DV_, f, dvs, valid, dv, DV, BDV, ADD)


@triton.jit
def compact_backward(
    Q, K, V, LSE, G, DELTA, LSES, DELTAS, DK_, DV_,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sgb, sgs, sgh, dkb, dks, dkh, dvb, dvs, dvh,
    S, H, h0, heads, tiles, scale, softmax_scale,
    N, R, tokens, slot, slot_step,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHAIN: tl.constexpr, GROUPED: tl.constexpr, sumL: tl.constexpr, sumC: tl.constexpr,
    COPIED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk, dv of BN keys of a compact part, added to what is there: of the summary, or of the global tokens if sumL = 0.

    CHAIN: the keys from the chain's lo on are local. COPIED: Q, G, LSES, DELTAS are descriptors.
    """
    tile, b, h = program(tiles, heads, False)
    head = h0 + h
    batch = b.to(tl.int64)
    head64 = head.to(tl.int64)
    K += batch * skb + head64 * skh
    V += batch * svb + head64 * svh
    if not COPIED:
        Q += batch * sqb + head64 * sqh
        G += batch * sgb + head64 * sgh
    DK_ += batch * dkb + head64 * dkh
    DV_ += batch * dvb + head64 * dvh
    numbers = (batch * H + head) * S
    LSE += numbers
    DELTA += numbers

    if sumL > 0:
        L: tl.constexpr = sumL
        C: tl.constexpr = sumC
        first = L - ((slot + h * slot_step) % (L // C) + 1) * C
        skip = keys_before(tokens, L, C, first)
    else:
        L = S
        C = tl.minimum(tokens, S)
        first = 0
        skip = 0
    at0 = skip + tile * BN
    at = at0 + tl.arange(0, BN)
    p = compact_position(at, L, C, first)
    count = keys_before(S, L, C, first)
    valid = at < count
    k = load_rows(K, p, sks, valid, DQ, BDQ)
    v = load_rows(V, p, svs, valid, DV, BDV)
    dk = tl.zeros([BN, BDQ], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)

    # The first query that may see the first key, and the first from which on all see the last key.
    near_key = compact_position(at0, L, C, first)
    far_key = compact_position(tl.minimum(at0 + BN, count) - 1, L, C, first)
    if CHAIN:
        begin = near_key + R + 1
        whole = far_key + R + 1
        if GROUPED:
            begin = tl.minimum(begin, near_key // N * N + N)
            whole = tl.minimum(whole, far_key // N * N + N)
    else:
        begin = near_key
        whole = far_key
    # Whole steps from 0 on: the copy engine takes (B, H, S) from multiples of 16 bytes on alone.
    begin = tl.where(at0 < count, begin // BM * BM, S)
    whole = tl.minimum(begin + tl.cdiv(tl.maximum(whole - begin, 0), BM) * BM, S)
    for start in tl.range(begin, whole, BM, num_stages=1):
        i = start + tl.arange(0, BM)
        seen = i < S
        q, g, lse, delta = _queries(
            Q, Q, G, LSE, DELTA, DELTA, LSES, DELTAS, b, head, 0, start, i, seen, sqs, 0, sgs, 1,
            DQ, DV, BDQ, BDV, BM, False, False, False, COPIED,
        )  # fmt: skip
        if CHAIN:
            upper = tl.maximum(i - R, 0)
            if GROUPED:
                upper = tl.maximum(upper, i - i % N)
        else:
            upper = i + 1
        hi = tl.where(seen, keys_before(upper, L, C, first) - 1, -1)
        pt, ds = _for_keys(k, v, q, g, lse, delta, at[:, None] <= hi[None, :], scale, MASKED=True)
        dv = tl.dot(pt, g, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    for start in tl.range(whole, S, BM, num_stages=STAGES):
        i = start + tl.arange(0, BM)
        seen = i < S
        q, g, lse, delta = _queries(
            Q, Q, G, LSE, DELTA, DELTA, LSES, DELTAS, b, head, 0, start, i, seen, sqs, 0, sgs, 1,
            DQ, DV, BDQ, BDV, BM, False, False, False, COPIED,
        )  # fmt: skip
        pt, ds = _for_keys(k, v, q, g, lse, delta, None, scale, MASKED=False)
        dv = tl.dot(pt, g, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    store_rows(DK_, p, dks, valid, dk * softmax_scale, DQ, BDQ, ADD=True)
    store_rows(DV_, p, dvs, valid, dv, DV, BDV, ADD=True)
