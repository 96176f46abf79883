"""Muon (Jordan et al. 2024) for many matrices at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon

from sparse_tx.attention.kernels import no_kernels
from sparse_tx.training.tables import table, usable

DTYPE = torch.bfloat16  # of the iteration: Triton's interpreter multiplies only others rightly


class BatchedMuon(Muon):
    """torch's Muon with all matrices of one shape in one product: the launches do not grow with the layers.

    A group's "rows" cut its matrices into parts that are made orthogonal each by itself; None leaves them whole. Like a
    fused AdamW it divides gradients by `grad_scale` and changes nothing where `found_inf` is 1, if they are set.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self._step(params, group)
        return loss

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """params: of one shape (R, C)."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        device = params[0].device
        if no_kernels(device) is None and usable([*params, *grads, *buffers]):
            self._launch(params, grads, buffers, group)
        else:
            self._passes(params, grads, buffers, group)

    def _launch(self, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
        """`_passes` by two kernels, which move 24 bytes a parameter around the products where torch moves some 144."""
        from sparse_tx.training import muon_kernels as kernels

        device = params[0].device
        scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        each = zip(grads, buffers, params, strict=True)
        addresses = table(tuple((g.data_ptr(), b.data_ptr(), p.data_ptr()) for g, b, p in each), device)
        moments = kernels.gather(addresses, params[0].shape, scale, found_inf, group["momentum"])
        for first, x, step in _updates(moments, group):
            kernels.apply(addresses, x, first, found_inf, group["lr"] * group["weight_decay"], step)

    def _passes(self, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
        stacked = torch.stack(grads)
        if self.grad_scale is not None:
            stacked = stacked / self.grad_scale
        kept = torch.ones((), device=stacked.device)
        if self.found_inf is not None:
            kept = 1 - self.found_inf
            stacked = torch.where(kept.bool(), stacked, 0.0)
        moments = torch.stack(buffers).lerp_(stacked, (1 - group["momentum"]) * kept)
        torch._foreach_copy_(buffers, list(moments.unbind()))
        moments = stacked.lerp_(moments, group["momentum"]).bfloat16()
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * kept)
        for first, x, step in _updates(moments, group):
            rows = [p[first : first + x.shape[1]] for p in params]
            torch._foreach_add_(rows, list((x.to(rows[0].dtype) * (-step * kept)).unbind()))


def _updates(moments: Tensor, group: dict[str, Any]) -> Iterator[tuple[int, Tensor, float]]:
    """Of the parts of moments (N, R, C), neighbours of one size together: their first row, their orthogonal matrices,
    and by how much of them to step.
    """
    N, R, C = moments.shape
    first = 0
    for rows, alike in groupby(group["rows"] or [R]):
        total = rows * len(list(alike))
        parts = moments[:, first : first + total].reshape(-1, rows, C)
        x = orthogonal(parts, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = 0.2 * math.sqrt(max(rows, C))  # match_rms_adamw
        yield first, x.view(N, total, C), group["lr"] * rate
        first += total


def orthogonal(g: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly orthogonal matrices by Newton-Schulz in bfloat16 (Jordan et al. 2024). g: (N, R, C). Returns them dense.

    x x' of wide matrices, x' x of tall ones: the smaller product, and no other layout.
    """
    x = g.to(DTYPE)
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)).contiguous()
    if no_kernels(x.device, x.dtype) is None:
        from sparse_tx.training import muon_products

        return muon_products.iterated(x, coefficients, steps)
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, gram, beta=a) if tall else torch.baddbmm(x, gram, x, beta=a)
    return x
