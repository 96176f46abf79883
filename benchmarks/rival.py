"""A plain transformer as a careful user writes it: what training is measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from masks import mask_of
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from sparse_tx.model import ModelSpec
from sparse_tx.model.embedding import Embedding
from sparse_tx.model.spec import VOCABULARY

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class RivalAttention(nn.Module):
    """attend: (B, H, S, Dqk), (B, H, S, Dqk), (B, H, S, Dv) -> (B, H, S, Dv); None passes the values by."""

    def __init__(self, spec: ModelSpec, attend: Attend | None) -> None:
        super().__init__()
        self.widths, self.heads, self.attend = (spec.qk, spec.qk, spec.width), spec.heads, attend
        self.qkv = nn.Linear(spec.width, 2 * spec.qk + spec.width)
        self.out = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).split(self.widths, -1))
        out = v if self.attend is None else self.attend(q, k, v)
        return self.out(out.transpose(1, 2).flatten(-2))


class RivalBlock(nn.Module):
    def __init__(self, spec: ModelSpec, attend: Attend | None) -> None:
        super().__init__()
        self.attention_norm, self.ff_norm = nn.LayerNorm(spec.width), nn.LayerNorm(spec.width)
        self.attention = RivalAttention(spec, attend)
        self.expand, self.contract = nn.Linear(spec.width, spec.ff), nn.Linear(spec.ff, spec.width)
        self.drop = nn.Dropout(spec.dropout)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.drop(self.attention(self.attention_norm(h)))
        u = self.expand(self.ff_norm(h))
        return h + self.drop(self.contract(u * torch.sigmoid(1.702 * u)))


class Rival(nn.Module):
    """A plain transformer of the spec's sizes; attends: one a layer."""

    def __init__(self, spec: ModelSpec, attends: list[Attend | None], again: bool = False) -> None:
        """again: whether each block is run again in the backward pass."""
        super().__init__()
        self.again = again
        self.embedding = Embedding(VOCABULARY, spec.width, spec.position_shape())
        self.blocks = nn.ModuleList(RivalBlock(spec, attend) for attend in attends)
        self.norm, self.output = nn.LayerNorm(spec.width), nn.Linear(spec.width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, step: Tensor, rows: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.again else block(h)
        logits = self.output(self.norm(h))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten().long())


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex_attends(spec: ModelSpec, device: torch.device) -> list[Attend]:
    compiled = device.type == "cuda"
    attends = {}
    for heads in dict.fromkeys(spec.patterns()):
        mask, count = mask_of(heads)
        n = spec.context
        blocks = create_block_mask(mask, None, count, n, n, device=str(device), _compile=compiled)
        attends[heads] = lambda q, k, v, blocks=blocks: flex_attention(q, k, v, block_mask=blocks)
    return [attends[heads] for heads in spec.patterns()]
