"""Sampling from a checkpoint: `sample`."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sparse_tx.checkpoint import read_checkpoint
from sparse_tx.config import SampleConfig
from sparse_tx.errors import UserError
from sparse_tx.evaluation.run import choose_device, choose_precision, unit_of
from sparse_tx.model import ModelSpec
from sparse_tx.model.decoder import cache_bytes
from sparse_tx.sampling.manifest import bits_by_sample, write_manifest
from sparse_tx.sampling.progress import DrawProgress
from sparse_tx.sampling.prompts import prompt_files, read_prompts
from sparse_tx.sampling.sampler import CPU_ROWS, Sampler
from sparse_tx.sampling.writers import FORMATS, write_samples
from sparse_tx.training.folders import dated_folder

_DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_MEMORY = 0.7  # of the GPU's free memory, for the cache: the rest is for a prompt's forward pass and the graph


def sample(config: SampleConfig) -> list[Path]:
    """Draw `count` samples and write them. Returns the paths of their files."""
    checkpoint = read_checkpoint(config.checkpoint)
    spec, kind = checkpoint.spec, checkpoint.spec.kind
    device = choose_device(config.device)
    if config.compile and device.type == "cpu":
        raise UserError("compile=true needs a GPU: leave it out, or use device=cuda")
    form = config.format or FORMATS[kind][0]
    if form not in FORMATS[kind]:
        raise UserError(f"format={form} does not fit samples of kind {kind}: use {' or '.join(FORMATS[kind])}")
    length = config.length or spec.context
    if length > spec.context:
        raise UserError(f"length={length}: this model has a context of {spec.context} bytes; use at most that")
    if config.debug == "fast":
        length = min(length, 24)
    if config.prompt is None and config.prompt_length is not None:
        raise UserError(f"prompt_length={config.prompt_length} without a prompt: give prompt=FILE, or leave it out")
    files = [] if config.prompt is None else prompt_files(config.prompt, kind)
    prompts = np.zeros((1, 0), np.uint8) if not files else read_prompts(files, spec, length, config.prompt_length)
    count = min(config.count, 2) if config.debug == "fast" else config.count
    precision = choose_precision(config.precision, checkpoint, device)
    dtype = _DTYPES[precision]
    batch = choose_batch(config.batch_size, count, spec, length, dtype, device)
    folder = _output(config.output, checkpoint.path)
    started = time.perf_counter()
    try:
        sampler = Sampler(
            checkpoint.model(config.weights, device),
            length,
            batch,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            dtype=dtype,
            compile=config.compile,
        )
        tokens, nats = _draw(sampler, torch.from_numpy(prompts), count)
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"batch_size={batch} does not fit into the GPU's memory: use a smaller one, such as "
            f"batch_size={max(1, batch // 2)}"
        ) from None
    seconds = time.perf_counter() - started
    if kind == "text":
        print(tokens[0].tobytes().decode("utf-8", "replace"))
        print()
    paths = write_samples(tokens, kind, form, folder)
    drawn = len(tokens) * (length - prompts.shape[1])
    print(f"drawn: {len(tokens)} samples of {length} bytes in {seconds:.1f} s, {drawn / seconds:.0f} bytes/s")
    bits = bits_by_sample(nats, prompts.shape[1])
    each = [b["bits_per_dim_drawn"] for b in bits]
    print(
        f"likelihood: {sum(each) / len(each):.4f} {unit_of(kind)} drawn, {min(each):.4f} to {max(each):.4f} by sample, "
        "under the model without temperature, top_k and top_p"
    )
    settings = dataclasses.asdict(config) | {
        "count": len(tokens),
        "batch_size": sampler.batch,
        "length": length,
        "prompt_length": prompts.shape[1],
        "format": form,
        "precision": precision,
    }
    manifest = write_manifest(folder, checkpoint, settings, files, paths[-len(tokens) :], bits, device)
    for path in paths:
        print(f"wrote: {path}")
    print(f"manifest: {manifest}")
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


def _draw(sampler: Sampler, prompts: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens (N, length) uint8 and nats (N, length): of all samples, or of the whole batches before an interrupt."""
    tokens, nats = [], []
    total = count * (sampler.length - prompts.shape[1])
    try:
        with DrawProgress(total) as progress:
            for samples in sampler.draw(prompts, count, on_bytes=progress):
                tokens.append(samples.tokens.cpu().numpy())
                nats.append(samples.nats.cpu().numpy())
    except KeyboardInterrupt:
        if not tokens:
            raise
        done = sum(len(t) for t in tokens)
        print(f"interrupted: {done} of {count} samples are whole and kept", file=sys.stderr)
    return np.concatenate(tokens), np.concatenate(nats)


def _output(output: str | None, checkpoint: Path) -> Path:
    """The folder asked for, or a new DATE_TIME-XXXX in RUN/samples/STEM for RUN/checkpoints/STEM.ckpt, in
    outputs/samples/NAME for an exported model.
    """
    if output is None and checkpoint.is_dir():
        return dated_folder(Path("outputs", "samples", checkpoint.resolve().name))
    if output is None:
        return dated_folder(checkpoint.parent.parent / "samples" / checkpoint.stem)
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be made a folder: {error.strerror}; give another") from None
    return Path(output)
