"""How a run shows that it goes on: bits, speed, utilisation and time left, on a bar or in plain lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from sparse_tx.training.callbacks import Deadline
from sparse_tx.training.peak import device_peak
from sparse_tx.training.words import clock, readable


@dataclass(frozen=True)
class Entry:
    """What is known of training after a stretch of steps."""

    step: int
    bits: float
    bytes_per_second: float
    utilisation: float | None  # share of the devices' peak FLOP/s
    learning_rate: float
    seconds_left: float


class Display(Protocol):
    """Where progress is seen. Steps are counted from the start of the whole run, also after a resume.

    training: whether steps are taken; else the last weights are scored.
    """

    def start(self, step: int, *, training: bool = True) -> None: ...
    def step(self, step: int) -> None: ...
    def entry(self, entry: Entry) -> None: ...
    def scoring(self, done: int, total: int) -> None: ...
    def scored(self, step: int, bits: float) -> None: ...
    def stop(self) -> None: ...


class Lines:
    """A line an entry: for files, pipes and notebooks, where a bar would be thousands of lines."""

    def __init__(self, max_steps: int, unit: str) -> None:
        self.max_steps, self.unit = max_steps, unit

    def start(self, step: int, *, training: bool = True) -> None:
        pass

    def step(self, step: int) -> None:
        pass

    def entry(self, entry: Entry) -> None:
        used = "" if entry.utilisation is None else f"  {entry.utilisation:.1%} of peak"
        print(
            f"step {entry.step}/{self.max_steps}  train {entry.bits:.4f} {self.unit}  "
            f"{readable(entry.bytes_per_second)} bytes/s{used}  lr {entry.learning_rate:.2e}  "
            f"left {clock(entry.seconds_left)}",
            flush=True,
        )

    def scoring(self, done: int, total: int) -> None:
        pass

    def scored(self, step: int, bits: float) -> None:
        print(f"step {step}/{self.max_steps}  validation {bits:.4f} {self.unit}", flush=True)

    def stop(self) -> None:
        pass


class Bar:
    """A bar for the steps, one for a validation while it goes on, and the numbers in a line below.

    Lightning's own bar reads every metric at every step, which makes a GPU wait for each of them.
    """

    def __init__(self, max_steps: int, unit: str, console: Console | None = None) -> None:
        self.max_steps, self.unit = max_steps, unit
        self._console = console or Console()
        self._live: _TwoLines | None = None
        self._entry: Entry | None = None
        self._bits: float | None = None

    def start(self, step: int, *, training: bool = True) -> None:
        if self._live is None:
            self._live = _TwoLines(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                refresh_per_second=4,
                expand=True,
                transient=not training,
            )
            self._steps = self._live.add_task(
                "training", total=self.max_steps, completed=step, visible=training, left=""
            )
            self._windows = self._live.add_task("validation", total=None, visible=False, left="")
            self._show()
            self._live.start()

    def step(self, step: int) -> None:
        if self._live is not None:
            self._live.update(self._steps, completed=step)

    def entry(self, entry: Entry) -> None:
        self._entry = entry
        if self._live is not None:
            self._live.update(self._steps, left=f"left {clock(entry.seconds_left)}")
        self._show()

    def scoring(self, done: int, total: int) -> None:
        if self._live is not None:
            if done <= 1:
                self._live.reset(self._windows, total=total, visible=True)
            self._live.update(self._windows, completed=done, total=total, visible=True)

    def scored(self, step: int, bits: float) -> None:
        self._bits = bits
        if self._live is not None:
            self._live.update(self._windows, visible=False)
        self._show()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        if self._live is None:
            return
        known = []
        if self._entry is not None:
            known.append(f"train {self._entry.bits:.4f}")
        if self._bits is not None:
            known.append(f"val {self._bits:.4f}")
        words = [f"{' '.join(known)} {self.unit}"] if known else []
        if self._entry is not None:
            words.append(f"{readable(self._entry.bytes_per_second)} bytes/s")
            if self._entry.utilisation is not None:
                words.append(f"{self._entry.utilisation:.1%} of peak")
            words.append(f"lr {self._entry.learning_rate:.1e}")
        self._live.numbers = Text("  ".join(words), style="dim", overflow="ellipsis", no_wrap=True)


class _TwoLines(RichProgress):
    numbers: RenderableType = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self.numbers


def display(max_steps: int, unit: str) -> Display:
    """A bar on a terminal that can draw one, else lines."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Bar(max_steps, unit) if terminal else Lines(max_steps, unit)


