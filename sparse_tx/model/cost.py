"""What a model costs before it is run: parameters, operations, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_tx.model.spec import ModelSpec
from sparse_tx.model.transformer import Transformer, count_parameters


@dataclass(frozen=True)
class Cost:
    """Of one window in training: `flops` counts each product forward and backward once (no recompute), `pairs` the
    mean keys a query over layers and heads; `state_bytes` are weights, gradients, AdamW and EMA in float32."""

    parameters: int
    flops: int
    pairs: float
    state_bytes: int
    activation_bytes: int


def cost_of(spec: ModelSpec, *, half: bool) -> Cost:
    """half: activations in a 16-bit type, with the residual stream, norms and log-sum-exps in float32."""
    with torch.device("meta"):
        parameters = count_parameters(Transformer(spec))
    n, heads = spec.context, spec.heads
    counts = {p: p.count(n) for layer in spec.patterns() for p in dict.fromkeys(layer)}
    pairs = [counts[p] for layer in spec.patterns() for p in layer]
    weights = spec.layers * (spec.width * (2 * spec.qk + 2 * spec.width) + 2 * spec.width * spec.ff) + spec.width * 256
    forward = 2 * weights * n + sum(2 * p * (spec.qk + spec.width) // heads for p in pairs)
    small = 2 if half else 4
    residual, norm = 4 * spec.width, small * spec.width
    attention = norm + small * (2 * spec.qk + spec.width) + small * spec.width + 4 * heads
    feed_forward = residual + norm + 3 * small * spec.ff
    kept = {"none": residual + attention + feed_forward, "attention": residual + feed_forward, "block": residual}
    activations = n * (spec.layers * kept[spec.recompute] + 2 * 4 * 256)
    if spec.recompute != "none":
        activations += n * (attention + feed_forward)  # of the one layer that is run again
    return Cost(parameters, 3 * forward, sum(pairs) / len(pairs) / n, 20 * parameters, activations)
