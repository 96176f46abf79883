"""Sampling from a checkpoint: `sample`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sparse_tx.checkpoint import read_checkpoint
from sparse_tx.config import SampleConfig
from sparse_tx.data.progress import Progress
from sparse_tx.errors import UserError
from sparse_tx.evaluation.run import choose_device, choose_precision, unit_of
from sparse_tx.model import ModelSpec
from sparse_tx.model.decoder import cache_bytes
from sparse_tx.sampling.kept import Kept
from sparse_tx.sampling.manifest import MANIFEST, describe
from sparse_tx.sampling.prompts import prompt_files, read_prompts
from sparse_tx.sampling.sampler import CPU_ROWS, Sampler
from sparse_tx.sampling.writers import FORMATS
from sparse_tx.training.folders import dated_folder

_DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_MEMORY = 0.7  # of the GPU's free memory, for the cache: the rest is for a prompt's forward pass and the graph


def sample(config: SampleConfig) -> list[Path]:
    """Draw `count` samples and write them, batch by batch. Returns the paths of their files.

    After an interrupt what is there stays, with its manifest, and KeyboardInterrupt goes on to the caller.
    """
    checkpoint = read_checkpoint(config.checkpoint)
    spec, kind = checkpoint.spec, checkpoint.spec.kind
    device = choose_device(config.device)
    form = config.format or FORMATS[kind][0]
    if form not in FORMATS[kind]:
        raise UserError(f"format={form} does not fit samples of kind {kind}: use {' or '.join(FORMATS[kind])}")
    length = config.length or spec.context
    if length > spec.context:
        raise UserError(f"length={length}: this model has a context of {spec.context} bytes; use at most that")
    if config.prompt is None and config.prompt_length is not None:
        raise UserError(f"prompt_length={config.prompt_length} without a prompt: give prompt=FILE, or leave it out")
    files = [] if config.prompt is None else prompt_files(config.prompt, kind)
    prompts = np.zeros((1, 0), np.uint8) if not files else read_prompts(files, spec, length, config.prompt_length)
    given, count = prompts.shape[1], config.count
    if config.debug == "fast":
        length, count = min(length, given + 24), min(count, 2)
    precision = choose_precision(config.precision, checkpoint, device)
    batch = choose_batch(config.batch_size, count, spec, length, _DTYPES[precision], device)
    model = checkpoint.model(config.weights, device)
    if not all(bool(weights.isfinite().all()) for weights in model.parameters()):
        raise UserError(
            f"checkpoint {checkpoint.path} has {config.weights} weights that are not finite: its training diverged. "
            "Use an earlier checkpoint"
        )
    folder = _output(config.output, checkpoint.path)
    settings = dataclasses.asdict(config) | {
        "count": count,
        "batch_size": batch,
        "length": length,
        "prompt_length": given,
        "format": form,
        "precision": precision,
    }
    kept = Kept(folder, spec, form, describe(checkpoint, settings, files, device), given, files)
    started = time.perf_counter()
    sampler: Sampler | None = None
    try:
        sampler = Sampler(
            model,
            length,
            batch,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            dtype=_DTYPES[precision],
        )
        settings["decoding"] = sampler.decoder.how
        with Progress("drawing", count * (length - given), "bytes") as progress:
            for samples in sampler.draw(torch.from_numpy(prompts), count, on_bytes=progress.add):
                kept.add(samples)
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"batch_size={batch} does not fit into the GPU's memory: use a smaller one, such as "
            f"batch_size={max(1, batch // 2)}"
        ) from None
    except KeyboardInterrupt:
        whole, part = len(kept.files), None if sampler is None else sampler.begun()
        message = f"interrupted: {whole} of {count} samples are whole"
        if part is not None and part.tokens.shape[1] > given:
            kept.add(part)
            message += f", {len(part.tokens)} have {part.tokens.shape[1]} of {length} bytes"
        kept.paths()
        print(f"{message}: kept in {folder}" if kept.files else message, file=sys.stderr)
        if config.output is None:
            with contextlib.suppress(OSError):  # it holds some
                folder.rmdir()
        raise
    except OSError as error:
        raise UserError(f"samples cannot be written to {folder}: {error.strerror or error}") from None
    seconds = time.perf_counter() - started
    paths = kept.paths()
    if kind == "text":
        print(f"{_shown(kept.first)}\n")
    drawn = count * (length - given)
    print(f"drawn: {count} samples of {length} bytes in {seconds:.1f} s, {drawn / seconds:.0f} bytes/s")
    print(f"decoding: {sampler.decoder.how}")
    each = [entry["bits_per_dim_drawn"] for entry in kept.entries]
    print(
        f"likelihood: {sum(each) / len(each):.4f} {unit_of(kind)} drawn, {min(each):.4f} to {max(each):.4f} by sample, "
        "under the model without temperature, top_k and top_p"
    )
    for path in paths:
        print(f"wrote: {path}")
    print(f"manifest: {folder / MANIFEST}")
    return paths


def choose_batch(
    wanted: str, count: int, spec: ModelSpec, length: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Samples at a time: those asked for, or as many as fit into the GPU's free memory, in equal batches."""
    if device.type == "cpu":
        return CPU_ROWS
    if wanted != "auto":
        return min(int(wanted), count)
    free, _ = torch.cuda.mem_get_info(device)
    fits = max(1, int(_MEMORY * free) // cache_bytes(spec, length, dtype))
    return -(-count // -(-count // fits))


def _shown(sample: bytes) -> str:
    """Text as this terminal can print it: bytes of a model may be anything, also commands to the terminal."""
    text = sample.decode("utf-8", "replace")
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _output(output: str | None, checkpoint: Path) -> Path:
    """The folder asked for, or a new DATE_TIME-XXXX in RUN/samples/STEM for RUN/checkpoints/STEM.ckpt, in
    outputs/samples/STEM for a model elsewhere. It can be written to.
    """
    if output is None:
        checkpoint = checkpoint.absolute()
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.name if checkpoint.is_dir() else checkpoint.stem)
        own = checkpoint.parent.name == "checkpoints" and not checkpoint.is_dir()
        return dated_folder((_near(checkpoint.parent.parent) if own else Path("outputs")) / "samples" / stem)
    folder = Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output={output} cannot be a folder to write to: {error.strerror}; give another") from None
    return folder


def _near(path: Path) -> Path:
    """Relative to where the user is, if it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
