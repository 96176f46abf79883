"""One decoding step over the cache: the new key is kept and each run of slots that the query sees is read once.

What a head reads comes from two tables: READS, a row for each position (`attention/ranges.py`), and PLACES, int64, for
each layer, head and part the addresses of its keys and of its values (of the first row of the batch), the slots from
one row of the batch to the next, and those of the strip. So one launch serves heads that keep their keys in different
tensors. Scores and softmax are in float32, in base 2.
"""

import triton
import triton.language as tl

from sparse_tx.attention.kernels.tiles import LOG2E


@triton.jit
def after_previous(DEPENDENT: tl.constexpr):
    """Wait for the kernel before, whose end this one may have overlapped, and let the next begin in the same way.

    Only once the one before has ended: at most two kernels are then under way, and what was written two or more
    launches ago can be read before the wait.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def aligned(address, like, ALIGN: tl.constexpr):
    """A number as a pointer of the type of `like`, known to be a multiple of ALIGN bytes."""
    return tl.multiple_of(address.to(like.dtype), ALIGN)


@triton.jit
def head_numbers(
    READS, PLACES, position, positions, row_of_reads, row_of_places, h, H: tl.constexpr, PARTS: tl.constexpr
):
    """Where a head's numbers begin in both tables."""
    in_chunk = (position % positions).to(tl.int32)
    reads = READS + ((row_of_reads + in_chunk) * H + h).to(tl.int64) * (1 + 4 * PARTS)
    return reads, PLACES + (row_of_places * H + h) * (4 * PARTS)


