"""Nats of the tokens from hidden states, by chunks of positions: the logits of a whole sequence never exist.

In float32 logits take 1 KB a position, their softmax and its gradient as much again: of 1,048,576 positions 3 GiB. A
chunk's gradient is taken as soon as its logits are there, as the loss is the sum of all chunks.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from sparse_tx.model.parts import parts, weight_gradient

CHUNK = 1 << 14  # positions at a time: 16 MiB of float32 logits


def mean_nats(
    h: Tensor, norm: nn.LayerNorm, output: nn.Linear, tokens: Tensor, *, chunk: int = CHUNK, compiled: bool = False
) -> Tensor:
    """Mean of -ln p(token) under the logits output(norm(h)), as cross_entropy has it. Returns ().

    h: (B, S, C), before the final norm; tokens: (B, S) integers. The product is in autocast's dtype, the softmax in
    float32 at least. compiled: let torch.compile fuse the softmax and its gradient. To be differentiated once.
    """
    gain, shift, weight = norm.weight, norm.bias, output.weight
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (h, gain, shift, weight))
    return _MeanNats.apply(h, gain, shift, weight, tokens, norm.eps, _product_dtype(h), chunk, compiled, grad)


def position_nats(h: Tensor, norm: nn.LayerNorm, output: nn.Linear, tokens: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """-ln p of each token as in `mean_nats`: (B, S), float32 at least. Without gradients."""
    with torch.no_grad():
        rows, ids, dtype = h.flatten(0, 1), tokens.flatten(), _product_dtype(h)
        with torch.autocast(h.device.type, enabled=False):
            weight = output.weight.to(dtype)
            found = [
                _nats(_logits(_norm(rows[part], norm.weight, norm.bias, norm.eps)[0], weight), ids[part])
                for part in parts(len(rows), chunk)
            ]
        return torch.cat(found).view(tokens.shape)


def _product_dtype(h: Tensor) -> torch.dtype | None:
    """Of the product with the output matrix: autocast's; else None, the dtype of the normed states."""
    kind = h.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _norm(rows: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm in float32 at least, with the means and 1 / standard deviations that its gradient needs."""
    rows = rows.to(torch.promote_types(rows.dtype, gain.dtype))
    return torch.native_layer_norm(rows, [rows.shape[-1]], gain, shift, eps)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """(T, V), in the dtype of the weight."""
    return x.to(weight.dtype) @ weight.t()


def _nats(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1) - logits.gather(-1, ids.long()[:, None])[:, 0]


def _nats_and_gradient(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the nats in float64, and its gradient with respect to the logits (T, V), in their dtype."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = wide.log_softmax(-1)
    # No gather: a comparison costs no pass of its own where this is compiled, and is deterministic by itself.
    hit = ids.long()[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    nats = -torch.where(hit, log_p, 0.0).sum(-1)
    return nats.double().sum(), (log_p.exp() - hit.to(wide.dtype)).to(logits.dtype)


@cache
def _fused_nats_and_gradient():
    # Not fullgraph: past the sizes that torch compiles in a process (8; a sweep) that raises, and this runs uncompiled.
    return torch.compile(_nats_and_gradient, dynamic=False)  # whose import takes seconds


class _MeanNats(torch.autograd.Function):
    """Takes the gradients of the sum of nats in the forward pass; the backward pass only scales them.

    They are not divided by the number of positions before they leave the 16-bit products, where a float16 would lose
    them, nor multiplied by a loss scale, which arrives in the backward pass.
    """

    @staticmethod
    def forward(ctx, h, gain, shift, weight, tokens, eps, dtype, chunk, compiled, grad):
        rows, ids = h.flatten(0, -2), tokens.flatten()
        wide = torch.promote_types(h.dtype, gain.dtype)
        low = weight.to(wide if dtype is None else dtype)
        total = torch.zeros((), dtype=torch.float64, device=h.device)
        grade = _fused_nats_and_gradient() if compiled else _nats_and_gradient
        d_rows = torch.empty_like(rows) if grad else None
        d_gain, d_shift, d_weight = (torch.zeros_like(t, dtype=wide) for t in (gain, shift, weight))
        with torch.autocast(h.device.type, enabled=False):
            for part in parts(len(rows), chunk):
                x, mean, rstd = _norm(rows[part], gain, shift, eps)
                logits = _logits(x, low)
                if d_rows is None:
                    total += _nats(logits, ids[part]).double().sum()
                    continue
                nats, d_logits = grade(logits, ids[part])
                total += nats
                d_weight += weight_gradient(d_logits, x.to(low.dtype), wide)
                d_x = (d_logits @ low).to(wide)
                d_part, more_gain, more_shift = torch.ops.aten.native_layer_norm_backward(
                    d_x, rows[part].to(wide), [x.shape[-1]], mean, rstd, gain, shift, [True, True, True]
                )
                d_rows[part] = d_part / len(rows)
                d_gain += more_gain
                d_shift += more_shift
        if d_rows is not None:
            ctx.save_for_backward(d_rows.view_as(h), *(d / len(rows) for d in (d_gain, d_shift, d_weight)))
            ctx.dtypes = gain.dtype, shift.dtype, weight.dtype
        return (total / len(rows)).to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor):
        # In place: nothing else holds them, and a second h of a million positions would not be small.
        d_h, *small = (d.mul_(d_out) for d in ctx.saved_tensors)
        return d_h, *(d.to(t) for d, t in zip(small, ctx.dtypes, strict=True)), *[None] * 6
