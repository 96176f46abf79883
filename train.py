"""Train a Sparse Transformer: `python train.py experiment=cifar10_strided`."""

from typing import Any

from omegaconf import DictConfig

from sparse_tx import command, config


def train(cfg: DictConfig) -> dict[str, Any]:
    """cfg: what Hydra composes from configs/train.yaml. Returns val/bits_per_dim, checkpoint, steps and more."""
    checked = config.training(cfg)
    from sparse_tx.training import run  # seconds to import: a mistake in the command is told before

    return run.train(checked)


if __name__ == "__main__":
    command.main(train, "train")
