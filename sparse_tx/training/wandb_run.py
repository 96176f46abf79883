"""A run at Weights & Biases that can never stop the training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

INIT_SECONDS = 30  # to reach the server, before the run goes on offline
FINISH_SECONDS = 120  # to upload what is left at the end; the rest stays in the folder, for `wandb sync`


class WandbRun(WandbLogger):
    """Lightning's logger, but that a server that cannot be reached or a service that dies is told once and left alone.

    Lightning gives each value the step it was logged at as x-axis; images, audio and text are logged with
    `log_image(key, images, step=step)`, `log_audio` and `log_text`.
    """

    def __init__(self, *, keeps_checkpoints: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._wandb_init.pop("anonymous")  # Lightning passes it on; it does nothing, and W&B warns of it
        self.keeps_checkpoints = keeps_checkpoints
        self._lost = False

    @classmethod
    def started(cls, settings: dict[str, Any], *, offline: bool) -> WandbRun:
        """A run that has begun: at the server, or offline if that is asked for or the server does not answer."""
        import wandb

        # Of its own: Lightning would go on with the run before in this process, whose service may have died.
        quiet = wandb.Settings(
            quiet=True, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, reinit="create_new"
        )
        if not offline:
            logger = cls(**settings, settings=quiet)
            try:
                logger._begin()
                return logger
            except wandb.Error as error:
                reason = str(error).splitlines()[0]
                print(f"wandb: cannot be reached ({reason}): going on offline", file=sys.stderr, flush=True)
                wandb.teardown()
        # A run that is continued keeps its id; that it is to be resumed is nothing that is settled offline.
        logger = cls(**settings, settings=quiet, mode="offline", resume=None)
        logger._begin()
        return logger

    @rank_zero_only
    def _begin(self) -> None:
        run = self.experiment
        # In the table of runs the best score stands, not the last.
        run.define_metric("val/bits_per_dim", step_metric="trainer/global_step", summary="min")
        where = run.url if not run.offline else f"offline; upload by: wandb sync {Path(run.dir).parent}"
        print(f"wandb: {where}", flush=True)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._safely(lambda: super(WandbRun, self).log_metrics(metrics, step))

    def log_checkpoint(self, metrics: dict[str, Any]) -> None:
        """The checkpoint of `metrics` as an artifact, with its score."""
        import wandb

        def log() -> None:
            run = self.experiment
            artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=metrics)
            artifact.add_file(metrics["checkpoint"], name="model.ckpt")
            run.log_artifact(artifact, aliases=["best", f"step-{metrics['best_step']}"])

        self._safely(log)

    def finish(self, failed: bool) -> None:
        if self._experiment is not None:
            experiment, self._experiment = self._experiment, None
            self._safely(lambda: experiment.finish(exit_code=int(failed)))

    @rank_zero_only
    def _safely(self, log: Any) -> None:
        if self._lost:
            return
        import wandb

        try:
            log()
        except (wandb.Error, OSError) as error:
            self._lost = True
            print(f"wandb: stopped logging ({error}): the training goes on", file=sys.stderr, flush=True)
