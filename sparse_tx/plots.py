"""Pictures of the patterns: `python -m sparse_tx.plots FILE.png`. Needs matplotlib (pip install 'sparse-tx[plots]')."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparse_tx.attention import Block, Column, Full, Global, Pattern, Summary, Window

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_pattern(axes: Axes, pattern: Pattern, n: int, title: str) -> None:
    """Rows are queries, columns are keys. Each part of a union has a shade of its own; the first that allows counts."""
    shades = torch.zeros(n, n)
    for rank, part in enumerate(pattern.parts):
        shades = torch.where(part.mask(n) & (shades == 0), 1 - 0.4 * rank, shades)
    axes.imshow(shades.numpy(), cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest")
    axes.set_xticks([k - 0.5 for k in range(n + 1)], minor=True)
    axes.set_yticks([k - 0.5 for k in range(n + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.7)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, fontsize=10)


def pattern_figure(path: Path, n: int = 24, stride: int = 6) -> None:
    """The patterns side by side, as in figure 3 of the paper, with their share of the pairs at real sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pattern_figure(Path(sys.argv[1]))
