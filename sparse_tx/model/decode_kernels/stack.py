"""All layers of one decoding step in one launch, for a few rows: what a step of small batches costs is latency.

Two phases a layer. Attention, a program for each row, head and share of the head's values: the residual stream, its
norm, this head's q and k and this share of v, the cache, and what they add through their columns of the output matrix.
Feed-forward, a program for each share of the hidden units, all rows: the stream after attention, its norm, these units
and what they add. Each program sums what those of the phase before left, in their order, so that no number is reduced
twice and a step is the same bits every time. Programs of one phase wait for a count of those of the other (`COUNT`);
meanwhile their next weights and keys are on their way into registers.

Every program must be on the device at once: a cooperative launch. Without WAIT the phases of a layer are launched one
by one, in the interpreter, which runs one program after the other.
"""

import triton
import triton.language as tl

from sparse_tx.attention.kernels.decode import absorb, part_numbers, ring_rows
from sparse_tx.attention.kernels.tiles import LOG2E
from sparse_tx.model.decode_kernels.linear import activated

ATTENTION, FEED_FORWARD, LOGITS = (tl.constexpr(n) for n in (1, 2, 4))  # phases, as bits


@triton.jit
def _wait(counter, target):
    """Until `target` programs have arrived; what they had written by then is seen from here on."""
    seen = target - 1
    while seen < target:
        seen = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def _arrive(counter):
    tl.debug_barrier()  # all threads have written
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _sum(first, stride, count, c, C: tl.constexpr, BP: tl.constexpr):
    """(BC,): the sum of `count` partial sums, `stride` apart. From the level of the cache that all programs share."""
    p = tl.arange(0, BP)
    mask = (p < count)[:, None] & (c < C)[None, :]
    return tl.sum(tl.load(first + p[:, None] * stride + c[None, :], mask=mask, other=0.0, cache_modifier=".cg"), 0)


