"""Memory of a training step on one device before it is run, and what to run again so that it fits.

Bytes, with s those of an activation in a product's dtype and r those of an element of the residual stream; C width, Q
width of the queries, F inner width, H heads. A block keeps for each token

    its two sums h, the norms' mean and deviation                  2 r C + 16
    attention half: normed input, q k v, output, log-sum-exp       s (3 C + 2 Q) + 4 H
    feed-forward: normed input, inner activations                  s (C + i F)

where i is 2 in compiled blocks, 3 in plain ones (2 with relu2), 2 in fused ones and there 1 up to a width of WIDEST. A
norm of queries and keys adds 8 H to the attention half, in blocks that are not fused s (C + 2 Q) too, and 8 Q in plain
ones. Of these, by what is run again: `activation` drops s F (where i is 1, nothing); `feedforward` all of i s F;
`attention` the attention half, of which it keeps one sum, in fused blocks its norm; `cheap` keeps r C and the output
and log-sum-exp of attention itself, s C + 4 H; `block` keeps r C. What is dropped exists again for one block at a time.

Fused blocks with nothing run again took 34.8, 27.9 and 85.0 GiB (59M, batch 16; 95M, 4; 152M, 8; 28.8, 25.1 and 75.9
with a stream in 16 bits) on an H200; this says 34.8, 28.2 and 86.0 (28.7, 25.2, 76.7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_tx.model import ModelSpec, Transformer
from sparse_tx.model.fused import ROWS, WIDEST
from sparse_tx.model.loss import CHUNK
from sparse_tx.model.spec import RECOMPUTE, VOCABULARY
from sparse_tx.model.transformer import count_parameters

MARGIN = 0.92  # of the free memory: what is cut up between tensors, and the libraries' own
INNER = {"fused": 2, "compiled": 2, "plain": 3}  # kinds of blocks, and the inner activations that each keeps
PLAIN = ("none", "attention", "block")  # of RECOMPUTE, what blocks know that are not fused
_FIXED = 160 << 20  # workspaces of the products, one-hot rows of the embedding's gradient


@dataclass(frozen=True)
class Memory:
    """Bytes. state: weights, gradients, optimizer, average, weights in 16 bits. kept: by the forward pass until the
    backward pass. working: of one block in the backward pass, what it runs again, and the logits of a chunk."""

    state: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        return self.state + self.kept + self.working


def memory_of(
    spec: ModelSpec, batch: int, *, half: bool, blocks: str, optimizer: str = "adamw", residual: int = 4
) -> Memory:
    """Of a step of `batch` windows with `spec.recompute`. half: 16-bit products.

    blocks: one of INNER. residual: bytes of an element of h.
    """
    tokens = batch * spec.context
    s = 2 if half else 4
    whole, kept = _kept(spec, "none", s, residual, blocks), _kept(spec, spec.recompute, s, residual, blocks)
    C, Q, F, H = spec.width, spec.qk, spec.ff, spec.heads
    # Gradients: of h, of what the half gives, and inside of it the inner activation and its gradient, or q k v's.
    inside = max(2 * s * F, s * (2 * Q + 2 * C) + 4 * H)
    working = tokens * (residual * C + s * C + inside + (whole - kept))
    if blocks == "fused" and spec.recompute in ("feedforward", "cheap", "block") and tokens > ROWS:
        # Hidden units and their gradients exist for ROWS tokens at a time.
        rest = tokens * (residual * C + s * C + whole - kept - s * F - _activation(spec, s, blocks))
        working = rest + max(ROWS * 4 * s * F, tokens * (s * (2 * Q + 2 * C) + 4 * H))
    chunk = min(tokens, CHUNK) * (VOCABULARY * (3 * 4 + 2 * s) + C * (3 * 4 + s))
    with torch.device("meta"):
        model = Transformer(spec)
        parameters, inside_blocks = count_parameters(model), count_parameters(model.blocks)
    moments = 8 * parameters - (4 * inside_blocks if optimizer == "muon" else 0)
    state = parameters * (4 + 4 + 4) + moments + (s * inside_blocks if half else 0)
    # Outside of the blocks: what enters the first and what leaves the last, whose gradient is taken with the loss.
    outside = tokens * 2 * residual * C
    return Memory(state, spec.layers * tokens * kept + outside, max(working, chunk) + _FIXED)


def _kept(spec: ModelSpec, again: str, s: int, r: int, blocks: str) -> int:
    """Bytes a token that a block keeps."""
    C, Q, F, H = spec.width, spec.qk, spec.ff, spec.heads
    attention = r * C + 8 + s * (3 * C + 2 * Q) + 4 * H
    if spec.qk_norm:
        attention += {"fused": 0, "compiled": s * (C + 2 * Q), "plain": s * (C + 2 * Q) + 8 * Q}[blocks] + 8 * H
    activation = _activation(spec, s, blocks)
    inner = activation + s * F * ((2 if spec.activation == "relu2" else INNER[blocks]) - 1)
    feed_forward = r * C + 8 + s * C + inner
    return {
        "none": attention + feed_forward,
        "activation": attention + feed_forward - activation,
        "feedforward": attention + feed_forward - activation - s * F,
        "attention": feed_forward + (s * C if blocks == "fused" else r * C),
        "cheap": r * C + s * C + 4 * H,
        "block": r * C,
    }[again]


def _activation(spec: ModelSpec, s: int, blocks: str) -> int:
    """Bytes a token of the activation of hidden units."""
    return 0 if blocks == "fused" and spec.width <= WIDEST else s * spec.ff


def by_policy(
    spec: ModelSpec, batch: int, *, half: bool, blocks: str, optimizer: str, residual: int = 4
) -> dict[str, Memory]:
    """`memory_of` for each way to recompute that these blocks know, the fastest first."""
    return {
        again: memory_of(
            spec.recomputing(again), batch, half=half, blocks=blocks, optimizer=optimizer, residual=residual
        )
        for again in (RECOMPUTE if blocks == "fused" else PLAIN)
    }


def choose(policies: dict[str, Memory], free: int) -> str:
    """The fastest that fits into `free` bytes with a margin; else the one that takes least."""
    for again, memory in policies.items():
        if memory.total <= MARGIN * free:
            return again
    return min(policies, key=lambda again: policies[again].total)
