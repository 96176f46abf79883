"""The forward kernel: one tile of queries against its chain of keys and its compact keys, one online softmax."""

import triton
import triton.language as tl

from sparse_tx.attention.kernels.tiles import (
    LN2,
    LOG2E,
    chain_bounds,
    column_of,
    compact_keys,
    keys_before,
    load_block,
    load_rows,
    program,
    store_rows,
)


@triton.jit
def _absorb(acc, top, total, q, k, v, at, lo, hi, scale, MASKED: tl.constexpr):
    """One step of the online softmax in base 2. acc, total are relative to exp2(top)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        s = tl.where((at[None, :] >= lo[:, None]) & (at[None, :] <= hi[:, None]), s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * scale)
    # A row that has seen no key yet has top -inf: any finite value keeps inf - inf out.
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s * scale - safe[:, None])
    alpha = tl.exp2(top - safe)
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, new, total


@triton.jit
def _compact(
    acc, top, total, q, K, V, b, head, sks, svs, first_lim, last_lim, lim, skip, L, C, first, scale,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    COPIED: tl.constexpr,
):  # fmt: skip
    """Keys [skip, lim) of a compact part: whole tiles that every row sees without a mask, the rest with."""
    keys = tl.arange(0, BN)
    whole = skip + tl.maximum(first_lim - skip, 0) // BN * BN
    for start in tl.range(skip, whole, BN, num_stages=STAGES):
        k, v = compact_keys(K, V, b, head, start, sks, svs, last_lim, L, C, first, DQ, DV, BDQ, BDV, BN, COPIED)
        acc, top, total = _absorb(acc, top, total, q, k, v, start + keys, lim, lim, scale, MASKED=False)
    for start in tl.range(whole, last_lim, BN, num_stages=1):
        k, v = compact_keys(K, V, b, head, start, sks, svs, last_lim, L, C, first, DQ, DV, BDQ, BDV, BN, COPIED)
        acc, top, total = _absorb(
            acc, top, total, q, k, v, start + keys, lim * 0 + skip, lim - 1, scale, MASKED=True
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _chain(
    acc, top, total, q, K, V, b, head, r, sks, svs, start, end, F, lo, hi, scale,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """Keys [start, end) of the chain."""
    for at0 in tl.range(start, end, BN, num_stages=STAGES):
        at = at0 + tl.arange(0, BN)
        k = load_block(K, b, head, r, at0, at, sks, at < F, DQ, BDQ, BN, COPIED)
        v = load_block(V, b, head, r, at0, at, svs, at < F, DV, BDV, BN, COPIED)
        acc, top, total = _absorb(acc, top, total, q, k, v, at, lo, hi, scale, MASKED)
    return acc, top, total


@triton.jit
def attention_forward(
    Q, K, V, KS, VS, O, LSE,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sob, sos, soh,
    S, H, h0, heads, tiles, per, scale,
    A, N, R, near, L, tokens, skip_lo, skip_hi, slot, slot_step,
    DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHAIN: tl.constexpr, STRIDED: tl.constexpr, GROUPED: tl.constexpr, SINGLE: tl.constexpr,
    sumL: tl.constexpr, sumC: tl.constexpr, GLOBAL: tl.constexpr, MERGE: tl.constexpr, HEAVY_LAST: tl.constexpr,
    COPIED: tl.constexpr, SUM_COPIED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """MERGE: O and LSE hold the result over other keys, with which the softmax begins. SINGLE: no key outside the tile.

    scale is in base 2: softmax scale / ln 2. Tiles begin every A <= BM entries. STRIDED: `per` tiles a column, each of
    which is a sequence with rows L apart. sumL > 0: with the summary of stride sumL and sumC columns. COPIED: Q, K, V
    are descriptors, blocks of which the copy engine brings; SUM_COPIED: KS, VS are, of the summary; else all pointers.
    """
    tile, b, h = program(tiles, heads, HEAVY_LAST)
    head = h0 + h
    O += b.to(tl.int64) * sob + head.to(tl.int64) * soh
    LSE += (b.to(tl.int64) * H + head) * S
    if not COPIED:
        Q += b.to(tl.int64) * sqb + head.to(tl.int64) * sqh
        K += b.to(tl.int64) * skb + head.to(tl.int64) * skh
        V += b.to(tl.int64) * svb + head.to(tl.int64) * svh
    if not SUM_COPIED:
        KS += b.to(tl.int64) * skb + head.to(tl.int64) * skh
        VS += b.to(tl.int64) * svb + head.to(tl.int64) * svh
    F = S
    least = 0
    step = 1
    r = 0
    if STRIDED:
        r, tile, F, least = column_of(tile, per, S, L, tokens, skip_lo, skip_hi)
        step = r.to(tl.int64) * 0 + L  # in 64 bits, also where Triton takes L or a stride for a constant
        if not COPIED:
            Q += r.to(tl.int64) * sqs
            K += r.to(tl.int64) * sks
            V += r.to(tl.int64) * svs
            sqs, sks, svs = step * sqs, step * sks, step * svs
        O += r.to(tl.int64) * sos
        LSE += r
        sos = step * sos

    f0 = tile * A
    f = f0 + tl.arange(0, BM)
    valid = f < tl.minimum(f0 + A, F)
    q = load_block(Q, b, head, r, f0, f, sqs, valid, DQ, BDQ, BM, COPIED)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    if MERGE:
        top = tl.load(LSE + f * step, mask=valid, other=float("-inf")) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc += load_rows(O, f, sos, valid, DV, BDV).to(tl.float32)

    if CHAIN:
        lo, hi = chain_bounds(f, valid, N, R, near, least, GROUPED)
        upper_first = tl.maximum(f0 - R, least)
        last = tl.minimum(f0 + A, F) - 1
        upper_last = tl.maximum(last - R, least)
        if GROUPED:
            upper_first = tl.maximum(upper_first, f0 - f0 % N)
            upper_last = tl.maximum(upper_last, last - last % N)
        if SINGLE:
            k = load_block(K, b, head, r, f0, f, sks, valid, DQ, BDQ, BM, COPIED)
            v = load_block(V, b, head, r, f0, f, svs, valid, DV, BDV, BM, COPIED)
            acc, top, total = _absorb(acc, top, total, q, k, v, f, lo, hi, scale, MASKED=True)
        else:
            # Keys that only some of the tile's queries see, those that all see, and those about the diagonal.
            end = tl.minimum(f0 + A - near, F)
            all_see = upper_first + tl.cdiv(upper_last - upper_first, BN) * BN
            diagonal = tl.maximum(upper_first + tl.maximum(f0 - near + 1 - upper_first, 0) // BN * BN, all_see)
            acc, top, total = _chain(
                acc, top, total, q, K, V, b, head, r, sks, svs, upper_first, tl.minimum(all_see, end), F, lo, hi, scale,
                DQ, DV, BDQ, BDV, BN, STAGES, MASKED=True, COPIED=COPIED,
            )  # fmt: skip
            acc, top, total = _chain(
                acc, top, total, q, K, V, b, head, r, sks, svs, all_see, tl.minimum(diagonal, end), F, lo, hi, scale,
                DQ, DV, BDQ, BDV, BN, STAGES, MASKED=False, COPIED=COPIED,
            )  # fmt: skip
            acc, top, total = _chain(
                acc, top, total, q, K, V, b, head, r, sks, svs, diagonal, end, F, lo, hi, scale,
                DQ, DV, BDQ, BDV, BN, STAGES, MASKED=True, COPIED=COPIED,
            )  # fmt: skip
        upper = lo
    else:
        upper = f + 1
        upper_first = f0 + 1
        upper_last = tl.minimum(f0 + A, S)

    if GLOBAL:
        count = tl.minimum(tokens, S)
        lim = tl.minimum(upper, count)
        acc, top, total = _compact(
            acc, top, total, q, KS, VS, b, head, sks, svs, tl.minimum(upper_first, count),
            tl.minimum(upper_last, count), lim, 0, S, count, 0, scale, DQ, DV, BDQ, BDV, BN, STAGES, COPIED=False,
        )  # fmt: skip
    if sumL > 0:
        first = sumL - ((slot + h * slot_step) % (sumL // sumC) + 1) * sumC
        lim = keys_before(upper, sumL, sumC, first)
        acc, top, total = _compact(
            acc, top, total, q, KS, VS, b, head, sks, svs, keys_before(upper_first, sumL, sumC, first),
            keys_before(upper_last, sumL, sumC, first), lim, keys_before(tokens, sumL, sumC, first),
            sumL, sumC, first, scale, DQ, DV, BDQ, BDV, BN, STAGES, SUM_COPIED,
        )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(LSE + f * step, lse, mask=valid)
    store_rows(O, f, sos, valid, acc, DV, BDV, ADD=False)
