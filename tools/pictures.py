"""Makes the pictures of README and docs.

    python tools/pictures.py                     # the patterns, and the numbers of benchmarks/RESULTS.md
    python tools/pictures.py RUN_FOLDER          # and the learning curve of a run of `python train.py`

Needs matplotlib (pip install -e '.[plots]').
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from sparse_tx.checkpoint import read_checkpoint
from sparse_tx.data import DataModule
from sparse_tx.evaluation.run import count_models, data_spec
from sparse_tx.plots import heads_figure, pattern_figure, seen_figure

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
# The table of attention in RESULTS.md: workload, ..., "fwd, bwd, both" of ours in us, dense in us, ratio.
ROW = re.compile(
    r"^\| (?P<name>[^|]+) \| .* \| [\d, ]*?(?P<ours>\d+) \| (?P<dense>[\d,]+) \| [\d.]+x \|$", re.MULTILINE
)
OURS, RIVAL, GREY = "#08519c", "#bdbdbd", "#737373"


def speed_rows(text: str) -> list[tuple[str, float, float]]:
    """Workload, ours and dense in ms, of every row that has both."""
    rows = [
        (m["name"].strip(), int(m["ours"]) / 1e3, int(m["dense"].replace(",", "")) / 1e3) for m in ROW.finditer(text)
    ]
    if not rows:
        raise SystemExit(f"{RESULTS} has no table of attention times that this script can read")
    return rows


def speed_figure(path: Path) -> None:
    rows = speed_rows(RESULTS.read_text())[::-1]
    device = re.search(r"## Attention, (.*)", RESULTS.read_text())
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.42 * len(rows)), layout="constrained")
    at = range(len(rows))
    axes.barh([y + 0.2 for y in at], [dense for _, _, dense in rows], 0.38, color=RIVAL, label="dense (cuDNN)")
    axes.barh([y - 0.2 for y in at], [ours for _, ours, _ in rows], 0.38, color=OURS, label="sparse-tx")
    for y, (_, ours, dense) in zip(at, rows, strict=True):
        axes.text(
            ours * 1.08, y - 0.2, f"{ours:.2f} ms, {dense / ours:.1f}x faster", va="center", fontsize=8, color=OURS
        )
    axes.set_yticks(list(at), [name for name, _, _ in rows], fontsize=9)
    axes.set_xscale("log")
    axes.set_xlabel(f"ms, forward and backward, bf16; {device[1] if device else ''}", fontsize=8, color=GREY)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def number(text: str) -> float | None:
    """Of "1,024" or "317k"; None of anything else."""
    found = re.fullmatch(r"([\d,]+)(k?)", text.strip())
    return None if found is None else float(found[1].replace(",", "")) * (1e3 if found[2] else 1)


def context_rows(text: str) -> list[tuple[float, float | None, float]]:
    """Context, bytes a second of dense attention and of ours, of the table of costs against context."""
    table = text.partition("### Cost against context\n")[2].partition("\n#")[0]
    rows = [[number(cell) for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    found = [(row[0], row[3], row[4]) for row in rows if row[0] is not None and row[4] is not None]
    if not found:
        raise SystemExit(f"{RESULTS} has no table of costs against context that this script can read")
    return found


def context_figure(path: Path) -> None:
    text = RESULTS.read_text()
    rows = context_rows(text)
    device = re.search(r"## Training, (.*)", text)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    names = "dense (cuDNN), compiled, blocks run again", "sparse-tx"
    for label, colour, points in (
        (names[0], RIVAL, [(n, dense / 1e3) for n, dense, _ in rows if dense]),
        (names[1], OURS, [(n, ours / 1e3) for n, _, ours in rows]),
    ):
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([n for n, _, _ in rows], [f"{n:,.0f}" for n, _, _ in rows], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("thousand bytes a second", fontsize=8)
    axes.set_xlabel(f"context; 152M parameters, whole steps; {device[1] if device else ''}", fontsize=8, color=GREY)
    axes.legend(fontsize=8, frameon=False, loc="center right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curve(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Points (step, bits) by column of a run's metrics.csv."""
    columns: dict[str, list[tuple[int, float]]] = {"train/bits_per_dim": [], "val/bits_per_dim": []}
    with (run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, points in columns.items():
                if row.get(name):
                    points.append((int(row["step"]), float(row[name])))
    return columns


def counted(run: Path) -> dict[int, float]:
    """Bits per byte of count models on the bytes that the run validates on."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    spec, data = data_spec(checkpoint, root=None, source=None, synthetic=False), checkpoint.config["data"]
    module = DataModule(spec, batch_size=1, seed=0, max_steps=1, eval_limit=data["limit"])
    module.prepare_data()
    return count_models(module.prepared, module.evaluation_windows("validation"), "validation")


def demo_figure(path: Path, run: Path) -> None:
    """The demo's bits per byte beside what it must beat: counting."""
    columns = curve(run)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(*zip(*columns["train/bits_per_dim"], strict=True), color=RIVAL, linewidth=0.8, label="a training batch")
    axes.plot(*zip(*columns["val/bits_per_dim"], strict=True), "o-", color=OURS, label="held-out files")
    names = {0: "each byte by itself", 1: "pairs of bytes", 2: "triples of bytes"}
    for order, bits in counted(run).items():
        axes.axhline(bits, color=GREY, linewidth=0.7, linestyle=":")
        axes.text(axes.get_xlim()[1], bits + 0.05, f"counting {names[order]}", ha="right", fontsize=7, color=GREY)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("bits per byte", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str]) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    pattern_figure(IMAGES / "patterns.png")
    seen_figure(IMAGES / "seen.png")
    heads_figure(IMAGES / "heads.png")
    speed_figure(IMAGES / "speed.png")
    context_figure(IMAGES / "context.png")
    for run in arguments:
        demo_figure(IMAGES / "demo.png", Path(run))
    print(f"wrote: {IMAGES}")


if __name__ == "__main__":
    main(sys.argv[1:])
