"""The residual block (Child et al. 2019, section 5.2): a = drop(attn(LN(h))), b = drop(ff(LN(h + a))), h + a + b."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_tx.attention import Pattern, packed_attention
from sparse_tx.model.dropout import counter_dropout
from sparse_tx.model.query_key import QueryKey
from sparse_tx.model.spec import ModelSpec


def _init(linear: nn.Linear, shrink: float = 1.0) -> None:
    """Normal with std sqrt(0.125 / d_in), as the released code has it (the paper's text disagrees), biases 0."""
    nn.init.normal_(linear.weight, std=shrink * (0.125 / linear.in_features) ** 0.5)
    nn.init.zeros_(linear.bias)


def _last(spec: ModelSpec) -> float:
    """What shrinks the matrices that add to the residual stream."""
    return 0.0 if spec.init == "zero" else (2 * spec.layers) ** -0.5


def activate(x: Tensor, name: str) -> Tensor:
    """The activation of the feed-forward: one of `spec.ACTIVATIONS`."""
    return x.relu().square() if name == "relu2" else x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head attention, one pattern per head; q, k and v are views of one projection."""

    def __init__(self, spec: ModelSpec, patterns: tuple[Pattern, ...]) -> None:
        super().__init__()
        self.heads, self.qk = spec.heads, spec.qk
        self.patterns, self.backend = patterns, spec.attention.backend
        self.qkv = nn.Linear(spec.width, 2 * spec.qk + spec.width)
        self.out = nn.Linear(spec.width, spec.width)
        self.query_key: QueryKey | None = None
        if spec.qk_norm or spec.rotary != "none":
            self.query_key = QueryKey(
                spec.heads, spec.qk, norm=spec.qk_norm, rotary=spec.rotary, shape=spec.position_shape()
            )
        _init(self.qkv)
        _init(self.out, _last(spec))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.query_key is not None:
            qkv = self.query_key(qkv)
        out = packed_attention(qkv, self.heads, self.qk, self.patterns, backend=self.backend)  # (B, S, H, Dv)
        return self.out(out.flatten(-2))


class FeedForward(nn.Module):
    """W2 f(W1 x + b1) + b2, with the GELU f(x) = x sigmoid(1.702 x) (Hendrycks & Gimpel 2016) in the paper."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.expand = nn.Linear(spec.width, spec.ff)
        self.contract = nn.Linear(spec.ff, spec.width)
        _init(self.expand)
        _init(self.contract, _last(spec))

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(activate(self.expand(x), self.activation))


class ResidualBlock(nn.Module):
    """(B, S, C) -> (B, S, C). `recompute` runs the attention half, or the whole block, again in the backward pass."""

    def __init__(self, spec: ModelSpec, patterns: tuple[Pattern, ...]) -> None:
        super().__init__()
        self.dropout, self.recompute = spec.dropout, spec.recompute
        self.attention_norm = nn.LayerNorm(spec.width)
        self.attention = Attention(spec, patterns)
        self.ff_norm = nn.LayerNorm(spec.width)
        self.ff = FeedForward(spec)

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
