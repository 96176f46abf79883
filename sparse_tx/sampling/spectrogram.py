"""Sound to look at: spectrograms of samples, one strip each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sparse_tx.data.mu_law import expand_mu_law

STRIPS = 16
ROWS = 128  # of a strip, 47 Hz each: the loudest of 4 bins, so that a harmonic stays a thin bright line
COLUMNS = 768  # of a strip at most
WINDOW = 1024  # samples, 85 ms: 12 Hz from one bin of the transform to the next
HOP = 64  # samples from one column to the next at least: nearer ones look the same through this window
RANGE = 80.0  # decibels from the darkest to the brightest
# Power at which the darkest lies at least, that of a tone one step of 16 bits high: where all is silence, the hiss of
# codes 127 and 128 by chance stays dark.
FLOOR = 1.0
LEVELS = 40  # 2 dB each: 16 strips of piano are 183 KB as a PNG, 461 with 250 levels
# Dark to bright, lightness rising evenly: eight colours of "inferno" (van der Walt and Smith 2015), the others between.
ANCHORS = (
    (0, 0, 4),
    (40, 11, 83),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 194, 40),
    (252, 255, 164),
)
PAPER = LEVELS  # index of white: between strips, where a prompt ends, behind a sample that ends before others


def spectrograms(samples: Sequence[np.ndarray], prompt: int = 0, gap: int = 2) -> Image.Image:
    """Log-magnitude spectrograms of the first 16 samples, each (S,) uint8 mu-law of one byte or more, under each other.

    Time goes to the right, at one scale for all, frequency up, from 0 to 6 kHz. Brightness is in decibels, over the 80
    below the loudest point of all samples. A white line stands where a prompt of so many bytes ends. Returns an image
    with a palette: N strips are gap + N (128 + gap) pixels tall, and at most 768 + 2 gap wide.
    """
    waves = [expand_mu_law(sample) for sample in samples[:STRIPS]]
    longest = max(map(len, waves))
    hop = max(HOP, -(-longest // COLUMNS))
    powers = [_power(wave, hop) for wave in waves]
    dark = max(FLOOR, max(power.max() for power in powers) / 10 ** (RANGE / 10))
    canvas = np.full((gap + len(waves) * (ROWS + gap), -(-longest // hop) + 2 * gap), PAPER, np.uint8)
    for n, power in enumerate(powers):
        strip = canvas[gap + n * (ROWS + gap) :][:ROWS, gap:]
        above = 10 * np.log10(np.maximum(power / dark, 1)) / RANGE  # 0 to 1
        strip[:, : power.shape[1]] = np.minimum(above * LEVELS, LEVELS - 1)
        if prompt:
            strip[:, prompt // hop] = PAPER
    picture = Image.fromarray(canvas)
    picture.putpalette(_palette())
    return picture


def _power(wave: np.ndarray, hop: int) -> np.ndarray:
    """(S,) -> (ROWS, S / hop, rounded up): a steady tone of amplitude A is A^2, highest frequency first.

    Column k is of the window around sample k hop. A sample is mirrored at its ends: cut off, it would crackle there.
    """
    hann = np.hanning(WINDOW + 1)[:-1]
    padded = np.pad(wave - wave.mean(), WINDOW // 2, "symmetric")  # the mean is no sound
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: len(wave) : hop]
    power = np.abs(np.fft.rfft(windows * hann)[:, 1:] * (2 / hann.sum())) ** 2
    return power.reshape(len(windows), ROWS, -1).max(-1).T[::-1]  # (columns, 512) -> (ROWS, columns)


def _palette() -> bytes:
    """R G B of each level, and of PAPER."""
    places = np.linspace(0, len(ANCHORS) - 1, LEVELS)
    channels = [np.interp(places, range(len(ANCHORS)), channel) for channel in zip(*ANCHORS, strict=True)]
    return np.stack(channels, 1).round().astype(np.uint8).tobytes() + b"\xff\xff\xff"
