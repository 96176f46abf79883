"""Score a checkpoint in bits per dim: `python evaluate.py checkpoint=PATH split=test`."""

from typing import Any

from omegaconf import DictConfig

from sparse_tx import command, config


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """cfg: what Hydra composes from configs/evaluate.yaml. Returns bits_per_dim, nats, count, split, weights, ..."""
    checked = config.evaluating(cfg)
    from sparse_tx.evaluation import run

    return run.evaluate(checked)


if __name__ == "__main__":
    command.main(evaluate, "evaluate")
