"""The kernels as torch custom operators: they take numbers, know their fake results and their gradients.

`attention` reads q, k, v wherever they lie; `packed_attention` reads them from one projection and writes one gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_tx.attention.kernels import launch


def split_packed(qkv: Tensor, heads: int, Dqk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k (B, S, H, Dqk), v (B, S, H, Dv) of qkv (B, S, H * (2 Dqk + Dv)): all q, then all k, then all v."""
    width = heads * Dqk
    q, k, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
    return q.unflatten(-1, (heads, Dqk)), k.unflatten(-1, (heads, Dqk)), v.unflatten(-1, (heads, -1))


def _dense_last(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    return q.new_empty(B, S, H, v.shape[-1]), q.new_empty(B, H, S, dtype=torch.float32)


@torch.library.custom_op("sparse_tx::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, numbers: list[int], scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _dense_last(q), _dense_last(k), _dense_last(v)
    out, lse = _results(q, v)
    launch.forward(q, k, v, out, lse, numbers, scale)
    return out, lse


@attention.register_fake
def _(q, k, v, numbers, scale):
    return _results(q, v)


@torch.library.custom_op("sparse_tx::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    numbers: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _dense_last(q), _dense_last(k), _dense_last(v)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    launch.backward(q, k, v, out, lse, dout, dlse, dq, dk, dv, numbers, scale)
    return dq, dk, dv


@attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, numbers, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ctx.numbers, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.set_materialize_grads(False)


def _attention_grad(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None, None
    if dout is None:
        dout = torch.zeros_like(out)
    return (*attention_backward(dout, dlse, q, k, v, out, lse, ctx.numbers, ctx.scale), None, None)


attention.register_autograd(_attention_grad, setup_context=_save)


@torch.library.custom_op("sparse_tx::packed_attention", mutates_args=())
def packed_attention(qkv: Tensor, heads: int, Dqk: int, numbers: list[int], scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = split_packed(_dense_last(qkv), heads, Dqk)
    out, lse = _results(q, v)
    launch.forward(q, k, v, out, lse, numbers, scale)
    return out, lse


@packed_attention.register_fake
def _(qkv, heads, Dqk, numbers, scale):
    q, _, v = split_packed(qkv, heads, Dqk)
    return _results(q, v)


@torch.library.custom_op("sparse_tx::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    dout: Tensor, dlse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, Dqk: int,
    numbers: list[int], scale: float,
) -> Tensor:  # fmt: skip
    dqkv = qkv.new_empty(qkv.shape)
    parts = split_packed(_dense_last(qkv), heads, Dqk)
    launch.backward(*parts, out, lse, dout, dlse, *split_packed(dqkv, heads, Dqk), numbers, scale)
    return dqkv


@packed_attention_backward.register_fake
def _(dout, dlse, qkv, out, lse, heads, Dqk, numbers, scale):
    return qkv.new_empty(qkv.shape)


def _save_packed(ctx, inputs, output):
    qkv, ctx.heads, ctx.Dqk, ctx.numbers, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.set_materialize_grads(False)


def _packed_grad(ctx, dout, dlse):
    qkv, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None, None
    if dout is None:
        dout = torch.zeros_like(out)
    dqkv = packed_attention_backward(dout, dlse, qkv, out, lse, ctx.heads, ctx.Dqk, ctx.numbers, ctx.scale)
    return dqkv, None, None, None, None


packed_attention.register_autograd(_packed_grad, setup_context=_save_packed)
