"""Sample from a checkpoint: `python sample.py checkpoint=PATH count=16 temperature=1.0 prompt=FILE`."""

from pathlib import Path

from omegaconf import DictConfig

from sparse_tx import command, config


def sample(cfg: DictConfig) -> list[Path]:
    """cfg: what Hydra composes from configs/sample.yaml. Returns the paths of the files written."""
    checked = config.sampling(cfg)
    from sparse_tx.sampling import run

    return run.sample(checked)


if __name__ == "__main__":
    command.main(sample, "sample")
