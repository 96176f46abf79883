"""A decoding step in fused Triton kernels. Importable without triton: it is looked for on first use."""

from __future__ import annotations

import os

import torch

from sparse_tx.attention.kernels import _DTYPES, no_kernels
from sparse_tx.attention.ranges import one_run
from sparse_tx.model.spec import ModelSpec


def unsupported(spec: ModelSpec, length: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot decode this model there; None if they can. Looks at the patterns on the device once."""
    if (reason := no_kernels(device)) is not None:
        return reason
    if dtype not in _DTYPES:
        return f"dtype {dtype}: the kernels know float16, bfloat16 and float32"
    if os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly: use float16 or float32"
    widest = max(spec.qk, spec.width) // spec.heads
    if widest > 256:
        return f"a head has width {widest}: the kernels take 256 at most"
    for patterns in dict.fromkeys(spec.patterns()):
        if not one_run(patterns, length, device):
            return f"a query's keys under {patterns[0]} are no single run of slots in the cache"
    return None
