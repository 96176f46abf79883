"""What queries and keys go through before attention, where a model asks for it: a norm, a rotation, or both."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

EPS = 1e-6


class QueryKey(nn.Module):
    """(..., S, 2 qk + C) -> the same, projections whose queries and keys are normed and turned, head by head.

    norm: divide each head's queries and keys by their root mean square (Henry et al. 2020); queries are then scaled by
    the head's learned temperature exp(t). shape: of the position tables; pairs of a head's numbers are turned by
    angles that grow with the position (Su et al. 2021), half of the pairs along the first axis, half along the second
    (the rows and columns that the patterns know), from 1 radian a place to 1 over the axis; None turns nothing.
    """

    turns: Tensor | None  # (places of both axes, D / 4, 2): cosine and sine by place on an axis

    def __init__(self, heads: int, qk: int, *, norm: bool, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.heads, self.qk, self.norm = heads, qk, norm
        rows, columns, *inner = shape or (1, 1)
        self.axes = rows, columns, math.prod(inner)  # places on both, and positions to a place on the second
        if norm:
            self.temperature = nn.Parameter(torch.zeros(heads))
        turns = None if shape is None else _turns((rows, columns), qk // heads // 4)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, qkv: Tensor, position: Tensor | None = None) -> Tensor:
        """position: (S,) int64, or (1,) for all; 0 to S - 1 if None."""
        x = qkv[..., : 2 * self.qk].unflatten(-1, (2, self.heads, -1))  # (..., S, 2, H, D)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.norm:
            scale = torch.stack([self.temperature.exp(), torch.ones_like(self.temperature)])  # (2, H)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * scale[..., None]
        if self.turns is not None:
            if position is None:
                position = torch.arange(qkv.shape[-2], device=qkv.device)
            cos, sin = self.angles(position)[..., None, None, :, :].unbind(-1)  # (S, 1, 1, D / 2)
            a, b = x.chunk(2, -1)
            x = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([x.flatten(-3).to(qkv.dtype), qkv[..., 2 * self.qk :]], -1)

    def angles(self, position: Tensor) -> Tensor:
        """(S, D / 2, 2): cosine and sine of each pair's angle. position: (S,) int64."""
        assert self.turns is not None
        rows, columns, inner = self.axes
        row, column = position // (columns * inner), position // inner % columns
        return torch.cat([self.turns[row], self.turns[rows + column]], 1)


def _turns(lengths: tuple[int, ...], pairs: int) -> Tensor:
    rows = []
    for n in lengths:
        speeds = torch.tensor([n ** (-f / max(1, pairs - 1)) for f in range(pairs)], dtype=torch.float64)
        angles = torch.arange(n, dtype=torch.float64)[:, None] * speeds
        rows.append(torch.stack([angles.cos(), angles.sin()], -1))
    return torch.cat(rows).float()
