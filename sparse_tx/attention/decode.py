"""Attention of one new query a head over the keys that its pattern keeps (`cache.py`), for sampling.

`Store` holds the keys and values of one layer. The two ways to say where a step reads are one arithmetic
(`HeadGroup.plan`): `StaticReads` keeps it as tensors of fixed shapes, computed on the device from a position that is a
tensor too, so that a step is the same launches at every position and can be captured in a CUDA graph; `SlicedReads`
turns it into plain numbers, so that a step on a CPU reads only the slots that hold something, as views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparse_tx.attention.cache import HeadGroup, head_groups
from sparse_tx.attention.patterns import AllowsKeys

_POSITIONS = 64  # planned at a time on a CPU: a plan costs some 50 launches, whatever it holds
_CELLS = 1 << 20  # of a plan's masks, at most


class Read(NamedTuple):
    """One step in one part. slot: where the own keys go: a number, (Hg,) int64, or None to keep none. bias: 0 or -inf
    for each key read, (Hg, 1, keys), or None where all are seen; a strip of no keys is left out by `keys` 0."""

    slot: int | Tensor | None
    strip: slice | Tensor
    keys: int
    bias: Tensor | None


class Step(NamedTuple):
    """One step of one group of heads. blind: (Hg, 1, 1) heads whose query sees no key; None if it is known that all
    see one."""

    reads: list[Read]
    blind: Tensor | None


class Reads(Protocol):
    def __call__(self, group: HeadGroup) -> Step: ...


class StaticReads:
    """Of one position, given as (1,) int64 on the device: nothing is read back, every shape is fixed."""

    def __init__(self, position: Tensor) -> None:
        self.position = position
        self._steps: dict[HeadGroup, Step] = {}

    def __call__(self, group: HeadGroup) -> Step:
        if group not in self._steps:
            self._steps[group] = self._step(group)
        return self._steps[group]

    def _step(self, group: HeadGroup) -> Step:
        reads = []
        blind = None
        for layout, plan in zip(group.layouts, group.plan(self.position), strict=True):
            strip: slice | Tensor = slice(0, layout.slots)
            if layout.by_column:
                strip = plan.start + torch.arange(layout.strip, device=plan.start.device)
            reads.append(Read(plan.slot[:, 0], strip, layout.strip, _bias(plan.seen)))
            none = ~plan.seen.any(-1, keepdim=True)
            blind = none if blind is None else blind & none
        return Step(reads, None if group.always_sees else blind)


class SlicedReads:
    """Of all positions below n in turn, as numbers: on a CPU, where reading them back costs nothing."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.position = 0
        self._plans: dict[HeadGroup, tuple[int, list[Step]]] = {}

    def __call__(self, group: HeadGroup) -> Step:
        first, steps = self._plans.get(group, (0, []))
        if not first <= self.position < first + len(steps):
            widest = sum(layout.strip for layout in group.layouts) * len(group.heads)
            count = max(1, min(_POSITIONS, _CELLS // max(1, widest), self.n - self.position))
            first, steps = self.position, self._slices(group, torch.arange(self.position, self.position + count))
            self._plans[group] = first, steps
        return steps[self.position - first]

    def _slices(self, group: HeadGroup, i: Tensor) -> list[Step]:
        reads: list[list[Read]] = [[] for _ in i]
        blind = torch.ones(len(group.heads), len(i), dtype=torch.bool)
        for layout, plan in zip(group.layouts, group.plan(i), strict=True):
            blind &= ~plan.seen.any(-1)
            by_any, by_all = plan.seen.any(0), plan.seen.all(0)  # (T, strip)
            found, length = by_any.any(-1).tolist(), layout.strip
            low = by_any.int().argmax(-1).tolist()
            high = (length - by_any.flip(-1).int().argmax(-1)).tolist()
            starts = plan.start.tolist()
            kept = plan.slot < layout.slots
            writes, same = kept.any(0).tolist(), (plan.slot == plan.slot[0]).all(0).tolist()
            for t, row in enumerate(reads):
                slot: int | Tensor | None = None
                if writes[t]:
                    slot = int(plan.slot[0, t]) if same[t] else plan.slot[:, t]
                if not found[t]:
                    row.append(Read(slot, slice(0, 0), 0, None))
                    continue
                a, b = low[t], high[t]
                bias = None
                if not bool(by_all[t, a:b].all()):
                    bias = _bias(plan.seen[:, t, None, a:b])
                row.append(Read(slot, slice(starts[t] + a, starts[t] + b), b - a, bias))
        some = (blind.any(0) & ~torch.tensor(group.always_sees)).tolist()
        return [Step(row, blind[:, t, None, None] if some[t] else None) for t, row in enumerate(reads)]


@dataclass
class _Kept:
    """Keys and values of a group of heads: of each part (B, Hg, slots, D)."""

    group: HeadGroup
    heads: Tensor | None  # (Hg,) int64, None if they are all heads of the layer
    k: list[Tensor]
    v: list[Tensor]


class Store:
    """The keys and values of one layer for n positions, in the dtype and on the device given."""

    def __init__(
        self, patterns: Sequence[AllowsKeys], n: int, batch: int, qk: int, v: int, dtype: torch.dtype, device
    ) -> None:
        """patterns: one a head. qk, v: widths of one head's keys and values."""
        self.scale = qk**-0.5
        self.kept: list[_Kept] = []
        for group in head_groups(tuple(patterns), n):
            sizes = [(batch, len(group.heads), layout.slots + layout.spare) for layout in group.layouts]
            k, values = ([torch.zeros(*s, D, dtype=dtype, device=device) for s in sizes] for D in (qk, v))
            heads = None if len(group.heads) == len(patterns) else torch.tensor(group.heads, device=device)
            self.kept.append(_Kept(group, heads, k, values))

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for kept in self.kept for t in (*kept.k, *kept.v))

    def fill(self, k: Tensor, v: Tensor, rows: Tensor, prompts: Tensor) -> None:
        """Keep the keys of the first P positions. k, v: (U, P, H, D); row rows[r] has those of prompts[r], of the U."""
        last = torch.tensor(k.shape[1] - 1, device=k.device)
        for kept in self.kept:
            heads = torch.tensor(kept.group.heads, device=k.device)[:, None]
            for number, layout in enumerate(kept.group.layouts):
                slots = torch.arange(layout.slots, device=k.device)
                held = torch.stack([parts[number][1].held(last, slots) for parts in kept.group.parts])  # (Hg, slots)
                for store, new in ((kept.k[number], k), (kept.v[number], v)):
                    found = new[:, held.clamp(min=0), heads].masked_fill((held < 0)[..., None], 0.0)
                    store[rows, :, : layout.slots] = found.to(store.dtype)[prompts]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, steps: Sequence[Step]) -> Tensor:
        """Keep the keys of a new position and attend to what its pattern sees. q, k: (B, H, Dqk), v: (B, H, Dv).

        steps: of each group of heads, as `steps` gives them. Returns (B, H, Dv). Scores and softmax are in float32
        (float64 for float64 inputs).
        """
        if len(self.kept) == 1:
            return _attend(self.kept[0], q, k, v, steps[0], self.scale)
        out = torch.empty_like(v)
        for kept, step in zip(self.kept, steps, strict=True):
            assert kept.heads is not None
            own = [t.index_select(1, kept.heads) for t in (q, k, v)]
            out.index_copy_(1, kept.heads, _attend(kept, own[0], own[1], own[2], step, self.scale))
        return out

    def steps(self, reads: Reads) -> list[Step]:
        return [reads(kept.group) for kept in self.kept]


