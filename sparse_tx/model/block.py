"""The residual block (Child et al. 2019, section 5.2): a = drop(attn(LN(h))), b = drop(ff(LN(h + a))), h + a + b."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_tx.attention import Pattern, packed_attention
from sparse_tx.model.dropout import counter_dropout


def _init(linear: nn.Linear, shrink: float = 1.0) -> None:
    """Normal with std sqrt(0.125 / d_in), as the released code has it (the paper's text disagrees), biases 0."""
    nn.init.normal_(linear.weight, std=shrink * (0.125 / linear.in_features) ** 0.5)
    nn.init.zeros_(linear.bias)


class Attention(nn.Module):
    """Multi-head attention, one pattern per head; q, k and v are views of one projection."""

    def __init__(
        self, width: int, heads: int, qk: int, patterns: tuple[Pattern, ...], backend: str, layers: int
    ) -> None:
        super().__init__()
        self.heads, self.qk = heads, qk
        self.patterns, self.backend = patterns, backend
        self.qkv = nn.Linear(width, 2 * qk + width)
        self.out = nn.Linear(width, width)
        _init(self.qkv)
        _init(self.out, shrink=(2 * layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = packed_attention(self.qkv(x), self.heads, self.qk, self.patterns, backend=self.backend)  # (B, S, H, Dv)
        return self.out(out.flatten(-2))


class FeedForward(nn.Module):
    """W2 f(W1 x + b1) + b2 with f(x) = x sigmoid(1.702 x), a GELU (Hendrycks & Gimpel 2016)."""

    def __init__(self, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, inner)
        self.contract = nn.Linear(inner, width)
        _init(self.expand)
        _init(self.contract, shrink=(2 * layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        return self.contract(x * torch.sigmoid(1.702 * x))


class ResidualBlock(nn.Module):
    """(B, S, C) -> (B, S, C). `recompute` runs the attention half, or the whole block, again in the backward pass."""

    def __init__(
        self,
        width: int,
        heads: int,
        qk: int,
        ff: int,
        patterns: tuple[Pattern, ...],
        *,
        backend: str = "auto",
        dropout: float = 0.0,
        recompute: str = "none",
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.dropout, self.recompute = dropout, recompute
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, qk, patterns, backend, layers)
        self.ff_norm = nn.LayerNorm(width)
        self.ff = FeedForward(width, ff, layers)

    def forward(self, h: Tensor, keys: Tensor | None = None) -> Tensor:
        """keys: (2, B, 2) of this layer from `dropout_keys`; None drops nothing."""
        if self.recompute == "block" and torch.is_grad_enabled():
            return _again(self._block, h, keys)
        return self._block(h, keys)

    def _block(self, h: Tensor, keys: Tensor | None) -> Tensor:
        if self.recompute == "attention" and torch.is_grad_enabled():
            a = _again(self._attend, h, keys)
        else:
            a = self._attend(h, keys)
        h = h + a
        return h + self._drop(self.ff(self.ff_norm(h)), keys, 1)

    def _attend(self, h: Tensor, keys: Tensor | None) -> Tensor:
        return self._drop(self.attention(self.attention_norm(h)), keys, 0)

    def _drop(self, x: Tensor, keys: Tensor | None, site: int) -> Tensor:
        return x if keys is None or self.dropout == 0 else counter_dropout(x, keys[site], self.dropout)


def _again(function, *args):
    # Dropout keeps no random state, so there is none to save.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
