"""Optimizers and the schedule of Child et al. 2019 (section 6), by steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sparse_tx.config import OptimizerConfig
from sparse_tx.model import Transformer


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
        """params: of one shape (R, C); stacked (N, R, C)."""
        momentum, lr, decay = group["momentum"], group["lr"], group["weight_decay"]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = torch.stack([p.grad for p in params if p.grad is not None])
        if self.grad_scale is not None:
            grads = grads / self.grad_scale
        kept = torch.ones((), device=grads.device)
        if self.found_inf is not None:
            kept = 1 - self.found_inf
            grads = torch.where(kept.bool(), grads, 0.0)
        moments = torch.stack(buffers).lerp_(grads, (1 - momentum) * kept)
        torch._foreach_copy_(buffers, list(moments.unbind()))
        numbers = group["ns_coefficients"], group["ns_steps"], group["eps"]
        updates = []
        for part in grads.lerp_(moments, momentum).split(group["rows"] or [params[0].shape[0]], 1):
            rate = 0.2 * math.sqrt(max(part.shape[1:]))  # match_rms_adamw
            updates.append(rate * orthogonal(part, *numbers).to(params[0].dtype))
        torch._foreach_mul_(params, 1 - lr * decay * kept)
        torch._foreach_add_(params, list((torch.cat(updates, 1) * (-lr * kept)).unbind()))


def orthogonal(g: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly orthogonal matrices by Newton-Schulz in bfloat16 (Jordan et al. 2024). g: (N, R, C)."""
    a, b, c = coefficients
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def takes_scale(optimizer: Optimizer) -> bool:
    """Whether it divides gradients by its `grad_scale` and leaves a step out by its `found_inf`, both on the device."""
    if isinstance(optimizer, MuonAdamW):
        return all(map(takes_scale, optimizer.parts))
    return isinstance(optimizer, BatchedMuon) or bool(optimizer.defaults.get("fused"))


class MuonAdamW(Optimizer):
    """Muon for some matrices and AdamW for the rest, as one optimizer: one schedule, one state, one step."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, muon: BatchedMuon, adamw: AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state, so that base-class saving and loading cover both."""
        muon, adamw = self.parts
        split = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = self.param_groups[:split], self.param_groups[split:]
        muon.state = adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            if takes_scale(self):
                part.grad_scale, part.found_inf = self.grad_scale, self.found_inf  # type: ignore[union-attr]
            part.step()
        return loss


def build_optimizer(model: Transformer, config: OptimizerConfig, *, fused: bool) -> Optimizer:
    """Weight decay on parameters of two dimensions or more. fused: few kernels for AdamW, which take a scale.

    Muon takes the matrices of the blocks, queries, keys and values as three: 0.02 to 0.05 bits/byte lower so after
    1,000 steps of the demo (docs/experiments.md).
    """
    projections, others = _matrices(model) if config.name == "muon" else ([], [])
    taken = set(map(id, [*projections, *others]))
    rest = [p for p in model.parameters() if id(p) not in taken]
    adamw = AdamW(
        [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused or None,
    )
    if not taken:
        return adamw
    width = projections[0].shape[1]
    qk = (projections[0].shape[0] - width) // 2
    groups: list[dict[str, Any]] = [{"params": projections, "rows": [qk, qk, width]}, {"params": others, "rows": None}]
    muon = BatchedMuon(
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAdamW(muon, adamw)


def _matrices(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The projections to queries, keys and values of the blocks, and their other matrices."""
    named = [(name, p) for name, p in model.blocks.named_parameters() if p.dim() == 2]  # type: ignore[union-attr, operator]
    projections = [p for name, p in named if name.endswith("attention.qkv.weight")]
    return projections, [p for name, p in named if not name.endswith("attention.qkv.weight")]


def warmup_steps(config: OptimizerConfig, max_steps: int) -> int:
    return min(5000, max_steps // 10) if config.warmup is None else config.warmup


def schedule(step: int, warmup: int, max_steps: int, hold: float = 0.0, decay: str = "cosine") -> float:
    """Share of the learning rate at a step counted from 0: linear warm-up, 1 for a share `hold` of what comes after,
    then along a cosine or a line to 0 at max_steps."""
    if step < warmup:
        return (step + 1) / warmup
    first = warmup + hold * (max_steps - warmup)
    if step < first:
        return 1.0
    done = min(1.0, (step - first) / max(1e-9, max_steps - first))
    return 1 - done if decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, max_steps: int) -> LambdaLR:
    warmup = warmup_steps(config, max_steps)
    return LambdaLR(optimizer, lambda step: schedule(step, warmup, max_steps, config.hold, config.decay))
