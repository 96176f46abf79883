"""Count models: what a table of byte counts scores on the held-out bytes, to read a network's number against."""

import numpy as np

CHUNK = 1 << 21
ORDERS = (0, 1, 2)


def order_k_bits(train: np.ndarray, held_out: np.ndarray, k: int) -> float:
    """Bits per byte on `held_out` of a model that counted in `train` which byte follows which k bytes.

    Smoothed after Witten and Bell (1991): P(x | c) = (n(c, x) + T(c) P(x | c')) / (n(c) + T(c)), with n the counts of
    `train`, T(c) the number of different bytes seen after context c, c' the context without its oldest byte, and 1/256
    below order 0: no byte ever costs infinity. The counts stay as `train` left them. The first k held-out bytes are
    scored by the orders that they have a context for. Arrays of uint8; about 250 MB at k = 2, whatever their lengths.
    """
    if k not in ORDERS:
        raise ValueError(f"k={k}: orders {ORDERS} are counted")
    if len(held_out) == 0:
        raise ValueError("held_out is empty: there is nothing to score")
    tables = [_Table(train, order) for order in range(k + 1)]
    bits = 0.0
    for first in range(0, len(held_out), CHUNK):
        have = min(k, first)  # bytes of context from the chunk before
        part = np.asarray(held_out[first - have : first + CHUNK])
        bits += _bits(tables, part, have)
    return bits / len(held_out)


class _Table:
    """Counts of every (context of `order` bytes, next byte), and what smoothing needs of them."""

    def __init__(self, train: np.ndarray, order: int):
        cells = 256 ** (order + 1)
        self.counts = np.zeros(cells, np.uint32)
        for first in range(0, max(0, len(train) - order), CHUNK):
            part = np.asarray(train[first : first + CHUNK + order])
            self.counts += np.bincount(_cells(part, order), minlength=cells).astype(np.uint32)
        table = self.counts.reshape(-1, 256)
        self.seen = table.sum(axis=1, dtype=np.int64)
        self.kinds = np.count_nonzero(table, axis=1)


def _cells(part: np.ndarray, order: int) -> np.ndarray:
    """For each byte that has `order` bytes before it: the number of its (context, byte) cell."""
    count = len(part) - order
    cell = np.zeros(count, np.int32)
    for back in range(order, -1, -1):
        cell = cell * 256 + part[order - back : order - back + count]
    return cell


def _bits(tables: list[_Table], part: np.ndarray, have: int) -> float:
    """The bits of all bytes of `part` but the first `have`, which are context only."""
    chance = np.full(len(part), 1 / 256)
    for order, table in enumerate(tables):
        if len(part) <= order:
            break
        cell = _cells(part, order)
        context = cell >> 8
        seen, kinds = table.seen[context], table.kinds[context]
        lower = chance[order:]
        known = seen > 0
        mixed = (table.counts[cell] + kinds * lower) / np.maximum(seen + kinds, 1)
        chance[order:] = np.where(known, mixed, lower)
    return float(-np.log2(chance[have:]).sum())
