"""Who attends to whom: the patterns of Child et al. 2019 (section 4) as small immutable objects.

Positions count from 0 and no query sees a key after it. The objects are the single definition: the oracle, the kernels,
the decode cache, FLOP counts and pictures all take the pattern from here. Any object with `allows(i, j)` is a pattern;
what else these classes offer (exact counts, strides) unlocks faster ways to run them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_ROWS = 1 << 20  # counted at a time: 8 MB an index vector
_CELLS = 1 << 24  # of a mask, made at a time


@runtime_checkable
class AllowsKeys(Protocol):
    """The least that a pattern must offer."""

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        """i, j: int64 positions of queries and keys, broadcast together. Returns bool; False wherever j > i."""
        ...


class Pattern:
    """Base of the patterns: combines with `|`, counts its pairs, draws its mask."""

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        """i, j: int64 positions of queries and keys, broadcast together. Returns bool; False wherever j > i."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The patterns whose union this is; a simple pattern is its own single part."""
        return (self,)

    def mask(self, n: int) -> Tensor:
        """(n, n) bool, rows are queries. For small n: pictures and the oracle."""
        return dense_mask(self, n)

    def count(self, n: int) -> int:
        """Pairs (query, key) among the first n positions, each counted once.

        O(n) where the parts that skip keys (Column, Summary) share one stride, else by row blocks in O(n^2).
        """
        return count_pairs(self, n)

    def __or__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        parts = tuple(dict.fromkeys(self.parts + other.parts))
        return parts[0] if len(parts) == 1 else Union(parts)


def _require(pattern: Pattern, holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"{pattern}: {message}")


@dataclass(frozen=True)
class Full(Pattern):
    """Every earlier key: dense causal attention."""

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i


@dataclass(frozen=True)
class Window(Pattern):
    """The last `stride` keys and the query's own: l + 1 keys (strided A(1), eq. 3)."""

    stride: int

    def __post_init__(self) -> None:
        _require(self, self.stride >= 1, "a window reaches back at least 1")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j <= self.stride)


@dataclass(frozen=True)
class Column(Pattern):
    """Every `stride`-th key back from the query (strided A(2), eq. 3); with a reach, only the last `reach` of them."""

    stride: int
    reach: int | None = None

    def __post_init__(self) -> None:
        _require(self, self.stride >= 1, "the stride must be at least 1")
        _require(self, self.reach is None or self.reach >= 0, "the reach must be None or at least 0")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & ((i - j) % self.stride == 0)
        return seen if self.reach is None else seen & (i - j <= self.reach * self.stride)


@dataclass(frozen=True)
class Block(Pattern):
    """The keys of the query's own block of `stride` (fixed A(1), eq. 4)."""

    stride: int

    def __post_init__(self) -> None:
        _require(self, self.stride >= 1, "a block has at least 1 position")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j // self.stride == i // self.stride)


@dataclass(frozen=True)
class Summary(Pattern):
    """`c` columns of every block of `stride` (fixed A(2), eq. 4); slot 0 is the last c, slot 1 the c before them."""

    stride: int
    c: int
    slot: int = 0

    def __post_init__(self) -> None:
        _require(self, self.stride >= 1, "the stride must be at least 1")
        _require(self, 1 <= self.c <= self.stride, "c must lie between 1 and the stride")
        slots = self.stride // self.c
        _require(self, 0 <= self.slot < slots, f"there are {slots} slots of c columns: use 0 to {slots - 1}")

    @property
    def first(self) -> int:
        """First column of the slot within a block."""
        return self.stride - (self.slot + 1) * self.c

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        column = j % self.stride
        return (j <= i) & (column >= self.first) & (column < self.first + self.c)


@dataclass(frozen=True)
class Global(Pattern):
    """The first `tokens` keys, seen by every later query (the global tokens of Longformer, Beltagy et al. 2020)."""

    tokens: int

    def __post_init__(self) -> None:
        _require(self, self.tokens >= 1, "at least 1 global token is needed")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j < self.tokens)


@dataclass(frozen=True, eq=False)
class Union(Pattern):
    """Keys that any part allows, each counted once: a merged head (eq. 7). Made by `a | b`, which flattens."""

    members: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        flat = tuple(dict.fromkeys(part for member in self.members for part in member.parts))
        if not flat:
            raise ValueError("a union needs at least one pattern")
        object.__setattr__(self, "members", flat)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.members

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        seen = self.members[0].allows(i, j)
        for part in self.members[1:]:
            seen = seen | part.allows(i, j)
        return seen

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Union) and frozenset(self.members) == frozenset(other.members)

    def __hash__(self) -> int:
        return hash(frozenset(self.members))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.members))


