"""Fused Triton kernels for the sparse patterns. Importable without triton: it is looked for on first use."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_tx.attention.kernels.plan import plan
from sparse_tx.attention.patterns import AllowsKeys

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST = (8, 0)

try:  # the runtime is loaded by the first call, not here
    from importlib.util import find_spec

    _HAS_TRITON = find_spec("triton") is not None
except (ImportError, ValueError):
    _HAS_TRITON = False


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _too_old(index: int) -> str:
    """The compute capability of an NVIDIA GPU that is too old; "" of others."""
    have = _capability(index)
    return "" if torch.version.hip is not None or have >= _OLDEST else ".".join(map(str, have))


# What torch.compiler.assume_constant_result sets, without its import of the compiler: it cannot trace the call inside.
_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def has_copy_engine(device: torch.device) -> bool:
    """Whether tiles can be brought by descriptor there: from compute capability 9.0 on, and in the interpreter."""
    return device.type != "cuda" or _capability(_index(device)) >= (9, 0)


def has_roles(device: torch.device) -> bool:
    """Whether kernels run there whose tensor instructions are those of compute capability 9.0 alone."""
    return device.type == "cuda" and torch.version.hip is None and _capability(_index(device)) == (9, 0)


def is_large(device: torch.device) -> bool:
    """Whether a program may have 160 KiB of shared memory."""
    return device.type != "cuda" or _capability(_index(device)) in ((8, 0), (9, 0), (10, 0))


@functools.cache
def multiprocessors(index: int | None) -> int:
    """Of a GPU by its index; a few where there is none."""
    return 4 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def no_kernels(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why no Triton kernel runs on this device, or for tensors of this dtype; None if they do. No work on it."""
    if not _HAS_TRITON:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"the tensors are on {device.type}: the kernels need a CUDA GPU"
    if device.type == "cuda" and (have := _too_old(_index(device))):
        return f"the GPU has compute capability {have}: the kernels need 8.0 or newer"
    if dtype is not None and dtype not in _DTYPES:
        return f"dtype {dtype}: the kernels know float16, bfloat16 and float32"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly: use float16 or float32"
    return None


def unsupported(q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[AllowsKeys]) -> str | None:
    """Why the kernels cannot run these inputs, with what would; None if they can. No work on the device."""
    return unsupported_widths(q, q.shape[-1], v.shape[-1], patterns)


def unsupported_widths(t: Tensor, Dqk: int, Dv: int, patterns: Sequence[AllowsKeys]) -> str | None:
    """`unsupported`, of heads of these widths that lie on the device of t, in its dtype."""
    if (reason := no_kernels(t.device, t.dtype)) is not None:
        return f"{reason}; use backend='blocked'"
    for name, width in (("q and k", Dqk), ("v", Dv)):
        if width % 8 or not 16 <= width <= 256:
            return f"{name} have width {width}: the kernels take 16 to 256 in multiples of 8; use backend='blocked'"
    try:
        plan(patterns)
    except NotImplementedError as error:
        return f"{error}; use backend='blocked'"
    return None


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[AllowsKeys], scale: float
) -> tuple[Tensor, Tensor]:
    """q, k: (B, S, H, Dqk), v: (B, S, H, Dv), patterns: one per head. Returns out (B, S, H, Dv), lse (B, H, S) float32.

    Both carry gradients. The last dimension should be dense; of any other strides nothing is copied.
    """
    from sparse_tx.attention.kernels import ops

    return ops.attention(q, k, v, plan(patterns), scale)


def packed_attention(
    qkv: Tensor, patterns: Sequence[AllowsKeys], Dqk: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `triton_attention`, of q, k, v inside one projection, with one gradient buffer and no copies.

    qkv: (B, S, H * (2 Dqk + Dv)): the q of all heads, then the k of all heads, then the v of all heads.
    """
    from sparse_tx.attention.kernels import ops

    scale = Dqk**-0.5 if scale is None else scale
    return ops.packed_attention(qkv, len(patterns), Dqk, plan(patterns), scale)