def _attend(kept: _Kept, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float) -> Tensor:
    q = _wide(q)[:, :, None] * scale  # (B, Hg, 1, Dqk)
    scores, values = [], []
    for read, keys, vals in zip(step.reads, kept.k, kept.v, strict=True):
        _write(keys, k, read.slot)
        _write(vals, v, read.slot)
        if read.keys:
            part = q @ _wide(_strip(keys, read.strip)).mT  # (B, Hg, 1, keys)
            scores.append(part if read.bias is None else part + read.bias)
            values.append(_wide(_strip(vals, read.strip)))
    if not scores:
        return torch.zeros_like(v)
    weights = (scores[0] if len(scores) == 1 else torch.cat(scores, -1)).softmax(-1)
    if step.blind is not None:
        weights = weights.masked_fill(step.blind, 0.0)
    shares = weights.split([s.shape[-1] for s in scores], -1)
    out = shares[0] @ values[0]
    for share, value in zip(shares[1:], values[1:], strict=True):
        out = out + share @ value
    return out[:, :, 0].to(v.dtype)


def _bias(seen: Tensor) -> Tensor:
    # Filled, not chosen by torch.where: that would copy its two numbers to the device, which waits for it.
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _strip(store: Tensor, strip: slice | Tensor) -> Tensor:
    return store[:, :, strip] if isinstance(strip, slice) else store.index_select(2, strip)


def _write(store: Tensor, new: Tensor, slot: int | Tensor | None) -> None:
    """store: (B, Hg, slots, D), new: (B, Hg, D)."""
    if isinstance(slot, int):
        store[:, :, slot] = new
    elif slot is not None:
        store[:, torch.arange(store.shape[1], device=store.device), slot] = new
