"""The activations of the feed-forward inside Triton's kernels: see `spec.ACTIVATIONS` and `block.activate`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(x, KIND: tl.constexpr):
    """f(x), float32."""
    if KIND == "relu2":
        x = tl.maximum(x, 0.0)
        return x * x
    return x * (1 / (1 + tl.exp(-1.702 * x)))


@triton.jit
def activated_and_slope(x, KIND: tl.constexpr):
    """f(x) and f'(x), float32."""
    if KIND == "relu2":
        x = tl.maximum(x, 0.0)
        return x * x, 2 * x
    s = 1 / (1 + tl.exp(-1.702 * x))
    return x * s, s + 1.702 * x * s * (1 - s)
