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
    """Rows of a program of `between_step`, which has a layer's weights in steps of so many inputs of the output matrix,
    hidden units and outputs of the next projection."""

    rows: int
    inputs: int
    hidden: int
    outputs: int
    warps: int
    stages: int


BETWEEN_ROWS = 64


def between(rows: int, width: int, itemsize: int, gpu: Gpu) -> Between | None:
    """Of `between_step`; None where the layers of a feed-forward and its neighbours are a launch each."""
    if rows < BETWEEN_ROWS or width > 256 or itemsize > 2:
        return None
    chosen = Between(32 if rows >= 1024 else 16, 64, 64, 64, 8, 3)
    widest = max(16, next_power_of_2(width))
    return chosen if 2 * widest * chosen.hidden * itemsize * chosen.stages <= gpu.shared else None


class Roles(NamedTuple):
    """The same of `between_by_roles`: rows, inputs of a tile of weights, tiles in shared memory at a time."""

    rows: int
    inputs: int
    stages: int


def attend(widest: int) -> tuple[int, int, int]:
    """Keys that `attend_step` reads at once, `widest` numbers each; its warps; and steps that are under way at a time.

    512 rows of the 59M CIFAR-10 model (128 wide) in bf16 on an H200: 34.8 us a layer, 41.5 with 64 keys and 4 warps.
    """
    return min(128, max(16, 4096 // next_power_of_2(widest))), 2, 1


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


def overlaps(programs: int, gpu: Gpu) -> bool:
    """Whether a kernel may begin while the one before ends, for so many rows and heads: while the GPU is not full.

    A step of the 59M CIFAR-10 model (2 heads) in bf16 on an H200, ms with and without, interleaved: 1 row 1.20, 1.85;
    128 rows 3.42, 2.95; 256 rows 2.67, 3.22; 512 rows 3.97, 4.63; 1,024 rows 5.83, 5.35; 1,536 rows 7.97, 7.84. Merged:
    128 rows 3.99, 3.51; 256 rows 3.52, 3.85; 440 rows 4.93, 4.50. No bound serves all: this one loses 15 percent at 128
    rows, whose tiles are small, and at 512 interleaved ones.
    """
    return programs <= 4 * gpu.processors


def splits(programs: int, slots: int, gpu: Gpu) -> int:
    """Programs that share what a head reads: so many that the GPU is full, with 128 slots each at least."""
    n = 1
    while n < 16 and programs * n * 2 <= 2 * gpu.processors and slots >= 256 * n:
        n *= 2
    return n
