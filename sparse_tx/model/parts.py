"""What the loss and the fused blocks share: many rows by parts, and the gradient of a weight from each."""

from __future__ import annotations

import torch
from torch import Tensor


def parts(rows: int, most: int) -> list[slice]:
    """Nearly equal parts of at most `most` rows: few sizes, so that little is compiled."""
    count = max(1, -(-rows // most))
    size = -(-rows // count)
    return [slice(start, start + size) for start in range(0, rows, size)]


def weight_gradient(d_y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """d_y^T x, summed and returned in `dtype`: the sum may leave the range of float16. d_y: (T, N), x: (T, K)."""
    if d_y.dtype == dtype:
        return d_y.t() @ x
    if d_y.is_cuda:
        return torch.mm(d_y.t(), x, out_dtype=dtype)
    return d_y.t().to(dtype) @ x.to(dtype)
