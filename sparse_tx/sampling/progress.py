"""How far the drawing is: a bar with bytes per second and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_QUIET = 10.0  # seconds between lines


class DrawProgress:
    """Counts the bytes drawn, on stderr. Use as a context; call it with how many more have been drawn."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._started = time.monotonic()
        self._next = self._started + _QUIET
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("drawing"), BarColumn(), _Bytes(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> DrawProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, more: int) -> None:
        self.done += more
        if self._bar is not None:
            self._bar.update(self._task, advance=more)
        elif (now := time.monotonic()) >= self._next:
            rate = self.done / (now - self._started)
            left = (self.total - self.done) / rate
            print(
                f"drawn {self.done:,} of {self.total:,} bytes, {rate:,.0f} bytes/s, {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            self._next = now + _QUIET


class _Bytes(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        return Text(f"{int(task.completed):,}/{int(task.total or 0):,} bytes  {speed:,.0f} bytes/s")
