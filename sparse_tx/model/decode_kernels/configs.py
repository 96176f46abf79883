"""Tile sizes of the decoding kernels and which of them a step takes, by numbers of the model and the batch."""

from __future__ import annotations

from typing import NamedTuple

from triton import next_power_of_2

VECTOR_ROWS = 4  # rows up to which plain sums beat tensor cores that work on 16 rows at least
# Rows from which the largest tile wins, with 8 warps, however few programs that gives (512 rows of the 59M CIFAR-10
# model in bf16 on an H200: 38.4 us a layer, 41.5 with tiles chosen to fill the GPU; fewer rows were not measured).
MANY_ROWS = 512
_TILES = ((64, 64), (32, 64), (16, 64), (16, 32))  # rows, outputs
_WHOLE = 512  # inputs that are normalised as a whole, in registers, at most


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


def tile(rows: int, outputs: int, inputs: int, norm: bool, itemsize: int, gpu: Gpu) -> Tile:
    """Of `linear_step`, for more than VECTOR_ROWS rows: the largest that gives most multiprocessors a program; from
    MANY_ROWS on the largest that fits."""
    widest = max(16, next_power_of_2(inputs))
    if itemsize == 4:  # exact products run on the plain cores
        return Tile(16 if rows <= 64 else 32, 32, min(32, widest), 4, 1)
    whole = norm and widest <= _WHOLE
    for m, n in _TILES:
        fits = not whole or (m * widest <= 1 << 15 and (m + n) * widest * itemsize <= gpu.shared)
        if fits and (rows >= MANY_ROWS or -(-rows // m) * -(-outputs // n) * 4 >= 3 * gpu.processors):
            break
    many = rows >= MANY_ROWS
    if whole:
        return Tile(m, n, widest, 8 if many or m * widest >= 1 << 14 else 4, 1)
    return Tile(m, n, min(128 if m <= 32 else 64, widest), 8 if many else 4, 3)


def vector(inputs: int) -> tuple[int, int]:
    """Outputs of a program of `vector_step`, which holds their weights at once, and its warps."""
    return max(1, 4096 // next_power_of_2(inputs)), 4


class Between(NamedTuple):
    """Of `between_by_roles`: rows of a program, inputs of a tile of weights, tiles in shared memory at a time."""

    rows: int
    inputs: int
    stages: int


# Rows up to which programs share a layer's weights, and from which on each reads them all. The 59M CIFAR-10 model in
# bf16, ms a byte of three launches a layer by shares, of two and of five, each at its best with or without overlap. On
# an H100: 16 rows 1.76, -, 2.01; 64 rows 1.81, -, 2.09; 128 rows 1.92, 2.38, 2.24; 192 rows 2.11, 2.48, 2.45; 256 rows
# 2.30, 2.59, 2.48; 320 rows 2.91, 2.67, 2.73. On an H200 two and five: 512 rows 2.89, 3.64; 1,536 rows 4.57, 6.19; 440
# merged rows 3.31, 3.80. The launch of all takes 14 to 15 us for any rows that are one wave: as long as a
# multiprocessor takes to bring a layer's weights.
SHARED_ROWS = 256
_BETWEEN_WIDEST = 256


def _fits(width: int, ff: int, itemsize: int) -> bool:
    """Whether all between two attentions can be one launch or two: 16 bits, narrow models, and rows of weights that
    begin at multiples of 16 bytes.
    """
    return itemsize == 2 and width <= _BETWEEN_WIDEST and width % 8 == ff % 8 == 0


def between(rows: int, width: int, ff: int, itemsize: int, gpu: Gpu) -> Between | None:
    """None where what lies between two attentions is not one launch: for few rows, and where it does not fit.

    1,536 rows as above: tiles of 64 inputs 4.57, of 128 (three at a time) 4.62; 32 rows a program 5.01.
    """
    if rows <= SHARED_ROWS or not _fits(width, ff, itemsize):
        return None
    return Between(16 if rows <= 16 * gpu.processors else 32, 64, 6)


SHARE_ROWS, SHARE_UNITS = 16, 64  # rows and hidden units of a program of `feedforward_share`


def shares(rows: int, width: int, ff: int, itemsize: int) -> int:
    """Into how many a feed-forward is cut, where all between two attentions is two launches; 0 where it is not."""
    taken = VECTOR_ROWS < rows <= SHARED_ROWS and _fits(width, ff, itemsize)
    return -(-ff // SHARE_UNITS) if taken else 0


MANY_PROGRAMS = 256


def attend(widest: int, programs: int) -> tuple[int, int, int]:
    """Keys that `attend_step` reads at once, `widest` numbers each; its warps; and steps that are under way at a time.

    As above, ms a byte, 16 keys, 1 warp, 2 steps against 32, 2, 1: 128 rows 2.47, 2.53; 256 rows 2.59, 2.68; 1,536 rows
    in five launches a layer 6.19, 6.91, of which attention is 27 and 34 us a layer; 440 merged rows 3.80, 3.98.
    """
    numbers, warps, steps = (2048, 1, 2) if programs >= MANY_PROGRAMS else (4096, 2, 1)
    return min(128, max(16, numbers // next_power_of_2(widest))), warps, steps


# Rows x heads up to which attention and its output matrix are one launch. The CIFAR-10 model (59M, 2 heads) in bf16 on
# an H100, us a layer in five launches, four, and three (with the feed-forward in one): 1 row 12.1, 8.0, 6.7; 2 rows
# 13.5, 8.8, 8.4; 4 rows 17.0, 10.9, 12.7; 8 rows 16.5, 15.3, 18.1; 16 rows 16.6, 25.2, 33.2.
JOINED = 8


def joins(rows: int, heads: int) -> bool:
    """Whether attention and its output matrix are one launch, where plain sums serve all products."""
    return rows <= VECTOR_ROWS and rows * heads <= JOINED


def attend_out(slots: int, nbytes: int) -> tuple[int, int, int]:
    """Keys of a part that `attend_out_step` reads before the kernel ahead has ended; outputs of a program; warps.

    slots: of all strips. nbytes: of a key or value; the keys stay in registers. As above, us a layer at 1 row: 6.66;
    with 8 warps 6.93, with 16 outputs 6.69, with 64 7.18, with 64 keys 7.71.
    """
    fitting = max(16, (1 << 15) // next_power_of_2(nbytes))
    return min(128, fitting, max(16, next_power_of_2(slots - 1))), 32, 4


JOINED_FF = 2  # rows up to which the feed-forward is one launch
_SHARES = 32  # of a feed-forward, at most: each program of the next kernel reads them all


def joins_feedforward(rows: int, width: int, ff: int) -> bool:
    """Whether both matrices of a feed-forward are one launch, where attention and its output matrix are."""
    return rows <= JOINED_FF and -(-ff // feedforward(width, ff)[0]) <= _SHARES


def feedforward(width: int, ff: int) -> tuple[int, int]:
    """Hidden units of a program of `feedforward_step`, which holds their weights at once, and its warps. As above,
    us a layer at 1 row: 6.66; with half as many units 6.73, with twice as many 7.06; with 4 warps 6.71.
    """
    return max(1, min(8192 // next_power_of_2(width), next_power_of_2(ff))), 8


def overlaps(programs: int, few_launches: bool, gpu: Gpu) -> bool:
    """Whether a kernel may begin while the one before ends, for so many rows and heads: while the GPU is not full.

    few_launches: two a layer or three. Three won by it at any rows: on an H100 128 take 1.92, 2.44. A step of the 59M
    CIFAR-10 model (2 heads) in bf16 on an H200, ms with and without: 1 row 1.20, 1.85; in five launches 128 rows 3.15,
    2.78; 256 rows 2.50, 3.04; 512 rows 3.64, 4.27; 1,024 rows 5.83, 5.35. In two: 512 rows 2.89, 3.16; 1,024 rows 3.98,
    3.84; 1,536 rows 4.61, 4.62; 440 merged rows 3.31, 3.63. In five launches no bound serves all: this one loses 15
    percent at 512 rows, 13 at 128.
    """
    return programs <= (8 if few_launches else 4) * gpu.processors


def splits(programs: int, slots: int, gpu: Gpu) -> int:
    """Programs that share what a head reads: so many that the GPU is full, with 128 slots each at least."""
    n = 1
    while n < 16 and programs * n * 2 <= 2 * gpu.processors and slots >= 256 * n:
        n *= 2
    return n
