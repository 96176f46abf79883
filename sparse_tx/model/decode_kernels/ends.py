"""The two ends of a decoding step: the input's embedding, and what is drawn from the logits."""

import triton
import triton.language as tl

from sparse_tx.attention.kernels.decode import after_previous


@triton.jit
def _table(P, place, c, C: tl.constexpr):
    return tl.load(P + place * C + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def embed_step(
    PREVIOUS, POSITION, TOKENS, START, P0, P1, P2, X, n1, n2, C: tl.constexpr, BC: tl.constexpr, DEPENDENT: tl.constexpr
):
    """X (B, C) float32 = embedding of the byte before, or of the start, and of the position. Grid (B,).

    P0, P1, P2: the tables of three axes, of lengths any, n1, n2; a model with fewer gives tables of one row of zeros.
    """
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    after_previous(DEPENDENT)
    position = tl.load(POSITION)
    previous = tl.load(PREVIOUS + b).to(tl.int64)
    token = tl.load(TOKENS + previous * C + c, mask=c < C, other=0.0)
    x = tl.where(position == 0, tl.load(START + c, mask=c < C, other=0.0), token).to(tl.float32)
    place = _table(P0, position // n2 // n1, c, C) + _table(P1, position // n2 % n1, c, C)
    place += _table(P2, position % n2, c, C)
    tl.store(X + b * C + c, x + place, mask=c < C)


@triton.jit
def draw_step(
    LOGITS, UNIFORMS, POSITION, TOKENS, NATS, PREVIOUS, rows, positions, length,
    TEMPERATURE: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One byte of each row by inversion of its distribution, with its nats, at POSITION. Grid (rows,).

    LOGITS (rows, V) float32; UNIFORMS (positions, rows) float64, row POSITION % positions; TOKENS (rows, length) uint8;
    NATS (rows, length) float32; PREVIOUS (rows,) int64. As `sampler.draw` in float64, whose sums are in another order:
    a byte may differ where u falls within some 1e-16 of a bound.
    """
    b = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BV)
    after_previous(DEPENDENT)
    position = tl.load(POSITION)
    logits = tl.load(LOGITS + b * V + v, mask=v < V, other=float("-inf"))
    top = tl.max(logits, 0)
    if TEMPERATURE == 0:
        drawn = tl.argmax(logits, 0, tie_break_left=True)
    else:
        u = tl.load(UNIFORMS + position % positions * rows + b)
        heated = (logits.to(tl.float64) - top.to(tl.float64)) / TEMPERATURE  # the likeliest at 0
        cumulative = tl.cumsum(tl.exp(heated), 0)
        whole = tl.max(cumulative, 0)
        # Below the whole even after rounding: a draw never lands on a byte without probability.
        below = tl.sum((cumulative <= u * whole).to(tl.int32), 0)
        drawn = tl.minimum(below, tl.sum((cumulative < whole).to(tl.int32), 0))
    of_drawn = tl.sum(tl.where(v == drawn, logits, 0.0), 0)
    nats = tl.log(tl.sum(tl.exp(logits - top), 0)) + top - of_drawn
    tl.store(NATS + b * length + position, nats)
    tl.store(TOKENS + b * length + position, drawn.to(tl.uint8))
    tl.store(PREVIOUS + b, drawn.to(tl.int64))
