"""One training run from a checked config to its numbers: `train`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger

from sparse_tx.config import TrainConfig
from sparse_tx.data import DataModule, prepare
from sparse_tx.errors import UserError
from sparse_tx.evaluation.run import backends, reference_lines, unit_of
from sparse_tx.model.cost import Cost, cost_of
from sparse_tx.shell import spelled
from sparse_tx.training.callbacks import (
    BEST,
    LAST,
    Bar,
    Deadline,
    Progress,
    Trace,
    checkpoint_callbacks,
    clock,
    readable,
)
from sparse_tx.training.ema import EMA
from sparse_tx.training.folders import find_resume, new_run_folder, override, write_config
from sparse_tx.training.loggers import check_loggers, make_loggers
from sparse_tx.training.module import TrainingModule

H200_FLOPS = 989e12  # dense bf16, by its datasheet
_NOTICES = (
    ".*does not have many workers.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*callbacks used to create the checkpoint need to be provided.*",  # those that save, whose settings may differ
    ".*your dataloader is not resumable.*",  # it starts at the step of the checkpoint
    ".*The dirpath has changed from.*",  # a resumed run has a folder of its own
    ".*isinstance.treespec, LeafSpec.*",
)
UTILISATION = 0.2  # assumed where nothing has been measured


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or describe the run if `dry_run`. Returns val/bits_per_dim, checkpoint, steps and more.

    Everything that can be wrong with the config, the checkpoint to resume and the data is found before the run's folder
    is made.
    """
    device, precision = _device_and_precision(config)
    half = precision != "32-true"
    cost = cost_of(config.model_spec(), half=half)
    _describe(config, cost, device, precision)
    if config.dry_run:
        return _expect(config, cost)
    resume = find_resume(config)
    if config.resume == "auto":
        _say(f"resume: {resume}" if resume else "resume: no checkpoint of this config, starting fresh")
    check_loggers(config.logger)
    prepare(config.data.spec())
    datamodule = _datamodule(config)
    folder = new_run_folder(config.output, config.name)
    write_config(folder, config)
    _say(f"run: {folder}")

    _quiet()
    seed_everything(config.seed, workers=True, verbose=False)
    module = TrainingModule(config)
    trainer, progress = _trainer(config, folder, precision, make_loggers(config, folder))
    trainer.fit(module, datamodule, ckpt_path=resume, weights_only=True)
    metrics = _finish(trainer, module, datamodule, folder)
    if trainer.is_global_zero:
        _conclude(config, datamodule, metrics, progress)
    return metrics


def _datamodule(config: TrainConfig) -> DataModule:
    data = config.data
    return DataModule(
        data.spec(),
        batch_size=data.batch_size,
        seed=config.seed,
        max_steps=config.trainer.max_steps,
        workers=data.workers,
        eval_batch_size=config.evaluation.batch_size,
        min_context=config.evaluation.min_context,
        eval_limit=data.limit,
        overfit=data.overfit,
    )


def _trainer(config: TrainConfig, folder: Path, precision: str, loggers: list[Logger]) -> tuple[Trainer, Progress]:
    settings, reporting = config.trainer, config.callbacks
    every = reporting.validate_every or max(1, min(5000, -(-settings.max_steps // 5)))
    terminal = sys.stdout.isatty()
    unit = unit_of(config.data.kind)
    progress = Progress(
        every=min(reporting.log_every, settings.max_steps),
        max_steps=settings.max_steps,
        bytes_a_step=config.data.batch_size * config.data.context,
        unit=unit,
        lines=not terminal,
    )
    callbacks: list[Callback] = [EMA(settings.ema_decay), progress]
    if terminal:
        callbacks.append(Bar(reporting.log_every, unit))
    if settings.max_time is not None:
        callbacks.append(Deadline(settings.max_time))
    callbacks += checkpoint_callbacks(folder / "checkpoints", reporting.checkpoint_every or every, reporting.keep)
    if config.profile:
        callbacks.append(Trace(folder))
    trainer = Trainer(
        accelerator=settings.accelerator,
        devices="auto" if settings.devices == "auto" else int(settings.devices),
        strategy=settings.strategy,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=-1,
        max_steps=settings.max_steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=min(reporting.log_every, settings.max_steps),
        gradient_clip_val=config.optimizer.clip,
        use_distributed_sampler=False,
        enable_progress_bar=terminal,
        enable_model_summary=False,
        logger=loggers,
        callbacks=callbacks,
        default_root_dir=folder,
    )
    return trainer, progress


def _finish(trainer: Trainer, module: TrainingModule, datamodule: DataModule, folder: Path) -> dict[str, Any]:
    """Score the last weights and return the better of them and the best checkpoint so far."""
    (scores,) = trainer.validate(module, datamodule, verbose=False)
    last = scores["val/bits_per_dim"]
    result = {"val/bits_per_dim": last, "checkpoint": str(folder / "checkpoints" / LAST), "steps": trainer.global_step}
    best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None) == "val/bits_per_dim"), None)
    score = getattr(best, "best_model_score", None)
    if score is not None and float(score) < last:
        result |= {"val/bits_per_dim": float(score), "checkpoint": str(folder / "checkpoints" / BEST)}
    return result


