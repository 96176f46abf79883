"""Small made-up twins of each kind of data: the same form, learnable, no files and no network."""

import hashlib
from typing import Any

import numpy as np

from sparse_tx.data.mu_law import RATE, encode_mu_law
from sparse_tx.data.spec import DataSpec

WINDOWS = {"train": 48, "validation": 24, "test": 24}


def synthetic_splits(spec: DataSpec) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """meta and arrays of a few dozen windows each; the same ones every time."""
    make = {"image": _images, "text": _text, "audio": _audio}[spec.kind]
    arrays = {}
    for number, (split, windows) in enumerate(WINDOWS.items()):
        array = make(np.random.default_rng([number, spec.context]), windows, spec.context)
        array.flags.writeable = False
        arrays[split] = array
    meta = {
        "name": spec.name,
        "source": f"synthetic {spec.kind}",
        "split_rule": "each split drawn by itself",
        "sha256": {split: hashlib.sha256(array.tobytes()).hexdigest() for split, array in arrays.items()},
        "counts": {split: len(array) for split, array in arrays.items()},
        "shapes": {split: list(array.shape) for split, array in arrays.items()},
    }
    return meta, arrays


def _images(rng: np.random.Generator, windows: int, context: int) -> np.ndarray:
    """Coloured gradients in any direction, with a little noise."""
    side = int((context // 3) ** 0.5)
    row, column = np.mgrid[0:side, 0:side] / max(side - 1, 1)
    start, down, right = rng.uniform(40, 120, (3, windows, 1, 1, 3))
    smooth = start + down * row[..., None] * rng.choice([-1, 1], (windows, 1, 1, 3)) / 2 + right * column[..., None]
    noisy = smooth + rng.normal(0, 2, smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8).reshape(windows, context)


def _text(rng: np.random.Generator, windows: int, context: int) -> np.ndarray:
    """Sentences of a small vocabulary, the same in every split."""
    letters = np.random.default_rng(7)
    words = [bytes(letters.integers(97, 123, letters.integers(2, 8)).astype(np.uint8)) + b" " for _ in range(32)]
    wanted, pieces, length = windows * context, [], 0
    while length < wanted:
        piece = b"".join(words[i] for i in rng.integers(0, len(words), 4096)) + b"\n"
        pieces.append(piece)
        length += len(piece)
    return np.frombuffer(b"".join(pieces), np.uint8)[:wanted].copy()


def _audio(rng: np.random.Generator, windows: int, context: int) -> np.ndarray:
    """Three sines and some noise, 8-bit mu-law."""
    time = np.arange(windows * context, dtype=np.float32) / RATE
    wave = rng.normal(0, 0.01, len(time)).astype(np.float32)
    for pitch in rng.choice([220.0, 277.2, 329.6, 440.0, 554.4], 3, replace=False):
        wave += 0.25 * np.sin(2 * np.pi * pitch * time, dtype=np.float32)
    return encode_mu_law(wave)
