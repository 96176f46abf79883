"""What a run reports while it goes, when it stops, and the checkpoints it leaves."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, Timer

LAST, BEST = "last.ckpt", "best.ckpt"


class Progress(Callback):
    """Logs bytes per second and the learning rate; prints a line every so many steps where there is no terminal.

    Bytes per second are of training alone, over the stretch since the last entry: validation and checkpoints are left
    out.
    """

    def __init__(self, *, every: int, max_steps: int, bytes_a_step: int, unit: str, lines: bool) -> None:
        self.every, self.max_steps, self.bytes_a_step = every, max_steps, bytes_a_step
        self.unit, self.lines = unit, lines
        self.seconds = 0.0  # of training, so far
        self._mark: tuple[float, int] | None = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._mark is None:
            self._mark = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self._mark is None or (step % self.every and step != self.max_steps):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed, steps = time.perf_counter() - self._mark[0], step - self._mark[1]
        self.seconds += elapsed
        rate = steps * self.bytes_a_step / elapsed
        learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        pl_module.log_dict({"train/bytes_per_second": rate, "train/learning_rate": learning_rate})
        if self.lines and trainer.is_global_zero:
            bits = float(trainer.callback_metrics["train/bits_per_dim"])
            left = (self.max_steps - step) * elapsed / max(1, steps)
            print(
                f"step {step}/{self.max_steps}  train {bits:.4f} {self.unit}  {readable(rate)}bytes/s  "
                f"lr {learning_rate:.2e}  left {clock(left)}",
                flush=True,
            )
        self._mark = time.perf_counter(), step

    def leave_out(self, seconds: float) -> None:
        """Seconds since the last entry that were not training."""
        if self._mark is not None:
            self._mark = self._mark[0] + seconds, self._mark[1]

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._mark = None

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if self.lines and trainer.is_global_zero and trainer.training:
            bits = float(trainer.callback_metrics["val/bits_per_dim"])
            print(f"step {trainer.global_step}/{self.max_steps}  validation {bits:.4f} {self.unit}", flush=True)


class Bar(RichProgressBar):
    """Lightning's bar in this project's units."""

    def __init__(self, every: int, unit: str) -> None:
        super().__init__(refresh_rate=every)
        self.unit = unit

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"  # by steps: Lightning's "Epoch 0/-2" says nothing here

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # type: ignore[override]
        seen = trainer.callback_metrics
        shown = {"train/bits_per_dim": f"train {self.unit}", "val/bits_per_dim": f"val {self.unit}"}
        metrics: dict[str, Any] = {label: f"{float(seen[key]):.4f}" for key, label in shown.items() if key in seen}
        if "train/bytes_per_second" in seen:
            metrics["bytes/s"] = readable(float(seen["train/bytes_per_second"]))
        return metrics


class Deadline(Timer):
    """Ends the run at the time given. A resumed run has the whole time again: nothing is taken from the checkpoint."""

    def __init__(self, days_hours_minutes_seconds: str) -> None:
        days, hours, minutes, seconds = map(int, days_hours_minutes_seconds.split(":"))
        super().__init__(timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds), verbose=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Trace(Callback):
    """Traces steps 3 to 5 of the run into a file that Perfetto opens (ui.perfetto.dev), and their costs as a table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profiler: torch.profiler.profile | None = None

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

    def _write(self, profiler: torch.profiler.profile) -> None:
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        (self.folder / "trace.txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=40))
        print(f"trace: {self.folder / 'trace.json'}", flush=True)


class LastCheckpoint(Callback):
    """Leaves last.ckpt however the run ends: at its last step, at its deadline, or by an interrupt or an error."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LAST

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # With one process alone: after an error on one rank the others would never come to the saving.
        finite = math.isfinite(float(trainer.callback_metrics.get("train/bits_per_dim", 0.0)))
        if trainer.world_size == 1 and trainer.global_step > 0 and finite:
            trainer.save_checkpoint(self.path)


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


def readable(number: float) -> str:
    """1234567 -> "1.23M"."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}" if number < 999.5 * factor else f"{number / factor:.0f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Seconds as 1d 02:03:04, without the days where there are none."""
    days, rest = divmod(round(seconds), 86400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text
