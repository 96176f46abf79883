"""Optimizers and the schedule of Child et al. 2019 (section 6), by steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sparse_tx.config import OptimizerConfig
from sparse_tx.model import Transformer
from sparse_tx.training.muon import BatchedMuon


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