def _conclude(config: TrainConfig, datamodule: DataModule, metrics: dict[str, Any], progress: Progress) -> None:
    unit = unit_of(config.data.kind)
    windows = datamodule.evaluation_windows("validation")
    print(f"trained: {metrics['steps']} steps in {clock(progress.seconds)}")
    if torch.cuda.is_available():
        print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
    print(f"validation: {windows.scored} bytes in {len(windows)} windows, ema weights")
    for line in reference_lines(datamodule.prepared, windows, "validation", config.attention.name):
        print(line)
    print(f"{unit}: {metrics['val/bits_per_dim']:.4f}")
    print(f"checkpoint: {metrics['checkpoint']}")
    print(f"evaluate: {spelled('evaluate')} {override('checkpoint', metrics['checkpoint'])} split=test")
    print(f"sample: {spelled('sample')} {override('checkpoint', metrics['checkpoint'])} count=4", flush=True)


def _device_and_precision(config: TrainConfig) -> tuple[torch.device, str]:
    """The kind of device, and Lightning's name of the precision."""
    settings = config.trainer
    cuda = torch.cuda.is_available() and settings.accelerator != "cpu"
    if settings.accelerator == "gpu" and not cuda and not config.dry_run:
        raise UserError("trainer.accelerator=gpu, but no GPU is visible: use trainer=auto or trainer=cpu")
    precision = settings.precision
    if precision == "auto":
        precision = "bf16-mixed" if cuda else "32"
    if precision == "16-mixed" and not cuda and not config.dry_run:
        raise UserError(
            "trainer.precision=16-mixed needs a GPU (on a CPU Lightning would silently make it bf16): "
            "use 32 or bf16-mixed"
        )
    if settings.cuda_graph and not config.dry_run:
        if not cuda:
            raise UserError("trainer.cuda_graph=true needs a GPU: use trainer.cuda_graph=false")
        if settings.devices != "1":
            raise UserError(
                f"trainer.cuda_graph=true captures the step of one process, not of trainer.devices={settings.devices}: "
                "use trainer.devices=1 or trainer.cuda_graph=false"
            )
    if settings.devices != "auto" and cuda and int(settings.devices) > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices={settings.devices}, but {torch.cuda.device_count()} GPUs are visible: "
            f"use at most {torch.cuda.device_count()}"
        )
    return torch.device("cuda" if cuda else "cpu"), "32-true" if precision == "32" else precision


def _describe(config: TrainConfig, cost: Cost, device: torch.device, precision: str) -> None:
    a, m = config.attention, config.model
    spec = config.model_spec()
    _say(f"parameters: {cost.parameters / 1e6:.2f}M")
    _say(f"model: {m.layers} layers, width {m.width}, {m.heads} heads, qk {m.qk}, ff {m.ff}, dropout {m.dropout}")
    _say(
        f"data: {config.data.name}{' (synthetic twin)' if config.data.synthetic else ''}, context {config.data.context}"
    )
    counted: dict[str, int] = {}
    for layer in spec.patterns():
        text = ", ".join(map(str, dict.fromkeys(layer)))
        counted[text] = counted.get(text, 0) + 1
    for text, count in counted.items():
        _say(f"attention: {a.name} {a.combine}: {text} in {count} of {m.layers} layers")
    _say(f"backend: {backends(spec, device, precision)} on {device.type}, {precision}")


def _expect(config: TrainConfig, cost: Cost) -> dict[str, Any]:
    """What a dry run reports: nothing is loaded, trained or written."""
    batch, steps = config.data.batch_size, config.trainer.max_steps
    step_flops = batch * cost.flops
    memory = cost.state_bytes + batch * cost.activation_bytes
    seconds = step_flops * steps / (H200_FLOPS * UTILISATION)
    _say(f"keys a query: {cost.pairs:.1f} of {config.data.context} (mean over layers and heads)")
    _say(f"FLOPs: {readable(step_flops)} a step, {readable(step_flops * steps)} in {steps} steps")
    _say(f"bytes: {readable(batch * config.data.context)} a step")
    _say(
        f"memory: {memory / 2**30:.1f} GiB (weights, gradients, AdamW, EMA {cost.state_bytes / 2**30:.1f}; activations)"
    )
    _say(f"time: {clock(seconds)} on one H200 at {UTILISATION:.0%} of its bf16 peak (assumed, not measured)")
    return {
        "parameters": cost.parameters,
        "flops_per_step": step_flops,
        "memory_bytes": memory,
        "seconds": seconds,
        "context": config.data.context,
        "attention": config.attention.name,
    }


def _say(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, flush=True)


def _quiet() -> None:
    """Lightning's notices that do not concern this project's users."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in _NOTICES:
        warnings.filterwarnings("ignore", message)
