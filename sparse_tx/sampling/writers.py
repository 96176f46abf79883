"""Bytes to files: PNG, WAV, text."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
from PIL import Image

from sparse_tx.data.mu_law import RATE, expand_mu_law

FORMATS = {"image": ("png", "npy"), "text": ("txt", "bin"), "audio": ("wav", "npy")}


def write_samples(tokens: np.ndarray, kind: str, format: str, folder: Path) -> list[Path]:
    """tokens: (N, S) uint8. One file a sample, and for PNG a grid of all of them first. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if kind == "image" and format == "png":
        images = [image_of(t) for t in tokens]
        paths.append(folder / "grid.png")
        grid(images).save(paths[0])
    for n, sample in enumerate(tokens):
        path = folder / f"sample-{n:04d}.{format}"
        if format == "png":
            Image.fromarray(images[n]).save(path)
        elif format == "npy":
            np.save(path, sample)
        elif format == "wav":
            write_wav(path, sample)
        else:
            path.write_bytes(sample.tobytes())
        paths.append(path)
    return paths


def image_of(sample: np.ndarray) -> np.ndarray:
    """(S,) bytes row by row, R G B of a pixel together -> (side, side, 3); what was not drawn is black."""
    side = math.isqrt(-(-len(sample) // 3) - 1) + 1
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
