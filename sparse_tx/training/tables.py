"""Tables of addresses, by which one launch works on many tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def usable(tensors: Sequence[Tensor]) -> bool:
    """Whether all are float32 on one device, dense and aligned as torch allocates them."""
    return all(
        t.dtype == torch.float32 and t.device == tensors[0].device and t.is_contiguous() and t.data_ptr() % 16 == 0
        for t in tensors
    )


def sent(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of integers as int64 on the device, for work of the current stream. From pinned memory: nothing waits."""
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@functools.lru_cache(16)
def table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """`sent`, once for the same addresses: they are the key, so that tensors that have moved never meet an old table.

    Gradients lie still in a CUDA graph. Without one they are allocated anew each step, mostly where they lay in the
    step before; where not, the step sends one small table more.
    """
    return sent(rows, device)
