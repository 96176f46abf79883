"""Bits per dim: the sum of nats over the predicted bytes, divided by their count and by ln 2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass
class Score:
    """Sums of nats (float64) and counts, kept apart: they are added over batches and ranks and divided once."""

    nats: Tensor | float = 0.0
    count: Tensor | int = 0

    def add(self, logits: Tensor, tokens: Tensor, first_scored: Tensor | None = None) -> None:
        """logits (B, S, V) at i predict tokens (B, S) at i; of each row only positions >= first_scored (B,) count."""
        nats = cross_entropy(logits.float().flatten(0, 1), tokens.long().flatten(), reduction="none").view(tokens.shape)
        self.add_nats(nats, first_scored)

    def add_nats(self, nats: Tensor, first_scored: Tensor | None = None) -> None:
        """nats (B, S) by position; of each row only positions >= first_scored (B,) count."""
        scored = torch.ones_like(nats, dtype=torch.bool)
        if first_scored is not None:
            scored = torch.arange(nats.shape[1], device=nats.device) >= first_scored[:, None]
        self.nats = self.nats + nats.double().masked_fill(~scored, 0.0).sum()
        self.count = self.count + scored.sum()

    def reduced(self, device: torch.device) -> Score:
        """The sums over all ranks."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        both = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in (self.nats, self.count)])
        torch.distributed.all_reduce(both)
        return Score(both[0], both[1])

    @property
    def bits_per_dim(self) -> float:
        count = int(self.count)
        return float(self.nats) / (count * math.log(2)) if count else math.nan


class ByContext:
    """Scores by how many bytes of its window a byte has before it, from 0 and then from 16 times powers of 4.

    What more context is worth to a model: one forward pass predicts with every length up to its own.
    """

    def __init__(self) -> None:
        self.scores: dict[int, Score] = {}  # by the least number of bytes before

    def add_nats(self, nats: Tensor, first_scored: Tensor) -> None:
        """As of `Score`."""
        first, last = 0, 16
        while first < nats.shape[1]:
            score = self.scores.setdefault(first, Score())
            score.add_nats(nats[:, first:last], first_scored - first)
            first, last = last, 4 * last

    @property
    def bits(self) -> dict[int, float]:
        """Bits per byte of the ranges in which bytes were scored, by the least number of bytes before."""
        return {first: score.bits_per_dim for first, score in self.scores.items() if int(score.count)}