def dense_mask(pattern: AllowsKeys, n: int, device: torch.device | str | None = None) -> Tensor:
    """(n, n) bool of any pattern, rows are queries."""
    at = torch.arange(n, device=device)
    return pattern.allows(at[:, None], at[None, :])


def count_pairs(pattern: AllowsKeys, n: int) -> int:
    """Pairs that the pattern allows among the first n positions."""
    if n < 0:
        raise ValueError(f"n={n}: a length is at least 0")
    if isinstance(pattern, Pattern):
        per_row = _KeyCounter.of(pattern)
        if per_row is not None:
            return sum(int(per_row(rows).sum()) for rows in _row_chunks(n, _ROWS))
    keys = torch.arange(n)
    chunks = _row_chunks(n, max(1, _CELLS // max(n, 1)))
    return sum(int(pattern.allows(rows[:, None], keys[None, :]).sum()) for rows in chunks)


def _row_chunks(n: int, size: int) -> Iterator[Tensor]:
    return (torch.arange(start, min(start + size, n)) for start in range(0, n, size))


class _KeyCounter:
    """Keys that each query sees, in closed form.

    A union of these patterns is, for query i: a prefix [0, low) from globals, a suffix [high, i] from windows and
    blocks (suffixes are nested, so the longest is their union), and between them the summary columns, a set of residues
    modulo the stride, and one residue more for the column.
    """

    def __init__(self, parts: tuple[Pattern, ...], stride: int | None) -> None:
        self.intervals = [p for p in parts if isinstance(p, Full | Window | Block)]
        self.tokens = max((p.tokens for p in parts if isinstance(p, Global)), default=0)
        self.stride = stride
        columns = [p for p in parts if isinstance(p, Column)]
        reaches = [p.reach for p in columns if p.reach is not None]
        self.column = bool(columns)
        self.reach = max(reaches) if len(reaches) == len(columns) and reaches else None
        summaries = [p for p in parts if isinstance(p, Summary)]
        self.summarised = torch.zeros(stride or 1, dtype=torch.bool)
        for part in summaries:
            self.summarised[part.first : part.first + part.c] = True

    @classmethod
    def of(cls, pattern: Pattern) -> _KeyCounter | None:
        """None where there is no closed form: a foreign part, or two strides among columns and summaries."""
        parts = pattern.parts
        if not all(type(p) in (Full, Window, Block, Global, Column, Summary) for p in parts):
            return None
        strides = {p.stride for p in parts if isinstance(p, Column | Summary)}
        return cls(parts, next(iter(strides), None)) if len(strides) <= 1 else None

    def __call__(self, i: Tensor) -> Tensor:
        """i: (R,) queries. Returns (R,) int64 counts of keys."""
        high = i + 1
        for part in self.intervals:
            if isinstance(part, Full):
                start = torch.zeros_like(i)
            elif isinstance(part, Window):
                start = (i - part.stride).clamp(min=0)
            else:
                start = i - i % part.stride
            high = torch.minimum(high, start)
        low = torch.minimum(torch.full_like(i, self.tokens), i + 1)
        high = torch.maximum(high, low)
        counts = low + (i + 1 - high)
        if self.stride is None:
            return counts
        stride = self.stride
        below = torch.cat([torch.zeros(1, dtype=torch.long), self.summarised.long().cumsum(0)])

        def summarised_before(x: Tensor) -> Tensor:
            return x // stride * below[-1] + below[x % stride]

        counts = counts + summarised_before(high) - summarised_before(low)
        if self.column:
            first = low if self.reach is None else torch.maximum(low, i - self.reach * self.stride)
            # Keys i - k l in [first, high): k from ceil((i - high + 1) / l) to floor((i - first) / l).
            nearest = (i - high + self.stride).div(self.stride, rounding_mode="floor")
            farthest = (i - first).div(self.stride, rounding_mode="floor")
            found = (farthest - nearest + 1).clamp(min=0)
            counts = counts + torch.where(self.summarised[i % self.stride], 0, found)
        return counts
