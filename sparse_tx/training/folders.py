"""Run folders, and finding the checkpoint to resume from."""

from __future__ import annotations

import os
import re
import secrets
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from sparse_tx.checkpoint import Checkpoint, read_checkpoint
from sparse_tx.config import TrainConfig
from sparse_tx.errors import UserError

_SHARED = "SPARSE_TX_RUN_FOLDER"  # tells the processes of a run which folder the first one made
_MAY_DIFFER = ("resume", "logger", "dry_run", "profile", "output", "debug")


def new_run_folder(output: str, name: str) -> Path:
    """OUTPUT/NAME/DATE_TIME-XXXX, made by this call alone."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and _SHARED in os.environ:
        return Path(os.environ[_SHARED])
    parent = Path(output) / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / f"{datetime.now():%Y-%m-%d_%H%M%S}-{secrets.token_hex(2)}"
            try:
                folder.mkdir()
                break
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"the run's folder cannot be made in {parent}: {error.strerror}; set output=FOLDER") from None
    os.environ[_SHARED] = str(folder)
    return folder


def write_config(folder: Path, config: TrainConfig) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))


def find_resume(config: TrainConfig) -> Path | None:
    """The checkpoint that `resume` asks for; None to start fresh."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        checkpoint = read_checkpoint(config.resume)
        if "optimizer_states" not in checkpoint.contents:
            raise UserError(f"resume={config.resume} is an exported model: only a run's own checkpoint can be resumed")
        if checkpoint.spec != config.model_spec():
            raise UserError(
                f"resume={config.resume} holds another model: {_first_difference(checkpoint, config)}; give the same "
                "config as the run that wrote it"
            )
        return checkpoint.path
    wanted = _identity(config.plain())
    files = Path(config.output).glob("*/*/checkpoints/*.ckpt")
    for path in sorted(files, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            written = yaml.safe_load((path.parent.parent / "config.yaml").read_text())
            if _identity(written) == wanted and _identity(read_checkpoint(path).config) == wanted:
                return path
        except (OSError, yaml.YAMLError, UserError, AttributeError, TypeError, KeyError):
            continue  # unreadable or foreign: the next newest
    return None


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What must agree for a run to go on: all but where it logs, on how many devices and for how long."""
    kept = {k: v for k, v in config.items() if k not in _MAY_DIFFER}
    kept["trainer"] = {k: v for k, v in config["trainer"].items() if k not in ("devices", "max_time")}
    return kept


def _first_difference(checkpoint: Checkpoint, config: TrainConfig) -> str:
    theirs, ours = checkpoint.spec.plain(), config.model_spec().plain()
    for key in ours:
        if theirs[key] != ours[key]:
            return f"{key} is {theirs[key]} there and {ours[key]} here"
    return "its weights differ"


def override(key: str, value: str | Path) -> str:
    """`key=value` quoted for Hydra, and then for the shell."""
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9_./-]+", text):
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        text = f'"{escaped}"'
    return shlex.quote(f"{key}={text}")
