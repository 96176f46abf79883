"""Token and position embeddings (Child et al. 2019, section 5.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_TOKENS = 1 << 16  # of one-hot rows at a time in the backward pass: 64 MB in float32


class _Embed(torch.autograd.Function):
    """Table look-up whose gradient is a product with one-hot rows: deterministic, where a scatter-add is not."""

    @staticmethod
    def forward(ctx, table: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.dtype = table.shape, table.dtype
        return table[tokens]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor):
        (tokens,) = ctx.saved_tensors
        V, C = ctx.shape
        rows, ids = d_out.reshape(-1, C).to(ctx.dtype), tokens.reshape(-1)
        values = torch.arange(V, device=ids.device)
        grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=d_out.device)
        with torch.autocast(d_out.device.type, enabled=False):
            for start in range(0, len(ids), _TOKENS):
                part = slice(start, start + _TOKENS)
                grad += (ids[part] == values[:, None]).to(ctx.dtype) @ rows[part]
        return grad, None


class Embedding(nn.Module):
    """tokens (B, S) -> (B, S, C): the tokens shifted right behind a learned start token, plus position embeddings.

    The position embedding added to the input that predicts x_i is that of i itself: the model knows where it writes.
    Positions are the sum of one learned table per axis of `shape` (an image's rows, columns and channels, or the rows
    and columns of a matrix), added as broadcast views, so that their gradient is a plain sum.
    """

    def __init__(self, vocabulary: int, width: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(vocabulary, width))
        self.start = nn.Parameter(torch.empty(width))
        self.positions = nn.ParameterList(nn.Parameter(torch.empty(n, width)) for n in shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, std 0.125 / sqrt(d) for tokens and 0.125 / sqrt(d n_emb) for positions (section 6 of the paper)."""
        std = 0.125 * self.start.shape[0] ** -0.5
        nn.init.normal_(self.tokens, std=std)
        nn.init.normal_(self.start, std=std)
        for table in self.positions:
            nn.init.normal_(table, std=std * len(self.positions) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        B, S = tokens.shape
        embedded = _Embed.apply(self.tokens, tokens[:, :-1].long())
        shifted = torch.cat([self.start.expand(B, 1, -1), embedded], 1)
        return shifted + self._positions()[:S]

    def at(self, previous: Tensor, position: Tensor) -> Tensor:
        """(B, C): the input at one position alone. previous: (B,) tokens before it; position: (1,) int64."""
        before = torch.where(position == 0, self.start, self.tokens[previous.long()])
        rows, place = [], position
        for table in reversed(list(self.positions)):
            rows.append(table[place % len(table)])
            place = place // len(table)
        total = rows[-1]
        for row in rows[-2::-1]:
            total = total + row
        return before + total

    def _positions(self) -> Tensor:
        """(context, C)."""
        total = self.positions[0]
        for table in list(self.positions)[1:]:
            total = total[..., None, :] + table  # one axis more: (n1, ..., nk, C)
        return total.flatten(0, -2)
