"""Tile sizes by kernel, part, widths and dtype: a small table measured on an H200, else a rule."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from sparse_tx.attention.kernels.plan import Chain


class Config(NamedTuple):
    rows: int  # queries (or entries of the chain) a program owns; for "keys": queries of a step
    keys: int  # keys of a step; for "keys": keys a program owns
    warps: int
    stages: int
    registers: int | None = None  # most registers a thread may have: fewer let more programs share a multiprocessor


class Walk(NamedTuple):
    """Of a kernel that walks along tiles of a window, or along columns."""

    tile: int  # entries of a tile
    warps: int
    stages: int
    programs: int  # on a multiprocessor, over which the walks are spread
    registers: int | None = None


class Roles(NamedTuple):
    """Of the kernel whose warps have roles: what it keeps in shared memory at a time."""

    queries: int  # tiles
    keys: int  # tiles
    pairs: int  # of tiles, weights and gradients of scores
    registers: int  # of a thread that makes weights
    back: int  # tiles that a pass over a window reaches back, beyond its first
    outputs: int  # tiles, of columns
    stores: int  # tiles of gradients on their way in or out


class NarrowRoles(NamedTuple):
    """As `Roles`, of the kernel of narrow heads."""

    tiles: int  # of queries, and of keys
    pairs: int  # of tiles, gradients of scores
    outputs: int  # tiles
    registers: int  # of a thread of a group that owns tiles of keys


class ForwardRoles(NamedTuple):
    """The same of the forward pass."""

    queries: int  # tiles
    keys: int  # tiles of a window, or columns
    groups: int  # of four warps, that take turns in tiles of queries
    registers: int  # of a thread of theirs


class Warps(NamedTuple):
    """Of a forward kernel whose warps work alone."""

    warps: int  # of a program, each with a head
    programs: int  # on a multiprocessor, over which all is spread
    early: int = 1  # blocks that are brought before their step, of a window: one or more


COMPACT = "fixed", "summary"  # parts with keys of a compact list
_LONG = 512  # keys of a window

# (kernel, part, Dqk, Dv, bytes of an element) -> Config. Kernels: "forward", "backward" (chain_backward), "keys"
# (compact_backward). Parts: "window", "full" (all keys, or a window of 512 and more), "fixed" (a block with summary or
# global keys), "summary" (such keys alone or beside a window), "column" and "block", followed by the least of 32, 64
# and 128 that holds a whole column or block if one does. Medians of benchmarks/tune_attention.py on one H100, cold L2;
# "summary" beside a window of 1,024, from which "full" has its own.
TUNED: dict[tuple[str, str, int, int, int], Config] = {
    ("forward", "window", 64, 128, 2): Config(64, 64, 4, 2),
    ("forward", "window", 64, 64, 2): Config(64, 32, 4, 3),
    ("forward", "window", 32, 32, 2): Config(64, 64, 4, 2),
    ("forward", "column 32", 64, 128, 2): Config(32, 32, 4, 2),
    ("forward", "column 32", 64, 64, 2): Config(32, 32, 4, 2),
    ("forward", "column 128", 32, 32, 2): Config(64, 32, 4, 2),
    ("forward", "column 128", 64, 64, 2): Config(64, 32, 4, 3),
    ("forward", "column", 64, 64, 2): Config(64, 32, 4, 3),
    ("forward", "fixed", 64, 64, 2): Config(128, 64, 8, 3),
    ("forward", "summary", 64, 64, 2): Config(64, 64, 4, 2),
    ("backward", "window", 64, 128, 2): Config(64, 32, 4, 1),
    ("backward", "window", 64, 64, 2): Config(64, 32, 4, 3, 168),
    ("backward", "window", 32, 32, 2): Config(64, 32, 4, 3),
    ("backward", "column 32", 64, 128, 2): Config(32, 64, 4, 1),
    ("backward", "column 32", 64, 64, 2): Config(32, 64, 4, 1),
    ("backward", "column 128", 32, 32, 2): Config(64, 32, 4, 1),
    ("backward", "column 128", 64, 64, 2): Config(64, 32, 4, 1, 168),
    ("backward", "column", 64, 64, 2): Config(64, 32, 4, 1, 168),
    ("backward", "full", 64, 64, 2): Config(64, 64, 4, 3),
    ("backward", "fixed", 64, 64, 2): Config(64, 64, 4, 3),
    ("backward", "summary", 64, 64, 2): Config(64, 64, 4, 3),
    ("keys", "fixed", 64, 64, 2): Config(64, 64, 4, 3, 168),
    ("keys", "summary", 64, 64, 2): Config(64, 64, 4, 3),
}

# (kernel, part, Dqk, Dv) -> Walk, of 16 bits. A walk whose accumulators do not fit the registers (the backward pass of
# a window of wider heads) lost to tiles of their own: 183 against 98 us on CIFAR-10's.
WALKS: dict[tuple[str, str, int, int], Walk] = {
    ("forward", "window", 32, 32): Walk(64, 4, 2, 8),
    ("forward", "column 128", 32, 32): Walk(64, 4, 3, 2),
    ("forward", "column 32", 64, 128): Walk(32, 4, 2, 8),
    ("forward", "column 32", 64, 64): Walk(32, 4, 3, 4),
    ("backward", "window", 32, 32): Walk(64, 4, 2, 4),
    ("backward", "column 128", 32, 32): Walk(64, 4, 2, 4),
}
MOST_BACK = 4  # tiles that a window reaches back, at most: their dq must fit the registers
MOST_TILES = 3  # of a column


ROLES_TILE = 64
_SHARED = 226 * 1024  # bytes of a program, barriers aside


# (Dqk, Dv) -> most passes over a window. Forward and backward, us on an H200, in passes and by tiles of their own: 512
# keys, 8 heads 64 wide, 1,383, 2,046; 16 heads 32 wide 2,008, 2,649; 1,024 keys, 8 heads 64 wide, a million positions
# with their columns 39,900, 43,100; 256 keys of heads 64 and 128 wide 161, 162.
ROLES_PASSES: dict[tuple[int, int], int] = {(64, 64): 4, (32, 32): 2}


def roles(R: int, Dqk: int, Dv: int, add: bool = False) -> Roles | None:
    """For a window of R keys, heads of powers of two wide, 16 bits; None if it does not fit. add: to another part.

    The gradients of queries must fit the registers: a window of more tiles takes several passes.

    On an H100, us, delta included: CIFAR-10's window 79 (108 by tiles of their own), audio's 294 (477), 12,288
    positions of 8 heads 64 wide with windows of 16 and 32 keys 177 and 180 (212, 214). Lost: scores of the next pair
    under way (on an H200 CIFAR-10's 70 for 66, audio's 464 for 280); a third group that makes weights, where registers
    allow (230 for 225 of ImageNet64's, before narrow heads had a kernel of their own).
    """
    tiles = -(-R // ROLES_TILE) + 1
    if tiles < 2 or min(Dqk, Dv) < 32:
        return None
    for passes in range(1, ROLES_PASSES.get((Dqk, Dv), 1) + 1):
        back = -(-tiles // passes) - 1
        twice = back <= 2 and (add or passes > 1)
        found = (_pass(back, Dqk, Dv, stores=2) if twice else None) or _pass(back, Dqk, Dv)
        if found is not None:
            return found
    return None


def _pass(back: int, Dqk: int, Dv: int, outputs: int = 0, stores: int = 1) -> Roles | None:
    """outputs: tiles of the output beside the others, for delta, with the numbers of the queries.

    stores: where gradients of another part have two places, those of the next tile are on their way while these are
    added to, which counts where a tile has few pairs. Us on an H200, two places and one: windows of 64 and 128 keys at
    2^20 positions of 8 heads 64 wide 2,921, 3,045 and 2,905, 3,045; CIFAR-10's 57, 60; of 256 keys 4,122, 4,094.
    """
    # A thread of four warps has half a register for each column of a tile's accumulator: dk, dv and back + 1 times dq.
    accumulators = (Dqk * (back + 2) + Dv) // 2
    others = 40 if outputs else 24
    registers = min(128, (512 - others - accumulators - 40) // 2 // 8 * 8)
    if not 1 <= back <= MOST_BACK or registers < 112:
        return None
    tile, pair = 2 * ROLES_TILE * (Dqk + Dv), 4 * ROLES_TILE**2
    rest = stores * 2 * ROLES_TILE * (2 * Dqk + Dv) + outputs * 2 * ROLES_TILE * Dv
    # Weights are up to a tile of keys ahead of the gradients: of two such tiles the next would come when it is wanted.
    many = (back + 3, 4, 4), (back + 3, 3, 4), (back + 2, 4, 4), (back + 2, 4, 3)
    few = (back + 2, 2, 3), (back + 2, 2, 2), (back + 1, 2, 2)
    for queries, keys, pairs in (*many, (back + 2, 3, 3), (back + 1, 3, 3), *few):
        numbers = queries * 8 * ROLES_TILE if outputs else 0
        if (queries + keys) * tile + pairs * pair + rest + numbers <= _SHARED:
            return Roles(queries, keys, pairs, registers, back, outputs, stores)
    return None


# Widths of heads whose columns go by roles, and the most passes over them backwards, of two tiles and more. Us on an
# H200, forward and backward with delta, by tiles of their own in brackets: audio's column of 256 entries 80, 156 (125,
# 335); at 2^20 positions of 8 heads columns of 64 entries 1,072 (1,236) forward, of 512 1,776, 4,387 (2,565, 8,295), of
# 1,024 8,077 (14,726) backward; ImageNet64's of 96, heads 32 wide, 233 (190). Where memory alone counts, fewer places
# did better, with which programs beside each other stay together: two tiles, backward, three of queries, four of keys
# 2,433, four and three 2,620 (three and two, 2,397, are not enough: see `column_backward_by_roles`); forward three of
# queries 1,096, six 1,125.
ROLES_COLUMNS: dict[tuple[int, int], int] = {(64, 64): 4}


def column_roles(N: int, Dqk: int, Dv: int) -> Roles | None:
    """As `roles`, for columns of N entries."""
    tiles = -(-N // ROLES_TILE)
    if tiles < 2:
        return None
    for passes in range(1, ROLES_COLUMNS.get((Dqk, Dv), 0) + 1):
        own = -(-tiles // passes)
        found = _pass(own - 1, Dqk, Dv, 2) or _pass(own - 1, Dqk, Dv, 1)
        if found is not None and found.queries > own:
            found = found._replace(registers=found.registers - (8 if own < 4 else 16))  # tiles of dq spill else
            return found._replace(queries=3, keys=4) if own == 2 else found
    return None


def narrow_roles(R: int, Dqk: int, Dv: int) -> NarrowRoles | None:
    """For a window of R keys, heads 32 wide, 16 bits; None if it does not fit.

    On an H200, us, delta included: ImageNet64's window 158 (203 as `roles`), its column 125 (183 as a walk). One warp
    for log-sum-exp and delta held all others up (163, 142); with 192 registers a group spills (176). Lost: telling of
    gradients of scores a pair later (163 for 160), places for more pairs (161); a third group spills.
    """
    back = -(-R // ROLES_TILE)
    if (Dqk, Dv) != (32, 32) or not 1 <= back <= MOST_BACK:
        return None
    return _narrow((8, 7), 2 * (back + 1))


def narrow_column_roles(N: int, Dqk: int, Dv: int) -> NarrowRoles | None:
    """As `narrow_roles`, for columns of N entries: two tiles or three."""
    tiles = -(-N // ROLES_TILE)
    if (Dqk, Dv) != (32, 32) or not 2 <= tiles <= MOST_TILES:
        return None
    return _narrow((8,) if tiles == 2 else (6,), tiles * (tiles + 1))


def _narrow(places: tuple[int, ...], pairs: int) -> NarrowRoles | None:
    """places: of tiles of queries and of keys each, most wanted first: three more than a window reaches back."""
    tile, pair = 2 * ROLES_TILE * 32, 2 * ROLES_TILE**2
    for tiles, outputs in itertools.product(places, (4, 2)):
        # Beside them five tiles of gradients on their way out, log-sum-exp and delta of the queries.
        if (4 * tiles + 5 + outputs) * tile + pairs * pair + tiles * 8 * ROLES_TILE <= _SHARED:
            return NarrowRoles(tiles, pairs, outputs, 208)
    return None


def forward_roles(R: int, Dqk: int, Dv: int) -> ForwardRoles | None:
    """As `roles`. On an H100, us: CIFAR-10's window 36.8 (41.6), audio's 145 (178); ImageNet64's, heads 32 wide, lost:
    124 (100), where they reach farther they win: 256 keys, B4 S32768 H16 on an H200, 410 (554), 512 keys 679 (677).
    """
    back = -(-R // ROLES_TILE)
    if back < 1 or min(Dqk, Dv) < (64 if back <= 2 else 32) or max(Dqk, Dv) > 128:
        return None
    least = 6 if back == 1 else back + 3  # see `window_forward_by_roles`
    for groups, queries, keys in ((3, 6, max(least, back + 5)), (3, 6, least), (3, 3, least), (2, 2, back + 2)):
        if 2 * ROLES_TILE * (queries * Dqk + groups * Dv + keys * (Dqk + Dv)) <= _SHARED:
            return ForwardRoles(queries, keys, groups, 160 if groups == 3 else 232)
    return None


def column_forward_roles(N: int, Dqk: int, Dv: int) -> ForwardRoles | None:
    """As `column_roles`."""
    tiles = -(-N // ROLES_TILE)
    if (Dqk, Dv) not in ROLES_COLUMNS or N <= ROLES_TILE // 2:
        return None
    most = (3,) if tiles <= 2 else (2, 1)  # see `column_forward_by_roles`
    for columns, queries in itertools.product(most, (3,) if tiles == 2 else (6, 3)):
        if 2 * ROLES_TILE * (queries * Dqk + 3 * Dv + columns * tiles * (Dqk + Dv)) <= _SHARED:
            return ForwardRoles(queries, columns, 3, 160)
    return None


BLOCK_ROWS = 16  # queries or keys of a block of warps that work alone
# (kernel, part, Dqk, Dv) -> Warps, of 16 bits, where roles do not take it. Forward, us as walks and by warps that
# work alone: on an H200 ImageNet64's window 136, 99, its column 100, 74 (79 with four warps a program), its window
# beside the column 113 with two heads a program, 106 with one, 118 with two warps that share the keys of one; on an
# H100 CIFAR-10's column 33.2, 32.2, that of 8 heads 80, 77. Backward they lost on an H100: ImageNet64's window 267,
# by roles 226; its column 203, as a walk 198, with loops that are not unrolled 209.
WARPS: dict[tuple[str, str, int, int], Warps] = {
    ("forward", "window", 32, 32): Warps(1, 8),
    ("forward", "column", 32, 32): Warps(2, 4),
    ("forward", "column", 64, 64): Warps(2, 4),
    ("forward", "column", 64, 128): Warps(2, 4),
}
_MOST_BLOCKS = 8  # that a window reaches back, and of a column
_MULTIPROCESSOR = 228 * 1024  # bytes of shared memory, of which each program takes one KiB more than it asks for


def warps(chain: Chain, heads: int, Dqk: int, Dv: int) -> Warps | None:
    """For so many heads of a window alone or beside a column, or of a short column; None if they have no such form, or
    if its programs do not fit side by side.
    """
    chosen = WARPS.get(("forward", chain.part, Dqk, Dv))
    entries = chain.N if chain.strided else chain.R
    if chosen is None or heads % chosen.warps or entries > _MOST_BLOCKS * BLOCK_ROWS:
        return None
    shared = chosen.warps * _of_a_warp(chain, Dqk, Dv, chosen.early)
    return chosen if chosen.programs * (shared + 1024) <= _MULTIPROCESSOR else None  # fewer were not measured


def _of_a_warp(chain: Chain, Dqk: int, Dv: int, early: int) -> int:
    """Bytes of shared memory: blocks of tensors Dqk and Dv wide, of two bytes."""
    both = 2 * BLOCK_ROWS * (Dqk + Dv)
    if chain.strided:
        return -(-chain.N // BLOCK_ROWS) * 2 * both
    ring = -(-chain.R // BLOCK_ROWS) + 1 + early
    return ring * both + 2 * BLOCK_ROWS * (2 * Dqk + 3 * Dv)


def walk(kernel: str, part: str, Dqk: int, Dv: int) -> Walk | None:
    """None where tiles of their own do better: part is "window", or "column" with the least size that holds one."""
    return WALKS.get((kernel, part, Dqk, Dv))


def part_of(chain: Chain) -> str:
    """The part as the tables name it: a long window is tiled as all keys are."""
    if chain.part == "window" and chain.R >= _LONG:
        return "full"
    if not (chain.grouped or chain.strided) or chain.part in COMPACT:
        return chain.part
    return chain.part + next((f" {most}" for most in (32, 64, 128) if most >= chain.N), "")


def power_of_two(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def config(kernel: str, part: str, Dqk: int, Dv: int, itemsize: int, large: bool) -> Config:
    """large: the GPU gives a program 160 KiB of shared memory or more (compute capability 8.0, 9.0)."""
    tuned = TUNED.get((kernel, part, Dqk, Dv, itemsize))
    if tuned is not None and large:
        return tuned
    width = max(power_of_two(Dqk), power_of_two(Dv)) * itemsize // 2  # as if of 16 bits
    if itemsize == 4:  # exact products run on the plain cores: larger tiles spill hundreds of registers
        return Config(32, 32, 4, 1) if width <= 128 else Config(16, 16, 4, 1)
    if kernel == "forward":
        if width <= 64:
            return Config(64, 64, 4, 2)
        if width <= 128:
            return Config(64, 32, 4, 2)
        return Config(32, 32, 4, 1) if width <= 256 else Config(16, 16, 4, 1)
    if part.endswith(" 32") and width <= 128:
        return Config(32, 32, 4, 1)
    if width <= 64:
        return Config(64, 64, 4, 1) if large else Config(64, 32, 4, 1)
    if width <= 128:
        return Config(64, 32, 4, 1) if large else Config(32, 32, 4, 1)
    return Config(32, 32, 4, 1) if width <= 256 and large else Config(16, 16, 4, 1)
