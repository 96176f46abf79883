"""A sweep from its command line to its table: `sweep`."""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sparse_tx.config import SweepConfig, config_folder, sweeping
from sparse_tx.errors import UserError
from sparse_tx.sweep.jobs import Job, first_done, launcher
from sparse_tx.sweep.members import Outcome, compose, member_name, seen_again
from sparse_tx.sweep.search import Grid, Proposals, Search
from sparse_tx.sweep.space import Axis, grid, read_space
from sparse_tx.sweep.table import Row, best, next_command, table, write_table


def sweep(function: Callable[[DictConfig], Any], config_name: str, arguments: Sequence[str]) -> list[str]:
    """Run all members of a command line with -m. Returns the failed ones, as their overrides."""
    for argument in arguments:
        if argument.startswith(("-", "hydra")):
            raise UserError(f"{argument} means nothing in a sweep: what it takes is in configs/sweep")
    if config_name != "train":
        return _each(function, config_name, grid(read_space(arguments, {}, config_folder())))
    given = [axis for axis in read_space(arguments, {}, config_folder()) if axis.fixed]
    alone = [axis.override(axis.values[0]) for axis in given if re.match(r"(sweep|output|seed)\b", axis.key)]
    config, output, seed = sweeping(compose(config_name, alone))
    space = read_space(arguments, config.params, config_folder())
    folder = Path(output) / "sweeps" / sweep_name(space)
    proposals = _proposals(space, config, folder, seed)
    return _train_all(space, config, proposals, folder)


def sweep_name(space: Sequence[Axis]) -> str:
    """By what varies, and a hash of the whole space: more trials of a search are the same sweep."""
    told = [axis for axis in space if not axis.key.startswith("sweep.")]
    mark = hashlib.sha256(repr(told).encode()).hexdigest()[:8]
    return f"{member_name([a.key for a in told if not a.fixed])}-{mark}"


def _proposals(space: Sequence[Axis], config: SweepConfig, folder: Path, seed: int) -> Proposals:
    if config.trials is None:
        return Grid(space)
    return Search(space, folder, trials=config.trials, sampler=config.sampler, seed=seed)


def _train_all(space: Sequence[Axis], config: SweepConfig, proposals: Proposals, folder: Path) -> list[str]:
    submit = launcher(config, folder)
    limit = 1 if config.launcher == "here" else config.parallel
    rows: dict[int, Row] = {number: (overrides, outcome) for number, overrides, outcome in proposals.known()}
    failed: list[str] = []  # in this start
    running: list[tuple[int, tuple[str, ...], Job]] = []
    source = iter(proposals)
    total = len(proposals.members) if isinstance(proposals, Grid) else config.trials
    try:
        while True:
            while len(running) < limit and (proposed := next(source, None)) is not None:
                number, overrides = proposed
                print(f"run {number + 1} of {total}: {' '.join(overrides)}", flush=True)
                running.append((number, overrides, submit(overrides)))
            if not running:
                break
            number, overrides, job = running.pop(first_done([job for _, _, job in running]))
            outcome = job.result()
            rows[number] = overrides, outcome
            proposals.tell(number, outcome)
            failed += [" ".join(overrides)] if outcome.failed else []
            _report(number, outcome)
            if any(told.folder for _, told in rows.values()):  # a command of mistakes alone leaves nothing behind
                folder.mkdir(parents=True, exist_ok=True)
                write_table(folder / "table.csv", space, [rows[n] for n in sorted(rows)])
    except (KeyboardInterrupt, SystemExit):
        for _, _, job in running:
            job.stop()
        print(f"\ninterrupted after {len(rows)} of {total}: the same command again goes on from there", flush=True)
        raise
    finally:
        if rows:
            _conclude(space, [(rows[n][0], seen_again(rows[n][1])) for n in sorted(rows)], folder)
    return failed


def _report(number: int, outcome: Outcome) -> None:
    score = "" if outcome.bits is None else f", {outcome.unit} {outcome.bits:.4f}"
    print(f"run {number + 1}: {outcome.status}{score}{f': {outcome.folder}' if outcome.folder else ''}\n", flush=True)


def _conclude(space: Sequence[Axis], rows: Sequence[Row], folder: Path) -> None:
    for line in table(space, rows):
        print(line)
    if (folder / "table.csv").is_file():
        write_table(folder / "table.csv", space, rows)
        print(f"table: {folder / 'table.csv'}")
    chosen = best(rows)
    if chosen is not None:
        print(f"best: {chosen[1].bits:.4f} {chosen[1].unit}: {chosen[1].folder}")
        if (command := next_command(chosen)) is not None:
            print(f"evaluate: {command}", flush=True)


def _each(function: Callable[[DictConfig], Any], config_name: str, members: Sequence[Sequence[str]]) -> list[str]:
    """Members of evaluate, sample or export: nothing is kept of them, so nothing is skipped."""
    outputs = [o for overrides in members for o in overrides if o.startswith("output=") and o != "output=null"]
    if len(set(outputs)) < len(outputs):
        raise UserError(f"{outputs[0]} would be written over by each member of this sweep: leave it out, or vary it")
    failed = []
    for number, overrides in enumerate(members):
        name = " ".join(overrides)
        print(f"run {number + 1} of {len(members)}: {name}", flush=True)
        try:
            function(compose(config_name, overrides))
        except UserError as error:
            failed.append(name)
            print(f"error: {error}", file=sys.stderr, flush=True)
        except Exception:
            failed.append(name)
            traceback.print_exc()
    return failed
