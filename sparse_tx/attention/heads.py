"""How the heads of each layer use the patterns: the `attention` group of the config, as patterns by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from sparse_tx.attention.patterns import Block, Column, Full, Global, Pattern, Summary, Window

KINDS = ("full", "strided", "fixed", "sliding")
COMBINE = ("interleaved", "merged", "split")
NAMES = {
    "full": ("full",),
    "strided": ("column", "window"),
    "fixed": ("block", "summary"),
    "sliding": ("window", "dilated", "global"),
}
# What an order may name besides: a window, which does not end where a block does, in place of the block.
_ALSO = {"fixed": ("window",)}


def layer_patterns(
    kind: str,
    *,
    layers: int,
    heads: int,
    stride: int | None = None,
    c: int | None = None,
    reach: int | None = None,
    global_tokens: int | None = None,
    combine: str = "merged",
    order: Sequence[str] | None = None,
    image: bool = False,
) -> list[tuple[Pattern, ...]]:
    """The pattern of each head of each layer: a list of `layers` tuples of `heads` patterns.

    kind: "full", "strided" (column, window), "fixed" (block, summary; by `order` also window), "sliding" (window,
    dilated, global).
    combine: "interleaved", one pattern per layer, cycled through `order` (eq. 6); "merged", every head attends to the
    union (eq. 7); "split", contiguous equal groups of heads, one a pattern (eq. 8). Heads that attend to summaries take
    slots 0, 1, ... in turn, counted among themselves. order: names of `kind`'s patterns; None is the natural one,
    which for strided attention on images is OpenAI's, one column layer to three windows.
    Raises ValueError for what does not fit together.
    """
    if kind not in KINDS:
        raise ValueError(f"attention {kind!r} is not known: use one of {', '.join(KINDS)}")
    if combine not in COMBINE:
        raise ValueError(f"attention.combine={combine!r} is not known: use one of {', '.join(COMBINE)}")
    names = NAMES[kind]
    if order is None:
        order = ("column", "window", "window", "window") if kind == "strided" and image else names
    known = names + _ALSO.get(kind, ())
    for name in order:
        if name not in known:
            raise ValueError(f"attention.order names {name!r}: {kind} attention has {', '.join(known)}")
    if not order:
        raise ValueError(f"attention.order is empty: name at least one of {', '.join(known)}, or null")
    if kind != "full":
        _check_numbers(kind, stride, c, reach, global_tokens)
    l, columns, tokens = stride or 1, c or 1, global_tokens or 1  # checked above where they are used

    def pattern(name: str, turn: int) -> Pattern:
        match name:
            case "column":
                return Column(l)
            case "window":
                return Window(l)
            case "block":
                return Block(l)
            case "summary":
                return Summary(l, columns, turn % (l // columns))
            case "dilated":
                return Column(l, reach)
            case "global":
                return Global(tokens)
        return Full()

    if kind == "full":
        return [(Full(),) * heads] * layers
    if combine == "interleaved":
        return [tuple(pattern(order[r % len(order)], h) for h in range(heads)) for r in range(layers)]
    distinct = tuple(dict.fromkeys(order))
    if combine == "merged":
        merged = tuple(reduce(Pattern.__or__, (pattern(name, h) for name in distinct)) for h in range(heads))
        return [merged] * layers
    if heads % len(distinct):
        raise ValueError(
            f"attention.combine=split shares {heads} heads among {len(distinct)} patterns: "
            f"model.heads must be a multiple of {len(distinct)}"
        )
    size = heads // len(distinct)
    return [tuple(pattern(distinct[h // size], h % size) for h in range(heads))] * layers


def _check_numbers(kind: str, stride: int | None, c: int | None, reach: int | None, global_tokens: int | None) -> None:
    if stride is None or stride < 1:
        raise ValueError(f"attention.stride={stride} does not fit {kind} attention: give a length of at least 1")
    if kind == "fixed" and (c is None or not 1 <= c <= stride):
        raise ValueError(
            f"attention.c={c} does not fit attention.stride={stride}: a summary has at most stride columns; "
            f"use 1 to {stride}"
        )
    if kind == "sliding" and (reach is None or reach < 0):
        raise ValueError(f"attention.reach={reach}: the dilated window reaches back 0 keys or more")
    if kind == "sliding" and (global_tokens is None or global_tokens < 1):
        raise ValueError(f"attention.global_tokens={global_tokens}: give at least 1")
