"""The moving average of many weights in one launch, by a table of their addresses.

torch's foreach takes three passes where a step may be left out, and some 40 launches each for the 1,540 tensors of the
59M model, most of them of few numbers: 1.5 ms of an H200 where the bytes take 0.2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_tx.attention.kernels import interpreted  # noqa: F401
from sparse_tx.training.tables import sent

_BLOCK = 4096  # elements of a program


@triton.jit
def move(TENSORS, BLOCKS, SHARE, BLOCK: tl.constexpr):
    """average <- average + share (weights - average), of a block of one tensor.

    TENSORS (tensors, 3) int64: addresses of an average and of its weights, elements. BLOCKS (programs, 2) int64:
    tensor, block of it. SHARE () float32.
    """
    tensor = TENSORS + 3 * tl.load(BLOCKS + 2 * tl.program_id(0))
    first = tl.load(BLOCKS + 2 * tl.program_id(0) + 1) * BLOCK
    average = tl.multiple_of(tl.load(tensor).to(tl.pointer_type(tl.float32)), 16)
    weights = tl.multiple_of(tl.load(tensor + 1).to(tl.pointer_type(tl.float32)), 16)
    n, share = tl.load(tensor + 2), tl.load(SHARE)
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:  # without a mask, 16 bytes at a time
        old = tl.load(average + at)
        tl.store(average + at, old + share * (tl.load(weights + at) - old))
    else:
        old = tl.load(average + at, mask=at < n)
        tl.store(average + at, old + share * (tl.load(weights + at, mask=at < n) - old), mask=at < n)


def move_all(average: Sequence[Tensor], weights: Sequence[Tensor], share: Tensor) -> None:
    """average <- average + share (weights - average). Of `usable` tensors; share: () float32 on their device."""
    rows = tuple((a.data_ptr(), w.data_ptr(), a.numel()) for a, w in zip(average, weights, strict=True))
    tensors, blocks = _tables(rows, share.device)
    move[(len(blocks),)](tensors, blocks, share, BLOCK=_BLOCK, num_warps=4)


@functools.lru_cache(4)  # by the addresses, as `table`; averages and weights lie still
def _tables(rows: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    blocks = [(i, block) for i, (_, _, n) in enumerate(rows) for block in range(triton.cdiv(n, _BLOCK))]
    return sent(rows, device), sent(blocks, device)
