"""Random numbers from counters: a hash of what a draw belongs to, with no generator whose state could differ."""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def mix(x: Tensor, inject: Tensor | int = 0) -> Tensor:
    """A 32-bit finaliser with full avalanche (multipliers found by hash-prospector, C. Wellons 2018). x: int64.

    In int64 with both multipliers below 2^31 no product overflows, which would be undefined in compiled C++.
    """
    x = x ^ (x >> 16)
    x = ((x * 0x21F0AAAD) + inject) & MASK32
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & MASK32
    return x ^ (x >> 15)


def uniform(seed: int, position: int | Tensor, samples: Tensor) -> Tensor:
    """float64 in [0, 1), by (seed, position, sample) alone. position (int64, if a tensor) and samples broadcast."""
    key = mix(torch.full_like(samples, seed & MASK32))
    key = mix(mix(key ^ (seed >> 32 & MASK32)) ^ (position & MASK32))
    high, low = mix(key + samples), mix(mix(key + 0x9E3779B9) + samples)
    return (high.double() * 2**21 + (low >> 11).double()) * 2**-53
