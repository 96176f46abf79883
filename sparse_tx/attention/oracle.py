"""The reference: dense attention under the pattern's mask, in any dtype. Every other backend is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_tx.attention.patterns import AllowsKeys, dense_mask


def oracle_attention(
    q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[AllowsKeys], scale: float
) -> tuple[Tensor, Tensor]:
    """q, k: (B, S, H, Dqk), v: (B, S, H, Dv), patterns: one per head. Makes (B, H, S, S) scores: for short S only.

    Returns out (B, S, H, Dv) and lse (B, H, S); a query with no key gives 0 and -inf, and passes no gradient.
    """
    masks = {p: dense_mask(p, q.shape[1], q.device) for p in dict.fromkeys(patterns)}
    mask = torch.stack([masks[p] for p in patterns])  # (H, S, S)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    empty = ~mask.any(-1)  # (H, S)
    # A row of -inf alone would make NaN of its gradient: give it finite scores and take its weights away again.
    scores = scores.masked_fill(empty[..., None], 0.0)
    weights = scores.softmax(-1).masked_fill(~mask, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse
