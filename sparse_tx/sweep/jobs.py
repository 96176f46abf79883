"""Where members run: here one after another, or as jobs of submitit (processes of this machine, or SLURM)."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sparse_tx.config import SweepConfig
from sparse_tx.errors import UserError
from sparse_tx.sweep.members import FAILED, Outcome, run_member


class Job(Protocol):
    def done(self) -> bool: ...
    def result(self) -> Outcome: ...
    def stop(self) -> None: ...


class Here:
    """Runs when its result is asked for."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.overrides = overrides

    def done(self) -> bool:
        return True

    def result(self) -> Outcome:
        return run_member(self.overrides)

    def stop(self) -> None:
        pass


class Training:
    """A member as submitit starts it. A job that SLURM takes the node from is queued again, and goes on from its
    newest checkpoint."""

    def __call__(self, overrides: Sequence[str]) -> Outcome:
        return run_member(overrides)

    def checkpoint(self, overrides: Sequence[str]) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, overrides)


class Submitted:
    """stop: leaves a job of SLURM alone, which an interrupt of the command that started it does not concern."""

    def __init__(self, job: Any, *, ours: bool) -> None:
        self._job, self._ours = job, ours

    def done(self) -> bool:
        return self._job.done()

    def result(self) -> Outcome:
        try:
            return self._job.result()
        except Exception as error:  # the job died, or was cancelled
            return Outcome(FAILED, error=f"job {self._job.job_id}: {str(error).strip().splitlines()[-1]}")

    def stop(self) -> None:
        if self._ours:
            self._job.cancel(check=False)


def launcher(config: SweepConfig, folder: Path) -> Any:
    """A function from a member's overrides to its job."""
    if config.launcher == "here":
        return Here
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"sweep.launcher={config.launcher} needs the package submitit: pip install 'sparse-tx[slurm]'")
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=config.launcher)
    except RuntimeError as error:
        raise UserError(f"sweep.launcher={config.launcher}: {error}; use sweep.launcher=here or local") from None
    executor.update_parameters(**parameters(config))
    ours = config.launcher == "local"
    return lambda overrides: Submitted(executor.submit(Training(), tuple(overrides)), ours=ours)


def parameters(config: SweepConfig) -> dict[str, Any]:
    """submitit's parameters of a job."""
    slurm = config.slurm
    wanted: dict[str, Any] = {
        "name": "sparse-tx",
        "timeout_min": slurm.timeout_min,
        "nodes": 1,
        "tasks_per_node": 1,
    }
    if config.launcher == "slurm":
        wanted |= {
            "gpus_per_node": slurm.gpus,
            "cpus_per_task": slurm.cpus,
            "mem_gb": slurm.mem_gb,
            "slurm_partition": slurm.partition,
            "slurm_account": slurm.account,
        }
    return {key: value for key, value in wanted.items() if value is not None}


def first_done(jobs: Sequence[Job]) -> int:
    """Waits until one of them is done; which."""
    while True:
        for place, job in enumerate(jobs):
            if job.done():
                return place
        time.sleep(1)
