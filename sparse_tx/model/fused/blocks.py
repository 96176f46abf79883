"""The forward pass of all residual blocks by fused kernels: the same model as `block.py`, in fewer trips to memory.

A product whose result is added to the residual stream, the dropout, the sum and the LayerNorm that follows are one
step, also across the border of two blocks: between blocks travel the stream and its norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sparse_tx.attention import packed_attention
from sparse_tx.model.block import ResidualBlock
from sparse_tx.model.fused import ROWS
from sparse_tx.model.fused.linear import feed_forward, joined, linear
from sparse_tx.model.fused.norm import norm
from sparse_tx.model.fused.query_key import prepared


def _kept(again: str, rows: int) -> str:
    """What the feed-forward keeps of its hidden units under a recompute policy: see `feed_forward`."""
    if again in ("block", "cheap"):
        # They are made again for the time of one block; of very many rows even that is too much at once.
        return "both" if rows <= ROWS else "none"
    return {"activation": "u", "feedforward": "none"}.get(again, "both")


def rounded(blocks: list[ResidualBlock], dtype: torch.dtype) -> list[list[Tensor]]:
    """The blocks' matrices, and the biases that the products add, in the dtype of the products, without gradients.

    By layer: qkv and its bias, out, expand and its bias, contract. Rounded once a forward pass by one launch for many
    tensors, where autocast does so for each: 128 layers have 768. Into memory of each pass's own: a backward pass, or
    the replay of a captured one, may still need those of another.
    """
    chosen: list[Tensor] = []
    for block in blocks:
        qkv, out, expand, contract = block.attention.qkv, block.attention.out, block.ff.expand, block.ff.contract
        chosen += [qkv.weight, qkv.bias, out.weight, expand.weight, expand.bias, contract.weight]
    chosen = [p.detach() for p in chosen]
    if dtype != chosen[0].dtype:
        own = [torch.empty_like(p, dtype=dtype) for p in chosen]
        torch._foreach_copy_(own, chosen)
        chosen = own
    return [chosen[i : i + 6] for i in range(0, len(chosen), 6)]


class FusedBlocks:
    """Runs the blocks of a Transformer. residual: dtype of the residual stream, None for that of the embedding."""

    def __init__(self, blocks: list[ResidualBlock], residual: torch.dtype | None) -> None:
        self.blocks, self.residual = blocks, residual

    def __call__(self, h: Tensor, keys: Tensor | None) -> Tensor:
        """h (B, S, C) -> (B, S, C), before the final norm. keys: (layers, 2, B, 2) of `dropout_keys`."""
        kind = h.device.type
        dtype = (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.blocks[0].ff_norm.weight.dtype
        )
        if self.residual is not None:
            h = h.to(self.residual)
        with torch.autocast(kind, enabled=False):
            x = None
            for layer, (block, low) in enumerate(zip(self.blocks, rounded(self.blocks, dtype), strict=True)):
                following = self.blocks[layer + 1].attention_norm if layer + 1 < len(self.blocks) else None
                h, x = _run(block, low, h, x, None if keys is None else keys[layer], following)
        return h


def _run(block: ResidualBlock, low: list[Tensor], h: Tensor, x: Tensor | None, keys: Tensor | None, following):
    """One block. h: the residual stream, x: its norm, made here if None; following: the norm of the next block."""
    again = block.recompute if torch.is_grad_enabled() else "none"
    if again in ("block", "cheap"):
        # One tensor a layer is kept between blocks, so each makes its norm.
        contexts = {"context_fn": _keep_attention} if again == "cheap" else {}
        return _again(lambda h: _block(block, low, h, None, keys, None, again)[0], h, **contexts), None
    return _block(block, low, h, x, keys, following, again)


def _block(block: ResidualBlock, low: list[Tensor], h: Tensor, x: Tensor | None, keys: Tensor | None, following, again):
    if x is None:
        h, x = norm(h, block.attention_norm, low[0].dtype)
    keys_of = (None, None) if keys is None else (keys[0], keys[1])
    attend = partial(_attention, block, low, keys_of[0])
    h, x = _again(attend, h, x) if again == "attention" else attend(h, x)
    kept = _kept(again, x.shape[0] * x.shape[1])
    return feed_forward(x, block.ff, low[3:], kept, h, keys_of[1], block.dropout, following)


def _attention(block: ResidualBlock, low: list[Tensor], key: Tensor | None, h: Tensor, x: Tensor):
    attention = block.attention
    qkv = linear(x, attention.qkv, low[0], low[1])
    if attention.query_key is not None:
        qkv = prepared(qkv, attention.query_key)
    out = packed_attention(qkv, attention.heads, attention.qk, attention.patterns, backend=attention.backend)
    return joined(out.flatten(-2), attention.out, low[2], h, key, block.dropout, block.ff_norm)


def _again(function: Callable, *args, **contexts):
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **contexts)


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    dear = op.name() == "sparse_tx::packed_attention"
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention():
    """Attention's output and log-sum-exp are kept, all else is made again: it costs the most a byte."""
    return create_selective_checkpoint_contexts(_policy)
