"""From gradients to the next weights without waiting for the device: the norm, clipping, steps left out, averages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_tx.attention.kernels import no_kernels
from sparse_tx.training.optimizer import takes_scale
from sparse_tx.training.tables import usable

_SLICE = 4 << 20  # elements of a difference at a time: 16 MB stay in the L2 cache until they are added


class Clipping:
    """Scales the gradient to norm `largest` at most, and leaves a step out whose gradient is not finite.

    Such a step changes neither weights nor the optimizer's state. On a GPU nothing waits to know: an optimizer that
    `takes_scale` divides by the scale and keeps everything as it is itself.
    """

    def __init__(self, parameters: list[nn.Parameter], largest: float) -> None:
        self.parameters, self.largest = parameters, largest
        self.skip: Tensor | None = None  # () float32 of the last step: 1 if it is left out
        self.skipped: Tensor | None = None  # () float32, steps so far
        self.in_a_row: Tensor | None = None

    def __call__(self, optimizer: Optimizer) -> Tensor:
        """Before `optimizer.step`. Returns the norm before clipping, () on the device."""
        given = [p for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in given if p.grad is not None], foreach=True)
        finite = torch.isfinite(norm)
        self.skip = (~finite).float()
        if self.skipped is None or self.in_a_row is None or self.skipped.device != norm.device:
            self.skipped, self.in_a_row = torch.zeros_like(self.skip), torch.zeros_like(self.skip)
        self.skipped = self.skipped + self.skip
        self.in_a_row = (self.in_a_row + 1) * self.skip
        if takes_scale(optimizer):
            # 1 / clip_grad_norm_'s coefficient, by which the optimizer divides: one pass over the gradients less.
            scale = ((norm + 1e-6) / self.largest).clamp(min=1.0)
            optimizer.grad_scale = torch.where(finite, scale, 1.0)  # type: ignore[attr-defined]
            optimizer.found_inf = self.skip  # type: ignore[attr-defined]
        elif norm.device.type == "cpu" and not finite:
            for p in given:
                p.grad = None  # what an optimizer passes over
        else:  # under a loss scale Lightning's scaler leaves the step out
            nn.utils.clip_grads_with_norm_(given, self.largest, norm, foreach=True)
        return norm


def move_average(average: list[Tensor], weights: list[Tensor], share: float, skip: Tensor | None = None) -> None:
    """average <- average + share (weights - average), unless skip () is 1; without waiting for it on a GPU."""
    with torch.no_grad():
        if skip is None or skip.device.type == "cpu":
            if skip is None or not skip:
                torch._foreach_lerp_(average, weights, share)
            return
        moved = share * (1 - skip)
        if no_kernels(skip.device) is None:
            from sparse_tx.training import average as kernel

            if usable([*average, *weights]):
                kernel.move_all(average, weights, moved)
                return
        for part in _slices(average):
            difference = torch._foreach_sub(weights[part], average[part])
            torch._foreach_mul_(difference, moved)
            torch._foreach_add_(average[part], difference)


def _slices(tensors: list[Tensor]) -> list[slice]:
    """Of consecutive tensors with at most `_SLICE` elements together, or of one that is larger."""
    found, start, elements = [], 0, 0
    for i, t in enumerate(tensors):
        if elements and elements + t.numel() > _SLICE:
            found.append(slice(start, i))
            start, elements = i, 0
        elements += t.numel()
    return [*found, slice(start, len(tensors))]
