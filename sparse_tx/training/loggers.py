"""Where a run's numbers go: CSV, Weights & Biases, TensorBoard, several at once."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from sparse_tx.config import LoggerConfig, TrainConfig
from sparse_tx.errors import UserError


def check_loggers(config: LoggerConfig | None) -> None:
    """UserError for a logger whose package is not installed."""
    for name in ("wandb", "tensorboard"):
        if config is not None and getattr(config, name) is not None and importlib.util.find_spec(name) is None:
            raise UserError(f"logger={name} needs the package {name}: pip install 'sparse-tx[{name}]'")


def make_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """Loggers that write into the run's folder."""
    loggers: list[Logger] = []
    if config.logger is None:
        return loggers
    if config.logger.csv is not None:
        loggers.append(CSVLogger(folder, name="", version="", flush_logs_every_n_steps=config.callbacks.log_every))
    if config.logger.tensorboard is not None:
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if config.logger.wandb is not None:
        wandb = config.logger.wandb
        offline = wandb.offline if wandb.offline is not None else not _has_key()
        loggers.append(
            WandbLogger(
                name=folder.name,
                group=config.name,
                save_dir=folder,
                project=wandb.project,
                entity=wandb.entity,
                tags=wandb.tags,
                offline=offline,
                config=config.plain(),
            )
        )
    return loggers


def _has_key() -> bool:
    """Whether Weights & Biases can log in by itself: a key in the environment or kept by `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text()
