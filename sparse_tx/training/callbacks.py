"""When a run stops, the trace of its steps, and the checkpoints it leaves."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from sparse_tx.errors import UserError
from sparse_tx.training.saving import NotWritten

LAST, BEST = "last.ckpt", "best.ckpt"


class Deadline(Timer):
    """Ends the run at the time given. A resumed run has the whole time again: nothing is taken from the checkpoint."""

    def __init__(self, days_hours_minutes_seconds: str) -> None:
        days, hours, minutes, seconds = map(int, days_hours_minutes_seconds.split(":"))
        super().__init__(timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds), verbose=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Diverged(UserError):
    """The loss is no number any more."""


SKIPPED_AT_MOST = 50  # steps in a row


class Divergence(Callback):
    """Ends a run whose loss is no number at two entries in a row, or whose steps are all left out: it goes nowhere."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._lost = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every:
            return
        bits = float(trainer.callback_metrics["train/bits_per_dim"])
        if not math.isfinite(bits) and self._lost:
            raise Diverged(
                f"the run diverged: its loss is {bits} at step {trainer.global_step}; use a smaller optimizer.lr, or "
                "go on from an earlier checkpoint with resume=PATH"
            )
        self._lost = not math.isfinite(bits)
        in_a_row = int(pl_module.clipping.in_a_row)  # type: ignore[arg-type, union-attr]
        if in_a_row >= SKIPPED_AT_MOST:
            raise Diverged(
                f"the gradient was not finite in the last {in_a_row} steps, which were left out: the run diverged "
                f"before step {trainer.global_step}; use a smaller optimizer.lr, or go on from an earlier checkpoint "
                "with resume=PATH"
            )


class Trace(Callback):
    """Traces steps 3 to 5 of the run into a file that Perfetto opens (ui.perfetto.dev), and their costs as a table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profiler: torch.profiler.profile | None = None
        self._written = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            schedule = torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
            self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)
            self._profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, *_: Any) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            if not self._written:
                print("trace: none, as this run ended before its fifth step", flush=True)

    def _write(self, profiler: torch.profiler.profile) -> None:
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        (self.folder / "trace.txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=40))
        self._written = True
        print(f"trace: {self.folder / 'trace.json'} (open it in ui.perfetto.dev)", flush=True)


class LastCheckpoint(Callback):
    """Leaves last.ckpt however the run ends: at its last step, at its deadline, or by an interrupt or an error."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LAST

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        # A checkpoint left in the middle of a step counts the batch that it never finished: without this the run that
        # goes on from it would validate a step early from then on, and log what it does at the step after.
        loop = trainer.fit_loop.epoch_loop
        loop.batch_progress.total.ready = trainer.global_step + 1
        loop._batches_that_stepped = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # With one process alone: after an error on one rank the others would never come to the saving.
        finite = math.isfinite(float(trainer.callback_metrics.get("train/bits_per_dim", 0.0)))
        if trainer.world_size > 1 or trainer.global_step == 0 or not finite or isinstance(exception, NotWritten):
            return
        try:
            trainer.save_checkpoint(self.path)
        except NotWritten as error:  # beside the error that ends the run, not in its place
            print(f"error: {error}", file=sys.stderr, flush=True)


def checkpoint_callbacks(folder: Path, every: int, keep: int) -> list[Callback]:
    """The newest few, the best by validation, and the last. Names hold nothing that Hydra cannot parse."""
    newest = ModelCheckpoint(
        folder,
        "step-{step:08d}",
        monitor="step",
        mode="max",
        save_top_k=keep,
        every_n_train_steps=every,
        auto_insert_metric_name=False,
    )
    best = ModelCheckpoint(
        folder, BEST.removesuffix(".ckpt"), monitor="val/bits_per_dim", mode="min", enable_version_counter=False
    )
    return [LastCheckpoint(folder), newest, best]
