"""Work that takes long, shown on stderr: a bar on a terminal, a line now and then elsewhere, nothing if it is short."""

import sys
import time
from typing import Any

QUIET_SECONDS = 2.0
LINE_SECONDS = 10.0


class Progress:
    """Counts units of work, with how many a second and the time left.

    `total` and `done` in the same unit, shown divided by `scale`; `done` is there from before. Used by `with`: a bar
    that is not stopped would leave the terminal without its cursor.
    """

    def __init__(self, what: str, total: int | None, unit: str = "", scale: float = 1.0, done: int = 0):
        self.what, self.total, self.unit, self.scale, self.done = what, total, unit, scale, done
        self._before, self._started = done, time.monotonic()
        self._next = self._started + QUIET_SECONDS
        self._spoke = False
        self._bar: Any = None

    def add(self, amount: int):
        self.done += amount
        now = time.monotonic()
        if now < self._next:
            return
        if sys.stderr.isatty():
            self._draw(now)
            self._next = now + 0.2
        else:
            self._say(now)
            self._next = now + LINE_SECONDS
        self._spoke = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object):
        if self._bar is not None:
            self._draw(time.monotonic())
            self._bar.stop()
            self._bar = None
        elif self._spoke:
            self._say(time.monotonic())

    def _draw(self, now: float):
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}")]
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, count="")
            self._bar.start()
        self._bar.update(self._task, completed=self.done, count=self._count(now))

    def _count(self, now: float) -> str:
        of = f" of {self.total / self.scale:,.0f}" if self.total else ""
        text = f"{self.done / self.scale:,.0f}{of} {self.unit}".rstrip()
        rate = (self.done - self._before) / max(now - self._started, 1e-9)  # units a second
        if rate:
            shown = rate / self.scale
            text += f", {shown:,.{0 if shown >= 10 else 1}f} {self.unit}/s"
            if self.total and self.total > self.done:
                text += f", {(self.total - self.done) / rate:,.0f} s left"
        return text

    def _say(self, now: float):
        print(f"{self.what}: {self._count(now)}", file=sys.stderr, flush=True)
