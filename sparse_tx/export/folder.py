"""The exported folder: model.safetensors, config.json, README.md. Tensors and plain data alone, no code, no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_tx import __version__
from sparse_tx.checkpoint import Checkpoint
from sparse_tx.errors import UserError
from sparse_tx.model import ModelSpec

FORMAT = 1
TENSORS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# Where and how one machine trained: of no use to another, and not everyone's business.
LEFT_OUT = ("output", "resume", "logger", "dry_run", "profile", "debug")


def shared_config(config: dict[str, Any]) -> dict[str, Any]:
    """A training config without folders of the machine that trained; of a source, its last name stays."""
    kept = {k: v for k, v in config.items() if k not in LEFT_OUT}
    data = {k: v for k, v in config["data"].items() if k != "root"}
    if data["source"] is not None:
        data["source"] = PurePath(data["source"]).name
    return kept | {"data": data}


def write_model(folder: Path, checkpoint: Checkpoint, weights: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes tensors and config into an existing folder. Returns what config.json holds."""
    tensors = {name: t.detach().contiguous() for name, t in checkpoint.weights(weights).items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    described = {
        "library_name": "sparse-tx",
        "version": __version__,
        "format": FORMAT,
        "weights": weights,
        "step": checkpoint.step,
        "model": checkpoint.spec.plain(),
        "config": shared_config(checkpoint.config),
        "results": results,
    }
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    (folder / TENSORS).chmod((folder / CONFIG).stat().st_mode)  # safetensors leaves it to its owner alone
    return described


def is_exported(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / TENSORS).is_file()


def read_model(folder: Path) -> Checkpoint:
    """What `write_model` wrote, as a checkpoint with one kind of weights and no state of an optimizer."""
    try:
        described = json.loads((folder / CONFIG).read_text())
        tensors: dict[str, torch.Tensor] = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the exported model {folder} cannot be read ({error}): export or download it again") from None
    if not isinstance(described, dict) or described.get("library_name") != "sparse-tx":
        raise UserError(f"{folder} is not a model that this project exported: its {CONFIG} does not say so")
    if described.get("format") != FORMAT:
        raise UserError(f"{folder} has format {described.get('format')}: this version reads format {FORMAT}")
    try:
        spec, config = ModelSpec.of(described["model"]), described["config"]
        config["data"].setdefault("root", os.environ.get("SPARSE_TX_DATA", "data"))
        weights, step = described["weights"], int(described["step"])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} describes no model that this version knows: {error}") from None
    contents = {"ema": tensors} if weights == "ema" else {"state_dict": {f"model.{n}": t for n, t in tensors.items()}}
    return Checkpoint(folder, spec, config, step, contents)
