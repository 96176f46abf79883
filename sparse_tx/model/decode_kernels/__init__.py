"""A decoding step in fused Triton kernels. Importable without triton: it is looked for on first use."""

from __future__ import annotations

import torch

from sparse_tx.attention.kernels import no_kernels
from sparse_tx.attention.ranges import one_run
from sparse_tx.model.spec import ModelSpec


def unsupported(spec: ModelSpec, length: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot decode this model there; None if they can. Looks at the patterns on the device once."""
    if (reason := no_kernels(device, dtype)) is not None:
        return reason
    widest = max(spec.qk, spec.width) // spec.heads
    if widest > 256:
        return f"a head has width {widest}: the kernels take 256 at most"
    for patterns in dict.fromkeys(spec.patterns()):
        if not one_run(patterns, length, device):
            return f"a query's keys under {patterns[0]} are no single run of slots in the cache"
    return None
