"""Launches of the kernels whose programs go along many tiles, and which passes take them.

A program of `attention_forward` or `chain_backward` has one tile and visits those that it meets. One of these goes
along a window tile by tile, or along columns one by one: as a walk, which visits each pair of tiles once, or on GPUs
that have what these need by warps with roles, or of narrow heads by warps that work alone. How many tiles it goes along
follows from how many programs fill the GPU.

tensors: all of the pass in the order of launch.py: q, k, v, out, lse, and backward dout, dlse, delta, dq, dk, dv too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from sparse_tx.attention.kernels import has_roles, multiprocessors
from sparse_tx.attention.kernels.column import column_backward, column_forward
from sparse_tx.attention.kernels.configs import (
    BLOCK_ROWS,
    MOST_BACK,
    MOST_TILES,
    ROLES_TILE,
    ForwardRoles,
    NarrowRoles,
    Roles,
    Walk,
    Warps,
    column_forward_roles,
    column_roles,
    forward_roles,
    narrow_column_roles,
    narrow_roles,
    part_of,
    power_of_two,
    roles,
    walk,
    warps,
)
from sparse_tx.attention.kernels.copies import can_copy, descriptor, heads_descriptor, rows_descriptor
from sparse_tx.attention.kernels.handles import Launch, Operand
from sparse_tx.attention.kernels.plan import Chain, Run
from sparse_tx.attention.kernels.roles import window_backward_by_roles
from sparse_tx.attention.kernels.roles_column import column_backward_by_roles
from sparse_tx.attention.kernels.roles_column_forward import column_forward_by_roles
from sparse_tx.attention.kernels.roles_forward import window_forward_by_roles
from sparse_tx.attention.kernels.roles_narrow import narrow_backward_by_roles
from sparse_tx.attention.kernels.tiles import LOG2E
from sparse_tx.attention.kernels.warps import window_forward_by_warps
from sparse_tx.attention.kernels.warps_column import column_forward_by_warps
from sparse_tx.attention.kernels.window import window_backward, window_forward

Way = Roles | NarrowRoles | Walk
Chosen = TypeVar("Chosen", Roles, NarrowRoles, ForwardRoles)


def forward_along(chain: Chain, run: Run, merge: bool, tensors: Sequence[Operand], scale: float) -> Launch | None:
    """None where tiles of their own do better, or must do it."""
    by_roles = _roles(chain, tensors, forward_roles, column_forward_roles)
    if by_roles is not None:
        return _forward_by_roles(chain, run, by_roles, merge, tensors, scale)
    if (alone := _takes_warps(chain, run, tensors)) is not None:
        return _forward_by_warps(chain, run, alone, merge, tensors, scale)
    walked = _walk("forward", chain, tensors)
    return None if walked is None else _walk_forward(chain, run, walked, merge, tensors, scale)


def way_backward(chain: Chain, add: bool, tensors: Sequence[Operand]) -> Way | None:
    """How `backward_along` goes; None where tiles of their own do better, or must do it. add: to another part."""
    if (narrow := _roles(chain, tensors, narrow_roles, narrow_column_roles)) is not None:
        return narrow
    by_roles = _roles(chain, tensors, functools.partial(roles, add=add), column_roles)
    return _walk("backward", chain, tensors) if by_roles is None else by_roles


def makes_delta(way: Way | None, chain: Chain, alone: bool, single: bool) -> bool:
    """Whether the first pass of a run makes delta on the way: where it sees each query once, and a window alone where
    it needs it. single: whether a tile of its own holds a whole group or column.
    """
    if isinstance(way, Roles):
        return chain.strided
    return single or (alone and chain.part == "window") or (way is not None and chain.strided)


def backward_along(
    chain: Chain, run: Run, way: Way, add: bool, delta_here: bool, store_delta: bool, has_dlse: bool,
    tensors: Sequence[Operand], scale: float,
) -> list[Launch]:  # fmt: skip
    """way: of `way_backward`. delta_here: whether this pass makes delta."""
    if isinstance(way, Roles):
        if chain.strided:
            return _column_by_roles(chain, run, way, store_delta, has_dlse, tensors, scale)
        return _window_by_roles(chain, run, way, add, tensors, scale)
    if isinstance(way, NarrowRoles):
        return [_narrow_backward(chain, run, way, add, delta_here, store_delta, has_dlse, tensors, scale)]
    return [_walk_backward(chain, run, way, add, delta_here, store_delta, has_dlse, tensors, scale)]


def _can_copy(chain: Chain, tensors: Sequence[Operand]) -> bool:
    """Whether the copy engine can bring all that is read or written by rows."""
    return can_copy(chain, *(t for t in tensors if len(t.shape) == 4))


def _plain(chain: Chain) -> bool:
    """Whether no other part has keys of it."""
    return chain.tokens == 0 and chain.skip == (0, 0)


def _roles(
    chain: Chain,
    tensors: Sequence[Operand],
    of_window: Callable[[int, int, int], Chosen | None],
    of_column: Callable[[int, int, int], Chosen | None],
) -> Chosen | None:
    """What the rule gives for a window alone or beside a column, or for that column; None where roles do not suit."""
    q, _, v, *_ = tensors
    suits = chain.part == "window" or (chain.part == "column" and _plain(chain))
    if not (suits and has_roles(q.device) and _can_copy(chain, tensors)):
        return None
    rule, entries = (of_column, chain.N) if chain.strided else (of_window, chain.R)
    return rule(entries, q.shape[-1], v.shape[-1])


def _takes_warps(chain: Chain, run: Run, tensors: Sequence[Operand]) -> Warps | None:
    """How this pass goes by warps that work alone; None where it does not."""
    q, _, v, *_ = tensors
    if not (_plain(chain) and has_roles(q.device) and _can_copy(chain, tensors)):
        return None
    return warps(chain, run.heads, q.shape[-1], v.shape[-1])


def _walk(kernel: str, chain: Chain, tensors: Sequence[Operand]) -> Walk | None:
    """How to walk this pass with one program for many tiles; None where that loses, or cannot be."""
    q, _, v, *_ = tensors
    if chain.part not in ("window", "column") or not _plain(chain) or q.dtype.itemsize != 2:
        return None
    chosen = walk(kernel, part_of(chain), q.shape[-1], v.shape[-1])
    if chosen is None:
        return None
    if chain.strided:
        fits = -(-chain.N // chosen.tile) <= MOST_TILES
    else:
        fits = -(-chain.R // chosen.tile) <= MOST_BACK
    if not fits:
        return None
    return chosen if _can_copy(chain, tensors) else None


def _spread(tiles: int, rest: int, chosen: Walk, device: torch.device) -> tuple[int, int]:
    """Tiles a program walks along, and programs along them; `rest` other programs run beside each."""
    length = max(1, -(-tiles * rest // (chosen.programs * multiprocessors(device.index))))
    return length, -(-tiles // length)


def _chunks(tiles: int, rest: int, halo: int, most: int, least: int = 1) -> tuple[int, int]:
    """As `_spread`, where `most` programs run at a time: the fewest tiles one after the other, of which each chunk has
    `halo` more than its own; of more than one chunk each has `least` of its own.
    """

    def cost(chunks: int) -> int:
        return -(-chunks * rest // most) * (-(-tiles // chunks) + halo)

    length = -(-tiles // min(range(1, max(1, min(tiles // least, most)) + 1), key=cost))
    return length, -(-tiles // length)


def _walk_forward(
    chain: Chain, run: Run, chosen: Walk, merge: bool, tensors: Sequence[Operand], scale: float
) -> Launch:
    q, k, v, out, lse = tensors
    B, S, H, Dqk = q.shape
    Dv = v.shape[-1]
    constants = {"BDQ": power_of_two(Dqk), "BDV": power_of_two(Dv), "BT": chosen.tile}
    tiles = min(chain.L, S) if chain.strided else -(-S // chosen.tile)
    length, chunks = _spread(tiles, B * run.heads, chosen, q.device)
    arguments = *(descriptor(t, chain, chosen.tile) for t in (q, k, v, out)), lse, S, H, run.head, run.heads
    options = {"STAGES": chosen.stages, "num_warps": chosen.warps, "maxnreg": chosen.registers}
    programs = chunks * B * run.heads
    if chain.strided:
        return Launch(
            column_forward, programs, *arguments, chunks, length, chain.L, scale * LOG2E.value,
            NEAR=chain.near, R=chain.R, NT=-(-chain.N // chosen.tile), **constants, **options,
        )  # fmt: skip
    return Launch(
        window_forward, programs, *arguments, chunks, length, scale * LOG2E.value,
        R=chain.R, MERGE=merge, **constants, **options,
    )  # fmt: skip


def _along(
    chain: Chain,
    run: Run,
    q: Operand,
    rows: int,
    halo: int,
    heads: int = 1,
    programs: int = 1,
    ahead: int = 0,
    least: int = 1,
) -> tuple[int, tuple[int, ...], dict[str, object]]:
    """Programs, numbers and constants of a launch that goes along tiles of so many rows, or along whole columns.

    halo: what a program costs beyond its tiles of a window. heads: of a program, neighbours. programs: side by side on
    a multiprocessor. ahead: tiles at the end of a window that are not gone along. least: tiles of a program, if several
    go along a sequence.
    """
    B, S, H, _ = q.shape
    groups = run.heads // heads
    most = programs * multiprocessors(q.device.index)
    if chain.strided:
        units = B * chain.L * groups
        programs = -(-units // -(-units // most))
        of_columns = {"L": chain.L, "NEAR": chain.near, "NT": -(-chain.N // rows)}
        return programs, (S, H, run.head, groups, units), {"R": chain.R, **of_columns}
    length, chunks = _chunks(-(-S // rows) - ahead, B * groups, halo, most, least)
    return chunks * B * groups, (S, H, run.head, groups, chunks, length), {"R": chain.R}


def _forward_by_roles(
    chain: Chain, run: Run, chosen: ForwardRoles, merge: bool, tensors: Sequence[Operand], scale: float
) -> Launch:
    # Half of the keys before a program's own, and some two tiles to begin and to end.
    halo = -(-chain.R // ROLES_TILE) // 2 + 2
    programs, numbers, constants = _along(chain, run, tensors[0], ROLES_TILE, halo)
    if chain.strided:  # the first pass of its heads: it never merges
        constants["NC"] = chosen.keys
    else:
        constants |= {"NKV": chosen.keys, "GROUPS": chosen.groups, "MERGE": merge}
    described = [descriptor(t, chain, ROLES_TILE)._replace(gluon=True) for t in tensors[:4]]
    return Launch(
        column_forward_by_roles if chain.strided else window_forward_by_roles, programs,
        *described, tensors[4], *numbers, scale * LOG2E.value,
        **constants, NQ=chosen.queries, REGISTERS=chosen.registers, num_warps=4,
    )  # fmt: skip


def _window_by_roles(
    chain: Chain, run: Run, chosen: Roles, add: bool, tensors: Sequence[Operand], scale: float
) -> list[Launch]:
    """As many passes as it takes, that over the farthest keys first.

    Sums are rounded to 16 bits between passes. The greatest are gradients of values at the beginning, mostly of queries
    near to them: added last, they are rounded once.
    """
    q, k, v, _, lse, dout, _, delta, *gradients = tensors
    by_tiles = [descriptor(t, chain, ROLES_TILE)._replace(gluon=True) for t in (q, k, v, dout, *gradients)]
    tiles = -(-chain.R // ROLES_TILE) + 1
    launches: list[Launch] = []
    for ahead in reversed(range(0, tiles, chosen.back + 1)):
        back = min(chosen.back, tiles - ahead - 1)
        # Half of the pairs with keys before a program's own, and some two tiles to begin and to end.
        programs, numbers, constants = _along(chain, run, q, ROLES_TILE, back // 2 + 2, ahead=ahead, least=back)
        launch = Launch(
            window_backward_by_roles, programs,
            *by_tiles[:3], lse, by_tiles[3], delta, *by_tiles[4:], *numbers, scale * LOG2E.value, scale, LOG2E.value,
            **constants, BACK=back, AHEAD=ahead, NQ=chosen.queries, NKV=chosen.keys, NP=chosen.pairs,
            NS=chosen.stores, REGISTERS=chosen.registers, ADD=add or bool(launches),
            LACK=ahead + chosen.back + 1 if launches and not add else 0, num_warps=4,
        )  # fmt: skip
        launches.append(launch)
    return launches


def _column_by_roles(
    chain: Chain, run: Run, chosen: Roles, store_delta: bool, has_dlse: bool, tensors: Sequence[Operand], scale: float
) -> list[Launch]:
    """As many passes as it takes, that of the last queries first: of the farthest, as of a window."""
    programs, numbers, constants = _along(chain, run, tensors[0], ROLES_TILE, 0)
    described = [descriptor(t, chain, ROLES_TILE)._replace(gluon=True) if len(t.shape) == 4 else t for t in tensors]
    launches: list[Launch] = []
    end = tiles = -(-chain.N // ROLES_TILE)
    passes = -(-tiles // (chosen.back + 1))
    for left in reversed(range(passes)):
        first = tiles * left // passes
        launch = Launch(
            column_backward_by_roles, programs, *described, *numbers, scale * LOG2E.value, scale,
            **constants | {"FIRST": first, "NT": end - first}, NQ=chosen.queries, NKV=chosen.keys, NP=chosen.pairs,
            NO=chosen.outputs, REGISTERS=chosen.registers, ADD=bool(launches),
            STORE_DELTA=store_delta, HAS_DLSE=has_dlse, num_warps=4,
        )  # fmt: skip
        launches.append(launch)
        end = first
    return launches


def _narrow_backward(
    chain: Chain, run: Run, chosen: NarrowRoles, add: bool, delta_here: bool, store_delta: bool, has_dlse: bool,
    tensors: Sequence[Operand], scale: float,
) -> Launch:  # fmt: skip
    q = tensors[0]
    programs, numbers, constants = _along(chain, run, q, ROLES_TILE, -(-chain.R // ROLES_TILE) + 2)
    if chain.strided:  # neighbours are a program's own: heads so narrow lost otherwise
        S, H, head, heads, _ = numbers
        units = q.shape[0] * chain.L
        of_head = -(-units // -(-units // max(1, multiprocessors(q.device.index) // heads)))
        programs, numbers = of_head * heads, (S, H, head, heads, of_head, units)
    else:
        constants |= {"L": 1, "NEAR": 0, "NT": 0}
    described = [
        rows_descriptor(t, chain, ROLES_TILE)._replace(gluon=True) if len(t.shape) == 4 else t for t in tensors
    ]
    return Launch(
        narrow_backward_by_roles, programs,
        *described, *numbers, q.shape[1] // chain.L, scale * LOG2E.value, scale,
        **constants, NQ=chosen.tiles, NKV=chosen.tiles, NP=chosen.pairs, NO=chosen.outputs,
        REGISTERS=chosen.registers, ADD=add, DELTA_HERE=delta_here, STORE_DELTA=store_delta, HAS_DLSE=has_dlse,
        num_warps=4,
    )  # fmt: skip


def _walk_backward(
    chain: Chain, run: Run, chosen: Walk, add: bool, delta_here: bool, store_delta: bool, has_dlse: bool,
    tensors: Sequence[Operand], scale: float,
) -> Launch:  # fmt: skip
    q, v = tensors[0], tensors[2]
    B, S, H, Dqk = q.shape
    Dv = v.shape[-1]
    constants = {"BDQ": power_of_two(Dqk), "BDV": power_of_two(Dv), "BT": chosen.tile}
    tiles = min(chain.L, S) if chain.strided else -(-S // chosen.tile)
    length, chunks = _spread(tiles, B * run.heads, chosen, q.device)
    by_pointer = (3,) if chain.strided else ()
    described = [t if len(t.shape) in by_pointer else descriptor(t, chain, chosen.tile) for t in tensors]
    options = {"STAGES": chosen.stages, "num_warps": chosen.warps, "maxnreg": chosen.registers, "HAS_DLSE": has_dlse}
    programs = chunks * B * run.heads
    arguments = *described, S, H, run.head, run.heads, chunks, length
    if chain.strided:
        return Launch(
            column_backward, programs, *arguments, chain.L, scale * LOG2E.value, scale,
            NEAR=chain.near, R=chain.R, NT=-(-chain.N // chosen.tile), STORE_DELTA=store_delta, **constants, **options,
        )  # fmt: skip
    return Launch(
        window_backward, programs, *arguments, scale * LOG2E.value, scale,
        R=chain.R, ADD=add, DELTA_HERE=delta_here, **constants, **options,
    )  # fmt: skip


def _forward_by_warps(
    chain: Chain, run: Run, chosen: Warps, merge: bool, tensors: Sequence[Operand], scale: float
) -> Launch:
    programs, numbers, constants = _along(chain, run, tensors[0], BLOCK_ROWS, 2, chosen.warps, chosen.programs)
    if not chain.strided:  # as by roles
        constants |= {"RING": -(-chain.R // BLOCK_ROWS) + 1 + chosen.early, "MERGE": merge}
    scales = (scale * LOG2E.value,) if chain.strided else (scale * LOG2E.value, LOG2E.value)
    described = [heads_descriptor(t, chain, chosen.warps) for t in tensors[:4]]
    return Launch(
        column_forward_by_warps if chain.strided else window_forward_by_warps, programs,
        *described, tensors[4], *numbers, *scales, **constants, num_warps=chosen.warps,
    )  # fmt: skip