class Progress(Callback):
    """Logs bytes per second, utilisation and the learning rate, and keeps the display up to date.

    Speed is of training alone, over the stretch since the last entry: validation and checkpoints are left out. The time
    left counts them in. Between entries nothing is read from the device.
    """

    def __init__(
        self,
        display: Display,
        *,
        every: int,
        max_steps: int,
        bytes_a_step: int,
        flops_a_step: int,
        half: bool,
        deadline: Deadline | None = None,
    ) -> None:
        self.display, self.every, self.max_steps = display, every, max_steps
        self.bytes_a_step, self.flops_a_step, self.half = bytes_a_step, flops_a_step, half
        self.deadline = deadline
        self.seconds = 0.0  # of training, so far
        self.steps = 0  # in those seconds
        self.earlier = 0.0  # seconds of training before the checkpoint that the run goes on from
        self.peak: float | None = None  # FLOP/s of all devices
        self._mark: tuple[float, int] | None = None
        self._first: tuple[float, int] | None = None  # the first entry: what comes before it is compiling, mostly

    @property
    def bytes_per_second(self) -> float:
        return self.steps * self.bytes_a_step / self.seconds if self.seconds else 0.0

    def utilisation(self, bytes_per_second: float) -> float | None:
        """Model FLOPs (each product once forward, twice backward, nothing run again) over the peak; None if unknown."""
        if self.peak is None:
            return None
        return bytes_per_second / self.bytes_a_step * self.flops_a_step / self.peak

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.earlier + self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peak = device_peak(trainer.strategy.root_device, half=self.half)
        self.peak = None if peak is None else peak * trainer.world_size
        if trainer.is_global_zero:
            self.display.start(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._mark is None:
            self._mark = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if trainer.is_global_zero:
            self.display.step(step)
        if self._mark is None or (step % self.every and step != self.max_steps):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        elapsed, steps = self._count(now, step)
        if not steps:
            return
        rate = steps * self.bytes_a_step / elapsed
        learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        numbers = {"train/bytes_per_second": rate, "train/learning_rate": learning_rate}
        numbers["train/seconds"] = self.earlier + self.seconds
        numbers["train/skipped"] = pl_module.clipping.skipped  # type: ignore[union-attr, assignment]
        utilisation = self.utilisation(rate)
        if utilisation is not None:
            numbers["train/utilisation"] = utilisation
        pl_module.log_dict(numbers)
        if trainer.is_global_zero:
            bits = float(trainer.callback_metrics["train/bits_per_dim"])
            left = self._left(now, step, elapsed / steps)
            self.display.entry(Entry(step, bits, rate, utilisation, learning_rate, left))

    def _count(self, now: float, step: int) -> tuple[float, int]:
        """Ends a stretch of training and begins the next. Returns its seconds and steps."""
        assert self._mark is not None
        elapsed, steps = now - self._mark[0], step - self._mark[1]
        self._mark = now, step
        if steps:
            self.seconds += elapsed
            self.steps += steps
        return elapsed, steps

    def leave_out(self, seconds: float) -> None:
        """Seconds since the last entry that were not training."""
        if self._mark is not None:
            self._mark = self._mark[0] + seconds, self._mark[1]

    def _left(self, now: float, step: int, seconds_a_step: float) -> float:
        if self._first is None:
            self._first = now, step
        else:
            seconds_a_step = (now - self._first[0]) / (step - self._first[1])
        left = (self.max_steps - step) * seconds_a_step
        allowed = None if self.deadline is None else self.deadline.time_remaining()
        return left if allowed is None else max(0.0, min(left, allowed))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause(trainer)

    def _pause(self, trainer: Trainer) -> None:
        """What was trained since the last entry counts; what comes until the next batch does not."""
        if self._mark is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._count(time.perf_counter(), trainer.global_step)
            self._mark = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause(trainer)
        if trainer.is_global_zero:
            self.display.start(trainer.global_step, training=trainer.state.fn == TrainerFn.FITTING)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.is_global_zero:
            self.display.scoring(batch_idx + 1, int(trainer.num_val_batches[0]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            self.display.scored(trainer.global_step, float(trainer.callback_metrics["val/bits_per_dim"]))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.display.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.display.stop()
