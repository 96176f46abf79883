"""Sampling from a checkpoint: `sample`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from sparse_tx.checkpoint import Checkpoint, read_checkpoint
from sparse_tx.config import SampleConfig
from sparse_tx.errors import UserError
from sparse_tx.evaluation.run import choose_device
from sparse_tx.sampling.sampler import generate
from sparse_tx.sampling.writers import FORMATS, write_samples


def sample(config: SampleConfig) -> list[Path]:
    """Draw `count` samples and write them. Returns the paths of the files."""
    checkpoint = read_checkpoint(config.checkpoint)
    kind, context = checkpoint.spec.kind, checkpoint.spec.context
    device = choose_device(config.device)
    form = config.format or FORMATS[kind][0]
    if form not in FORMATS[kind]:
        raise UserError(f"format={form} does not fit samples of kind {kind}: use {' or '.join(FORMATS[kind])}")
    length = config.length or context
    if length > context:
        raise UserError(f"length={length}: this model has a context of {context} bytes; use at most that")
    if config.debug == "fast":
        length = min(length, 24)
    prompt = np.zeros(0, np.uint8) if config.prompt is None else read_prompt(config.prompt, checkpoint)[:context]
    if len(prompt) >= length:
        raise UserError(
            f"prompt={config.prompt} fills all {length} bytes of a sample: give a shorter one or more length"
        )
    count = min(config.count, 2) if config.debug == "fast" else config.count
    folder = Path(config.output) if config.output is not None else _beside(checkpoint.path)
    model = checkpoint.model(config.weights, device)
    started = time.perf_counter()
    drawn = []
    for first in range(0, count, config.batch_size or count):
        size = min(config.batch_size or count, count - first)
        start = torch.from_numpy(prompt).to(device).expand(size, -1)
        tokens = generate(
            model,
            start,
            length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            first=first,
            on_step=_progress(f"samples {first + 1} to {first + size} of {count}", length),
        )
        drawn.append(tokens.cpu().numpy())
    samples = np.concatenate(drawn)
    if kind == "text":
        print(samples[0].tobytes().decode("utf-8", "replace"))
        print()
    paths = write_samples(samples, kind, form, folder)
    seconds = time.perf_counter() - started
    print(f"drawn: {count} samples of {length} bytes in {seconds:.1f} s, {count * length / seconds:.0f} bytes/s")
    for path in paths:
        print(f"wrote: {path}")
    return paths


def read_prompt(path: str, checkpoint: Checkpoint) -> np.ndarray:
    """(P,) bytes that every sample starts with: a file's bytes, or the upper half of an image."""
    kind, context = checkpoint.spec.kind, checkpoint.spec.context
    if not Path(path).is_file():
        raise UserError(f"prompt={path} does not exist: give the path of a file")
    if kind == "image":
        side = checkpoint.spec.position_shape()[0]
        try:
            with Image.open(path) as image:
                if image.size != (side, side):
                    raise UserError(
                        f"prompt={path} is {image.width} x {image.height}: this model draws {side} x {side}"
                    )
                pixels = np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"prompt={path} cannot be read as an image: {error}") from None
        return pixels.reshape(-1)[: 3 * side * (side // 2)].copy()
    if kind == "audio":
        raise UserError("prompt= is not available for audio in this version: sample without it")
    data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    if not 0 < len(data) < context:
        raise UserError(f"prompt={path} has {len(data)} bytes: this model needs 1 to {context - 1}")
    return data.copy()


def _beside(checkpoint: Path) -> Path:
    """RUN/samples/STEM for RUN/checkpoints/STEM.ckpt; outputs/samples/NAME for an exported model."""
    if checkpoint.is_dir():
        return Path("outputs", "samples", checkpoint.resolve().name)
    return checkpoint.parent.parent / "samples" / checkpoint.stem


def _progress(what: str, length: int):
    """A counter on a terminal's last line; nothing elsewhere."""
    if not sys.stderr.isatty():
        return None

    def show(done: int) -> None:
        if done % 16 == 0 or done == length:
            end = "\n" if done == length else ""
            print(f"\r{what}: {done}/{length} bytes", end=end, file=sys.stderr, flush=True)

    return show
