"""What a model costs before it is run: parameters and operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_tx.model.spec import ModelSpec
from sparse_tx.model.transformer import Transformer, count_parameters


@dataclass(frozen=True)
class Cost:
    """Of one window in training: `flops` counts each product forward and backward once (no recompute), `pairs` the
    mean keys a query over layers and heads."""

    parameters: int
    flops: int
    pairs: float


def cost_of(spec: ModelSpec) -> Cost:
    with torch.device("meta"):
        parameters = count_parameters(Transformer(spec))
    n, heads = spec.context, spec.heads
    counts = {p: p.count(n) for layer in spec.patterns() for p in dict.fromkeys(layer)}
    pairs = [counts[p] for layer in spec.patterns() for p in layer]
    weights = spec.layers * (spec.width * (2 * spec.qk + 2 * spec.width) + 2 * spec.width * spec.ff) + spec.width * 256
    forward = 2 * weights * n + sum(2 * p * (spec.qk + spec.width) // heads for p in pairs)
    return Cost(parameters, 3 * forward, sum(pairs) / len(pairs) / n)
