"""The backward kernels. Weights come from the log-sum-exp over all parts, so the parts add up without a merge.

`chain_backward` owns one tile of the chain, as queries and as keys: the tile on the diagonal serves dq, dk and dv at
once, its other tiles are visited once for dk, dv and once for dq. No atomics: every element has one writer, in order.
"""

import triton
import triton.language as tl

from sparse_tx.attention.kernels.tiles import (
    chain_bounds,
    chain_until,
    compact_position,
    keys_before,
    load_rows,
    position,
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
    LSE, DELTA, DLSE, O, g, rows, valid, sos, DV: tl.constexpr, BDV: tl.constexpr,
    DELTA_HERE: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta of some queries; g is their dout."""
    lse = tl.load(LSE + rows, mask=valid, other=0.0) * 1.4426950408889634
    if DELTA_HERE:
        o = load_rows(O, rows, sos, valid, DV, BDV)
        delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        if HAS_DLSE:
            delta -= tl.load(DLSE + rows, mask=valid, other=0.0)
    else:
        delta = tl.load(DELTA + rows, mask=valid, other=0.0)
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
    dq, q, g, lse, delta, K, V, sks, svs, first_lim, last_lim, lim, skip, L, C, first, scale,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    keys = tl.arange(0, BN)
    whole = skip + tl.maximum(first_lim - skip, 0) // BN * BN
    for start in tl.range(skip, whole, BN, num_stages=STAGES):
        at = start + keys
        p = compact_position(at, L, C, first)
        k = load_rows(K, p, sks, at < last_lim, DQ, BDQ)
        v = load_rows(V, p, svs, at < last_lim, DV, BDV)
        ds = _for_queries(q, g, k, v, lse, delta, None, scale, MASKED=False)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    for start in tl.range(whole, last_lim, BN, num_stages=1):
        at = start + keys
        p = compact_position(at, L, C, first)
        k = load_rows(K, p, sks, at < last_lim, DQ, BDQ)
        v = load_rows(V, p, svs, at < last_lim, DV, BDV)
        ds = _for_queries(q, g, k, v, lse, delta, at[None, :] < lim[:, None], scale, MASKED=True)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    return dq


@triton.jit
def chain_backward(
    Q, K, V, O, LSE, G, DLSE, DELTA, DQ_, DK_, DV_,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sob, sos, soh, sgb, sgs, sgh,
    dqb, dqs, dqh, dkb, dks, dkh, dvb, dvs, dvh,
    S, H, h0, heads, tiles, scale, softmax_scale,
    F, A, N, R, near, L, tokens, skip_lo, skip_hi,
    sumL, sumC, slot, slot_step,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    CHAIN: tl.constexpr, STRIDED: tl.constexpr, GROUPED: tl.constexpr, SINGLE: tl.constexpr, SUMMARY: tl.constexpr,
    GLOBAL: tl.constexpr, ADD: tl.constexpr, DELTA_HERE: tl.constexpr, STORE_DELTA: tl.constexpr,
    HAS_DLSE: tl.constexpr, FAR: tl.constexpr, REACHES: tl.constexpr, HEAVY_LAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq over all parts but the column (or over the column alone, if STRIDED); dk, dv of the chain.

    ADD: the gradients hold those of another part, which are added. DELTA_HERE: take delta from O and G, not DELTA.
    FAR: near > 1, so that keys of earlier tiles can be too near. REACHES: a query sees back to the start of its tile.
    """
    tile, b, h = program(tiles, heads, HEAVY_LAST)
    head = h0 + h
    batch = b.to(tl.int64)
    head64 = head.to(tl.int64)
    Q += batch * sqb + head64 * sqh
    K += batch * skb + head64 * skh
    V += batch * svb + head64 * svh
    O += batch * sob + head64 * soh
    G += batch * sgb + head64 * sgh
    DQ_ += batch * dqb + head64 * dqh
    DK_ += batch * dkb + head64 * dkh
    DV_ += batch * dvb + head64 * dvh
    numbers = (batch * H + head) * S
    LSE += numbers
    DELTA += numbers
    DLSE += numbers

    f0 = tile * A
    f = f0 + tl.arange(0, BT)
    rows = position(f, N, L, STRIDED)
    valid = (f < tl.minimum(f0 + A, F)) & (rows < S)
    q = load_rows(Q, rows, sqs, valid, DQ, BDQ)
    g = load_rows(G, rows, sgs, valid, DV, BDV)
    lse, delta = _row_numbers(LSE, DELTA, DLSE, O, g, rows, valid, sos, DV, BDV, DELTA_HERE, HAS_DLSE)
    if STORE_DELTA:
        tl.store(DELTA + rows, delta, mask=valid)
    dq = tl.zeros([BT, BDQ], tl.float32)

    # dq is complete and stored before dk and dv begin: together they would not fit the registers.
    if CHAIN:
        lo, hi = chain_bounds(f, valid, S, N, R, near, L, tokens, skip_lo, skip_hi, STRIDED, GROUPED)
        if not SINGLE:
            begin = tl.maximum(f0 - R, 0)
            if GROUPED:
                begin = tl.maximum(begin, f0 - f0 % N)
            # Whole steps that end at the tile: then `lo` alone bounds them, unless `near` is more than one step.
            for start in tl.range(f0 - tl.cdiv(f0 - begin, BN) * BN, f0, BN, num_stages=STAGES):
                at = start + tl.arange(0, BN)
                pj = position(at, N, L, STRIDED)
                there = (at >= 0) & (pj < S)
                kj = load_rows(K, pj, sks, there, DQ, BDQ)
                vj = load_rows(V, pj, svs, there, DV, BDV)
                seen = at[None, :] >= lo[:, None]
                if FAR:
                    seen = seen & (at[None, :] <= hi[:, None])
                ds_j = _for_queries(q, g, kj, vj, lse, delta, seen, scale, MASKED=True)
                dq = tl.dot(ds_j, kj, dq, input_precision="ieee")
        upper = lo
        upper_first = tl.maximum(f0 - R, 0)
        last = tl.minimum(f0 + A, S) - 1
        upper_last = tl.maximum(last - R, 0)
        if GROUPED:
            upper_first = tl.maximum(upper_first, f0 - f0 % N)
            upper_last = tl.maximum(upper_last, last - last % N)
    else:
        upper = f + 1
        upper_first = f0 + 1
        upper_last = tl.minimum(f0 + A, S)
    if GLOBAL:
        count = tl.minimum(tokens, S)
        dq = _compact_dq(
            dq, q, g, lse, delta, K, V, sks, svs, tl.minimum(upper_first, count), tl.minimum(upper_last, count),
            tl.minimum(upper, count), 0, S, count, 0, scale, DQ, DV, BDQ, BDV, BN, STAGES,
        )  # fmt: skip
    if SUMMARY:
        first = sumL - ((slot + h * slot_step) % (sumL // sumC) + 1) * sumC
        dq = _compact_dq(
            dq, q, g, lse, delta, K, V, sks, svs, keys_before(upper_first, sumL, sumC, first),
            keys_before(upper_last, sumL, sumC, first), keys_before(upper, sumL, sumC, first),
            keys_before(tokens, sumL, sumC, first), sumL, sumC, first, scale, DQ, DV, BDQ, BDV, BN, STAGES,
        )  # fmt: skip
    dk = tl.zeros([BT, BDQ], tl.float32)
    dv = tl.zeros([BT, BDV], tl.float32)
    if CHAIN:
        k = load_rows(K, rows, sks, valid, DQ, BDQ)
        v = load_rows(V, rows, svs, valid, DV, BDV)
        sees = f[:, None] <= hi[None, :]
        if not REACHES:
            sees = sees & (f[:, None] >= lo[None, :])
        p, ds = _for_keys(k, v, q, g, lse, delta, sees, scale, MASKED=True)
        dq = tl.dot(tl.trans(ds), k, dq, input_precision="ieee")
        store_rows(DQ_, rows, dqs, valid, dq * softmax_scale, DQ, BDQ, ADD)
        dv = tl.dot(p, g, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if not SINGLE:
            end = tl.minimum(f0 + BT + R, F)
            if GROUPED:
                end = tl.minimum(end, (f0 + BT - 1) // N * N + N)
            until = chain_until(f, S, N, R, L, tokens, skip_lo, skip_hi, STRIDED, GROUPED)
            for start in tl.range(f0 + BT, end, BN, num_stages=STAGES):
                fi = start + tl.arange(0, BN)
                ri = position(fi, N, L, STRIDED)
                # Queries that are not there load zeros, which add nothing.
                there = (fi < F) & (ri < S)
                qi = load_rows(Q, ri, sqs, there, DQ, BDQ)
                gi = load_rows(G, ri, sgs, there, DV, BDV)
                lse_i, delta_i = _row_numbers(LSE, DELTA, DLSE, O, gi, ri, there, sos, DV, BDV, DELTA_HERE, HAS_DLSE)
                seen_by = fi[None, :] <= until[:, None]
                if FAR:
                    seen_by = seen_by & (fi[None, :] - near >= f[:, None])
                p_i, ds_i = _for_keys(k, v, qi, gi, lse_i, delta_i, seen_by, scale, MASKED=True)
                dv = tl.dot(p_i, gi, dv, input_precision="ieee")
                dk = tl.dot(ds_i, qi, dk, input_precision="ieee")
    else:
        store_rows(DQ_, rows, dqs, valid, dq * softmax_scale, DQ, BDQ, ADD)
    store_rows(DK_, rows, dks, valid, dk * softmax_scale, DQ, BDQ, ADD)
    store_rows(DV_, rows, dvs, valid, dv, DV, BDV, ADD)


@triton.jit
def compact_backward(
    Q, K, V, LSE, G, DELTA, DK_, DV_,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sgb, sgs, sgh, dkb, dks, dkh, dvb, dvs, dvh,
    S, H, h0, heads, tiles, scale, softmax_scale,
    N, R, tokens, L, C, slot, slot_step,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHAIN: tl.constexpr, GROUPED: tl.constexpr, IS_GLOBAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk, dv of BN keys of a compact part, added to what is there. CHAIN: the keys from the chain's lo on are local."""
    tile, b, h = program(tiles, heads, False)
    head = h0 + h
    batch = b.to(tl.int64)
    head64 = head.to(tl.int64)
    Q += batch * sqb + head64 * sqh
    K += batch * skb + head64 * skh
    V += batch * svb + head64 * svh
    G += batch * sgb + head64 * sgh
    DK_ += batch * dkb + head64 * dkh
    DV_ += batch * dvb + head64 * dvh
    numbers = (batch * H + head) * S
    LSE += numbers
    DELTA += numbers

    if IS_GLOBAL:
        first = 0
        skip = 0
    else:
        first = L - ((slot + h * slot_step) % (L // C) + 1) * C
        skip = keys_before(tokens, L, C, first)
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
    begin = tl.where(at0 < count, begin, S)
    whole = tl.minimum(begin + tl.cdiv(tl.maximum(whole - begin, 0), BM) * BM, S)
    for start in tl.range(begin, whole, BM, num_stages=1):
        i = start + tl.arange(0, BM)
        seen = i < S
        q = load_rows(Q, i, sqs, seen, DQ, BDQ)
        g = load_rows(G, i, sgs, seen, DV, BDV)
        lse = tl.load(LSE + i, mask=seen, other=0.0) * 1.4426950408889634
        delta = tl.load(DELTA + i, mask=seen, other=0.0)
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
        q = load_rows(Q, i, sqs, seen, DQ, BDQ)
        g = load_rows(G, i, sgs, seen, DV, BDV)
        lse = tl.load(LSE + i, mask=seen, other=0.0) * 1.4426950408889634
        delta = tl.load(DELTA + i, mask=seen, other=0.0)
        pt, ds = _for_keys(k, v, q, g, lse, delta, None, scale, MASKED=False)
        dv = tl.dot(pt, g, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    store_rows(DK_, p, dks, valid, dk * softmax_scale, DQ, BDQ, ADD=True)
    store_rows(DV_, p, dvs, valid, dv, DV, BDV, ADD=True)
