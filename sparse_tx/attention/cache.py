"""What to keep of the keys while sampling: for each pattern only what a later query can still ask for.

A part of a pattern keeps its keys in a `Layout`, numbers that say in which slot position j lies, such that what one
query reads is one contiguous strip:

  Window(l)          a ring of l + 1
  Block(l)           the current block, written over by the next
  Column(l, reach)   column-major, so that a column is a strip; with a reach a ring of reach + 1 in each column
  Summary(l, c)      the c columns of every block, side by side
  Global(g)          the first g
  Full()             all

A union keeps each part on its own; a pattern that offers `allows` alone keeps everything. Which of the keys in a strip
a query sees is asked of the pattern itself (`allows`), with the positions that the slots hold, so that the patterns
stay the single definition; a key that two parts of a union hold belongs to the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from sparse_tx.attention.patterns import AllowsKeys, Block, Column, Full, Global, Pattern, Summary, Window


@dataclass(frozen=True)
class Layout:
    """Position j has the column j mod stride - first and the row j // stride. Kept are columns 0 to width - 1, and of
    each the newest `rows` rows, in a ring. by_column: slots run down the columns, and a query reads its own column."""

    stride: int
    width: int
    rows: int
    first: int = 0
    by_column: bool = False

    @property
    def slots(self) -> int:
        return self.width * self.rows

    @property
    def strip(self) -> int:
        """Slots that one query reads."""
        return self.rows if self.by_column else self.slots

    @property
    def spare(self) -> int:
        """1 where some positions are not kept: they are written to a slot behind the others, which nobody reads."""
        return int(self.width < self.stride)

    def slot(self, j: Tensor) -> Tensor:
        """The slot that position j is written to; `slots` if it is not kept."""
        column, row = j % self.stride - self.first, j // self.stride % self.rows
        at = column * self.rows + row if self.by_column else row * self.width + column
        return at.masked_fill((column < 0) | (column >= self.width), self.slots)

    def start(self, i: Tensor) -> Tensor:
        """The first slot that query i reads."""
        return i % self.stride * self.rows if self.by_column else torch.zeros_like(i)

    def held(self, i: Tensor, slot: Tensor) -> Tensor:
        """The position that a slot holds once i has been written; -1 if none. i and slot broadcast."""
        column, row = (
            (slot // self.rows, slot % self.rows) if self.by_column else (slot % self.width, slot // self.width)
        )
        at = self.first + column
        newest = (i - at).div(self.stride, rounding_mode="floor")  # row of the column's last position up to i
        row = newest - (newest - row) % self.rows
        return (row * self.stride + at).masked_fill(row < 0, -1)


Part = tuple[AllowsKeys, Layout]


def layouts(pattern: AllowsKeys, n: int) -> tuple[Part, ...]:
    """How a head with this pattern keeps its keys for n positions: its parts, each with its layout."""
    parts: tuple[AllowsKeys, ...] = pattern.parts if isinstance(pattern, Pattern) else (pattern,)
    if any(type(p) not in (Window, Column, Block, Summary, Global) for p in parts):
        return ((pattern, Layout(stride=n, width=n, rows=1)),)  # Full among them, or a pattern unknown here
    return tuple((p, _layout(p, n)) for p in parts)


def _layout(part: AllowsKeys, n: int) -> Layout:
    if isinstance(part, Window):
        size = min(part.stride + 1, n)
        return Layout(stride=size, width=size, rows=1)
    if isinstance(part, Block):
        size = min(part.stride, n)
        return Layout(stride=size, width=size, rows=1)
    if isinstance(part, Column):
        rows = -(-n // part.stride)
        if part.reach is not None:
            rows = min(rows, part.reach + 1)
        return Layout(stride=part.stride, width=min(part.stride, n), rows=rows, by_column=True)
    if isinstance(part, Summary):
        return Layout(stride=part.stride, width=part.c, rows=-(-n // part.stride), first=part.first)
    assert isinstance(part, Global)
    return Layout(stride=n, width=min(part.tokens, n), rows=1)


def cached_rows(pattern: AllowsKeys, n: int) -> int:
    """Rows of keys (and of values) that a head with this pattern keeps, to draw n positions."""
    return sum(layout.slots + layout.spare for _, layout in layouts(pattern, n))


@dataclass(frozen=True)
class Plan:
    """What some queries write and read in one part, for heads that are alike but for their summary slots.

    slot: (Hg, T) where the queries' own keys go. start: (T,) first slot of the strip. seen: (Hg, T, strip) which slots
    of it the query sees.
    """

    slot: Tensor
    start: Tensor
    seen: Tensor


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of a layer whose keys are kept alike: the same layouts but for the first column of a summary.

    Equal by identity alone: layers with the same patterns share theirs, and what is planned for one serves them all.
    """

    heads: tuple[int, ...]
    patterns: tuple[AllowsKeys, ...]  # one a head
    n: int

    @cached_property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """By head."""
        return tuple(layouts(p, self.n) for p in self.patterns)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Of each part, as the first head has it."""
        return tuple(layout for _, layout in self.parts[0])

    @cached_property
    def always_sees(self) -> bool:
        """Whether every query sees a key. Only summaries alone, or a pattern unknown here, may leave one without."""
        known = (Full, Window, Column, Block, Global)
        return all(any(type(part) in known for part, _ in parts) for parts in self.parts)

    def plan(self, i: Tensor) -> list[Plan]:
        """i: (T,) int64 queries. One plan a part, on the device of i."""
        plans = []
        for number, layout in enumerate(self.layouts):
            start = layout.start(i)
            slot = start[:, None] + torch.arange(layout.strip, device=i.device)  # (T, strip)
            distinct: dict[tuple[Part, ...], tuple[Tensor, Tensor]] = {}
            for parts in self.parts:
                key = parts[: number + 1]
                if key in distinct:
                    continue
                *earlier, (part, own) = key
                j = own.held(i[:, None], slot)
                seen = (j >= 0) & part.allows(i[:, None], j)
                for other, _ in earlier:
                    seen = seen & ~other.allows(i[:, None], j)
                distinct[key] = own.slot(i), seen
            chosen = [distinct[parts[: number + 1]] for parts in self.parts]
            plans.append(Plan(torch.stack([s for s, _ in chosen]), start, torch.stack([m for _, m in chosen])))
        return plans


@lru_cache(maxsize=64)
def head_groups(patterns: tuple[AllowsKeys, ...], n: int) -> tuple[HeadGroup, ...]:
    """Heads by how they keep their keys for n positions. patterns: one a head."""
    groups: dict[tuple, list[int]] = {}
    for head, pattern in enumerate(patterns):
        key = tuple((type(part), replace(layout, first=0)) for part, layout in layouts(pattern, n))
        groups.setdefault(key, []).append(head)
    return tuple(HeadGroup(tuple(heads), tuple(patterns[h] for h in heads), n) for heads in groups.values())
