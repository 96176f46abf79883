"""Proposals: all members of a grid, or those that Optuna asks for."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from sparse_tx.errors import UserError
from sparse_tx.sweep.members import DIVERGED, ELSEWHERE, FAILED, Outcome, earlier
from sparse_tx.sweep.space import Axis, grid


class Proposals(Protocol):
    """Members to run, one after another, and what became of them."""

    def __iter__(self) -> Iterator[tuple[int, tuple[str, ...]]]: ...
    def known(self) -> list[tuple[int, tuple[str, ...], Outcome]]: ...
    def tell(self, number: int, outcome: Outcome) -> None: ...


class Grid:
    """Every combination, in the order of the command."""

    def __init__(self, space: Sequence[Axis]) -> None:
        self.members = grid(space)

    def __iter__(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        yield from enumerate(self.members)

    def known(self) -> list[tuple[int, tuple[str, ...], Outcome]]:
        return []  # a member knows its own folder

    def tell(self, number: int, outcome: Outcome) -> None:
        pass


class Search:
    """So many trials of Optuna, kept in a journal: started again, the search goes on where it was.

    The sampler of a trial is seeded by its number, so that an interrupted search proposes what an uninterrupted one
    would, and a trial that was begun is run again with its own parameters, which finds its own folder and checkpoint.
    """

    def __init__(self, space: Sequence[Axis], folder: Path, *, trials: int, sampler: str, seed: int) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise UserError("sweep.trials needs the package optuna: pip install 'sparse-tx[sweep]'")
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.trials, self.sampler, self.seed = space, trials, sampler, seed
        self.distributions = {axis.key: _distribution(axis) for axis in space if not axis.fixed}
        if not self.distributions:
            raise UserError("sweep.trials searches what several values or an interval are given for: nothing is")
        folder.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
        self.study = optuna.create_study(
            storage=storage, study_name="sweep", direction="minimize", load_if_exists=True, sampler=self._sampler(0)
        )

    def __iter__(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        import optuna

        begun = self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        for trial in begun:
            yield trial.number, self._overrides(trial.params)
        while (number := len(self.study.get_trials(deepcopy=False))) < self.trials:
            self.study.sampler = self._sampler(number)
            asked = self.study.ask(self.distributions)
            yield asked.number, self._overrides(asked.params)

    def known(self) -> list[tuple[int, tuple[str, ...], Outcome]]:
        """The trials that were told before."""
        told = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                overrides = self._overrides(trial.params)
                seconds = trial.duration.total_seconds() if trial.duration is not None else 0.0
                told.append((trial.number, overrides, earlier(overrides, trial.value, seconds)))
        return told

    def tell(self, number: int, outcome: Outcome) -> None:
        import optuna

        if outcome.status == ELSEWHERE:
            return  # who runs it tells of it
        if self.study.get_trials(deepcopy=False)[number].state.is_finished():
            return
        if outcome.bits is None and outcome.status == DIVERGED:
            self.study.tell(number, math.inf)  # the sampler keeps away from there
        elif outcome.bits is None or not math.isfinite(outcome.bits) or outcome.status == FAILED:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(number, outcome.bits)

    def _overrides(self, params: dict[str, Any]) -> tuple[str, ...]:
        return tuple(a.override(a.values[0] if a.fixed else _text(params[a.key])) for a in self.space)

    def _sampler(self, number: int) -> Any:
        import optuna

        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {number}".encode()).digest()[:4], "little")
        kind = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[self.sampler]
        return kind(seed=seed)


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    low, high = axis.low, axis.high
    if low is None or high is None:
        return CategoricalDistribution(axis.values)
    if not low < high:
        raise UserError(f"{axis.key}: an interval from {low} to {high} holds nothing: give the smaller end first")
    if axis.log and low <= 0:
        raise UserError(f"{axis.key}: a logarithmic interval starts above 0, not at {low}")
    if all(float(n).is_integer() for n in (low, high, axis.step or 1)) and (axis.step or isinstance(low, int)):
        return IntDistribution(int(low), int(high), log=axis.log, step=int(axis.step or 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.1 + 2 x 0.1 is not 0.3, which Optuna warns of before it rounds
        return FloatDistribution(low, high, log=axis.log, step=axis.step)


def _text(value: Any) -> str:
    """A parameter as Hydra reads it. Six digits of a number are enough, and give folders names that can be read."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
