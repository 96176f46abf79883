"""The kernels as torch operators: they take numbers, know their fake results and their gradients.

`attention` reads q, k, v wherever they lie; `packed_attention` reads them from one projection and writes one gradient.
They are defined piece by piece, as torch.library.custom_op and register_autograd would do, because what these wrap
around a call costs the host 50 us, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_tx.attention.kernels import launch

_LIBRARY = torch.library.Library("sparse_tx", "FRAGMENT")


def _operator(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """run: on real tensors; fake: results of the same shapes, of tensors without numbers."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_tx::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sparse_tx, name).default


def _differentiable(operator: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> None:
    """function: runs `operator` through `_below`, and knows its gradient."""

    def run(*args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        return _below(operator, *args)

    _LIBRARY.impl(operator._opname, run, "Autograd")


def _below(operator: torch._ops.OpOverload, *args):
    """Where gradients have been seen to: on to the modes that trace or count, and the device."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _not_differentiable(operator: torch._ops.OpOverload) -> None:
    class Refusal(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            return _below(operator, *args)

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(f"{operator.name()} has no gradient of its own; use backend='oracle'")

    _differentiable(operator, Refusal)


def split_packed(qkv: Tensor, heads: int, Dqk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k (B, S, H, Dqk), v (B, S, H, Dv) of qkv (B, S, H * (2 Dqk + Dv)): all q, then all k, then all v.

    qkv: dense in its last dimension.
    """
    B, S, total = qkv.shape
    b, s, _ = qkv.stride()
    at, width, Dv = qkv.storage_offset(), heads * Dqk, total // heads - 2 * Dqk
    q, k = (qkv.as_strided((B, S, heads, Dqk), (b, s, Dqk, 1), at + start) for start in (0, width))
    return q, k, qkv.as_strided((B, S, heads, Dv), (b, s, Dv, 1), at + 2 * width)


def _dense_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _results(v: Tensor) -> tuple[Tensor, Tensor]:
    B, S, H, _ = v.shape
    return _empty_like(v), v.new_empty((B, H, S), dtype=torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, numbers: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _dense_last(q), _dense_last(k), _dense_last(v)
    out, lse = _results(v)
    launch.forward(q, k, v, out, lse, numbers, scale)
    return out, lse


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    numbers: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _dense_last(q), _dense_last(k), _dense_last(v)
    dq, dk, dv = _backward_fake(dout, dlse, q, k, v, out, lse, numbers, scale)
    launch.backward(q, k, v, out, lse, dout, dlse, dq, dk, dv, numbers, scale)
    return dq, dk, dv


def _backward_fake(dout, dlse, q, k, v, out, lse, numbers, scale):
    return _empty_like(q), _empty_like(k), _empty_like(v)


attention = _operator(
    "attention(Tensor q, Tensor k, Tensor v, int[] numbers, float scale) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, numbers, scale: _results(v),
)
attention_backward = _operator(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] numbers, float scale) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, numbers, scale):
        out, lse = _below(attention, q, k, v, numbers, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        ctx.numbers, ctx.scale = numbers, scale
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None, None
        if dout is None:
            dout = torch.zeros_like(out)
        return (*attention_backward(dout, dlse, q, k, v, out, lse, ctx.numbers, ctx.scale), None, None)


_differentiable(attention, _Attention)
_not_differentiable(attention_backward)


def _packed_forward(qkv: Tensor, heads: int, Dqk: int, numbers: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    return _forward(*split_packed(_dense_last(qkv), heads, Dqk), numbers, scale)


def _packed_fake(qkv, heads, Dqk, numbers, scale):
    return _results(qkv[..., 2 * heads * Dqk :].unflatten(-1, (heads, -1)))


def _packed_backward(
    dout: Tensor, dlse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, Dqk: int,
    numbers: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    dqkv = _empty_like(qkv)
    parts = split_packed(_dense_last(qkv), heads, Dqk)
    launch.backward(*parts, out, lse, dout, dlse, *split_packed(dqkv, heads, Dqk), numbers, scale)
    return dqkv


packed_attention = _operator(
    "packed_attention(Tensor qkv, int heads, int Dqk, int[] numbers, float scale) -> (Tensor, Tensor)",
    _packed_forward,
    _packed_fake,
)
packed_attention_backward = _operator(
    "packed_attention_backward(Tensor dout, Tensor? dlse, Tensor qkv, Tensor out, Tensor lse, int heads, int Dqk, "
    "int[] numbers, float scale) -> Tensor",
    _packed_backward,
    lambda dout, dlse, qkv, out, lse, heads, Dqk, numbers, scale: _empty_like(qkv),
)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, heads, Dqk, numbers, scale):
        out, lse = _below(packed_attention, qkv, heads, Dqk, numbers, scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.set_materialize_grads(False)
        ctx.numbers = heads, Dqk, numbers, scale
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        qkv, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None, None
        if dout is None:
            dout = torch.zeros_like(out)
        return packed_attention_backward(dout, dlse, qkv, out, lse, *ctx.numbers), None, None, None, None


_differentiable(packed_attention, _PackedAttention)
_not_differentiable(packed_attention_backward)
