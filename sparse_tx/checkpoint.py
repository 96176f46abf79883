"""Reading checkpoints: only tensors and plain data are ever loaded, and the model is built from what they hold."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_tx.errors import UserError
from sparse_tx.model import ModelSpec, Transformer


@dataclass
class Checkpoint:
    path: Path
    spec: ModelSpec
    config: dict[str, Any]  # the whole training config, plain
    step: int
    contents: dict[str, Any]

    @property
    def trained_on(self) -> str | None:
        """The title of its training data; None in older checkpoints."""
        return self.contents.get("sparse_tx", {}).get("data")

    def weights(self, which: str) -> dict[str, torch.Tensor]:
        """ "ema" or "live", named as in the model."""
        where = {"ema": "ema", "live": "state_dict"}
        if which not in where:
            raise UserError(f"weights={which} is not known: use ema or live")
        if where[which] not in self.contents:
            other = "live" if which == "ema" else "ema"
            raise UserError(f"{self.path} was exported with its {other} weights alone: use weights={other}")
        if which == "ema":
            return self.contents["ema"]
        prefix = "model."
        return {n[len(prefix) :]: t for n, t in self.contents["state_dict"].items() if n.startswith(prefix)}

    @property
    def file(self) -> Path:
        """The file that holds the weights."""
        from sparse_tx.export.folder import TENSORS

        return self.path / TENSORS if self.path.is_dir() else self.path

    def model(self, weights: str = "ema", device: str | torch.device | None = None) -> Transformer:
        """In eval mode, on the device (the CPU if None)."""
        model = Transformer(self.spec)
        try:
            model.load_state_dict(self.weights(weights))
        except RuntimeError as error:
            raise UserError(f"{self.path} does not hold the weights of its own config: {error}") from None
        return model.to(device or "cpu").eval()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """A file that training wrote, an exported folder, or "hub:USER/NAME".

    Raises UserError for what is missing, damaged, or not one of ours.
    """
    from sparse_tx.export import folder, hub  # safetensors is needed for these alone

    if str(path).startswith(hub.PREFIX):
        return folder.read_model(hub.download(str(path)))
    path = Path(path).expanduser()
    if folder.is_exported(path):
        return folder.read_model(path)
    if path.is_dir():
        raise UserError(
            f"checkpoint {path} is a folder: give a file in it, such as {path / 'checkpoints' / 'best.ckpt'}"
        )
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give the path that training printed")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read ({reason}): it is damaged, or not a checkpoint") from None
    ours = contents.get("sparse_tx") if isinstance(contents, dict) else None
    if not isinstance(ours, dict) or not {"model", "config"} <= ours.keys() or "ema" not in contents:
        raise UserError(f"checkpoint {path} was not written by this project: give one that `python train.py` wrote")
    if ours.get("format") != 1:
        raise UserError(f"checkpoint {path} has format {ours.get('format')}: this version reads format 1")
    try:
        spec = ModelSpec.of(ours["model"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path} describes no model that this version knows: {error}") from None
    return Checkpoint(path, spec, ours["config"], int(contents.get("global_step", 0)), contents)


def load(checkpoint: str | Path, *, weights: str = "ema", device: str | torch.device | None = None) -> Transformer:
    """A trained model in eval mode: model(tokens (B, S)) -> logits (B, S, 256), tokens unshifted, S <= context.

    checkpoint: a file that training wrote, a folder that `sparse_tx.export` wrote, or "hub:USER/NAME".
    weights: "ema", the averaged ones, or "live", those being trained. Raises UserError for a checkpoint that is
    missing, damaged or not one of ours.
    """
    return read_checkpoint(checkpoint).model(weights, device)
