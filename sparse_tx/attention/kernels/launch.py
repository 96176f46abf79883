"""From runs of heads to kernel launches: which kernel, with which numbers, on which tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparse_tx.attention.kernels import interpreted  # noqa: F401
from sparse_tx.attention.kernels.backward import attention_delta, chain_backward, compact_backward
from sparse_tx.attention.kernels.configs import Config, config, power_of_two
from sparse_tx.attention.kernels.forward import attention_forward
from sparse_tx.attention.kernels.plan import BLOCK, FULL, NO_LOCAL, WINDOW, Run, runs_of

_LOG2E = 1.4426950408889634
_LARGE: dict[int | None, bool] = {}


class Chain(NamedTuple):
    """Numbers of one pass: `entries` queries and keys in groups of N, of which a query sees those near .. R back."""

    part: str
    entries: int
    N: int
    R: int
    near: int
    L: int
    tokens: int
    skip: tuple[int, int]
    present: bool
    strided: bool
    grouped: bool


def _column(run: Run, S: int) -> Chain:
    steps = -(-S // run.column)
    entries = steps * min(run.column, S)
    skip = (0, 0)  # columns of a summary: set by the kernel's caller for each slot
    reach = S if run.reach < 0 else run.reach
    return Chain("column", entries, steps, reach, run.near, run.column, run.tokens, skip, True, True, True)


def _rows(run: Run, S: int) -> Chain:
    N, R = (run.width, S) if run.local == BLOCK else (S, run.width if run.local == WINDOW else S)
    part = {NO_LOCAL: "fixed", WINDOW: "window", BLOCK: "block", FULL: "full"}[run.local]
    if run.summary or run.tokens:
        part = "fixed"
    return Chain(part, S, N, min(R, S), 0, 1, run.tokens, (0, 0), run.local != NO_LOCAL, False, run.local == BLOCK)


def _large(t: Tensor) -> bool:
    """Whether a program may have 160 KiB of shared memory."""
    index = t.device.index
    if index not in _LARGE:
        _LARGE[index] = not t.is_cuda or torch.cuda.get_device_capability(t.device) in ((8, 0), (9, 0), (10, 0))
    return _LARGE[index]


def _tiling(kernel: str, chain: Chain, q: Tensor, v: Tensor) -> tuple[Config, int, bool]:
    """Configuration, entries from one tile to the next, and whether tiles hold whole groups."""
    part = chain.part
    if chain.grouped and part != "fixed":
        part += next((f" {most}" for most in (32, 64, 128) if most >= chain.N), "")
    chosen = config(kernel, part, q.shape[-1], v.shape[-1], q.element_size(), _large(q))
    if chain.grouped and chosen.rows >= chain.N:
        return chosen, chosen.rows // chain.N * chain.N, True
    return chosen, chosen.rows, False


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


def _runs(numbers: list[int]) -> list[Run]:
    return [single for run in runs_of(numbers) for single in _by_slot(run)]


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, numbers: list[int], scale: float) -> None:
    """Writes out (B, S, H, Dv) and lse (B, H, S)."""
    B, S, H, Dqk = q.shape
    Dv = v.shape[-1]
    if lse.numel() == 0:
        return
    if scale <= 0:  # the kernels scale after the maximum, which needs a positive scale
        q, scale = q * scale, 1.0
    for run in _runs(numbers):
        for turn, chain in enumerate(_passes(run, S)):
            chosen, advance, single = _tiling("forward", chain, q, v)
            tiles = -(-chain.entries // advance)
            attention_forward[(tiles * B * run.heads,)](
                q, k, v, out, lse,
                *_strides(q), *_strides(k), *_strides(v), *_strides(out),
                S, H, run.head, run.heads, tiles, scale * _LOG2E,
                chain.entries, advance, chain.N, chain.R, chain.near, chain.L, chain.tokens, *chain.skip,
                run.summary, run.c, run.slot, run.slot_step,
                DQ=Dqk, DV=Dv, BDQ=power_of_two(Dqk), BDV=power_of_two(Dv), BM=chosen.rows, BN=chosen.keys,
                CHAIN=chain.present, STRIDED=chain.strided, GROUPED=chain.grouped, SINGLE=single,
                SUMMARY=run.summary > 0 and not chain.strided, GLOBAL=run.tokens > 0 and not chain.strided,
                MERGE=turn > 0, HEAVY_LAST=chain.part in ("fixed", "full"), STAGES=chosen.stages,
                num_warps=chosen.warps, maxnreg=chosen.registers,
            )  # fmt: skip


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, numbers: list[int], scale: float,
) -> None:  # fmt: skip
    """Writes dq, dk, dv, of any strides but the last."""
    B, S, H, Dqk = q.shape
    Dv = v.shape[-1]
    if q.numel() == 0:
        return
    if scale <= 0:
        backward(q * scale, k, v, out, lse, dout, dlse, dq, dk, dv, numbers, 1.0)
        dq.mul_(scale)
        return
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    has_dlse = dlse is not None
    widths = Dqk, Dv, q.element_size(), _large(q)
    constants = {"DQ": Dqk, "DV": Dv, "BDQ": power_of_two(Dqk), "BDV": power_of_two(Dv)}
    delta = torch.empty_like(lse)
    for run in _runs(numbers):
        chains = _passes(run, S)
        compact = bool(run.summary or run.tokens)
        tilings = [_tiling("backward", chain, q, v) for chain in chains]
        # Where the first pass sees each query once, it makes delta on the way; a window alone makes it where needed.
        single_first = tilings[0][2]
        here = single_first or (chains[0].part == "window" and len(chains) == 1)
        if not here:
            rows = 64
            attention_delta[(-(-S // rows) * B * run.heads,)](
                out, dout, dlse if dlse is not None else lse, delta, *_strides(out), *_strides(dout),
                S, H, run.head, run.heads,
                DV=Dv, BDV=power_of_two(Dv), BM=rows, HAS_DLSE=has_dlse, num_warps=4,
            )  # fmt: skip
        for turn, (chain, (chosen, advance, single)) in enumerate(zip(chains, tilings, strict=True)):
            tiles = -(-chain.entries // advance)
            chain_backward[(tiles * B * run.heads,)](
                q, k, v, out, lse, dout, dlse if dlse is not None else lse, delta, dq, dk, dv,
                *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_strides(dout),
                *_strides(dq), *_strides(dk), *_strides(dv),
                S, H, run.head, run.heads, tiles, scale * _LOG2E, scale,
                chain.entries, advance, chain.N, chain.R, chain.near, chain.L, chain.tokens, *chain.skip,
                run.summary, run.c, run.slot, run.slot_step,
                **constants, BT=chosen.rows, BN=chosen.keys,
                CHAIN=chain.present, STRIDED=chain.strided, GROUPED=chain.grouped, SINGLE=single,
                SUMMARY=run.summary > 0 and not chain.strided, GLOBAL=run.tokens > 0 and not chain.strided,
                ADD=turn > 0, DELTA_HERE=here and turn == 0,
                STORE_DELTA=here and turn == 0 and (len(chains) > 1 or compact),
                HAS_DLSE=has_dlse, FAR=chain.near > 1, REACHES=not chain.grouped and chosen.rows - 1 <= chain.R,
                HEAVY_LAST=chain.part == "fixed", STAGES=chosen.stages,
                num_warps=chosen.warps, maxnreg=chosen.registers,
            )  # fmt: skip
        rows_chain = chains[-1]
        for L, C, is_global in ((run.summary, run.c, False), (S, min(run.tokens, S), True)):
            if not C:
                continue
            chosen = config("keys", "fixed", *widths)
            most = C if is_global else -(-S // L) * C
            tiles = triton.cdiv(most, chosen.keys)
            compact_backward[(tiles * B * run.heads,)](
                q, k, v, lse, dout, delta, dk, dv,
                *_strides(q), *_strides(k), *_strides(v), *_strides(dout), *_strides(dk), *_strides(dv),
                S, H, run.head, run.heads, tiles, scale * _LOG2E, scale,
                rows_chain.N, rows_chain.R, run.tokens, L, C, run.slot, run.slot_step,
                **constants, BM=chosen.rows, BN=chosen.keys,
                CHAIN=rows_chain.present, GROUPED=rows_chain.grouped, IS_GLOBAL=is_global,
                STAGES=chosen.stages, num_warps=chosen.warps, maxnreg=chosen.registers,
            )  # fmt: skip


def _strides(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(1), t.stride(2)
