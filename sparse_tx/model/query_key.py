"""What queries and keys go through before attention, where a model asks for it: a norm, a rotation, or both."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

EPS = 1e-6


class QueryKey(nn.Module):
    """(..., S, 2 qk + C) -> the same, projections whose queries and keys are normed and turned, head by head.

    norm: divide each head's queries and keys by their root mean square (Henry et al. 2020); queries are then scaled by
    the head's learned temperature exp(t). rotary: pairs of a head's numbers are turned by angles that grow with the
    position (Su et al. 2021). "axes": half of the pairs along the first axis of `shape`, that of the position tables,
    half along the second (the rows and columns that the patterns know), from 1 radian a place to 1 over the axis.
    "position": all pairs with the position in the sequence, from 1 radian to 1 over all of it. "none": not turned.
    """

    turns: Tensor | None  # (places of both axes, D / 4 or D / 2, 2): cosine and sine by place on an axis

    def __init__(self, heads: int, qk: int, *, norm: bool, rotary: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.heads, self.qk, self.norm, self.rotary = heads, qk, norm, rotary
        rows, columns, *inner = shape
        self.axes = rows, columns, math.prod(inner)  # places on both, and positions to a place on the second
        if norm:
            self.temperature = nn.Parameter(torch.zeros(heads))
        turns = None
        if rotary == "axes":
            turns = torch.cat([_turns(n, 1, n, qk // heads // 4) for n in (rows, columns)])
        elif rotary == "position":
            # Turned by the row's first position, then by the place in the row: two short tables in place of a long one.
            columns *= math.prod(inner)
            self.axes = rows, columns, 1
            whole, pairs = rows * columns, qk // heads // 2
            turns = torch.cat([_turns(rows, columns, whole, pairs), _turns(columns, 1, whole, pairs)])
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
        by_row, by_column = self.turns[row], self.turns[rows + column]
        if self.rotary == "axes":
            return torch.cat([by_row, by_column], 1)
        (a, b), (c, d) = by_row.unbind(-1), by_column.unbind(-1)
        return torch.stack([a * c - b * d, b * c + a * d], -1)


def _turns(places: int, step: int, length: int, pairs: int) -> Tensor:
    """(places, pairs, 2): cosine and sine of angles at 0, step, 2 step, ..., from 1 to 1 / length radians a place."""
    speeds = torch.tensor([length ** (-f / max(1, pairs - 1)) for f in range(pairs)], dtype=torch.float64)
    angles = step * torch.arange(places, dtype=torch.float64)[:, None] * speeds
    return torch.stack([angles.cos(), angles.sin()], -1).float()
