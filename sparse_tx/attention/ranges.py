"""What one query reads of the decode cache (`cache.py`), as a few numbers for a kernel.

Of each part of its pattern a query sees a run of slots that lie side by side in the strip, its own slot aside, where
the strip is taken as a ring, its end joined to its start: what a window's ring holds but for the newest; the rows of
a column so far, less the newest one or two that a window beside it has; the summaries of all blocks before; the first
tokens, less the one that a column beside them has. The order of keys does not matter to a softmax, and the query's own
key needs no look at the cache. Where a pattern has no such run (`one_run`), kernels cannot be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sparse_tx.attention.cache import HeadGroup, Plan, head_groups
from sparse_tx.attention.patterns import AllowsKeys, Block, Column, Full, Global, Pattern, Summary, Window

CHUNK = 1024  # positions in a table, at most
NUMBERS = 4  # of a part: the slot that the own key goes to, -1 for none; start of the strip; first slot read; how many
_CELLS = 1 << 24  # of a plan's masks at a time: some 0.5 GiB while they are made
_MOST_CELLS = 1 << 34  # of those looked through to know a pattern: about a second on a GPU
_KNOWN = (Full, Window, Column, Block, Summary, Global)


class ReadTable:
    """The numbers of a chunk of positions, in a tensor that stays where it is.

    table: (kinds, CHUNK, H, 1 + NUMBERS * parts) int32; kinds are the distinct layers. The first number is 1 if the
    query sees its own key, 0 if not. Row position % CHUNK is that of `position`, once `prepare` has been told of it.
    """

    def __init__(self, layers: Sequence[tuple[AllowsKeys, ...]], n: int, device: torch.device) -> None:
        """layers: patterns by layer and head, for n positions."""
        self.n = n
        kinds = list(dict.fromkeys(layers))
        self.kind = [kinds.index(layer) for layer in layers]
        self.groups = [head_groups(kind, n) for kind in kinds]
        self.parts = max(len(group.layouts) for groups in self.groups for group in groups)
        self.positions = min(n, CHUNK)
        shape = len(kinds), self.positions, len(layers[0]), 1 + NUMBERS * self.parts
        self.table = torch.zeros(shape, dtype=torch.int32, device=device)
        self._chunk = -1

    def prepare(self, position: int) -> None:
        """Fill in the chunk that holds this position, unless it is there."""
        if position // self.positions == self._chunk:
            return
        self._chunk = position // self.positions
        first = self._chunk * self.positions
        for kind, groups in enumerate(self.groups):
            for group in groups:
                size = max(1, _CELLS // cells(group))
                for start in range(0, self.positions, size):
                    end = min(start + size, self.positions)
                    i = torch.arange(first + start, first + end, device=self.table.device).clamp(max=self.n - 1)
                    numbers, _ = read_numbers(group, i)
                    for h, row in zip(group.heads, numbers, strict=True):  # an index by a list would wait for the host
                        self.table[kind, start:end, h, : row.shape[-1]] = row


def cells(group: HeadGroup) -> int:
    """Of the masks that plan one query."""
    return len(group.heads) * sum(layout.strip for layout in group.layouts)


def read_numbers(group: HeadGroup, i: Tensor) -> tuple[Tensor, Tensor]:
    """i: (T,) int64 queries. Returns their rows of the table, (Hg, T, 1 + NUMBERS * parts) int32, and the most runs
    that any of them reads of one part, () int64: the rows hold if that is at most 1."""
    own = torch.zeros(len(group.heads), len(i), dtype=torch.bool, device=i.device)
    most = torch.zeros((), dtype=torch.long, device=i.device)
    columns = []
    for layout, plan in zip(group.layouts, group.plan(i), strict=True):
        sees_own, others = _less_own(plan, layout.strip)
        own |= sees_own
        begins = others & ~others.roll(1, -1)
        most = torch.maximum(most, begins.sum(-1).max())
        slot = plan.slot.masked_fill(plan.slot >= layout.slots, -1)
        start = plan.start.expand_as(slot)
        columns += [slot, start, begins.int().argmax(-1), others.sum(-1)]
    return torch.stack([own.long(), *columns], -1).int(), most


def _less_own(plan: Plan, strip: int) -> tuple[Tensor, Tensor]:
    """Whether a query sees its own key in this part (Hg, T), and the other slots of the strip that it sees."""
    at = plan.slot - plan.start  # beyond the strip where the key is not kept
    is_own = torch.arange(strip, device=at.device) == at[..., None]
    return (plan.seen & is_own).any(-1), plan.seen & ~is_own


@lru_cache(maxsize=64)
def one_run(patterns: tuple[AllowsKeys, ...], n: int, device: torch.device) -> bool:
    """Whether of each part each of n queries reads one run at most. patterns: one a head. Waits for the device."""
    for group in head_groups(patterns, n):
        if all(_is_known_alone(p) for p in group.patterns):
            continue
        if n * cells(group) > _MOST_CELLS:
            return False
        size = max(1, _CELLS // cells(group))
        most = [read_numbers(group, torch.arange(a, min(a + size, n), device=device))[1] for a in range(0, n, size)]
        if int(torch.stack(most).max()) > 1:
            return False
    return True


def _is_known_alone(pattern: AllowsKeys) -> bool:
    parts = pattern.parts if isinstance(pattern, Pattern) else (pattern,)
    return len(parts) == 1 and type(parts[0]) in _KNOWN
