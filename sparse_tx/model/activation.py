"""The activations of the feed-forward inside Triton's kernels: see `spec.ACTIVATIONS` and `block.activate`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-1.702 x)): with a root and its square half of the instructions that a division takes."""
    root = tl.rsqrt(1 + tl.exp2(-2.4554669595930157 * x))
    return root * root


@triton.jit
def activated(x, KIND: tl.constexpr):
    """f(x), float32."""
    if KIND == "relu2":
        x = tl.maximum(x, 0.0)
        return x * x
    return x * _sigmoid(x)


@triton.jit
def activated_and_slope(x, KIND: tl.constexpr):
    """f(x) and f'(x), float32."""
    if KIND == "relu2":
        x = tl.maximum(x, 0.0)
        return x * x, 2 * x
    s = _sigmoid(x)
    return x * s, s + 1.702 * x * s * (1 - s)
