"""The windows of an evaluation, and which bytes of each are scored."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

from sparse_tx.errors import UserError


class Window(NamedTuple):
    start: int  # first byte in the split; for images the row
    length: int
    first_scored: int  # positions in the window from here on are scored


class EvaluationWindows(Sequence[Window]):
    """All windows of a split of `length` bytes (images: rows), in order.

    min_context 0: windows of the context side by side, the last one short, every byte scored once. min_context m > 0:
    windows step by context - m and score what has at least m bytes before it in the window; the last one is shifted
    back to end with the split and scores only the rest: every byte from m on exactly once. A split shorter than the
    context is one short window. limit: only so many windows, spread evenly.
    """

    def __init__(
        self, length: int, context: int, min_context: int = 0, *, kind: str = "text", limit: int | None = None
    ):
        if not 0 <= min_context < context:
            raise UserError(
                f"evaluation.min_context={min_context} does not fit the context {context}: 0 to {context - 1}"
            )
        if kind == "image" and min_context:
            raise UserError(
                f"evaluation.min_context={min_context} is for text and audio: of an image every byte is scored"
            )
        if length <= min_context:
            raise UserError(f"a split of {length} bytes has nothing to score with evaluation.min_context={min_context}")
        if limit is not None and limit < 1:
            raise UserError(f"an evaluation of {limit} windows has nothing to score: 1 or more")
        self.length, self.context, self.min_context, self.kind = length, context, min_context, kind
        self.step = context - min_context
        if kind == "image":
            count = length
        else:
            count = 1 + max(0, -(-(length - context) // self.step))
        chosen = count if limit is None else min(count, limit)
        self.indices = [k * count // chosen for k in range(chosen)]

    def shard(self, rank: int, world: int) -> "EvaluationWindows":
        """Every world-th window from `rank`: all ranks together have each window once."""
        part = object.__new__(EvaluationWindows)
        part.__dict__.update(self.__dict__)
        part.indices = self.indices[rank::world]
        return part

    @property
    def scored(self) -> int:
        """How many bytes are scored in all of them."""
        return sum(window.length - window.first_scored for window in self)

    def batches(self, size: int) -> list[list[Window]]:
        """In order, at most `size` together, and only windows of one length."""
        grouped: list[list[Window]] = []
        for window in self:
            if grouped and len(grouped[-1]) < size and grouped[-1][0].length == window.length:
                grouped[-1].append(window)
            else:
                grouped.append([window])
        return grouped

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Window]:
        return map(self._window, self.indices)

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._window(k) for k in self.indices[index]]
        return self._window(self.indices[index])

    def _window(self, k: int) -> Window:
        if self.kind == "image":
            return Window(k, self.context, 0)
        start = k * self.step
        if start + self.context <= self.length:
            return Window(start, self.context, self.min_context)
        if k == 0 or self.min_context == 0:
            return Window(start, self.length - start, self.min_context)
        shifted = self.length - self.context
        scored_until = start - self.step + self.context  # by the window before
        return Window(shifted, self.context, scored_until - shifted)
