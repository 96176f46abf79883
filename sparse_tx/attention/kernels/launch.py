"""From runs of heads to kernel launches: which kernel, with which numbers, on which tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparse_tx.attention.kernels import interpreted, is_large  # noqa: F401
from sparse_tx.attention.kernels.backward import attention_delta, chain_backward, compact_backward
from sparse_tx.attention.kernels.configs import COMPACT, Config, config, part_of, power_of_two
from sparse_tx.attention.kernels.copies import (
    copies_summary,
    copies_tiles,
    descriptor,
    rows_descriptor,
    summary_descriptor,
)
from sparse_tx.attention.kernels.forward import attention_forward
from sparse_tx.attention.kernels.handles import Launch, Layout, Operand, layouts, operands
from sparse_tx.attention.kernels.plan import BLOCK, FULL, NO_LOCAL, WINDOW, Chain, Run, runs_of
from sparse_tx.attention.kernels.tiles import LOG2E
from sparse_tx.attention.kernels.walks import backward_along, forward_along, makes_delta, way_backward

_MOST_PLANS = 1024  # kept, of layouts and patterns: those of a few models


def _column(run: Run, S: int) -> Chain:
    steps = -(-S // run.column)
    skip = (0, 0)  # columns of a summary: set by the caller, for each slot
    reach = S if run.reach < 0 else run.reach
    return Chain("column", steps, min(reach, steps), run.near, run.column, run.tokens, skip, True, True, False)


def _rows(run: Run, S: int) -> Chain:
    N, R = (run.width, S) if run.local == BLOCK else (S, run.width if run.local == WINDOW else S)
    part = {NO_LOCAL: "summary", WINDOW: "window", BLOCK: "block", FULL: "full"}[run.local]
    if run.summary or run.tokens:
        part = "fixed" if run.local == BLOCK else "summary"
    return Chain(part, N, min(R, S), 0, 1, run.tokens, (0, 0), run.local != NO_LOCAL, False, run.local == BLOCK)


class Tiling(NamedTuple):
    """A configuration; tiles in all, of a column (`per`), entries from one to the next, and whether each holds whole
    groups or a whole column.
    """

    config: Config
    tiles: int
    per: int
    advance: int
    single: bool


def _tiling(kernel: str, chain: Chain, q: Operand, v: Operand) -> Tiling:
    chosen = config(kernel, part_of(chain), q.shape[-1], v.shape[-1], q.dtype.itemsize, is_large(q.device))
    S = q.shape[1]
    if chain.strided:
        chosen = chosen._replace(rows=min(chosen.rows, power_of_two(chain.N)))
        per = -(-chain.N // chosen.rows)
        return Tiling(chosen, per * min(chain.L, S), per, chosen.rows, per == 1)
    single = chain.grouped and chosen.rows >= chain.N
    advance = chosen.rows // chain.N * chain.N if single else chosen.rows
    return Tiling(chosen, -(-S // advance), 1, advance, single)


def _by_slot(run: Run) -> list[Run]:
    """Runs whose column pass skips the same columns: one per head where column and summary meet with several slots."""
    if not (run.column and run.summary and run.slot_step):
        return [run]
    slots = run.summary // run.c
    return [
        run._replace(head=run.head + i, heads=1, slot=(run.slot + i * run.slot_step) % slots) for i in range(run.heads)
    ]


def _passes(run: Run, S: int) -> list[Chain]:
    """The column first, if there is one, then everything else."""
    chains = []
    if run.column:
        chain = _column(run, S)
        if run.summary:
            first = run.summary - (run.slot + 1) * run.c
            chain = chain._replace(skip=(first, first + run.c))
        chains.append(chain)
    if run.local != NO_LOCAL or run.summary or run.tokens:
        chains.append(_rows(run, S))
    return chains


def _runs(numbers: Sequence[int]) -> list[Run]:
    return [single for run in runs_of(numbers) for single in _by_slot(run)]


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, numbers: Sequence[int], scale: float) -> None:
    """Writes out (B, S, H, Dv) and lse (B, H, S)."""
    if lse.numel() == 0:
        return
    if scale <= 0:  # the kernels scale after the maximum, which needs a positive scale
        q, scale = q * scale, 1.0
    tensors = q, k, v, out, lse
    _launch(plan_forward(layouts(tensors), q.device, tuple(numbers), scale), tensors)


def _launch(launches: Sequence[Launch], tensors: tuple[Tensor, ...]) -> None:
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():  # Triton launches on the current one
        with torch.cuda.device(device):
            for launch in launches:
                launch(tensors)
        return
    for launch in launches:
        launch(tensors)


# A plan knows nothing that is not an argument of it, but for the tables of sizes: it holds for every later call.
@functools.lru_cache(_MOST_PLANS)
def plan_forward(
    known: tuple[Layout, ...], device: torch.device, numbers: tuple[int, ...], scale: float
) -> tuple[Launch, ...]:
    """Launches of a forward pass of q, k, v, out, lse, of these layouts. scale: above 0."""
    q, k, v, out, lse = tensors = operands(known, device)
    B, S, H, Dqk = q.shape
    Dv = v.shape[-1]
    launches = []
    for run in _runs(numbers):
        for turn, chain in enumerate(_passes(run, S)):
            if (along := forward_along(chain, run, turn > 0, tensors, scale)) is not None:
                launches.append(along)
                continue
            chosen, tiles, per, advance, single = _tiling("forward", chain, q, v)
            copied, sum_copied = copies_tiles(chosen, chain, q, k, v), copies_summary(run, chosen, chain, k, v)
            keys = chosen.rows if single else chosen.keys
            main = (
                [rows_descriptor(t, chain, n) for t, n in ((q, chosen.rows), (k, keys), (v, keys))]
                if copied
                else [q, k, v]
            )
            rest = [summary_descriptor(t, run, chosen.keys) for t in (k, v)] if sum_copied else [k, v]
            launch = Launch(
                attention_forward, tiles * B * run.heads,
                *main, *rest, out, lse,
                *q.strides[:3], *k.strides[:3], *v.strides[:3], *out.strides[:3],
                S, H, run.head, run.heads, tiles, per, scale * LOG2E.value,
                advance, chain.N, chain.R, chain.near, chain.L, chain.tokens, *chain.skip, run.slot, run.slot_step,
                DQ=Dqk, DV=Dv, BDQ=power_of_two(Dqk), BDV=power_of_two(Dv), BM=chosen.rows, BN=chosen.keys,
                CHAIN=chain.present, STRIDED=chain.strided, GROUPED=chain.grouped, SINGLE=single,
                sumL=0 if chain.strided else run.summary, sumC=run.c, GLOBAL=run.tokens > 0 and not chain.strided,
                MERGE=turn > 0, HEAVY_LAST=chain.part in (*COMPACT, "full"),
                COPIED=copied, SUM_COPIED=sum_copied, STAGES=chosen.stages,
                num_warps=chosen.warps, maxnreg=chosen.registers,
            )  # fmt: skip
            launches.append(launch)
    return tuple(launches)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, numbers: Sequence[int], scale: float,
) -> None:  # fmt: skip
    """Writes dq, dk, dv, of any strides but the last."""
    if q.numel() == 0:
        return
    if scale <= 0:
        backward(q * scale, k, v, out, lse, dout, dlse, dq, dk, dv, numbers, 1.0)
        dq.mul_(scale)
        return
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = torch.empty_like(lse)
    gradient = lse if dlse is None else dlse.contiguous()  # a tensor must stand there, if unread
    tensors = q, k, v, out, lse, dout, gradient, delta, dq, dk, dv
    _launch(plan_backward(layouts(tensors), q.device, tuple(numbers), scale, dlse is not None), tensors)


@functools.lru_cache(_MOST_PLANS)
def plan_backward(
    known: tuple[Layout, ...], device: torch.device, numbers: tuple[int, ...], scale: float, has_dlse: bool
) -> tuple[Launch, ...]:
    """Launches of a backward pass of q, k, v, out, lse, dout, dlse, delta, dq, dk, dv, of these layouts."""
    q, k, v, out, lse, dout, dlse, delta, dq, dk, dv = tensors = operands(known, device)
    B, S, H, Dqk = q.shape
    Dv = v.shape[-1]
    widths = Dqk, Dv, q.dtype.itemsize, is_large(device)
    constants = {"DQ": Dqk, "DV": Dv, "BDQ": power_of_two(Dqk), "BDV": power_of_two(Dv)}
    launches = []
    for run in _runs(numbers):
        chains = _passes(run, S)
        compact = bool(run.summary or run.tokens)
        tilings = [_tiling("backward", chain, q, v) for chain in chains]
        ways = [way_backward(chain, turn > 0, tensors) for turn, chain in enumerate(chains)]
        here = makes_delta(ways[0], chains[0], len(chains) == 1, tilings[0].single)
        if not here:
            rows = 64
            launch = Launch(
                attention_delta, -(-S // rows) * B * run.heads,
                out, dout, dlse, delta, *out.strides[:3], *dout.strides[:3], S, H, run.head, run.heads,
                DV=Dv, BDV=power_of_two(Dv), BM=rows, HAS_DLSE=has_dlse, num_warps=4,
            )  # fmt: skip
            launches.append(launch)
        for turn, (chain, (chosen, tiles, per, advance, single)) in enumerate(zip(chains, tilings, strict=True)):
            if (way := ways[turn]) is not None:
                store_delta = len(chains) > 1 or compact
                along = backward_along(
                    chain, run, way, turn > 0, here and turn == 0, store_delta, has_dlse, tensors, scale
                )
                launches += along
                continue
            copied = copies_tiles(chosen, chain, q, k, v, dout)
            sum_copied = copies_summary(run, chosen, chain, k, v)
            own_copied = copied and chosen.rows == chosen.keys
            by_keys = [rows_descriptor(t, chain, chosen.keys) if copied else t for t in (q, k, v, dout)]
            own = by_keys if own_copied else (q, k, v, dout)
            by_summary = [summary_descriptor(t, run, chosen.keys) if sum_copied else t for t in (k, v)]
            numbers_of = [
                descriptor(t, chain, chosen.keys) if copied and not chain.strided else t for t in (lse, delta)
            ]
            launch = Launch(
                chain_backward, tiles * B * run.heads,
                *own, *by_keys, *by_summary, out, lse, dlse, delta, *numbers_of, dq, dk, dv,
                *q.strides[:3], *k.strides[:3], *v.strides[:3], *out.strides[:3], *dout.strides[:3],
                *dq.strides[:3], *dk.strides[:3], *dv.strides[:3],
                S, H, run.head, run.heads, tiles, per, scale * LOG2E.value, scale,
                advance, chain.N, chain.R, chain.near, chain.L, chain.tokens, *chain.skip, run.slot, run.slot_step,
                **constants, BT=chosen.rows, BN=chosen.keys,
                CHAIN=chain.present, STRIDED=chain.strided, GROUPED=chain.grouped, SINGLE=single,
                sumL=0 if chain.strided else run.summary, sumC=run.c, GLOBAL=run.tokens > 0 and not chain.strided,
                ADD=turn > 0, DELTA_HERE=here and turn == 0,
                STORE_DELTA=here and turn == 0 and (len(chains) > 1 or compact),
                HAS_DLSE=has_dlse, FAR=chain.near > 1,
                REACHES=not chain.grouped and chosen.rows - 1 <= chain.R and not (chain.strided and chain.tokens),
                HEAVY_LAST=chain.part in COMPACT, COPIED=copied, SUM_COPIED=sum_copied, STAGES=chosen.stages,
                num_warps=chosen.warps, maxnreg=chosen.registers,
            )  # fmt: skip
            launches.append(launch)
        rows_chain = chains[-1]
        for L, C, is_global in ((run.summary, run.c, False), (S, min(run.tokens, S), True)):
            if not C:
                continue
            chosen = config("keys", rows_chain.part, *widths)
            most = C if is_global else -(-S // L) * C
            tiles = triton.cdiv(most, chosen.keys)
            copied = copies_tiles(chosen, rows_chain, q, dout)
            by_rows = [rows_descriptor(t, rows_chain, chosen.rows) if copied else t for t in (q, dout)]
            numbers_of = [descriptor(t, rows_chain, chosen.rows) if copied else t for t in (lse, delta)]
            launch = Launch(
                compact_backward, tiles * B * run.heads,
                by_rows[0], k, v, lse, by_rows[1], delta, *numbers_of, dk, dv,
                *q.strides[:3], *k.strides[:3], *v.strides[:3], *dout.strides[:3], *dk.strides[:3], *dv.strides[:3],
                S, H, run.head, run.heads, tiles, scale * LOG2E.value, scale,
                rows_chain.N, rows_chain.R, run.tokens, run.slot, run.slot_step,
                **constants, BM=chosen.rows, BN=chosen.keys,
                CHAIN=rows_chain.present, GROUPED=rows_chain.grouped,
                sumL=0 if is_global else run.summary, sumC=run.c, COPIED=copied,
                STAGES=chosen.stages, num_warps=chosen.warps, maxnreg=chosen.registers,
            )  # fmt: skip
            launches.append(launch)
    return tuple(launches)


def forget_plans() -> None:
    """For tuning and tests, which exchange the tables of sizes and the kernels: plans made with others do not hold."""
    plan_forward.cache_clear()
    plan_backward.cache_clear()
