"""Dropout whose masks come from a counter: a hash of (seed, step, layer, site, row of the batch, element).

No generator state is kept or advanced, so that recomputed layers, compiled layers and several ranks draw the same mask
for the same element, and a resumed run draws the masks it would have drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_tx.model.counter import MASK32, mix


def dropout_keys(seed: int, step: Tensor, rows: Tensor, layers: int) -> Tensor:
    """Keys of every dropout site of a step: (layers, 2, B, 2) int64, by layer, site (attention, feed-forward), row.

    step: () int64. rows: (B,) int64, each row's index in the batch over all ranks.
    """
    sites = torch.arange(layers * 2, device=rows.device).view(layers, 2, 1)
    key = mix(mix(step + (seed & MASK32)) ^ (seed >> 32 & MASK32))
    key = mix(mix(key + sites) + rows)  # (layers, 2, B)
    return torch.stack([key, mix(key + 0x9E3779B9)], -1)


def counter_dropout(x: Tensor, key: Tensor, p: float) -> Tensor:
    """x: (B, S, C), key: (B, 2) from `dropout_keys`. Zeroes elements with probability p and scales the rest."""
    return _CounterDropout.apply(x, key, p)


def _drop(x: Tensor, key: Tensor, p: float) -> Tensor:
    _, S, C = x.shape
    element = torch.arange(S * C, device=x.device).view(1, S, C)
    first, second = key[:, 0, None, None], key[:, 1, None, None]
    keep = mix(element ^ first, second) >= int(p * 2**32)
    return torch.where(keep, x * (1 / (1 - p)), 0.0)


class _CounterDropout(torch.autograd.Function):
    """Draws the mask again in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx, x: Tensor, key: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(key)
        ctx.p = p
        return _drop(x, key, p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor):
        (key,) = ctx.saved_tensors
        return _drop(d_out, key, ctx.p), None, None
