"""What runs learnt by time, by steps and by bytes: the curves of finished runs of train.py beside each other.

    python benchmarks/learning.py sparse=outputs/A/RUN dense=outputs/B/RUN --plot curves.png --json curves.json
    python benchmarks/learning.py a=RUN_5_MINUTES b=RUN_10_MINUTES c=RUN_20_MINUTES --target 2.80

Each argument is a run's folder, or NAME=FOLDER; runs of one name are seeds of one thing, and their spread is shown.
Time is that of training: what the first steps take longer than the others, compiling and capturing, is left out, as
are validations and checkpoints. Bits are those of the validations, of averaged weights.

A run whose learning rate has fallen to 0 is compared at its own end. In between, all are read off their curves by
interpolation at the same minutes and the same steps, where none of them has gone through its decay: who is ahead
there need not be at the end. --target fits bits = a + b minutes^-c to the ends of three runs or more that differ in
their length alone, and says when that reaches the target; it is an extrapolation, and as good as that.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

MARKS = 6  # points in common at which curves are compared


@dataclass(frozen=True)
class Curve:
    """One run. seconds, steps, bits: at its validations."""

    name: str
    folder: str
    unit: str
    bytes_a_step: int
    steps: np.ndarray
    seconds: np.ndarray
    bits: np.ndarray
    train_bits: float  # mean of the last tenth of the entries
    bytes_per_second: float  # median

    @property
    def minutes(self) -> float:
        return float(self.seconds[-1]) / 60

    def at(self, of: str, value: float) -> float | None:
        """Bits where `of` ("seconds" or "steps") is the value; None outside of the curve."""
        x = getattr(self, of)
        return None if not x[0] <= value <= x[-1] else float(np.interp(value, x, self.bits))


def read(argument: str) -> Curve:
    """A run's curve from its folder. Raises SystemExit for what is no run with a logger and two validations."""
    name, found, path = argument.partition("=")
    folder = Path(path if found else argument)
    try:
        config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
        with open(folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        sys.exit(f"{folder} is no run of train.py with logger=csv: {error}")

    def column(key: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = {int(r["step"]): float(r[key]) for r in rows if r.get(key)}
        return np.array(sorted(pairs)), np.array([pairs[step] for step in sorted(pairs)])

    entries, seconds = column("train/seconds")
    scored, bits = column("val/bits_per_dim")
    if len(entries) < 3 or len(scored) < 2:
        sys.exit(f"{folder} has {len(entries)} entries and {len(scored)} validations: 3 and 2 are needed for a curve")
    # The logger counts steps from 0, but for the validation at the end.
    taken, each = entries + 1, np.diff(seconds) / np.diff(entries)
    last = json.loads(ended.read_text())["steps"] if (ended := folder / "result.json").is_file() else int(taken[-1])
    scored, place = np.unique(np.minimum(scored + 1, last), return_index=True)
    start = seconds[0] - statistics.median(each) * taken[0]
    rates = column("train/bytes_per_second")[1]
    train = column("train/bits_per_dim")[1]
    return Curve(
        name if found else folder.name,
        str(folder),
        "bits/dim" if config["data"]["kind"] == "image" else "bits/byte",
        config["data"]["batch_size"] * config["data"]["context"],
        scored,
        np.interp(scored, taken, seconds - start),
        bits[place],
        float(train[-max(1, len(train) // 10) :].mean()),
        statistics.median(rates),
    )


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def ends(curves: list[Curve]) -> str:
    lines = [
        [
            c.name,
            f"{int(c.steps[-1]):,}",
            f"{c.minutes:.2f}",
            f"{c.bytes_per_second / 1e3:,.0f}k",
            f"{c.steps[-1] * c.bytes_a_step / 1e9:.2f}",
            f"{c.train_bits:.4f}",
            f"{c.bits[-1]:.4f}",
            f"{c.bits.min():.4f}",
        ]
        for c in curves
    ]
    return table(
        ["run", "steps", "minutes", "bytes/s", "GB seen", "training", f"validation, {curves[0].unit}", "lowest"], lines
    )


def common(curves: list[Curve], of: str) -> str:
    """Mean bits of each name at equal seconds or steps, with the half-width of its range over seeds."""
    first, last = (
        max(float(getattr(c, of)[0]) for c in curves), min(float(getattr(c, of)[-1]) for c in curves)
    )  # fmt: skip
    if last <= first:
        return f"no {of} in common"
    marks = np.geomspace(first, last, MARKS)
    names = list(dict.fromkeys(c.name for c in curves))
    lines = []
    for mark in marks:
        line = [f"{mark / 60:.2f}" if of == "seconds" else f"{mark:,.0f}"]
        for name in names:
            found = [b for c in curves if c.name == name and (b := c.at(of, float(mark))) is not None]
            spread = f" +- {(max(found) - min(found)) / 2:.4f}" if len(found) > 1 else ""
            line.append(f"{statistics.mean(found):.4f}{spread}" if found else "")
        lines.append(line)
    return table(["minutes" if of == "seconds" else of, *names], lines)


def fit(minutes: np.ndarray, bits: np.ndarray) -> tuple[float, float, float]:
    """a, b, c of bits = a + b minutes^-c with b, c > 0: least squares in log space over a grid of a below all bits."""
    best: tuple[float, float, float, float] | None = None
    for a in np.linspace(0, bits.min() - 1e-3, 2000):
        slope, height = np.polyfit(np.log(minutes), np.log(bits - a), 1)
        missed = float(np.square(a + np.exp(height) * minutes**slope - bits).sum())
        if slope < 0 and (best is None or missed < best[0]):
            best = missed, float(a), float(np.exp(height)), float(-slope)
    if best is None:
        sys.exit("longer runs are not better here: there is nothing to fit")
    return best[1:]


def estimate(curves: list[Curve], target: float) -> str:
    minutes, bits = np.array([c.minutes for c in curves]), np.array([c.bits[-1] for c in curves])
    if len(set(minutes.round(2))) < 3:
        sys.exit(f"--target needs the ends of runs of three lengths or more: these have {len(set(minutes.round(2)))}")
    a, b, c = fit(minutes, bits)
    formula = f"bits = {a:.3f} + {b:.3f} minutes^-{c:.3f}"
    if target <= a:
        return f"{formula}: it never reaches {target}"
    return f"{formula}: {target} after {(b / (target - a)) ** (1 / c):,.0f} minutes, if that goes on"


def plot(curves: list[Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    names = list(dict.fromkeys(c.name for c in curves))
    for curve in curves:
        look = {"color": f"C{names.index(curve.name)}", "marker": ".", "linewidth": 1.2}
        known = curve.name in axes[0].get_legend_handles_labels()[1]
        axes[0].plot(curve.seconds / 60, curve.bits, label=None if known else curve.name, **look)
        axes[1].plot(curve.steps * curve.bytes_a_step / 1e6, curve.bits, **look)
    axes[0].set(xlabel="minutes of training", ylabel=f"validation, {curves[0].unit}", xscale="log", yscale="log")
    axes[1].set(xlabel="million bytes seen", xscale="log")
    axes[0].legend(frameon=False)
    for axis in axes:
        # Bits span less than a decade: a logarithmic axis by itself would label few of them, as 3 x 10^0.
        axis.yaxis.set(major_locator=MaxNLocator(8, steps=[1, 2, 5, 10]), major_formatter="{x:g}", minor_formatter="")
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("--target", type=float, help="bits to be reached: when, by a fit to the ends of the runs")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    curves = [read(run) for run in options.runs]
    if len({c.unit for c in curves}) > 1:
        sys.exit("runs on images and on text or audio have other units: compare one kind at a time")
    print(ends(curves), end="\n\n")
    if len(curves) > 1:
        print(f"at equal minutes:\n\n{common(curves, 'seconds')}\n\nat equal steps:\n\n{common(curves, 'steps')}\n")
    if options.target is not None:
        print(estimate(curves, options.target))
    if options.json:
        plain = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(c).items()} for c in curves]
        options.json.write_text(json.dumps(plain, indent=1) + "\n")
    if options.plot:
        plot(curves, options.plot)


if __name__ == "__main__":
    main()
