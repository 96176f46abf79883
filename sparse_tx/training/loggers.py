"""Where a run's numbers go: CSV, Weights & Biases, TensorBoard, several at once."""

from __future__ import annotations

import csv
import importlib.util
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from sparse_tx.config import LoggerConfig, TrainConfig, WandbConfig
from sparse_tx.errors import UserError
from sparse_tx.training.wandb_run import WandbRun


def check_loggers(config: LoggerConfig | None) -> None:
    """UserError for a logger whose package is not installed."""
    for name in ("wandb", "tensorboard"):
        if config is not None and getattr(config, name) is not None and importlib.util.find_spec(name) is None:
            raise UserError(f"logger={name} needs the package {name}: pip install 'sparse-tx[{name}]'")


def make_loggers(
    config: TrainConfig, folder: Path, *, facts: dict[str, Any], start: int = 0, run_id: str | None = None
) -> list[Logger]:
    """Loggers that write into the run's folder.

    facts: what the config does not say, for Weights & Biases. start: the step that the run goes on from; what the
    folder holds from there on is logged again. run_id: the run at Weights & Biases that this one continues.
    """
    loggers: list[Logger] = []
    if config.logger is None:
        return loggers
    if config.logger.csv is not None:
        loggers.append(_csv(folder, config.callbacks.log_every, start))
    if config.logger.tensorboard is not None:
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard", purge_step=start or None))
    if config.logger.wandb is not None:
        loggers.append(_wandb(config, config.logger.wandb, folder, facts, run_id))
    return loggers


def close_loggers(loggers: list[Logger], *, failed: bool) -> None:
    """After the last number: the next run of this process starts loggers of its own."""
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.finish(failed)
        logger.finalize("failed" if failed else "success")


def run_id_of(loggers: list[Logger]) -> str | None:
    """The id of the run at Weights & Biases, for the checkpoint."""
    return next((logger.version for logger in loggers if isinstance(logger, WandbRun)), None)


def log_checkpoint(loggers: list[Logger], metrics: dict[str, Any]) -> None:
    """Upload the checkpoint that a run ends with, where that is asked for."""
    for logger in loggers:
        if isinstance(logger, WandbRun) and logger.keeps_checkpoints:
            logger.log_checkpoint(metrics)


def _csv(folder: Path, every: int, start: int) -> CSVLogger:
    """metrics.csv in the folder. Lightning deletes the one it finds; its rows from before `start` are kept."""
    path, rows = folder / "metrics.csv", []
    if start and path.is_file():
        with path.open(newline="") as file:
            rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file) if int(row["step"]) < start]
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=every)
    if rows:
        rank_zero_only(logger.experiment.metrics.extend)(rows)
        logger.save()
    return logger


def _wandb(
    config: TrainConfig, wandb: WandbConfig, folder: Path, facts: dict[str, Any], run_id: str | None
) -> WandbRun:
    offline = wandb.offline if wandb.offline is not None else not _has_key()
    settings: dict[str, Any] = {
        "name": folder.name,
        "group": config.name,
        "save_dir": folder.resolve(),  # its service runs where it was started
        "project": wandb.project,
        "entity": wandb.entity,
        "tags": wandb.tags,
        "version": run_id,
        "config": {**config.plain(), "run": facts},
        "keeps_checkpoints": wandb.checkpoints,
    }
    return WandbRun.started(settings, offline=offline)


def _has_key() -> bool:
    """Whether Weights & Biases can log in by itself: by a key in the environment, or kept by `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    home = Path("~/.netrc").expanduser()
    path = os.environ.get("NETRC") or str(home if home.is_file() else Path("~/_netrc").expanduser())
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).netloc
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
