"""How fast the data are served, beside what a training step asks for.

    python benchmarks/data.py CIFAR10 TEXT IMAGES RECORDINGS

Each argument is the `data.source` of one experiment, or `-` to leave it out. Batches are taken as training takes them,
through the DataModule's loader, in shuffled order over the whole training set, pinned if there is a GPU. Without one,
pinning is an extra copy of a batch, and "copied" adds it: a clone of each batch in the process that trains.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

import hydra
import torch

from sparse_tx import config
from sparse_tx.data import DataModule

# Bytes a second that training is to reach on one GPU, for the experiment files' batches.
GOALS = {"cifar10_strided": 600e3, "enwik8_fixed": 420e3, "imagenet64_strided": 400e3, "audio_1m": 100e3}
SECONDS, ROUNDS = 1.0, 5


def rate(data: DataModule, seconds: float, copied: bool) -> tuple[float, float]:
    """Bytes a second, and the longest wait for one batch in milliseconds; worker processes start before the clock."""
    loader = data.train_dataloader()
    loader.pin_memory = torch.cuda.is_available()  # as with a trainer on a GPU
    batches = iter(loader)
    next(batches)
    served, longest, started = 0, 0.0, time.perf_counter()
    while (now := time.perf_counter()) - started < seconds:
        tokens = next(batches)["tokens"]
        served += (tokens.clone() if copied else tokens).numel()
        longest = max(longest, time.perf_counter() - now)
    return served / (time.perf_counter() - started), 1000 * longest


def main(sources: list[str]):
    torch.set_num_threads(1)  # as in the thread that pins
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {cpu()}")
    print("| experiment | batch | workers | goal MB/s | served MB/s (best, worst) | times the goal | longest wait ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with hydra.initialize_config_dir(str(config.config_folder()), version_base="1.3"):
        for (experiment, goal), source in zip(GOALS.items(), sources, strict=True):
            if source == "-":
                continue
            overrides = [f"experiment={experiment}", f"data.source={source}", "data.unreadable=skip"]
            checked = config.training(hydra.compose("train", overrides))
            for workers, copied in ((0, False), (0, True), (2, False)):
                data = DataModule(
                    checked.data.spec(), batch_size=checked.data.batch_size, seed=1, max_steps=1 << 30, workers=workers
                )
                data.prepare_data()
                rounds = [rate(data, SECONDS, copied) for _ in range(ROUNDS)]
                rates, wait = sorted(r for r, _ in rounds), max(w for _, w in rounds)
                middle = statistics.median(rates)
                print(
                    f"| {experiment} | {checked.data.batch_size} x {checked.data.context:,} | "
                    f"{workers}{', copied' if copied else ''} | {goal / 1e6:.2f} | {middle / 1e6:,.0f} "
                    f"({rates[-1] / 1e6:,.0f}, {rates[0] / 1e6:,.0f}) | {middle / goal:,.0f} | {wait:.1f} |",
                    flush=True,
                )


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    if len(sys.argv) != 1 + len(GOALS):
        sys.exit(__doc__)
    main(sys.argv[1:])
