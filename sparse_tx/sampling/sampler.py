"""Drawing bytes from a model, one position at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_tx.model import Transformer
from sparse_tx.model.counter import uniform


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1,
    first: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """prompt: (B, P) uint8, P may be 0. Returns (B, length) uint8 that start with it.

    temperature 0 takes the likeliest byte. The draw at a position depends on (seed, sample, position) alone, where
    samples are numbered from `first`. on_step is called with the number of bytes done.
    """
    B, P = prompt.shape
    tokens = torch.zeros(B, length, dtype=torch.uint8, device=prompt.device)
    tokens[:, :P] = prompt[:, :length]
    samples = torch.arange(first, first + B, device=prompt.device)
    for i in range(P, length):
        # Logits at i do not depend on tokens from i on, so that a prefix is all there is to compute.
        logits = model(tokens[:, : i + 1].long())[:, i].float()
        tokens[:, i] = draw(logits, uniform(seed, i, samples), temperature, top_k, top_p).to(torch.uint8)
        if on_step is not None:
            on_step(i + 1)
    return tokens


def draw(logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits: (B, V) float32, u: (B,) in [0, 1). Returns (B,) int64, by inversion of the distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        probabilities = logits.softmax(-1).gather(-1, order)
        before = probabilities.cumsum(-1) - probabilities  # the likeliest is always kept
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    cumulative = logits.softmax(-1).cumsum(-1)
    # Below the total even after rounding: a draw never lands on a byte without probability.
    total = cumulative[:, -1:]
    target = torch.minimum(u.double()[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return (cumulative <= target).sum(-1)
