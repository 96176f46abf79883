"""Exporting a checkpoint: `export`."""

from __future__ import annotations

import contextlib
import io
import secrets
import shutil
from pathlib import Path
from typing import Any

from sparse_tx.checkpoint import Checkpoint, read_checkpoint
from sparse_tx.config import EvaluateConfig, ExportConfig, SampleConfig
from sparse_tx.errors import UserError
from sparse_tx.evaluation.run import choose_device, evaluate
from sparse_tx.export import hub
from sparse_tx.export.card import model_card
from sparse_tx.export.folder import CARD, write_model
from sparse_tx.sampling.run import sample


def export(config: ExportConfig) -> Path:
    """Score, draw, and write the folder; upload it if `to` is the hub. Returns the folder.

    The folder appears whole or not at all.
    """
    checkpoint = read_checkpoint(config.checkpoint)
    checkpoint.weights(config.weights)
    choose_device(config.device)
    length = checkpoint.spec.context if config.length is None else config.length
    if length > checkpoint.spec.context:
        raise UserError(f"length={length}: this model has a context of {checkpoint.spec.context} bytes")
    folder = _place(config, checkpoint)
    if config.repo is not None:
        hub.check_access(config.repo)
    made = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    try:
        made.mkdir(parents=True)
        results = [] if config.split is None else [_score(config, checkpoint)]
        samples = [] if config.samples == 0 else _draw(config, length, made)
        described = write_model(made, checkpoint, config.weights, results)
        name = f"{hub.PREFIX}{config.repo}" if config.repo is not None else folder.name
        (made / CARD).write_text(model_card(described, samples, made, name))
        made.rename(folder)
    except OSError as error:
        raise UserError(f"the export cannot be written to {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print(f"wrote: {folder}")
    if config.repo is not None:
        print(f"uploaded: {hub.upload(folder, config.repo, private=config.private)}")
    return folder


def _place(config: ExportConfig, checkpoint: Checkpoint) -> Path:
    if config.repo is not None:
        return Path("outputs", "exports", f"{config.repo.replace('/', '-')}-{secrets.token_hex(2)}")
    folder = Path(config.to)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.exists():
        raise UserError(f"to={config.to} is there already: give a new folder, or remove it")
    return folder


def _score(config: ExportConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    assert config.split is not None
    try:
        result = evaluate(
            EvaluateConfig(
                checkpoint=config.checkpoint,
                split=config.split,
                weights=config.weights,
                device=config.device,
                limit=config.limit,
                debug=config.debug,
                data=config.data,
            )
        )
    except UserError as error:
        raise UserError(f"{error}; split=null exports without a score") from None
    kept = ("split", "bits_per_dim", "nats", "count", "context", "min_context", "precision", "backend")
    synthetic = config.debug == "fast" or checkpoint.config["data"]["synthetic"]
    return {k: result[k] for k in kept} | {"synthetic": synthetic}


def _draw(config: ExportConfig, length: int, folder: Path) -> list[Path]:
    wanted = SampleConfig(
        checkpoint=config.checkpoint,
        count=config.samples,
        length=length,
        temperature=config.temperature,
        seed=config.seed,
        weights=config.weights,
        device=config.device,
        output=str(folder / "samples"),
        debug=config.debug,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it names files in a folder that is about to be renamed
        drawn = sample(wanted)
    for noted in {p for p in (folder / "samples").iterdir() if p.is_file()} - set(drawn):
        noted.unlink()  # what sampling writes beside the samples tells of this machine
    return drawn
