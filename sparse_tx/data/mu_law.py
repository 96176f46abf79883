"""Sound as bytes: 8-bit mu-law (mu = 255) at one rate, there and back."""

import numpy as np

RATE = 12_000  # samples a second, of all audio here (Child et al. 2019, section 7.4)
MU = 255.0


def encode_mu_law(wave: np.ndarray) -> np.ndarray:
    """Samples from -1 to 1 (beyond: clipped) -> uint8 codes, 0 the lowest, 255 the highest; silence is 128.

    F(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu), the continuous curve of G.711 in 256 equal steps. G.711's own codes
    follow a polyline and are ordered otherwise: these are not its bytes.
    """
    x = np.clip(np.asarray(wave, np.float64), -1, 1)
    curve = np.copysign(np.log1p(MU * np.abs(x)) / np.log1p(MU), x)
    return np.floor((curve + 1) / 2 * MU + 0.5).astype(np.uint8)


def expand_mu_law(codes: np.ndarray) -> np.ndarray:
    """uint8 codes -> int16 samples; encoded again, these are the same codes.

    Code 255 - k is the sample of code k with its sign inverted, exactly. No code is 0: silence is 128, heard as 3,
    and inverted 127, heard as -3.
    """
    x = codes.astype(np.float64) / (MU / 2) - 1
    return (np.sign(x) * np.expm1(np.abs(x) * np.log1p(MU)) / MU * 32767).round().astype(np.int16)
