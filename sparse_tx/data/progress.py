"""A line on stderr for work that takes long; silence for work that does not."""

import sys
import time

QUIET_SECONDS = 2.0


class Progress:
    """Counts units of work; speaks only after two seconds, and to a file at most every ten."""

    def __init__(self, what: str, total: int | None, unit: str = "", scale: float = 1.0):
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.done = 0
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + QUIET_SECONDS
        self._spoke = False

    def add(self, amount: int):
        self.done += amount
        if time.monotonic() >= self._next:
            self._say(end="\r" if self._terminal else "\n")
            self._next = time.monotonic() + (0.2 if self._terminal else 10.0)
            self._spoke = True

    def close(self):
        if self._spoke:
            self._say(end="\n")

    def _say(self, end: str):
        of = f" of {self.total / self.scale:,.0f}" if self.total else ""
        print(
            f"{self.what}: {self.done / self.scale:,.0f}{of} {self.unit}".rstrip(), end=end, file=sys.stderr, flush=True
        )
