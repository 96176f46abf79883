"""Work that takes long, shown on stderr: a bar on a terminal, a line now and then elsewhere, nothing if it is short."""

import sys
import time
from typing import Any

QUIET_SECONDS = 2.0
LINE_SECONDS = 10.0


class Progress:
    """Counts units of work; `total` and `done` in the same unit, shown divided by `scale`.

    Used by `with`: a bar that is not stopped would leave the terminal without its cursor.
    """

    def __init__(self, what: str, total: int | None, unit: str = "", scale: float = 1.0, done: int = 0):
        self.what, self.total, self.unit, self.scale, self.done = what, total, unit, scale, done
        self._next = time.monotonic() + QUIET_SECONDS
        self._spoke = False
        self._bar: Any = None

    def add(self, amount: int):
        self.done += amount
        now = time.monotonic()
        if now < self._next:
            return
        if sys.stderr.isatty():
            self._draw()
            self._next = now + 0.2
        else:
            self._say()
            self._next = now + LINE_SECONDS
        self._spoke = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object):
        if self._bar is not None:
            self._draw()
            self._bar.stop()
            self._bar = None
        elif self._spoke:
            self._say()

    def _draw(self):
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}")]
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, count="")
            self._bar.start()
        self._bar.update(self._task, completed=self.done, count=self._count())

    def _count(self) -> str:
        of = f" of {self.total / self.scale:,.0f}" if self.total else ""
        return f"{self.done / self.scale:,.0f}{of} {self.unit}".rstrip()

    def _say(self):
        print(f"{self.what}: {self._count()}", file=sys.stderr, flush=True)
