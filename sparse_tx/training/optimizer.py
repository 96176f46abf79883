"""Optimizers and the schedule of Child et al. 2019 (section 6), by steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sparse_tx.config import OptimizerConfig
from sparse_tx.model import Transformer


class MuonAdamW(Optimizer):
    """torch's Muon for some matrices and AdamW for the rest, as one optimizer: one schedule, one state, one step."""

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self._parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state, so that base-class saving and loading cover both."""
        muon, adamw = self._parts
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
        for part in self._parts:
            part.step()
        return loss


def build_optimizer(model: Transformer, config: OptimizerConfig, *, fused: bool) -> Optimizer:
    """Weight decay on parameters of two dimensions or more. fused: one CUDA kernel for all of AdamW."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] if config.name == "muon" else []
    taken = set(map(id, matrices))
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
    if not matrices:
        return adamw
    muon = Muon(
        matrices,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAdamW(muon, adamw)


def warmup_steps(config: OptimizerConfig, max_steps: int) -> int:
    return min(5000, max_steps // 10) if config.warmup is None else config.warmup


def schedule(step: int, warmup: int, max_steps: int) -> float:
    """Share of the learning rate at a step counted from 0: linear warm-up, then cosine to 0 at max_steps."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, max_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, max_steps: int) -> LambdaLR:
    warmup = warmup_steps(config, max_steps)
    return LambdaLR(optimizer, lambda step: schedule(step, warmup, max_steps))


def clip_gradients(model: nn.Module, largest: float) -> torch.Tensor:
    """Scale the gradient to norm `largest` at most. Returns its norm before, without waiting for the device."""
    return nn.utils.clip_grad_norm_(model.parameters(), largest, foreach=True)
