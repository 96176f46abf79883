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
            x = tl.where((k < K)[None, :], x - (tl.sum(x, 1) / K)[:, None], 0.0)
            x = x * tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None] * gain[None, :] + shift[None, :]
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
def vector_step(
    X, NORM_WEIGHT, NORM_BIAS, W, BIAS, RESIDUAL, SHARES, Y, N, eps,
    ROWS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As `linear_step`, for a few rows: plain sums. BK holds all of K. Grid (cdiv(N, BN),).

    HEADS: the residual stream is X, or RESIDUAL, with SHARES (ROWS, HEADS, width) of `attend_out_step` added; 0: it has
    none. What was written two launches ago or earlier is on its way before the kernel ahead has ended: the weights, the
    residual, and with shares that are new X itself.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    w = tl.load(W + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    if BIASED:
        bias = tl.load(BIAS + n, mask=n < N, other=0.0)
    if NORM:
        gain = tl.load(NORM_WEIGHT + k, mask=k < K, other=0.0)
        shift = tl.load(NORM_BIAS + k, mask=k < K, other=0.0)
    early: tl.constexpr = NORM and HEADS > 0
    xs = ()
    residuals = ()
    for m in tl.static_range(ROWS):
        if early:
            x = tl.load(X + m * K + k, mask=k < K, other=0.0).to(tl.float32)
            xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005  Triton unpacks nothing
        if ADD:
            residual = tl.load(RESIDUAL + m * N + n, mask=n < N, other=0.0)
            for h in tl.static_range(HEADS):
                residual += tl.load(SHARES + (m * HEADS + h) * N + n, mask=n < N, other=0.0)
            residuals = residuals + (residual,)  # type: ignore[assignment]  # noqa: RUF005
    after_previous(DEPENDENT)
    for m in tl.static_range(ROWS):
        if early:
            x = xs[m]  # type: ignore[misc]
            for h in tl.static_range(HEADS):
                x += tl.load(SHARES + (m * HEADS + h) * K + k, mask=k < K, other=0.0)
        else:
            x = tl.load(X + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
            x = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * gain + shift
            x = x.to(w.dtype).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1)
        if BIASED:
            y += bias.to(tl.float32)
        if ACTIVATION is not None:
            y = activated(y, ACTIVATION)
        if ADD:
            y += residuals[m]  # type: ignore[misc]
        tl.store(Y + m * N + n, y.to(Y.dtype.element_ty), mask=n < N)