@triton.jit
def part_numbers(reads, places, like, b, part: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """Of a head and part, for row b of the batch: the slot of the own key, start of the strip, first slot read, count,
    the strip's length, keys and values."""
    ALIGN: tl.constexpr = 16 if W % 8 == 0 and BW % 8 == 0 else 2
    numbers = reads + 1 + 4 * part
    slot = tl.load(numbers)
    start = tl.load(numbers + 1)
    first = tl.load(numbers + 2)
    count = tl.load(numbers + 3)
    place = places + 4 * part
    row = b * tl.load(place + 2)
    k = aligned(tl.load(place), like, ALIGN) + row * W
    v = aligned(tl.load(place + 1), like, ALIGN) + row * BW
    return slot, start, first, count, tl.load(place + 3).to(tl.int32), k, v


@triton.jit
def ring_rows(base, start, first, ring, at, end, W: tl.constexpr, BW: tl.constexpr):
    """Rows `at` of a run, W numbers each, zero from `end` and W on."""
    slot = first + at
    slot = start + tl.where(slot >= ring, slot - ring, slot)
    d = tl.arange(0, BW)
    ptr = base + slot.to(tl.int64)[:, None] * W + d[None, :]
    mask = (at < end)[:, None]
    if W != BW:
        mask = mask & (d < W)[None, :]
    return tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def _turn(TURNS, at, mask):
    """Cosine and sine of an entry of the table."""
    cos = tl.load(TURNS + 2 * at, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(TURNS + 2 * at + 1, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def query_or_key(
    AT, d, head, scaled, position, TURNS, SCALE, n0, n1, inner, eps,
    D: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """D numbers of a head's query (scaled: by its temperature too) or key, normed and turned: `model/query_key.py`."""
    x = tl.load(AT + d, mask=d < D, other=0.0).to(tl.float32)
    if NORM:
        std = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        std *= tl.where(scaled, tl.load(SCALE + head), 1.0)
        x *= std
    if ROTARY != "none":
        half: tl.constexpr = D // 2
        other = tl.load(AT + (d + half) % D, mask=d < D, other=0.0).to(tl.float32)
        if NORM:
            other *= std
        row = (position // (n1 * inner)).to(tl.int32)
        column = (position // inner % n1).to(tl.int32)
        pair = d % half
        if ROTARY == "axes":
            quarter: tl.constexpr = D // 4
            cos, sin = _turn(TURNS, tl.where(pair < quarter, row, n0 + column) * quarter + pair % quarter, d < D)
        else:
            by_row, across = _turn(TURNS, row * half + pair, d < D)
            by_column, along = _turn(TURNS, (n0 + column) * half + pair, d < D)
            cos, sin = by_row * by_column - across * along, across * by_column + by_row * along
        x = x * cos + tl.where(d < half, -other, other) * sin
    return x


@triton.jit
def own_numbers(
    QKV, b, h, position, scale, TURNS, SCALE, n0, n1, inner, eps,
    H: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Of a head at this position: the query, float32 and scaled to base 2, the key and the value as they are kept."""
    dq = tl.arange(0, BDQ)
    dv = tl.arange(0, BDV)
    qkv = QKV + b * (H * (2 * DQ + DV))
    q = query_or_key(qkv + h * DQ, dq, h, True, position, TURNS, SCALE, n0, n1, inner, eps, DQ, NORM, ROTARY)
    k = query_or_key(qkv + (H + h) * DQ, dq, h, False, position, TURNS, SCALE, n0, n1, inner, eps, DQ, NORM, ROTARY)
    v = tl.load(qkv + 2 * H * DQ + h * DV + dv, mask=dv < DV, other=0.0)
    return q * (scale * LOG2E), k.to(QKV.dtype.element_ty), v


@triton.jit
def of_own_key(q, k, v, counts):
    """The online softmax of the own key alone, or of none where it does not count."""
    top = tl.where(counts, tl.sum(q * k.to(tl.float32), 0), float("-inf"))
    total = tl.where(counts, 1.0, 0.0)
    return top, total, v.to(tl.float32) * total


@triton.jit
def keep(k_at, v_at, slot, k, v, here, DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr):
    """Store the own key and value in their slot, if there is one and `here`."""
    dq = tl.arange(0, BDQ)
    dv = tl.arange(0, BDV)
    writes = (slot >= 0) & here
    tl.store(k_at + slot.to(tl.int64) * DQ + dq, k, mask=writes & (dq < DQ))
    tl.store(v_at + slot.to(tl.int64) * DV + dv, v, mask=writes & (dv < DV))


@triton.jit
def absorb(top, total, acc, q, k, v, valid):
    """One step of the online softmax. q: (BDQ,), scaled to base 2; k: (N, BDQ), v: (N, BDV) of which `valid` (N,)."""
    s = tl.sum(k.to(tl.float32) * q[None, :], 1)
    s = tl.where(valid, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 0))
    # No key seen yet: any finite value keeps inf - inf out.
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe)
    alpha = tl.exp2(top - safe)
    acc = acc * alpha + tl.sum(v.to(tl.float32) * p[:, None], 0)
    return new, total * alpha + tl.sum(p, 0), acc


# Layers differ in two numbers: not one compilation for those that are 1, or whole 16s, and one for the others.
@triton.jit(do_not_specialize=("row_of_reads", "row_of_places"))
def attend_step(
    QKV, OUT, PARTIAL, READS, PLACES, POSITION, positions, row_of_reads, row_of_places, scale,
    TURNS, SCALE, n0, n1, inner, eps,
    H: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Attention of one position of one layer: QKV (B, H * (2 DQ + DV)) -> OUT (B, H * DV).

    TURNS, SCALE (H,) float32, n0, n1, inner: of `query_or_key`, where there is a norm or a rotation.

    Grid (B * H, SPLITS). With more than one split each reads its share of every run and leaves what `combine_step`
    joins in PARTIAL (B * H, SPLITS, 2 + BDV) float32. row_of_reads: of READS, that of position 0 of the chunk, for this
    kind of layer; row_of_places: of PLACES, that of the layer. One row is one head.
    """
    program = tl.program_id(0)
    split = tl.program_id(1)
    b = (program // H).to(tl.int64)
    h = program % H
    position = tl.load(POSITION)
    reads, places = head_numbers(READS, PLACES, position, positions, row_of_reads, row_of_places, h, H, PARTS)
    dv = tl.arange(0, BDV)
    sees_own = tl.load(reads)
    after_previous(DEPENDENT)
    q, k_own, v_own = own_numbers(
        QKV, b, h, position, scale, TURNS, SCALE, n0, n1, inner, eps, H, DQ, DV, BDQ, BDV, NORM, ROTARY
    )
    top, total, acc = of_own_key(q, k_own, v_own, (sees_own != 0) & (split == 0))
    for part in tl.static_range(PARTS):
        slot, start, first, count, ring, k_at, v_at = part_numbers(reads, places, QKV, b, part, DQ, DV)
        keep(k_at, v_at, slot, k_own, v_own, split == 0, DQ, DV, BDQ, BDV)
        begin = (count.to(tl.int64) * split // SPLITS).to(tl.int32)
        end = (count.to(tl.int64) * (split + 1) // SPLITS).to(tl.int32)
        for from_ in tl.range(begin, end, BN, num_stages=STAGES):
            at = from_ + tl.arange(0, BN)
            k = ring_rows(k_at, start, first, ring, at, end, DQ, BDQ)
            v = ring_rows(v_at, start, first, ring, at, end, DV, BDV)
            top, total, acc = absorb(top, total, acc, q, k, v, at < end)
    if SPLITS == 1:
        out = acc / tl.where(total > 0, total, 1.0)
        tl.store(OUT + b * (H * DV) + h * DV + dv, out.to(OUT.dtype.element_ty), mask=dv < DV)
    else:
        partial = PARTIAL + (program * SPLITS + split).to(tl.int64) * (2 + BDV)
        tl.store(partial, top)
        tl.store(partial + 1, total)
        tl.store(partial + 2 + dv, acc)


@triton.jit(do_not_specialize=("row_of_reads", "row_of_places"))
def attend_out_step(
    QKV, W, BIAS, SHARES, READS, PLACES, POSITION, positions, row_of_reads, row_of_places, scale,
    TURNS, SCALE, n0, n1, inner, eps, C,
    H: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    BO: tl.constexpr, ALL: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """`attend_step` and what a head's output adds to the residual stream: SHARES (B, ALL, C) float32, of which the
    first H are those of W (C, H DV), of head 0 the bias too.

    Grid (B * H, cdiv(C, BO)): each program attends for its own outputs, the first of them keeps the new key. For few
    rows: a launch less is worth more than reading the same keys from the L2 cache again. All but the new query, key
    and value was written long ago, and is on its way before the kernel ahead has ended.
    """
    program = tl.program_id(0)
    first = tl.program_id(1) == 0
    b = (program // H).to(tl.int64)
    h = program % H
    position = tl.load(POSITION)
    reads, places = head_numbers(READS, PLACES, position, positions, row_of_reads, row_of_places, h, H, PARTS)
    dv = tl.arange(0, BDV)
    n = tl.program_id(1) * BO + tl.arange(0, BO)
    sees_own = tl.load(reads)
    numbers = ()
    early = ()
    at = tl.arange(0, BN)
    for part in tl.static_range(PARTS):  # Triton's tuples grow by addition alone
        slot, start, begin, count, ring, k_at, v_at = part_numbers(reads, places, QKV, b, part, DQ, DV)
        k = ring_rows(k_at, start, begin, ring, at, count, DQ, BDQ)
        v = ring_rows(v_at, start, begin, ring, at, count, DV, BDV)
        numbers = numbers + ((slot, start, begin, count, ring, k_at, v_at),)  # type: ignore[assignment]  # noqa: RUF005
        early = early + ((k, v),)  # type: ignore[assignment]  # noqa: RUF005
    inside = (n < C)[:, None] & (dv < DV)[None, :]
    w = tl.load(W + n[:, None] * (H * DV) + h * DV + dv[None, :], mask=inside, other=0.0)
    bias = tl.load(BIAS + n, mask=(n < C) & (h == 0), other=0.0).to(tl.float32)
    after_previous(DEPENDENT)
    q, k_own, v_own = own_numbers(
        QKV, b, h, position, scale, TURNS, SCALE, n0, n1, inner, eps, H, DQ, DV, BDQ, BDV, NORM, ROTARY
    )
    top, total, acc = of_own_key(q, k_own, v_own, sees_own != 0)
    for part in tl.static_range(PARTS):
        slot, start, begin, count, ring, k_at, v_at = numbers[part]
        keep(k_at, v_at, slot, k_own, v_own, first, DQ, DV, BDQ, BDV)
        k, v = early[part]
        top, total, acc = absorb(top, total, acc, q, k, v, at < count)
        for from_ in tl.range(BN, count, BN, num_stages=1):
            later = from_ + at
            k = ring_rows(k_at, start, begin, ring, later, count, DQ, BDQ)
            v = ring_rows(v_at, start, begin, ring, later, count, DV, BDV)
            top, total, acc = absorb(top, total, acc, q, k, v, later < count)
    out = (acc / tl.where(total > 0, total, 1.0)).to(QKV.dtype.element_ty).to(tl.float32)
    share = tl.sum(w.to(tl.float32) * out[None, :], 1) + bias
    tl.store(SHARES + (b * ALL + h) * C + n, share, mask=n < C)


@triton.jit
def combine_step(
    PARTIAL, OUT, H: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT: tl.constexpr
):
    """The splits of `attend_step` as one softmax, in their order. Grid (B * H,)."""
    program = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dv = tl.arange(0, BDV)
    after_previous(DEPENDENT)
    partial = PARTIAL + (program * SPLITS + split) * (2 + BDV)
    top = tl.load(partial)
    most = tl.max(top, 0)
    share = tl.exp2(top - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(share * tl.load(partial + 1), 0)
    acc = tl.sum(share[:, None] * tl.load((partial + 2)[:, None] + dv[None, :]), 0)
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(OUT + program * DV + dv, out.to(OUT.dtype.element_ty), mask=dv < DV)
