"""Patterns by head as plain numbers: what the kernels need to know of a head, and which heads one launch can take.

A head's keys are cut into disjoint parts. A part is a list of keys in some order, of which a query sees an interval:
  local     the nearest keys: a window, the query's own block, or all; in order of position
  column    the query's column, in column-major order (column by column), at least `near` steps back
  summary   columns of every block, and global tokens: compact lists, in order of position, before the local part
No key is in two parts: a key that two patterns of a union allow belongs to the first of local, global, summary, column.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparse_tx.attention.patterns import AllowsKeys, Block, Column, Full, Global, Pattern, Summary, Window

NO_LOCAL, WINDOW, BLOCK, FULL = range(4)


class Run(NamedTuple):
    """`heads` heads from `head` on, alike but for the slots of their summaries. 0 stands for a part that is absent."""

    head: int
    heads: int
    local: int = NO_LOCAL  # one of the four above
    width: int = 0  # a window sees `width` keys and its own; a block has `width` positions
    column: int = 0  # stride of the column
    near: int = 0  # fewest steps back in the column
    reach: int = -1  # most steps back; -1: any
    summary: int = 0  # stride of the summary
    c: int = 0
    slot: int = 0  # of the first head
    slot_step: int = 0  # to the next head, modulo summary // c
    tokens: int = 0  # global


FIELDS = len(Run._fields)


class Chain(NamedTuple):
    """Numbers of one pass over sequences of N entries each, in groups if `grouped`, of which a query sees those
    near .. R back: the whole sequence in groups of N, or its columns, rows L apart.
    """

    part: str
    N: int
    R: int
    near: int
    L: int
    tokens: int
    skip: tuple[int, int]
    present: bool
    strided: bool
    grouped: bool


def runs_of(numbers: Sequence[int]) -> list[Run]:
    return [Run(*numbers[at : at + FIELDS]) for at in range(0, len(numbers), FIELDS)]


def plan(patterns: Sequence[AllowsKeys]) -> tuple[int, ...]:
    """Runs of heads, flattened to integers. NotImplementedError names the pattern that the kernels cannot take."""
    patterns = tuple(patterns)
    if torch.compiler.is_compiling():  # it traces a function behind a cache, with a warning
        return _plan(patterns)
    try:
        return _kept_plan(patterns)
    except TypeError:  # a pattern of the user's that has no hash
        return _plan(patterns)


def _plan(patterns: tuple[AllowsKeys, ...]) -> tuple[int, ...]:
    runs: list[Run] = []
    for head, pattern in enumerate(patterns):
        one = _run(head, pattern)
        joined = _join(runs[-1], one) if runs else None
        if joined is None:
            runs.append(one)
        else:
            runs[-1] = joined
    return tuple(number for run in runs for number in run)


_kept_plan = functools.lru_cache(_plan)


def _join(run: Run, one: Run) -> Run | None:
    """The run with one head more, if it is alike and its slot is the next in step."""
    alike = run._replace(head=0, heads=0, slot=0, slot_step=0) == one._replace(head=0, heads=0, slot=0, slot_step=0)
    if not alike:
        return None
    if not run.summary:
        return run._replace(heads=run.heads + 1)
    slots = run.summary // run.c
    step = (one.slot - run.slot) % slots if run.heads == 1 else run.slot_step
    if (run.slot + step * run.heads) % slots != one.slot:
        return None
    return run._replace(heads=run.heads + 1, slot_step=step)


def _run(head: int, pattern: AllowsKeys) -> Run:
    parts: tuple[AllowsKeys, ...] = pattern.parts if isinstance(pattern, Pattern) else (pattern,)
    foreign = [p for p in parts if type(p) not in (Full, Window, Column, Block, Summary, Global)]
    if foreign:
        raise NotImplementedError(f"{foreign[0]!r} has no kernel")
    if Full() in parts:
        return Run(head, 1, FULL)
    windows = [p.stride for p in parts if isinstance(p, Window)]
    blocks = {p.stride for p in parts if isinstance(p, Block)}
    columns = [p for p in parts if isinstance(p, Column)]
    summaries = {p for p in parts if isinstance(p, Summary)}
    tokens = max([0, *(p.tokens for p in parts if isinstance(p, Global))])  # as torch.compile can trace it
    if len(blocks) > 1 or (blocks and windows):
        raise NotImplementedError(f"{pattern!r}: the kernels take one window or one block a head")
    if len(summaries) > 1:
        raise NotImplementedError(f"{pattern!r}: the kernels take one summary a head")
    strides = blocks | {p.stride for p in columns} | {p.stride for p in summaries}
    if columns and len(strides) > 1:
        raise NotImplementedError(f"{pattern!r}: beside a column, blocks, summaries and columns must have its stride")

    local, width = NO_LOCAL, 0
    column = near = 0
    reach = -1
    if blocks:
        local, width = BLOCK, blocks.pop()
    elif windows:
        local, width = WINDOW, max(windows)
    if columns:
        column = columns[0].stride
        reaches = [-1 if p.reach is None else p.reach for p in columns]
        reach = -1 if -1 in reaches else max(reaches)
        if local == WINDOW:
            # A window that ends on the column leaves that key to it: its tiles then hold `width` keys, not one more.
            near = width // column if width % column == 0 else width // column + 1
        elif local == BLOCK:
            near = 1
        if 0 <= reach < near:
            column = near = 0
            reach = -1
        elif local == WINDOW and width % column == 0:
            width -= 1
    run = Run(head, 1, local, width, column, near, reach, tokens=tokens)
    if summaries:
        part = summaries.pop()
        run = run._replace(summary=part.stride, c=part.c, slot=part.slot)
    return run
