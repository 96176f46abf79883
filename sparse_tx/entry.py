"""What each command does with the config that Hydra composed. Torch and Lightning are imported after the checks.

The scripts of a checkout, the installed `sparse-tx` and a caller from Python share these functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sparse_tx import config


def train(cfg: DictConfig) -> dict[str, Any]:
    """cfg: what Hydra composes from configs/train.yaml. Returns val/bits_per_dim, checkpoint, steps and more."""
    checked = config.training(cfg)
    from sparse_tx.training import run  # seconds to import: a mistake in the command is told before

    return run.train(checked)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """cfg: what Hydra composes from configs/evaluate.yaml. Returns bits_per_dim, nats, count, split, weights, ..."""
    checked = config.evaluating(cfg)
    from sparse_tx.evaluation import run

    return run.evaluate(checked)


def sample(cfg: DictConfig) -> list[Path]:
    """cfg: what Hydra composes from configs/sample.yaml. Returns the paths of the files written."""
    checked = config.sampling(cfg)
    from sparse_tx.sampling import run

    return run.sample(checked)


def export(cfg: DictConfig) -> Path:
    """cfg: what Hydra composes from configs/export.yaml. Returns the folder written."""
    checked = config.exporting(cfg)
    from sparse_tx.export import run

    return run.export(checked)
