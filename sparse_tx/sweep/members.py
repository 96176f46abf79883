"""One member of a sweep: its folder, found again by the hash of its config, and what becomes of it."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import re
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sparse_tx.config import TrainConfig, config_folder, training
from sparse_tx.data.lock import taken
from sparse_tx.errors import UserError
from sparse_tx.shell import spelled
from sparse_tx.training.folders import RESULT, identity

FINISHED, EARLIER, STOPPED, FAILED = "finished", "finished earlier", "stopped at max_time", "failed"
DIVERGED, ELSEWHERE, SHOWN = "diverged", "running elsewhere", "described"
FAILURE = "failure.json"
# Overrides that change nothing of what is learnt, or that every member shares.
_UNNAMED = re.compile(
    r"\+*(debug|output|name|resume|dry_run|profile|logger|callbacks|sweep|trainer\.(devices|max_time)|data\.root)\b"
)
_LONGEST = 120


@dataclass(frozen=True)
class Outcome:
    """What became of a member. bits: of its best weights, in bits per dim."""

    status: str
    bits: float | None = None
    seconds: float = 0.0
    folder: str = ""
    error: str = ""
    unit: str = "bits/dim"

    @property
    def failed(self) -> bool:
        return self.status in (FAILED, DIVERGED)


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """What Hydra makes of a member's overrides; a mistake is one line."""
    begun = GlobalHydra.instance().is_initialized()
    with nullcontext() if begun else hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            return hydra.compose(config_name, list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(str(error).splitlines()[0]) from None


def member_name(overrides: Sequence[str]) -> str:
    """experiment=cifar10_strided seed=1 -> experiment-cifar10_strided.seed-1, in characters that Hydra can parse."""
    named = [o.lstrip("+") for o in overrides if not _UNNAMED.match(o)]
    words = [re.sub(r"[^A-Za-z0-9_.]+", "-", o).strip("-.") for o in named]
    return ".".join(words)[:_LONGEST].strip("-.") or "run"


def config_hash(config: TrainConfig) -> str:
    """The same for the same experiment, however it was asked for."""
    text = json.dumps(identity(config.plain()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def member_folder(config: TrainConfig, overrides: Sequence[str]) -> Path:
    """OUTPUT/NAME/OVERRIDES-HASH: the one that a member of this config has, or one to make."""
    parent, mark = Path(config.output) / config.name, config_hash(config)
    known = sorted(path for path in parent.glob(f"*-{mark}") if path.is_dir())
    return known[0] if known else parent / f"{member_name(overrides)}-{mark}"


def run_member(overrides: Sequence[str]) -> Outcome:
    """Train a member, from where it was left if it was begun before; never raises but for an interrupt."""
    from sparse_tx.training.callbacks import Diverged

    started, folder, unit = time.perf_counter(), None, "bits/dim"
    try:
        config = training(compose("train", overrides))
        unit = "bits/dim" if config.data.kind == "image" else "bits/byte"
        refuse_several_devices(config, overrides)
        if config.dry_run:
            from sparse_tx.training.run import train

            train(config)
            return Outcome(SHOWN)
        folder = member_folder(config, overrides)
        outcome = _train_in(folder, config, unit)
    except Exception as error:
        status = DIVERGED if isinstance(error, Diverged) else FAILED
        text = str(error).strip() or type(error).__name__
        if not isinstance(error, UserError):
            traceback.print_exc()
            text = f"{type(error).__name__}: {text}".splitlines()[0]
        print(f"error: {text}", file=sys.stderr, flush=True)
        if folder is not None and folder.is_dir():
            _write(folder / FAILURE, {"status": status, "error": text, "overrides": list(overrides)})
        outcome = Outcome(status, None, time.perf_counter() - started, str(folder or ""), text, unit)
    _release()  # outside the handler, which holds the frames that hold the tensors
    return outcome


def _train_in(folder: Path, config: TrainConfig, unit: str) -> Outcome:
    from sparse_tx.training.run import train

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be made: {error.strerror}; set output=FOLDER") from None
    with taken(folder / "lock") as mine:
        if not mine:
            return Outcome(ELSEWHERE, folder=str(folder), unit=unit)
        before = read_result(folder)
        if before is not None and before["steps"] >= config.trainer.max_steps:
            return Outcome(EARLIER, before["val/bits_per_dim"], before.get("seconds", 0.0), str(folder), "", unit)
        (folder / FAILURE).unlink(missing_ok=True)
        started = time.perf_counter()
        result = train(config, folder)
        status = FINISHED if result["steps"] >= config.trainer.max_steps else STOPPED
        return Outcome(status, result["val/bits_per_dim"], time.perf_counter() - started, str(folder), "", unit)


def seen_again(outcome: Outcome) -> Outcome:
    """What another process has made of a member since."""
    result = read_result(Path(outcome.folder)) if outcome.status == ELSEWHERE else None
    if result is None:
        return outcome
    return replace(outcome, status=EARLIER, bits=result["val/bits_per_dim"], seconds=result.get("seconds", 0.0))


def earlier(overrides: Sequence[str], bits: float | None, seconds: float) -> Outcome:
    """A trial that was told of in an earlier start of its search."""
    if bits is None or not math.isfinite(bits):
        return Outcome(DIVERGED if bits is not None else FAILED, None, seconds, error="in an earlier start")
    config = training(compose("train", overrides))
    unit = "bits/dim" if config.data.kind == "image" else "bits/byte"
    return Outcome(EARLIER, bits, seconds, str(member_folder(config, overrides)), "", unit)


def refuse_several_devices(config: TrainConfig, overrides: Sequence[str]) -> None:
    """Lightning's further processes run the command line again: in a sweep that is the whole sweep."""
    trainer = config.trainer
    if trainer.devices in ("1", "auto") and trainer.strategy != "ddp":
        return
    alone = " ".join(o for o in overrides if not o.startswith("sweep"))
    raise UserError(
        f"a sweep (-m) with trainer.devices={trainer.devices} would start itself once more on each device: start each "
        f"member by itself, without -m ({spelled('train')} {alone}), or keep trainer.devices=1 and start the same "
        "sweep once for each GPU (CUDA_VISIBLE_DEVICES=0, 1, ...): they share its members"
    )


def read_result(folder: Path) -> dict[str, Any] | None:
    try:
        result = json.loads((folder / RESULT).read_text())
        return result if {"steps", "val/bits_per_dim", "checkpoint"} <= result.keys() else None
    except (OSError, ValueError, AttributeError):
        return None  # not there, or damaged: the checkpoints say how far it came


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _release() -> None:
    """What a failed member held of the device's memory, so that the next one can have it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a fault of the device stays for the life of the process
            sys.exit(f"error: the GPU cannot be used any more in this process ({error}): start the same sweep again")
