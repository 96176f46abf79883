"""Pictures of the patterns: `python -m sparse_tx.plots FILE.png`. Needs matplotlib (pip install 'sparse-tx[plots]')."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_tx.attention import Block, Column, Full, Global, Pattern, Summary, Window
from sparse_tx.attention.heads import layer_patterns

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_pattern(axes: Axes, pattern: Pattern, n: int, title: str) -> None:
    """Rows are queries, columns are keys. Each part of a union has a shade of its own; the first that allows counts."""
    shades = torch.zeros(n, n)
    for rank, part in enumerate(pattern.parts):
        shades = torch.where(part.mask(n) & (shades == 0), 1 - 0.4 * rank, shades)
    _cells(axes, shades, title)


def _cells(axes: Axes, shades: torch.Tensor, title: str) -> None:
    """(rows, columns) of shades as a board."""
    axes.imshow(shades.numpy(), cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest")
    axes.set_xticks([k - 0.5 for k in range(shades.shape[1] + 1)], minor=True)
    axes.set_yticks([k - 0.5 for k in range(shades.shape[0] + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.7)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, fontsize=10)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def pattern_figure(path: Path, n: int = 24, stride: int = 6) -> None:
    """The patterns side by side, as in figure 3 of the paper, with their share of the pairs at real sizes."""
    pyplot = _pyplot()
    drawn: list[tuple[str, Pattern, Pattern, int]] = [
        ("full", Full(), Full(), 3072),
        ("strided = window | column", Window(stride) | Column(stride), Window(96) | Column(96), 3072),
        ("fixed = block | summary", Block(stride) | Summary(stride, 1), Block(128) | Summary(128, 32), 12288),
        (
            "sliding = window | dilated | global",
            Window(3) | Column(stride, reach=1) | Global(2),
            Window(128) | Column(128, reach=32) | Global(16),
            12288,
        ),
    ]
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(3.1 * len(drawn), 3.8), layout="constrained")
    for axis, (title, small, real, length) in zip(axes, drawn, strict=True):
        share = real.count(length) / Full().count(length)
        draw_pattern(axis, small, n, f"{title}\n{share:.1%} of the pairs at {length:,}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def seen_figure(path: Path, side: int = 12, reader: tuple[int, int] = (7, 6)) -> None:
    """One pixel of a small image and the pixels that its window, its column and their union see, one layer each."""
    pyplot = _pyplot()
    n, query = side * side, reader[0] * side + reader[1]
    drawn: list[tuple[str, Pattern]] = [
        ("window: the last row's length", Window(side)),
        ("column: the pixels above", Column(side)),
        ("merged: both in one softmax", Window(side) | Column(side)),
        ("fixed: own row, last columns", Block(side) | Summary(side, 2)),
    ]
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(2.6 * len(drawn), 3.0), layout="constrained")
    for axis, (title, pattern) in zip(axes, drawn, strict=True):
        keys = torch.arange(n)
        shades = 0.12 + 0.55 * pattern.allows(torch.tensor(query), keys).float()
        shades[query] = 1.1
        shades[query + 1 :] = 0
        _cells(axis, shades.view(side, side), title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def heads_figure(path: Path, n: int = 24, stride: int = 8, heads: int = 4) -> None:
    """What each head of each layer sees under the three ways to combine patterns, and the slots of summaries."""
    pyplot = _pyplot()
    rows = [
        (
            "interleaved, layer 1",
            layer_patterns("strided", layers=2, heads=heads, stride=stride, combine="interleaved")[0],
        ),
        (
            "interleaved, layer 2",
            layer_patterns("strided", layers=2, heads=heads, stride=stride, combine="interleaved")[1],
        ),
        ("split", layer_patterns("strided", layers=1, heads=heads, stride=stride, combine="split")[0]),
        ("merged", layer_patterns("fixed", layers=1, heads=heads, stride=stride, c=2)[0]),
    ]
    figure, axes = pyplot.subplots(len(rows), heads, figsize=(1.7 * heads, 1.85 * len(rows)), layout="constrained")
    for line, (title, patterns) in zip(axes, rows, strict=True):
        for head, (axis, pattern) in enumerate(zip(line, patterns, strict=True)):
            draw_pattern(axis, pattern, n, f"{title}\nhead {head + 1}" if head == 0 else f"\nhead {head + 1}")
            axis.title.set_fontsize(8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pattern_figure(Path(sys.argv[1]))
