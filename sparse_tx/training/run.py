"""One training run from a checked config to its numbers: `train`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger

from sparse_tx.checkpoint import read_checkpoint
from sparse_tx.config import TrainConfig
from sparse_tx.data import DataModule, prepare
from sparse_tx.errors import UserError
from sparse_tx.evaluation.run import backends, unit_of, windows_at_once
from sparse_tx.model.cost import Cost, cost_of
from sparse_tx.model.fused import fuses, unsupported
from sparse_tx.training.callbacks import (
    BEST,
    LAST,
    Deadline,
    Divergence,
    Trace,
    checkpoint_callbacks,
)
from sparse_tx.training.ema import EMA
from sparse_tx.training.folders import (
    find_resume,
    identity,
    new_run_folder,
    newest_checkpoint,
    override,
    write_config,
    write_result,
)
from sparse_tx.training.loggers import check_loggers, close_loggers, log_checkpoint, make_loggers
from sparse_tx.training.media import SAMPLE_LENGTH, DrawSamples
from sparse_tx.training.memory import by_policy, choose
from sparse_tx.training.module import TrainingModule, compiles
from sparse_tx.training.progress import Progress, display
from sparse_tx.training.saving import WholeFiles
from sparse_tx.training.summary import batch_a_device, batch_flops, conclude, describe, expect, say

_NOTICES = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",  # a run that goes on in its own folder
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*callbacks used to create the checkpoint need to be provided.*",  # those that save, whose settings may differ
    ".*your dataloader is not resumable.*",  # it starts at the step of the checkpoint
    ".*The dirpath has changed from.*",  # a resumed run has a folder of its own
    ".*isinstance.treespec, LeafSpec.*",
)


def train(config: TrainConfig, folder: Path | None = None) -> dict[str, Any]:
    """Train, or describe the run if `dry_run`. Returns val/bits_per_dim, checkpoint, steps and more.

    folder: an existing one to run in, from its newest checkpoint if it has one; else the run makes its own. Everything
    that can be wrong with the config, the checkpoint to resume and the data is found before that.
    """
    device, precision = _device_and_precision(config)
    spec = config.model_spec()
    cost = cost_of(spec)
    blocks = _blocks(config, device, precision)
    # A dry run without a GPU tells what one would need.
    on_a_gpu = config.dry_run and device.type == "cpu" and config.trainer.precision != "32"
    memory = by_policy(
        spec,
        batch_a_device(config),
        half=precision != "32-true" or on_a_gpu,
        blocks="fused" if on_a_gpu and config.trainer.fused != "false" else blocks,
        optimizer=config.optimizer.name,
        residual=2 if config.trainer.residual == "bfloat16" else 4,
    )
    if spec.recompute not in memory:
        raise UserError(
            f"model.recompute={spec.recompute} is for fused blocks (trainer.fused=true, on a GPU): {blocks} ones know "
            f"{', '.join(memory)}"
        )
    if config.model.recompute == "auto" and device.type == "cuda":
        spec = spec.recomputing(choose(memory, torch.cuda.mem_get_info()[0]))
    describe(config, spec, cost, memory, device, precision, "a GPU" if on_a_gpu else "a device")
    if config.dry_run:
        return expect(config, cost, memory[spec.recompute])
    resume = find_resume(config) if folder is None else newest_checkpoint([folder], config)
    if config.resume == "auto" or (folder is not None and resume is not None):
        say(f"resume: {resume}" if resume else "resume: no checkpoint of this config, starting fresh")
    check_loggers(config.logger)
    prepared = prepare(config.data.spec())
    say(f"prepared: {prepared.title}: {', '.join(f'{n:,} {split}' for split, n in prepared.meta['counts'].items())}")
    datamodule = _datamodule(config, device)
    alone = folder is None
    if folder is None:
        folder = new_run_folder(config.output, config.name)
    write_config(folder, config)
    say(f"run: {folder}")

    _quiet()
    seed_everything(config.seed, workers=True, verbose=False)
    module = TrainingModule(config, spec, blocks=blocks, capture=_capture(config, device, precision))
    loggers = _loggers(config, folder, resume, cost)
    trainer, progress = _trainer(config, folder, precision, cost, loggers)
    failed = True
    try:
        trainer.fit(module, datamodule, ckpt_path=resume, weights_only=True)
        metrics = _finish(trainer, module, datamodule, folder)
        if trainer.is_global_zero:
            conclude(config, datamodule, metrics, progress)
            write_result(folder, {**metrics, "seconds": round(progress.earlier + progress.seconds, 1)})
            log_checkpoint(loggers, metrics)
        failed = False
    except SystemExit:  # what Lightning makes of an interrupt from the keyboard or the system
        last = folder / "checkpoints" / LAST
        if last.is_file() and alone:
            say(f"interrupted at step {trainer.global_step}: {override('resume', last)} goes on from there, exactly")
        raise
    finally:
        close_loggers(loggers, failed=failed)
    return metrics


def _loggers(config: TrainConfig, folder: Path, resume: Path | None, cost: Cost) -> list[Logger]:
    start, run_id = 0, None
    if resume is not None:
        checkpoint = read_checkpoint(resume)
        start = checkpoint.step
        if identity(checkpoint.config) == identity(config.plain()):  # else it is another experiment from here on
            run_id = checkpoint.contents["sparse_tx"].get("wandb_run")
    facts = {"folder": str(folder), "parameters": cost.parameters, "flops_per_step": batch_flops(config, cost)}
    return make_loggers(config, folder, facts=facts, start=start, run_id=run_id)


def _datamodule(config: TrainConfig, device: torch.device) -> DataModule:
    data = config.data
    windows = windows_at_once(config.evaluation.batch_size, batch_a_device(config), data.context, device)
    return DataModule(
        data.spec(),
        batch_size=data.batch_size,
        seed=config.seed,
        max_steps=config.trainer.max_steps,
        workers=data.workers,
        eval_batch_size=windows,
        min_context=config.evaluation.min_context,
        eval_limit=data.limit,
        overfit=data.overfit,
        mirror=data.mirror,
    )


def _trainer(
    config: TrainConfig, folder: Path, precision: str, cost: Cost, loggers: list[Logger]
) -> tuple[Trainer, Progress]:
    settings, reporting = config.trainer, config.callbacks
    every = reporting.validate_every or max(1, min(5000, -(-settings.max_steps // 5)))
    deadline = None if settings.max_time is None else Deadline(settings.max_time)
    progress = Progress(
        display(settings.max_steps, unit_of(config.data.kind)),
        every=min(reporting.log_every, settings.max_steps),
        max_steps=settings.max_steps,
        bytes_a_step=config.data.batch_size * config.data.context,
        flops_a_step=batch_flops(config, cost),
        half=precision != "32-true",
        deadline=deadline,
    )
    ema = EMA(settings.ema_decay)
    callbacks: list[Callback] = [ema, progress, Divergence(progress.every)]
    if deadline is not None:
        callbacks.append(deadline)
    if reporting.sample_every is not None:
        callbacks.append(
            DrawSamples(
                folder / "samples",
                config.model_spec(),
                ema,
                progress,
                every=reporting.sample_every,
                count=reporting.sample_count,
                length=reporting.sample_length or min(config.data.context, SAMPLE_LENGTH),
                seed=config.seed,
            )
        )
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
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=loggers,
        callbacks=callbacks,
        plugins=[WholeFiles()],
        default_root_dir=folder,
    )
    return trainer, progress


def _finish(trainer: Trainer, module: TrainingModule, datamodule: DataModule, folder: Path) -> dict[str, Any]:
    """Score the last weights and return the better of them and the best checkpoint so far."""
    (scores,) = trainer.validate(module, datamodule, verbose=False)
    last = scores["val/bits_per_dim"]
    steps = trainer.global_step
    result = {"val/bits_per_dim": last, "checkpoint": str(folder / "checkpoints" / LAST), "steps": steps}
    result["best_step"] = steps
    best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None) == "val/bits_per_dim"), None)
    score = getattr(best, "best_model_score", None)
    if score is not None and float(score) < last:
        path = folder / "checkpoints" / BEST
        result |= {"val/bits_per_dim": float(score), "checkpoint": str(path)}
        if trainer.is_global_zero:  # another node may not see the file
            result["best_step"] = read_checkpoint(path).step
    return result


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
    if settings.cuda_graph == "true" and not config.dry_run:
        if not cuda:
            raise UserError("trainer.cuda_graph=true needs a GPU: use trainer.cuda_graph=false")
        if precision == "16-mixed":
            raise UserError(
                "trainer.cuda_graph=true does not scale the loss: use trainer.precision=bf16-mixed or "
                "trainer.cuda_graph=false"
            )
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


def _capture(config: TrainConfig, device: torch.device, precision: str) -> str:
    """trainer.cuda_graph as this run has it: "auto" where it is to be tried."""
    settings = config.trainer
    if settings.cuda_graph != "auto":
        return settings.cuda_graph
    fits = device.type == "cuda" and settings.devices == "1" and settings.strategy == "auto"
    # A trace of launches says more than one of a graph. The plain backends prepare on the host what no graph can hold.
    fits = fits and precision != "16-mixed" and not config.profile
    fits = fits and set(backends(config.model_spec(), device, precision).split("/")) <= {"triton", "sdpa"}
    return "auto" if fits else "false"


def _blocks(config: TrainConfig, device: torch.device, precision: str) -> str:
    """How the residual blocks run: "fused", "compiled" or "plain"."""
    if config.trainer.residual == "bfloat16" and not config.dry_run:
        if precision != "bf16-mixed":
            raise UserError(
                f"trainer.residual=bfloat16 goes with trainer.precision=bf16-mixed, not with {precision}: "
                "use trainer.residual=float32"
            )
        if config.trainer.fused == "false" or unsupported(device) is not None:
            raise UserError("trainer.residual=bfloat16 needs fused blocks, on a GPU: use trainer.residual=float32")
    wanted = config.trainer.fused
    if wanted == "true" and not config.dry_run and (reason := unsupported(device)) is not None:
        raise UserError(f"trainer.fused=true cannot run here: {reason}")
    if fuses(wanted, device):
        return "fused"
    return "compiled" if compiles(config, device) else "plain"


def _quiet() -> None:
    """Lightning's notices that do not concern this project's users."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in _NOTICES:
        warnings.filterwarnings("ignore", message)
