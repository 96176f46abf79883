"""Samples drawn during training: to the run's folder, and to the loggers that show images, sound and text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from sparse_tx.data.mu_law import RATE, expand_mu_law
from sparse_tx.model import ModelSpec
from sparse_tx.sampling.sampler import Sampler
from sparse_tx.sampling.spectrogram import spectrograms
from sparse_tx.sampling.writers import FORMATS, grid, image_of, write_grid, write_samples, write_spectrograms
from sparse_tx.training.ema import EMA
from sparse_tx.training.progress import Progress

SAMPLE_LENGTH = 12_288  # bytes at most where none are given: an image of 64 x 64, one second of sound
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class DrawSamples(Callback):
    """Draws the same few samples, by seed and number, from the averaged weights every so many steps.

    Nothing of the training changes by it: random numbers come from counters, weights are put back, and the seconds it
    takes do not count as training. Where the GPU's memory does not suffice it says so once and draws no more; samples
    that cannot be written are left out.
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        ema: EMA,
        progress: Progress,
        *,
        every: int,
        count: int,
        length: int,
        seed: int,
    ) -> None:
        self.folder, self.spec, self.ema, self.progress = folder, spec, ema, progress
        self.every, self.count, self.length, self.seed = every, count, length, seed
        self._drawn = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if not self.every or not trainer.is_global_zero or step % self.every or step == self._drawn:
            return
        self._drawn = step
        started = time.perf_counter()
        try:
            with self.ema.applied(pl_module):
                samples = self._draw(pl_module, _DTYPES.get(str(trainer.precision)))
        except torch.cuda.OutOfMemoryError:
            self.every = 0
            print("samples: not enough memory beside the training, no more are drawn", file=sys.stderr, flush=True)
            return
        try:
            self._write(samples, self.folder / f"step-{step:08d}")
            log_media(trainer, self.spec, samples, step)
        except OSError as error:  # a full disk, most often: worth no training run
            print(f"samples: those of step {step} are not written: {error}", file=sys.stderr, flush=True)
        self.progress.leave_out(time.perf_counter() - started)

    def _write(self, samples: np.ndarray, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_samples(samples, self.spec.context, FORMATS[self.spec.kind][0], folder)
        if self.spec.kind == "image":
            write_grid(list(samples), self.spec.context, folder)
        elif self.spec.kind == "audio":
            write_spectrograms(list(samples), folder)

    def _draw(self, pl_module: LightningModule, dtype: torch.dtype | None) -> np.ndarray:
        model: Any = pl_module.model
        sampler = Sampler(model, self.length, self.count, seed=self.seed, dtype=dtype)
        nothing = torch.zeros(1, 0, dtype=torch.uint8)
        return np.concatenate([s.tokens.cpu().numpy() for s in sampler.draw(nothing, self.count)])


def log_media(trainer: Trainer, spec: ModelSpec, samples: np.ndarray, step: int) -> None:
    """Hand samples (N, S) uint8 to the loggers that can show them: a grid of images, texts, or sound at 12 kHz
    and its spectrograms."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            _to_wandb(logger, spec, samples, step)
        elif isinstance(logger, TensorBoardLogger):
            _to_tensorboard(logger.experiment, spec, samples, step)


def _to_wandb(logger: WandbLogger, spec: ModelSpec, samples: np.ndarray, step: int) -> None:
    if spec.kind == "image":
        logger.log_image("samples", [grid([image_of(s, spec.context) for s in samples])], step=step)
    elif spec.kind == "audio":
        rates = [RATE] * len(samples)
        logger.log_audio("samples", [expand_mu_law(s) for s in samples], step=step, sample_rate=rates)
        logger.log_image("spectrograms", [spectrograms(list(samples))], step=step)
    else:
        rows = [[str(number), _text(s)] for number, s in enumerate(samples)]
        logger.log_text("samples", columns=["number", "text"], data=rows, step=step)


def _to_tensorboard(writer: Any, spec: ModelSpec, samples: np.ndarray, step: int) -> None:
    if spec.kind == "image":
        pixels = np.asarray(grid([image_of(s, spec.context) for s in samples]))
        writer.add_image("samples", pixels, step, dataformats="HWC")
        return
    if spec.kind == "audio":
        pixels = np.asarray(spectrograms(list(samples)).convert("RGB"))
        writer.add_image("spectrograms", pixels, step, dataformats="HWC")
    for number, sample in enumerate(samples):
        if spec.kind == "audio":
            wave = torch.from_numpy(expand_mu_law(sample) / np.float32(32768))
            writer.add_audio(f"samples/{number}", wave, step, sample_rate=RATE)
        else:
            writer.add_text(f"samples/{number}", f"```\n{_text(sample)}\n```", step)


def _text(sample: np.ndarray) -> str:
    return sample.tobytes().decode("utf-8", "replace")
