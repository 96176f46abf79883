"""The patterns that every backend is tried on."""

from sparse_tx.attention import Block, Column, Full, Global, Summary, Window


def patterns_of(l):
    """Each pattern of stride l, and the unions that the paper and later work use."""
    c = max(1, l // 2)
    return [
        Full(),
        Window(l),
        Column(l),
        Column(l, reach=2),
        Block(l),
        Summary(l, c),
        Summary(l, 1, slot=l - 1),
        Summary(l, l),
        Global(5),
        Window(l) | Column(l),
        Block(l) | Summary(l, c, l // c - 1),
        Window(l) | Column(l, reach=3) | Global(2),
    ]
