"""The results of a sweep as a table: on the screen, and as CSV beside the sweep's journal."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from sparse_tx.files import whole
from sparse_tx.shell import spelled
from sparse_tx.sweep.members import Outcome, read_result
from sparse_tx.sweep.space import Axis
from sparse_tx.training.folders import override
from sparse_tx.training.words import clock

Row = tuple[tuple[str, ...], Outcome]


def write_table(path: Path, space: Sequence[Axis], rows: Sequence[Row]) -> None:
    """Whole after each member, so that an interrupt loses nothing."""
    keys = [axis.key for axis in space]
    with whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "bits_per_dim", "seconds", "status", "folder", "error"])
        for overrides, outcome in rows:
            bits = "" if outcome.bits is None else f"{outcome.bits:.6f}"
            values = [o.partition("=")[2] for o in overrides]
            writer.writerow([*values, bits, f"{outcome.seconds:.1f}", outcome.status, outcome.folder, outcome.error])


def table(space: Sequence[Axis], rows: Sequence[Row]) -> list[str]:
    """Lines: what varies, the score, the time and what became of each member; the best one is marked."""
    varying = [place for place, axis in enumerate(space) if not axis.fixed]
    units = sorted({outcome.unit for _, outcome in rows if outcome.bits is not None})
    header = [*(space[place].key for place in varying), " or ".join(units) or "bits/dim", "time", "status"]
    chosen = best(rows)
    cells = []
    for row in rows:
        overrides, outcome = row
        bits = "-" if outcome.bits is None else f"{outcome.bits:.4f}{'*' if row is chosen else ''}"
        values = [overrides[place].partition("=")[2] for place in varying]
        cells.append([*values, bits, clock(outcome.seconds), outcome.status])
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *cells]
    ]


def best(rows: Sequence[Row]) -> Row | None:
    scored = [row for row in rows if row[1].bits is not None and math.isfinite(row[1].bits)]
    return min(scored, key=lambda row: row[1].bits or 0.0, default=None)


def next_command(row: Row) -> str | None:
    """How the best member goes on; None where its result is gone."""
    result = read_result(Path(row[1].folder))
    if result is None:
        return None
    return f"{spelled('evaluate')} {override('checkpoint', result['checkpoint'])} split=test"
