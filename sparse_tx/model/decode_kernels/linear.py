"""A linear layer of one decoding step with what surrounds it: LayerNorm before, activation or residual after."""

import triton
import triton.language as tl

from sparse_tx.attention.kernels.decode import after_previous
from sparse_tx.model.activation import activated


@triton.jit
def _inputs(X, m, k, rows, K: tl.constexpr):
    """(len(m), len(k)) of X (rows, K), zero outside."""
    mask = (m < rows)[:, None] & (k < K)[None, :]
    return tl.load(X + m.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def _weights(W, n, k, N, K: tl.constexpr):
    """(len(k), len(n)) of the transpose of W (N, K), zero outside."""
    return tl.load(W + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)


@triton.jit
def _vectors(GAIN, SHIFT, k, K: tl.constexpr):
    return tl.load(GAIN + k, mask=k < K, other=0.0), tl.load(SHIFT + k, mask=k < K, other=0.0)


@triton.jit
def _normal(x, gain, shift, k, eps, K: tl.constexpr):
    """LayerNorm of the rows of x (rows, len(k)), zero from K on."""
    x = tl.where((k < K)[None, :], x - (tl.sum(x, 1) / K)[:, None], 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None] * gain[None, :] + shift[None, :]


@triton.jit
def _statistics(X, m, rows, eps, K: tl.constexpr, BK: tl.constexpr):
    """Mean and 1 / standard deviation of each of the rows m of X (rows, K)."""
    total = tl.zeros(m.shape, tl.float32)
    k = tl.arange(0, BK)
    for start in tl.range(0, K, BK, num_stages=1):
        total += tl.sum(_inputs(X, m, start + k, rows, K), 1)
    mean = total / K
    squares = tl.zeros(m.shape, tl.float32)
    for start in tl.range(0, K, BK, num_stages=1):
        x = tl.where((start + k < K)[None, :], _inputs(X, m, start + k, rows, K) - mean[:, None], 0.0)
        squares += tl.sum(x * x, 1)
    return mean, tl.rsqrt(squares / K + eps)


@triton.jit
def linear_step(
    X, NORM_WEIGHT, NORM_BIAS, W, BIAS, RESIDUAL, Y, rows, N, eps,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Y (rows, N) = act(LN?(X) W^T + b) + residual?, X (rows, K), W (N, K). Grid (cdiv(N, BN), cdiv(rows, BM)).

    The norm is in float32 and its result rounded to W's dtype, as under autocast. RESIDUAL may be Y. BM is at least 16:
    products on tensor cores. `vector_step` is for fewer rows.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    at = m.to(tl.int64)
    if BK >= K:
        # All loads at once, those of the weights before the kernel ahead has ended.
        k = tl.arange(0, BK)
        w = _weights(W, n, k, N, K)
        if NORM:
            gain, shift = _vectors(NORM_WEIGHT, NORM_BIAS, k, K)
        after_previous(DEPENDENT)
        x = _inputs(X, m, k, rows, K)
        if NORM:
            x = _normal(x, gain, shift, k, eps, K)
        acc = tl.dot(x.to(w.dtype), w, input_precision="ieee")
    else:
        after_previous(DEPENDENT)
        if NORM:
            mean, scale = _statistics(X, m, rows, eps, K, BK)
        acc = tl.zeros([BM, BN], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            x = _inputs(X, m, k, rows, K)
            w = _weights(W, n, k, N, K)
            if NORM:
                gain, shift = _vectors(NORM_WEIGHT, NORM_BIAS, k, K)
                x = ((x - mean[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]).to(w.dtype)
            acc = tl.dot(x, w, acc, input_precision="ieee")
    if BIASED:
        acc += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        acc = activated(acc, ACTIVATION)
    to = at[:, None] * N + n[None, :]
    mask = (m < rows)[:, None] & (n < N)[None, :]
    if ADD:
        acc += tl.load(RESIDUAL + to, mask=mask, other=0.0)
    tl.store(Y + to, acc.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _row(X, m, c, C):
    return tl.load(X + m * C + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _with_shares(x, SHARES, m, c, C, ALL: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr):
    """x, numbers c of row m, and the shares FIRST to END - 1 of that row, of SHARES (ROWS, ALL, C), in their order."""
    for share in tl.static_range(FIRST, END):
        x += _row(SHARES, m * ALL + share, c, C)
    return x


@triton.jit
def _normed(x, gain, shift, k, eps, K: tl.constexpr):
    x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * gain + shift


@triton.jit
def vector_step(
    X, NORM_WEIGHT, NORM_BIAS, W, BIAS, RESIDUAL, SHARES, KEPT, Y, N, eps,
    ROWS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    ALL: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr, KEEP: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As `linear_step`, for a few rows: plain sums. BK holds all of K. Grid (cdiv(N, BN),).

    The residual stream is X under a norm, or RESIDUAL, with the first OLD + NEW of SHARES (ROWS, ALL, width) added, of
    which the last NEW are from the kernel ahead. KEEP: it is left in KEPT (ROWS, K). What was written two launches ago
    or earlier is on its way before the kernel ahead has ended: weights, RESIDUAL, old shares, and with shares X itself.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    w = tl.load(W + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    if BIASED:
        bias = tl.load(BIAS + n, mask=n < N, other=0.0)
    if NORM:
        gain, shift = _vectors(NORM_WEIGHT, NORM_BIAS, k, K)
    early: tl.constexpr = NORM and OLD + NEW > 0
    olds = ()  # Triton's tuples grow by addition alone
    residuals = ()
    for m in tl.static_range(ROWS):
        if early:
            old = _with_shares(_row(X, m, k, K), SHARES, m, k, K, ALL, 0, OLD)
            olds = olds + (old,)  # type: ignore[assignment]  # noqa: RUF005
        if ADD:
            residual = _with_shares(_row(RESIDUAL, m, n, N), SHARES, m, n, N, ALL, 0, OLD)
            residuals = residuals + (residual,)  # type: ignore[assignment]  # noqa: RUF005
    after_previous(DEPENDENT)
    xs = ()
    for m in tl.static_range(ROWS):  # all loads before the first sum waits for one
        if early:
            x = _with_shares(olds[m], SHARES, m, k, K, ALL, OLD, OLD + NEW)  # type: ignore[misc]
        else:
            x = _row(X, m, k, K)
        xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
    for m in tl.static_range(ROWS):
        x = xs[m]  # type: ignore[misc]
        if KEEP:
            tl.store(KEPT + m * K + k, x, mask=(k < K) & (tl.program_id(0) == 0))
        if NORM:
            x = _normed(x, gain, shift, k, eps, K).to(w.dtype).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1)
        if BIASED:
            y += bias.to(tl.float32)
        if ACTIVATION is not None:
            y = activated(y, ACTIVATION)
        if ADD:
            y += residuals[m]  # type: ignore[misc]
        tl.store(Y + m * N + n, y.to(Y.dtype.element_ty), mask=n < N)


@triton.jit
def feedforward_step(
    X, NORM_WEIGHT, NORM_BIAS, W1, BIAS1, W2, BIAS2, SHARES, F, eps,
    ROWS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BU: tl.constexpr, ALL: tl.constexpr, HEADS: tl.constexpr,
    ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """W2 act(W1 LN(x) + b1) + b2 for few rows, in shares. x: X (ROWS, C) with the first HEADS of SHARES (ROWS, ALL, C)
    float32, which the kernel ahead wrote. W1 (F, C), W2 (C, F).

    Grid (cdiv(F, BU),): each program leaves what its BU hidden units add to the residual stream as a share after those
    of the heads, the first with b2. So none waits for the hidden units of another, and all weights are on their way
    before the kernel ahead has ended.
    """
    program = tl.program_id(0)
    u = program * BU + tl.arange(0, BU)
    c = tl.arange(0, BC)
    w1 = tl.load(W1 + u[:, None] * C + c[None, :], mask=(u < F)[:, None] & (c < C)[None, :], other=0.0)
    w2 = tl.load(W2 + c[:, None] * F + u[None, :], mask=(c < C)[:, None] & (u < F)[None, :], other=0.0)
    bias1 = tl.load(BIAS1 + u, mask=u < F, other=0.0).to(tl.float32)
    bias2 = tl.load(BIAS2 + c, mask=(c < C) & (program == 0), other=0.0).to(tl.float32)
    gain, shift = _vectors(NORM_WEIGHT, NORM_BIAS, c, C)
    olds = ()
    for m in tl.static_range(ROWS):
        olds = olds + (_row(X, m, c, C),)  # type: ignore[assignment]  # noqa: RUF005
    after_previous(DEPENDENT)
    xs = ()
    for m in tl.static_range(ROWS):
        x = _with_shares(olds[m], SHARES, m, c, C, ALL, 0, HEADS)  # type: ignore[misc]
        xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
    for m in tl.static_range(ROWS):
        x = _normed(xs[m], gain, shift, c, eps, C).to(w1.dtype).to(tl.float32)  # type: ignore[misc]
        hidden = activated(tl.sum(w1.to(tl.float32) * x[None, :], 1) + bias1, ACTIVATION)
        hidden = hidden.to(w2.dtype).to(tl.float32)
        y = tl.sum(w2.to(tl.float32) * hidden[None, :], 1) + bias2
        tl.store(SHARES + (m * ALL + HEADS + program) * C + c, y, mask=c < C)
