"""What kernels in Gluon share: barriers in shared memory, copies to places between them, and descriptors, which say how
a block lies there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def barriers(N: gl.constexpr):
    """N barriers whose phase is over after one arrival. A barrier tells its last phase from the next alone."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def bring(X, x, full, empty, coordinates, turn, PLACES: gl.constexpr):
    """Has the copy engine bring a block of X to the place of this turn, as soon as that is free."""
    at = turn % PLACES
    mbarrier.wait(empty.index(at), (turn // PLACES & 1) ^ 1)
    mbarrier.expect(full.index(at), X.block_type.nbytes)
    tma.async_copy_global_to_shared(X, coordinates, full.index(at), x.index(at))


@gluon.jit
def bring_two(X, Y, x, y, full, empty, coordinates, turn, PLACES: gl.constexpr):
    """As `bring`, of X and of Y, which have their places together."""
    at = turn % PLACES
    mbarrier.wait(empty.index(at), (turn // PLACES & 1) ^ 1)
    mbarrier.expect(full.index(at), X.block_type.nbytes + Y.block_type.nbytes)
    tma.async_copy_global_to_shared(X, coordinates, full.index(at), x.index(at))
    tma.async_copy_global_to_shared(Y, coordinates, full.index(at), y.index(at))


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))


def block_descriptor(t: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """Of memory from the first element of t on, in blocks as products take them from shared memory."""
    return TensorDescriptor(t, list(shape), list(strides), list(block), _layout(tuple(block), t.dtype))
