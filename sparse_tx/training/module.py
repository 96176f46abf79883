"""The LightningModule: one step, its loss in bits per dim, and the scores of validation."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparse_tx.config import TrainConfig
from sparse_tx.evaluation.bits import Score
from sparse_tx.model import Transformer
from sparse_tx.training.loggers import run_id_of
from sparse_tx.training.optimizer import build_optimizer, build_schedule, clip_gradients

CHECKPOINT_FORMAT = 1


class StepLoss(nn.Module):
    """Mean nats of a batch: all of a step's forward pass as a function of tensors alone."""

    def __init__(self, model: Transformer, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed

    def forward(self, tokens: Tensor, step: Tensor, rows: Tensor) -> Tensor:
        """tokens: (B, S) int64, step: () int64, rows: (B,) int64."""
        logits = self.model(tokens, seed=self.seed, step=step, rows=rows)
        return cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


class TrainingModule(LightningModule):
    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config.model_spec())
        self.score = Score()
        # In a tuple, so that the model's weights are not registered a second time.
        self._loss: tuple[nn.Module] = (StepLoss(self.model, config.seed),)
        self._captured = False

    def setup(self, stage: str) -> None:
        wanted = self.config.trainer.compile
        if wanted == "true" or (wanted == "auto" and self.trainer.strategy.root_device.type == "cuda"):
            self.model.compile_blocks()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens = batch["tokens"].long()
        # As a tensor, so that neither compiled code nor a captured graph is made again for each step.
        step = torch.tensor(self.global_step, device=tokens.device)
        if self.config.trainer.cuda_graph and not self._captured:
            self._capture(tokens, step, batch["rows"])
        loss = self._loss[0](tokens, step, batch["rows"])
        self.log("train/bits_per_dim", loss.detach() / math.log(2), sync_dist=True)
        return loss

    def _capture(self, *inputs: Tensor) -> None:
        """Make the forward and the backward pass one CUDA graph each.

        128 thin layers are some ten thousand launches a step, which take the CPU three times as long as the GPU (the
        59M model on one H200: 340 ms of which the GPU works 109).
        """
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            torch.cuda.make_graphed_callables(self._loss[0], inputs)
        self._captured = True

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.log("train/gradient_norm", clip_gradients(self.model, self.config.optimizer.clip))

    def on_validation_epoch_start(self) -> None:
        self.score = Score()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.score.add(self.model(batch["tokens"].long()), batch["tokens"], batch["first_scored"])

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
            "model": self.config.model_spec().plain(),
            "config": self.config.plain(),
            "wandb_run": run_id_of(self.trainer.loggers),
        }
