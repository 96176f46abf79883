"""What the copy engine of a GPU can bring of the tensors of a pass, and how it is told: descriptors for pointers."""

from __future__ import annotations

from sparse_tx.attention.kernels import has_copy_engine
from sparse_tx.attention.kernels.configs import BLOCK_ROWS, Config, power_of_two
from sparse_tx.attention.kernels.handles import Described, Operand
from sparse_tx.attention.kernels.plan import Chain, Run


def copies_tiles(chosen: Config, chain: Chain, *tensors: Operand) -> bool:
    """Whether the copy engine brings the tiles of this configuration.

    Only those that go on to the tensor cores from shared memory, while others are on their way: elsewhere Triton 3.6
    lets one copy overwrite another (seen in columns of 32 rows without stages).
    """
    return chosen.rows >= 64 and chosen.stages > 1 and can_copy(chain, *tensors)


def can_copy(chain: Chain, *tensors: Operand) -> bool:
    """Whether the copy engine can bring these tensors of a pass: whole columns, and whole 16 bytes of (B, H, S)."""
    q = tensors[0]
    whole = q.shape[1] % (chain.L if chain.strided else 4) == 0
    return whole and q.dtype.itemsize == 2 and has_copy_engine(q.device) and all(_copyable(t) for t in tensors)


def _copyable(t: Operand) -> bool:
    """Whether the copy engine takes it: rows of whole 16 bytes, a power of two wide."""
    D = t.shape[-1]
    whole = all(n > 0 and n * t.dtype.itemsize % 16 == 0 for n in t.strides[:3])
    return whole and t.aligned and D & (D - 1) == 0


def descriptor(t: Operand, chain: Chain, rows: int) -> Described:
    """Of t (B, S, H, D) as (B, H, S, D), or of its columns as (B, H, L, S / L, D), in blocks of `rows`; or of numbers
    (B, H, S).
    """
    if len(t.shape) == 3:
        return Described(t, list(t.shape), list(t.strides), [1, 1, rows])
    B, S, H, D = t.shape
    b, s, h = t.strides[:3]
    width = power_of_two(D)
    if chain.strided:
        L = chain.L
        return Described(t, [B, H, L, S // L, D], [b, h, s, s * L, 1], [1, 1, 1, rows, width])
    return Described(t, [B, H, S, D], [b, h, s, 1], [1, 1, rows, width])


def rows_descriptor(t: Operand, chain: Chain, rows: int) -> Described:
    """Of t (B, S, H, D) as (B, H, L, S / L, D), where L = 1 for the whole sequence, in blocks of `rows`."""
    return descriptor(t, chain._replace(strided=True), rows)


def heads_descriptor(t: Operand, chain: Chain, heads: int) -> Described:
    """For warps that work alone, 16 rows of so many heads at a time: of t (B, S, H, D) as (B, H, S, D), or of its
    columns as (B, L, H, S / L, D).
    """
    B, S, H, D = t.shape
    b, s, h = t.strides[:3]
    if chain.strided:
        L = chain.L
        return Described(t, [B, L, H, S // L, D], [b, s, h, s * L, 1], [1, 1, heads, BLOCK_ROWS, D], True)
    return Described(t, [B, H, S, D], [b, h, s, 1], [1, heads, BLOCK_ROWS, D], True)


def summary_descriptor(t: Operand, run: Run, keys: int) -> Described:
    """Of t (B, S, H, D) as (B, H, S / l, l, D), in blocks of `keys` columns of a summary, of one row or more."""
    B, S, H, D = t.shape
    b, s, h = t.strides[:3]
    shape, steps = [B, H, S // run.summary, run.summary, D], [b, h, s * run.summary, s, 1]
    return Described(t, shape, steps, [1, 1, max(1, keys // run.c), min(keys, run.c), power_of_two(D)])


def copies_summary(run: Run, chosen: Config, chain: Chain, *tensors: Operand) -> bool:
    """Whether a step's summary columns are a block: power-of-two rows of it, or a share of one, from the first on."""
    if chain.strided or not run.summary or run.tokens:
        return False
    shared = chosen.keys % run.c == 0 or run.c % chosen.keys == 0
    fits = shared and run.c & (run.c - 1) == 0 and tensors[0].shape[1] % run.summary == 0
    return fits and copies_tiles(chosen, chain, *tensors)
