"""What kernels in Gluon share: barriers in shared memory, and descriptors, which say how a block lies there."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def barriers(N: gl.constexpr):
    """N barriers whose phase is over after one arrival. A barrier tells its last phase from the next alone."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=1)
    return bars


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))


def block_descriptor(t: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """Of memory from the first element of t on, in blocks as products take them from shared memory."""
    return TensorDescriptor(t, list(shape), list(strides), list(block), _layout(tuple(block), t.dtype))
