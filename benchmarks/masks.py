"""The patterns as FlexAttention's users write them: masks for the rivals."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from sparse_tx.attention import Summary
from sparse_tx.attention.patterns import Pattern


def mask_of(heads: tuple[Pattern, ...]):
    """The patterns of a layer, by head where heads differ, and the heads that the mask tells apart: None if alike."""
    if len(set(heads)) == 1:
        parts = heads[0].parts

        def mask(b, h, i, j):
            seen = parts[0].allows(i, j)
            for part in parts[1:]:
                seen = seen | part.allows(i, j)
            return seen

        return mask, None
    l, c = summary_of(heads)
    others = [p for p in heads[0].parts if not isinstance(p, Summary)]
    if heads != tuple(_with_slot(heads[0], h % (l // c)) for h in range(len(heads))):
        raise NotImplementedError(f"no mask is written for {heads}")

    def mask_by_head(b, h, i, j):
        low = l - (h % (l // c) + 1) * c
        seen = (j <= i) & (j % l >= low) & (j % l < low + c)
        for part in others:
            seen = seen | part.allows(i, j)
        return seen

    return mask_by_head, len(heads)


def _with_slot(pattern: Pattern, slot: int) -> Pattern:
    return reduce(Pattern.__or__, (replace(p, slot=slot) if isinstance(p, Summary) else p for p in pattern.parts))


def summary_of(heads: tuple[Pattern, ...]) -> tuple[int, int]:
    """Stride and columns of the first head's summary."""
    summary = next((p for p in heads[0].parts if isinstance(p, Summary)), None)
    if summary is None:
        raise NotImplementedError(f"no mask is written for heads that differ as {heads[0]} and {heads[-1]}")
    return summary.stride, summary.c
