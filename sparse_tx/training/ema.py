"""The moving average of the weights that evaluation uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from sparse_tx.training.update import move_average


def decay_at(step: int, largest: float) -> float:
    """Decay after step t counted from 0: min(largest, (1 + t) / (10 + t)), so that short runs are judged fairly."""
    return min(largest, (1 + step) / (10 + step))


class EMA(Callback):
    """Averages the weights in float32 after each step, evaluates with them, and keeps them as checkpoint["ema"].

    Lightning's EMAWeightAveraging has no ramp and stores the average in place of the weights.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._step = 0
        self._swapped = False
        self._followed: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.average:
            self.average = {n: p.detach().float().clone() for n, p in self._weights(pl_module).items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = self._weights(pl_module)
        self.average = {n: t.to(weights[n].device, torch.float32) for n, t in self.average.items()}
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        share = 1 - decay_at(self._step, self.decay)
        self._step = trainer.global_step
        skip = pl_module.clipping.skip  # type: ignore[union-attr]
        move_average(list(self.average.values()), self._live(pl_module), share, skip)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._swapped:  # whatever is saved from here on holds the trained weights where they belong
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = {n: t.detach().clone() for n, t in self.average.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.average = {n: t.clone() for n, t in checkpoint["ema"].items()}

    @contextmanager
    def applied(self, pl_module: LightningModule) -> Iterator[None]:
        """The module has the averaged weights inside, and its own again after."""
        self._swap(pl_module)
        try:
            yield
        finally:
            self._swap(pl_module)

    def _swap(self, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for name, weight in self._weights(pl_module).items():
                held = weight.detach().clone()
                weight.copy_(self.average[name])
                self.average[name].copy_(held)
        self._swapped = not self._swapped

    def _live(self, pl_module: LightningModule) -> list[Tensor]:
        """The weights in the order of the average, looked up once: names of 1,500 parameters take the CPU 10 ms."""
        if not self._followed:
            weights = self._weights(pl_module)
            self._followed = [weights[name] for name in self.average]
        return self._followed

    @staticmethod
    def _weights(pl_module: LightningModule) -> dict[str, Tensor]:
        return dict(pl_module.model.named_parameters())  # type: ignore[union-attr, operator, arg-type]
