"""What warps with roles do with a pair of tiles, one of queries and one of keys, of a window or of a column.

In Gluon for compute capability 9.0. The tile of queries lies `far` tiles after that of keys, a number that the compiler
does not know.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def only_seen(x, query, key, far, BT: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr, OTHER: gl.constexpr):
    """x (queries, keys), and OTHER where a key is not NEAR to R steps before a query."""
    if (far * BT < NEAR + BT - 1) | (far * BT + BT - 1 > R):
        away = (query + far * BT)[:, None] - key[None, :]
        x = gl.where((away >= NEAR) & (away <= R), x, OTHER)
    return x


@gluon.jit
def softmax_step(s, values, acc, top, total, scale):
    """acc, top and total of the keys so far and of these, whose scores are s (queries, keys)."""
    wide: gl.constexpr = acc.type.layout
    rows: gl.constexpr = gl.SliceLayout(1, wide)
    new = gl.maximum(top, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new[:, None])
    alpha = gl.exp2(top - new)
    total = total * alpha + gl.sum(p, 1)
    acc = acc * gl.convert_layout(alpha, rows)[:, None]
    weights = gl.convert_layout(p.to(values.dtype), gl.DotOperandLayout(0, wide, 2))
    acc = warpgroup_mma(weights, values, acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc]), new, total


@gluon.jit
def numbers_of(LSE, DELTA, rows, S):
    """Log-sum-exp and delta of queries, zero beyond the sequence."""
    return gl.load(LSE + rows, mask=rows < S, other=0.0), gl.load(DELTA + rows, mask=rows < S, other=0.0)


@gluon.jit
def scores_of(
    q, k, v, g, of_queries, of_keys, zero, BT: gl.constexpr, BDQ: gl.constexpr, BDV: gl.constexpr
):  # fmt: skip
    """Products of queries with keys and of their gradients with values, both under way, from these places."""
    queries = q.index(of_queries).reshape([BT, BDQ])
    grads = g.index(of_queries).reshape([BT, BDV])
    keys = k.index(of_keys).reshape([BT, BDQ])
    values = v.index(of_keys).reshape([BT, BDV])
    s = warpgroup_mma(queries, keys.permute([1, 0]), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(grads, values.permute([1, 0]), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def leave_weights(
    s, dp, lse, delta, query, key, far, n, weights, scores, pair_full, pair_empty, scale,
    BT: gl.constexpr, NEAR: gl.constexpr, R: gl.constexpr, NP: gl.constexpr,
):  # fmt: skip
    """Weights and gradients of scores of pair n, of `scores_of`, in their place of NP. lse is in base 2."""
    s = warpgroup_mma_wait(1, deps=[s])
    p = only_seen(gl.exp2(s * scale - lse[:, None]), query, key, far, BT, NEAR, R, 0.0)
    mbarrier.wait(pair_empty.index(n % NP), (n // NP & 1) ^ 1)
    weights.index(n % NP).store(p.to(weights.dtype))
    dp = warpgroup_mma_wait(0, deps=[dp])
    scores.index(n % NP).store((p * (dp - delta[:, None])).to(scores.dtype))
    fence_async_shared()
    mbarrier.arrive(pair_full.index(n % NP), count=1)


@gluon.jit
def written(at, x, ADD: gl.constexpr):
    """Puts x (BT, D) where the copy engine takes it from; ADD: added to what lies there."""
    BT: gl.constexpr = x.shape[0]
    D: gl.constexpr = x.shape[1]
    tile = at.reshape([BT, D])
    if ADD:
        x += tile.load(x.type.layout).to(gl.float32)
    tile.store(x.to(at.dtype))
