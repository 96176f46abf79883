"""Tile sizes of the decoding kernels and which of them a step takes, by numbers of the model and the batch."""

from __future__ import annotations

from typing import NamedTuple

VECTOR_ROWS = 4  # rows up to which plain sums beat tensor cores that work on 16 rows at least
_TILES = ((128, 64), (64, 64), (32, 64), (16, 64), (16, 32))  # rows, outputs
_WHOLE = 512  # inputs that are normalised as a whole, in registers, at most
_WEIGHTS = 128 << 10  # bytes of weights that a program of the persistent kernel keeps in registers, at most
_SLOTS = 512  # that a head of it reads, at most: no other program helps


class Gpu(NamedTuple):
    """What the choices depend on: multiprocessors, and bytes of shared memory that a program may have."""

    processors: int
    shared: int


class Tile(NamedTuple):
    """Rows, outputs and inputs of a step of a linear layer."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


class Stack(NamedTuple):
    """The persistent kernel: shares of a head's values, shares of the hidden units, keys read at once."""

    shares: int
    units: int
    keys: int
    warps: int


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def tile(rows: int, outputs: int, inputs: int, norm: bool, itemsize: int, gpu: Gpu) -> Tile:
    """Of `linear_step`, for more than VECTOR_ROWS rows: the largest that gives most multiprocessors a program."""
    widest = max(16, power_of_two(inputs))
    if itemsize == 4:  # exact products run on the plain cores
        return Tile(16 if rows <= 64 else 32, 32, min(32, widest), 4, 1)
    whole = norm and widest <= _WHOLE
    for m, n in _TILES:
        fits = not whole or (m * widest <= 1 << 15 and (m + n) * widest * itemsize <= gpu.shared)
        if fits and -(-rows // m) * -(-outputs // n) * 4 >= 3 * gpu.processors:
            break
    if whole:
        return Tile(m, n, widest, 8 if m * widest >= 1 << 14 else 4, 1)
    return Tile(m, n, min(128 if m <= 32 else 64, widest), 4, 3)


def vector(inputs: int) -> tuple[int, int]:
    """Outputs of a program of `vector_step`, which holds their weights at once, and its warps."""
    return max(1, 4096 // power_of_two(inputs)), 4


def attend(widest: int) -> tuple[int, int]:
    """Keys that `attend_step` reads at once, `widest` numbers each, and its warps."""
    return min(128, max(16, 8192 // power_of_two(widest))), 4


def splits(programs: int, slots: int, gpu: Gpu) -> int:
    """Programs that share what a head reads: so many that the GPU is full, with 128 slots each at least."""
    n = 1
    while n < 16 and programs * n * 2 <= 2 * gpu.processors and slots >= 256 * n:
        n *= 2
    return n


def stack(Dv: int, ff: int, slots: int) -> Stack:
    """slots: that a head reads of one part at most."""
    shares = max(n for n in range(1, max(1, Dv // 32) + 1) if Dv % n == 0)
    units = max(n for n in range(1, max(1, min(32, ff // 32)) + 1) if ff % n == 0)
    return Stack(shares, units, min(128, power_of_two(max(16, slots))), 8)


def persistent_fits(chosen: Stack, rows: int, heads: int, gpu: Gpu) -> bool:
    """Whether all programs are on the GPU at once, one a multiprocessor."""
    return rows * heads * chosen.shares + chosen.units <= gpu.processors


def takes_persistent(chosen: Stack, width: int, Dqk: int, Dv: int, slots: int, itemsize: int) -> bool:
    """Whether it is likely to win where it fits: weights and keys of a program are few enough to be there in time."""
    weights = (2 * Dqk + 2 * Dv // chosen.shares) * width * itemsize
    return weights <= _WEIGHTS and slots <= _SLOTS