@triton.jit
def _normal(h, c, gain, shift, eps, C: tl.constexpr):
    """LayerNorm of one row, in float32."""
    x = tl.where(c < C, h - tl.sum(h, 0) / C, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * gain + shift


@triton.jit
def _matrix(base, row, column, rows, columns, stride: tl.constexpr):
    """(len(row), len(column)) of a matrix with rows `stride` long, zero from `rows` and `columns` on."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _vector(base, at, count):
    return tl.load(base + at, mask=at < count, other=0.0).to(tl.float32)


@triton.jit
def _apply(matrix, x):
    """(N, K) of the products' dtype, (K,) float32 -> (N,) float32."""
    return tl.sum(matrix.to(tl.float32) * x[None, :], 1)


@triton.jit
def stack_step(
    X, MID, FROM_HEADS, FROM_UNITS, COUNT, LOGIT,
    QKV_W, QKV_B, OUT_W, OUT_B, EXPAND_W, EXPAND_B, CONTRACT_W, CONTRACT_B,
    NORM1_W, NORM1_B, NORM2_W, NORM2_B, NORM_W, NORM_B, OUTPUT,
    READS, PLACES, KIND, POSITION, positions, rows, first, last, layers, phases, scale, eps,
    H: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, SHARES: tl.constexpr, BDV: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, F: tl.constexpr, NF: tl.constexpr, BF: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr, BPF: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Layers first .. last - 1 of one position, then the logits.

    X (rows, C) float32: the input's embedding, and between the phases the stream without what FROM_UNITS adds.
    MID (rows, C): the stream a layer begins with. FROM_HEADS (rows, H * SHARES, C), FROM_UNITS (NF, rows, C): partial
    sums. LOGIT (rows, V). Weights are stacked by layer. Grid (rows * H * SHARES + NF,). SHARES divides DV.
    """
    program = tl.program_id(0)
    wide = program.to(tl.int64) * 0  # a stack of weights may have more elements than 32 bits count
    heads = rows * (H * SHARES)
    c = tl.arange(0, BC)
    dtype = OUTPUT.dtype.element_ty
    if program < heads:
        b = (program // (H * SHARES)).to(tl.int64)
        mine = program % (H * SHARES)
        h = mine // SHARES
        DVS: tl.constexpr = DV // SHARES
        from_v = mine % SHARES * DVS
        dq = tl.arange(0, BDQ)
        dv = tl.arange(0, BDV)
        in_chunk = (tl.load(POSITION) % positions).to(tl.int32)
        if phases & ATTENTION:
            for layer in tl.range(first, last, num_stages=1):
                at = wide + layer
                qkv = QKV_W + at * ((2 * H * DQ + H * DV) * C)
                wq = _matrix(qkv + h * DQ * C, dq, c, DQ, C, C)
                wk = _matrix(qkv + (H + h) * DQ * C, dq, c, DQ, C, C)
                wv = _matrix(qkv + (2 * H * DQ + h * DV + from_v) * C, dv, c, DVS, C, C)
                wo = _matrix(OUT_W + at * (C * H * DV) + h * DV + from_v, c, dv, C, DVS, H * DV)
                qkv_b = QKV_B + layer * (2 * H * DQ + H * DV)
                bq = _vector(qkv_b + h * DQ, dq, DQ)
                bk = _vector(qkv_b + (H + h) * DQ, dq, DQ)
                bv = _vector(qkv_b + 2 * H * DQ + h * DV + from_v, dv, DVS)
                gain = _vector(NORM1_W + layer * C, c, C)
                shift = _vector(NORM1_B + layer * C, c, C)
                later = layer > 0
                before = _vector(CONTRACT_B + (layer - 1) * C, c, tl.where(later, C, 0))
                reads = READS + ((tl.load(KIND + layer) * positions + in_chunk) * H + h).to(tl.int64) * (1 + 4 * PARTS)
                places = PLACES + (layer * H + h) * (4 * PARTS)
                sees_own = tl.load(reads) != 0
                keys = ()
                values = ()
                for part in tl.static_range(PARTS):
                    _, start, low, count, ring, k_at, v_at = part_numbers(reads, places, OUTPUT, b, part, DQ, DV)
                    n = tl.arange(0, BN)
                    keys += (ring_rows(k_at, start, low, ring, n, count, DQ, BDQ, 0, DQ),)
                    values += (ring_rows(v_at, start, low, ring, n, count, DV, BDV, from_v, DVS),)
                if WAIT:
                    _wait(COUNT + 1, NF * layer)
                x = tl.load(X + b * C + c, mask=c < C, other=0.0, cache_modifier=".cg") + before
                x += _sum(FROM_UNITS + b * C, rows * C, tl.where(later, NF, 0), c, C, BPF)
                tl.store(MID + b * C + c, x, mask=(c < C) & (mine == 0))
                x = _normal(x, c, gain, shift, eps, C).to(dtype).to(tl.float32)
                q = (_apply(wq, x) + bq).to(dtype).to(tl.float32) * (scale * LOG2E)
                k_own = (_apply(wk, x) + bk).to(dtype)
                v_own = (_apply(wv, x) + bv).to(dtype)
                top = tl.where(sees_own, tl.sum(q * k_own.to(tl.float32), 0), float("-inf"))
                total = tl.where(sees_own, 1.0, 0.0)
                acc = v_own.to(tl.float32) * total
                for part in tl.static_range(PARTS):
                    slot, start, low, count, ring, k_at, v_at = part_numbers(reads, places, OUTPUT, b, part, DQ, DV)
                    writes = (slot >= 0) & (mine % SHARES == 0)
                    tl.store(k_at + slot.to(tl.int64) * DQ + dq, k_own, mask=writes & (dq < DQ))
                    tl.store(v_at + slot.to(tl.int64) * DV + from_v + dv, v_own, mask=(slot >= 0) & (dv < DVS))
                    n = tl.arange(0, BN)
                    top, total, acc = absorb(top, total, acc, q, keys[part], values[part], n < count)
                    for begin in tl.range(BN, count, BN, num_stages=1):
                        k = ring_rows(k_at, start, low, ring, begin + n, count, DQ, BDQ, 0, DQ)
                        v = ring_rows(v_at, start, low, ring, begin + n, count, DV, BDV, from_v, DVS)
                        top, total, acc = absorb(top, total, acc, q, k, v, begin + n < count)
                acc = (acc / tl.where(total > 0, total, 1.0)).to(dtype).to(tl.float32)
                tl.store(FROM_HEADS + (b * (H * SHARES) + mine) * C + c, _apply(wo, acc), mask=c < C)
                if WAIT:
                    _arrive(COUNT)
        if phases & LOGITS:
            VS: tl.constexpr = (V + H * SHARES - 1) // (H * SHARES)
            n = tl.arange(0, BV)
            place = mine * VS + n
            wanted = (n < VS) & (place < V)
            w = tl.load(OUTPUT + place[:, None] * C + c[None, :], mask=wanted[:, None] & (c < C)[None, :], other=0.0)
            gain = _vector(NORM_W, c, C)
            shift = _vector(NORM_B, c, C)
            before = _vector(CONTRACT_B + (layers - 1) * C, c, C)
            if WAIT:
                _wait(COUNT + 1, NF * layers)
            x = tl.load(X + b * C + c, mask=c < C, other=0.0, cache_modifier=".cg") + before
            x += _sum(FROM_UNITS + b * C, rows * C, NF, c, C, BPF)
            x = _normal(x, c, gain, shift, eps, C).to(dtype).to(tl.float32)
            tl.store(LOGIT + b * V + place, _apply(w, x), mask=wanted)
    elif phases & FEED_FORWARD:
        mine = program - heads
        FS: tl.constexpr = F // NF
        f = tl.arange(0, BF)
        for layer in tl.range(first, last, num_stages=1):
            at = wide + layer
            w1 = _matrix(EXPAND_W + (at * F + mine * FS) * C, f, c, FS, C, C)
            w2 = _matrix(CONTRACT_W + at * (C * F) + mine * FS, c, f, C, FS, F)
            bias = _vector(EXPAND_B + layer * F + mine * FS, f, FS)
            out_bias = _vector(OUT_B + layer * C, c, C)
            gain = _vector(NORM2_W + layer * C, c, C)
            shift = _vector(NORM2_B + layer * C, c, C)
            if WAIT:
                _wait(COUNT, heads * (layer + 1))
            for b in tl.range(0, rows, num_stages=1):
                x = tl.load(MID + b * C + c, mask=c < C, other=0.0, cache_modifier=".cg") + out_bias
                x += _sum(FROM_HEADS + b * (H * SHARES * C), C, H * SHARES, c, C, BP)
                tl.store(X + b * C + c, x, mask=(c < C) & (mine == 0))
                x = _normal(x, c, gain, shift, eps, C).to(dtype).to(tl.float32)
                units = activated(_apply(w1, x) + bias).to(dtype).to(tl.float32)
                tl.store(FROM_UNITS + (mine * rows + b) * C + c, _apply(w2, units), mask=c < C)
            if WAIT:
                _arrive(COUNT + 1)
