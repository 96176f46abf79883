"""The LightningModule: one step, its loss in bits per dim, and the scores of validation."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from sparse_tx.config import TrainConfig
from sparse_tx.evaluation.bits import Score
from sparse_tx.model import ModelSpec, Transformer
from sparse_tx.model.loss import position_nats
from sparse_tx.training.loggers import run_id_of
from sparse_tx.training.optimizer import build_optimizer, build_schedule
from sparse_tx.training.step import Gradients, StepLoss
from sparse_tx.training.update import Clipping

CHECKPOINT_FORMAT = 1


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether torch.compile is used on what is not fused."""
    return config.trainer.compile == "true" or (config.trainer.compile == "auto" and device.type == "cuda")


class TrainingModule(LightningModule):
    """Trains a model of `spec`: that of the config, with what it leaves open (`model.recompute=auto`) decided."""

    def __init__(
        self, config: TrainConfig, spec: ModelSpec | None = None, *, blocks: str = "plain", capture: str = "false"
    ) -> None:
        """blocks: how they run, of `memory.INNER`. capture: whether a step is one CUDA graph; "auto" goes on without
        where that fails, and says so."""
        super().__init__()
        self.kind = blocks
        self.config, self.spec = config, spec or config.model_spec()
        self.model = Transformer(self.spec)
        self.score = Score()
        parameters = list(self.model.parameters())
        self.clipping = Clipping(parameters, config.optimizer.clip)
        # In a tuple, so that the model's weights are not registered a second time.
        self._loss: tuple[StepLoss] = (StepLoss(self.model, config.seed),)
        self._gradients: Gradients | None = None
        if capture != "false":
            failed = self._not_captured if capture == "auto" else None
            self._gradients = Gradients(self._loss[0], parameters, failed=failed)

    def setup(self, stage: str) -> None:
        if self.kind == "compiled":
            self.model.compile_blocks()
        self._loss[0].compiled = compiles(self.config, self.trainer.strategy.root_device)

    def on_fit_start(self) -> None:
        if self.kind == "fused":
            residual = torch.bfloat16 if self.config.trainer.residual == "bfloat16" else None
            self.model.fuse_blocks(residual)  # only here are the weights on their device

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens, rows = batch["tokens"], batch["rows"]
        if self._gradients is not None:
            loss = self._gradients(tokens, self.global_step, rows)
        else:
            # As a tensor on the device, so that compiled code is not made again for each step, and nothing waits.
            step = torch.full((), self.global_step, dtype=torch.long, device=tokens.device)
            loss = self._loss[0](tokens, step, rows)
        self.log("train/bits_per_dim", loss.detach() / math.log(2), sync_dist=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._gradients is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        # Lightning asks for it after the step's gradients have been taken.
        if self._gradients is None:
            super().optimizer_zero_grad(*args, **kwargs)

    def _not_captured(self, error: Exception) -> None:
        print(
            f"the step cannot be captured as a CUDA graph and is run launch by launch: {str(error).splitlines()[0]} "
            "(trainer.cuda_graph=false does not try)",
            flush=True,
        )

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.log("train/gradient_norm", self.clipping(getattr(optimizer, "optimizer", optimizer)))

    def on_validation_epoch_start(self) -> None:
        self.score = Score()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        tokens = batch["tokens"]
        nats = position_nats(self.model.hidden(tokens), self.model.norm, self.model.output, tokens)
        self.score.add_nats(nats, batch["first_scored"])

    def on_validation_epoch_end(self) -> None:
        # Sums over ranks, then one division: the same number on all of them, so that their mean is it.
        self.log("val/bits_per_dim", self.score.reduced(self.device).bits_per_dim, sync_dist=True)

    def configure_optimizers(self) -> Any:
        config = self.config
        cuda = self.trainer.strategy.root_device.type == "cuda"
        # A fused AdamW unscales gradients itself, and would leave none to clip under a loss scale.
        optimizer = build_optimizer(self.model, config.optimizer, fused=cuda and config.trainer.precision != "16-mixed")
        scheduler = build_schedule(optimizer, config.optimizer, config.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """All that is needed to build, evaluate and sample the model again, as plain data."""
        checkpoint["sparse_tx"] = {
            "format": CHECKPOINT_FORMAT,
            "data": self.trainer.datamodule.prepared.title,  # type: ignore[attr-defined]
            "model": self.spec.plain(),
            "config": self.config.plain(),
            "wandb_run": run_id_of(self.trainer.loggers),
        }
