"""Run folders, and finding the checkpoint to resume from."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from torch.distributed import TCPStore

from sparse_tx.checkpoint import Checkpoint, read_checkpoint
from sparse_tx.config import TrainConfig
from sparse_tx.errors import UserError
from sparse_tx.files import whole
from sparse_tx.model import ModelSpec

RESULT = "result.json"
_SHARED = "SPARSE_TX_RUN_FOLDER"  # tells the processes of a run which folder the first one made
_PARTS_MAY_DIFFER = {"trainer": ("devices", "max_time", "fused", "compile", "cuda_graph"), "model": ("recompute",)}
_MAY_DIFFER = ("resume", "logger", "dry_run", "profile", "output", "debug", "sweep")


def new_run_folder(output: str, name: str) -> Path:
    """OUTPUT/NAME/DATE_TIME-XXXX, made by this call alone, once for all the processes of a run."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun, whose processes share a store
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"{_SHARED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if os.environ.get("RANK", "0") == "0":
            store.set(key, str(dated_folder(Path(output) / name)))
        return Path(store.get(key).decode())
    if os.environ.get("LOCAL_RANK", "0") != "0" and _SHARED in os.environ:  # started by the first process
        return Path(os.environ[_SHARED])
    folder = dated_folder(Path(output) / name)
    os.environ[_SHARED] = str(folder)
    return folder


def dated_folder(parent: Path) -> Path:
    """PARENT/DATE_TIME-XXXX, made by this call alone."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / f"{datetime.now():%Y-%m-%d_%H%M%S}-{secrets.token_hex(2)}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"the folder cannot be made in {parent}: {error.strerror}; set output=FOLDER") from None


def write_config(folder: Path, config: TrainConfig) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """result.json, whole or not at all: it says that the run has come to its end."""
    with whole(folder / RESULT) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")


def find_resume(config: TrainConfig) -> Path | None:
    """The checkpoint that `resume` asks for; None to start fresh."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        checkpoint = read_checkpoint(config.resume)
        if "optimizer_states" not in checkpoint.contents:
            raise UserError(f"resume={config.resume} is an exported model: only a run's own checkpoint can be resumed")
        if _without_recompute(checkpoint.spec) != _without_recompute(config.model_spec()):
            raise UserError(
                f"resume={config.resume} holds another model: {_first_difference(checkpoint, config)}; give the same "
                "config as the run that wrote it"
            )
        return checkpoint.path
    return newest_checkpoint(Path(config.output).glob("*/*"), config)


def newest_checkpoint(folders: Iterable[Path], config: TrainConfig) -> Path | None:
    """The newest good checkpoint of this config in the folders of runs."""
    wanted = identity(config.plain())
    files = [path for folder in folders for path in folder.glob("checkpoints/*.ckpt")]
    for path in sorted(files, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            written = yaml.safe_load((path.parent.parent / "config.yaml").read_text())
            if identity(written) == wanted and identity(read_checkpoint(path).config) == wanted:
                return path
        except (OSError, yaml.YAMLError, UserError, AttributeError, TypeError, KeyError):
            continue  # unreadable or foreign: the next newest
    return None


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """What of a plain config must agree for a run to go on: all but where it logs, its devices and its time.

    What only trades memory for time may differ as well: a run may go on on another device.
    """
    kept = {k: v for k, v in config.items() if k not in _MAY_DIFFER}
    for group, keys in _PARTS_MAY_DIFFER.items():
        kept[group] = {k: v for k, v in config[group].items() if k not in keys}
    return kept


def _without_recompute(spec: ModelSpec) -> ModelSpec:
    """What is run again changes no number, and what fits depends on the device."""
    return spec.recomputing("none")


def _first_difference(checkpoint: Checkpoint, config: TrainConfig) -> str:
    theirs, ours = (_without_recompute(s).plain() for s in (checkpoint.spec, config.model_spec()))
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
