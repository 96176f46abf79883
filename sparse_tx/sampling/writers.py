"""Bytes to files: PNG, WAV, text."""

from __future__ import annotations

import math
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sparse_tx.data.mu_law import RATE, expand_mu_law
from sparse_tx.sampling.spectrogram import spectrograms

FORMATS = {"image": ("png", "npy"), "text": ("txt", "bin"), "audio": ("wav", "npy")}
GRID = "grid.png"
SPECTROGRAMS = "spectrograms.png"


def write_samples(tokens: np.ndarray, context: int, format: str, folder: Path, first: int = 0) -> list[Path]:
    """tokens: (N, S) uint8, samples first to first + N - 1 of a model with this context. One file a sample, in an
    existing folder. Returns the paths."""
    paths = []
    for n, sample in enumerate(tokens, first):
        path = folder / f"sample-{n:04d}.{format}"
        if format == "png":
            Image.fromarray(image_of(sample, context)).save(path)
        elif format == "npy":
            np.save(path, sample)
        elif format == "wav":
            write_wav(path, sample)
        else:
            path.write_bytes(sample.tobytes())
        paths.append(path)
    return paths


def write_grid(tokens: Sequence[np.ndarray], context: int, folder: Path) -> Path:
    """All images beside each other, in one PNG."""
    path = folder / GRID
    grid([image_of(t, context) for t in tokens]).save(path)
    return path


def write_spectrograms(tokens: Sequence[np.ndarray], folder: Path, prompt: int = 0) -> Path:
    """Sound to look at, in one PNG: see `spectrograms`. prompt: bytes that each starts with."""
    path = folder / SPECTROGRAMS
    spectrograms(tokens, prompt).save(path, optimize=True)
    return path


def image_of(sample: np.ndarray, context: int) -> np.ndarray:
    """(S,) bytes row by row, R G B of a pixel together -> (side, side, 3), where 3 side side is the context.

    What was not drawn is black.
    """
    side = math.isqrt(context // 3)
    pixels = np.zeros(3 * side * side, np.uint8)
    pixels[: len(sample)] = sample
    return pixels.reshape(side, side, 3)


def grid(images: list[np.ndarray], gap: int = 2) -> Image.Image:
    """The images in rows, near a square, on white."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    side = images[0].shape[0] + gap
    canvas = np.full((rows * side + gap, columns * side + gap, 3), 255, np.uint8)
    for n, image in enumerate(images):
        top, left = gap + n // columns * side, gap + n % columns * side
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas)


def write_wav(path: Path, codes: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(expand_mu_law(codes).tobytes())
