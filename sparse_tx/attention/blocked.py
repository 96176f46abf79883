"""Every pattern on any device and length, in plain torch, without an (S, S) tensor.

The keys of a query are split into disjoint pieces that are plain strided views: the query's own chunk of l positions
and the chunk before it (windows, blocks), its column (a transposed view), summary columns, global tokens, and for any
other pattern the rows themselves. Each piece is dense attention under a mask that comes from the pattern objects; the
pieces join by log-sum-exp into one softmax. A key that two parts of a union allow belongs to the first piece that
reaches it. The backward pass recomputes each piece's weights from the joint log-sum-exp, so that nothing but q, k, v,
out and lse is kept, and takes the gradient of the log-sum-exp too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparse_tx.attention.patterns import AllowsKeys, Block, Column, Global, Pattern, Summary, Window, dense_mask

_SCORES = 1 << 26  # scores made at a time: 256 MB in float32
_GROUPS = 8  # of query rows against keys that grow with them: 1 / 16 of the scores lie above the diagonal
_TILE = 512  # rows at a time where the pattern has no stride; a shorter sequence is one dense tile


# Compiled code of torch 2.11 loses what the backward pass adds to its buffers through views, and gives gradients of 0.
@torch.compiler.disable
def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, patterns: tuple[AllowsKeys, ...], scale: float, return_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """q, k: (B, S, H, Dqk), v: (B, S, H, Dv), patterns: one per head.

    Returns out (B, S, H, Dv) and lse (B, H, S) in float32 (float64 for float64 inputs), both with gradients; a query
    with no key gives 0 and -inf, and passes no gradient. Without `return_lse` lse may be None: a sequence of one tile
    is then left to torch's own fused attention.
    """
    if q.shape[1] <= _TILE and not return_lse:
        return _one_tile(q, k, v, patterns, scale), None
    groups = {p: [h for h, other in enumerate(patterns) if other == p] for p in dict.fromkeys(patterns)}
    if len(groups) == 1:
        return _Blocked.apply(q, k, v, patterns[0], scale)
    results = [_Blocked.apply(*(t[:, :, heads] for t in (q, k, v)), p, scale) for p, heads in groups.items()]
    order = torch.tensor([h for heads in groups.values() for h in heads]).argsort().to(q.device)
    out = torch.cat([out for out, _ in results], 2).index_select(2, order)
    return out, torch.cat([lse for _, lse in results], 1).index_select(1, order)


def _one_tile(q: Tensor, k: Tensor, v: Tensor, patterns: tuple[AllowsKeys, ...], scale: float) -> Tensor:
    mask, empty = _tile_mask(patterns, q.shape[1], q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    return out if empty is None else out.masked_fill(empty, 0.0)


@lru_cache(maxsize=64)
def _tile_mask(patterns: tuple[AllowsKeys, ...], S: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """mask (1, H, S, S), in which queries without keys see all; empty (S, H, 1) says which those are, None if none."""
    mask = torch.stack([dense_mask(p, S, device) for p in patterns])
    empty = ~mask.any(-1, keepdim=True)  # (H, S, 1)
    return (mask | empty)[None], empty.transpose(0, 1) if bool(empty.any()) else None


@dataclass(frozen=True)
class _Piece:
    """Dense attention between some queries and some keys.

    row_view, key_view: views of a (B, N, l, H, D) buffer, where position = N-index * l + l-index, as (..., R, D) and
    (..., K, D), or with their positions in two dimensions (..., R1, R2, D) where `split` says so, since one would need
    a copy. mask: bool, broadcasts to (..., R, K).
    """

    row_view: Callable[[Tensor], Tensor]
    key_view: Callable[[Tensor], Tensor]
    mask: Tensor
    split: tuple[bool, bool] = (False, False)

    def rows(self, t: Tensor) -> Tensor:
        view = self.row_view(t)
        return view.flatten(-3, -2) if self.split[0] else view

    def keys(self, t: Tensor) -> Tensor:
        view = self.key_view(t)
        return view.flatten(-3, -2) if self.split[1] else view


def _add(view: Tensor, values: Tensor) -> None:
    view.add_(values.reshape(view.shape))


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, pattern: AllowsKeys, scale: float):
        with torch.autocast(q.device.type, enabled=False):
            out, lse = _forward(q, k, v, pattern, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pattern, ctx.scale = pattern, scale
        return out, lse.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor, d_lse: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            grads = _backward(q, k, v, out, lse, d_out, d_lse.transpose(1, 2), ctx.pattern, ctx.scale)
        return *grads, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, pattern: AllowsKeys, scale: float) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    stride = _stride(pattern, S) or _tile(S)
    wide = _compute_dtype(q)
    qc, kc, vc = (_chunks(t.to(wide), stride) for t in (q, k, v))
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(vc.shape, dtype=accumulate, device=v.device)  # (B, N, l, H, Dv)
    lse = torch.full((*qc.shape[:-1], 1), -torch.inf, dtype=accumulate, device=q.device)
    for piece in _pieces(pattern, S, B * H, q.device):
        scores = _scores(piece, qc, kc, scale, accumulate)
        piece_lse = scores.logsumexp(-1, keepdim=True)
        # Rows without a key in this piece: exp(-inf - (a finite number)) is the 0 they need, where -inf + inf is not.
        weights = (scores - _finite(piece_lse)).exp()
        values = (weights.to(wide) @ piece.keys(vc)).to(accumulate)
        before = piece.rows(lse)
        joint = torch.logaddexp(before, piece_lse)
        out_rows, lse_rows = piece.row_view(out), piece.row_view(lse)
        out_rows.mul_((before - _finite(joint)).exp().reshape(lse_rows.shape))
        _add(out_rows, values * (piece_lse - _finite(joint)).exp())
        lse_rows.copy_(joint.reshape(lse_rows.shape))
    return _unchunk(out, S).to(v.dtype), _unchunk(lse, S).squeeze(-1)


def _backward(q, k, v, out, lse, d_out, d_lse, pattern: AllowsKeys, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """With P = exp(scores - lse): dS = P (dO V^T - rowsum(dO O) + dlse), then the products of softmax attention."""
    B, S, H, _ = q.shape
    stride = _stride(pattern, S) or _tile(S)
    wide = _compute_dtype(q)
    accumulate = lse.dtype
    delta = (d_out.to(accumulate) * out.to(accumulate)).sum(-1) - d_lse
    qc, kc, vc, doc = (_chunks(t.to(wide), stride) for t in (q, k, v, d_out))
    # Rows of the padding must stay empty too: exp(scores - inf) is their 0.
    lse_c = _chunks(torch.where(lse == -torch.inf, torch.inf, lse)[..., None], stride, value=torch.inf)
    delta_c = _chunks(delta[..., None], stride)
    dq, dk, dv = (torch.zeros(t.shape, dtype=accumulate, device=t.device) for t in (qc, kc, vc))
    for piece in _pieces(pattern, S, B * H, q.device):
        weights = (_scores(piece, qc, kc, scale, accumulate) - piece.rows(lse_c)).exp()
        d_rows = piece.rows(doc)
        d_weights = (d_rows @ piece.keys(vc).mT).to(accumulate)
        d_scores = (weights * (d_weights - piece.rows(delta_c)) * scale).to(wide)
        _add(piece.key_view(dv), weights.to(wide).mT @ d_rows)
        _add(piece.key_view(dk), d_scores.mT @ piece.rows(qc))
        _add(piece.row_view(dq), d_scores @ piece.keys(kc))
    return _unchunk(dq, S).to(q.dtype), _unchunk(dk, S).to(k.dtype), _unchunk(dv, S).to(v.dtype)


def _scores(piece: _Piece, qc: Tensor, kc: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    scores = (piece.rows(qc) @ piece.keys(kc).mT).to(dtype) * scale
    return scores.masked_fill(~piece.mask, -torch.inf)


def _finite(lse: Tensor) -> Tensor:
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def _compute_dtype(q: Tensor) -> torch.dtype:
    """float16 products can overflow before they are scaled, and a CPU multiplies half types no faster."""
    return q.dtype if q.dtype != torch.float16 and (q.is_cuda or q.dtype == torch.float64) else torch.float32


def _stride(pattern: AllowsKeys, S: int) -> int | None:
    """The chunk length at which every part is a view; None where there is none, or where S is too short to cut."""
    parts = pattern.parts if isinstance(pattern, Pattern) else ()
    strides = {p.stride for p in parts if isinstance(p, Window | Block | Column | Summary)}
    viewed = all(type(p) in (Window, Block, Column, Summary, Global) for p in parts)
    stride = strides.pop() if len(strides) == 1 else None
    return stride if stride is not None and viewed and _TILE < S and stride < S else None


def _tile(S: int) -> int:
    return max(1, min(_TILE, S))


def _chunks(t: Tensor, stride: int, value: float = 0.0) -> Tensor:
    """(B, S, H, D) -> (B, N, l, H, D), padded at the end: causality keeps every real query from the padding."""
    B, S, H, D = t.shape
    missing = -S % stride
    if missing:
        t = torch.nn.functional.pad(t, (0, 0, 0, 0, 0, missing), value=value)
    return t.reshape(B, (S + missing) // stride, stride, H, D)


def _unchunk(t: Tensor, S: int) -> Tensor:
    return t.flatten(1, 2)[:, :S]


def _pieces(pattern: AllowsKeys, S: int, batch: int, device: torch.device) -> Iterator[_Piece]:
    """Disjoint pieces that together reach each allowed (query, key) once."""
    parts = pattern.parts if isinstance(pattern, Pattern) else (pattern,)
    stride = _stride(pattern, S)
    if stride is None:
        yield from _row_pieces(parts, (), None, -(-S // _tile(S)), _tile(S), batch, device)
        return
    N = -(-S // stride)
    chunked = [p for p in parts if isinstance(p, Window | Block)]
    columns = [p for p in parts if isinstance(p, Column)]
    if chunked:
        yield from _chunk_pieces(chunked, N, stride, batch, device)
    if columns:
        yield from _column_pieces(columns, chunked, N, stride, batch, device)
    done: list[Pattern] = [*chunked, *columns]
    for part in parts:
        if isinstance(part, Summary | Global):
            yield from _row_pieces((part,), tuple(done), part, N, stride, batch, device)
            done.append(part)


def _mask(parts: Sequence[AllowsKeys], done: Sequence[AllowsKeys], i: Tensor, j: Tensor) -> Tensor:
    i, j = i[..., :, None], j[..., None, :]
    seen = parts[0].allows(i, j)
    for part in parts[1:]:
        seen = seen | part.allows(i, j)
    for part in done:
        seen = seen & ~part.allows(i, j)
    return seen


def _chunk_pieces(parts: Sequence[Pattern], N: int, stride: int, batch: int, device: torch.device) -> Iterator[_Piece]:
    """Each chunk against itself and, for a window, against the chunk before: the same masks for every chunk."""
    at = torch.arange(stride, device=device)
    own = _mask(parts, (), at + stride, at + stride)
    windowed = [p for p in parts if isinstance(p, Window)]
    step = max(1, _SCORES // (batch * stride * stride))
    for a in range(0, N, step):
        b = min(a + step, N)
        yield _Piece(_slice_chunks(a, b), _slice_chunks(a, b), own)
    if windowed:
        before = _mask(windowed, (), at + stride, at)
        for a in range(1, N, step):
            b = min(a + step, N)
            yield _Piece(_slice_chunks(a, b), _slice_chunks(a - 1, b - 1), before)


def _slice_chunks(a: int, b: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[:, a:b].transpose(2, 3)  # (B, N, l, H, D) -> (B, N', H, l, D)


def _column_pieces(
    parts: Sequence[Pattern], done: Sequence[AllowsKeys], N: int, stride: int, batch: int, device: torch.device
) -> Iterator[_Piece]:
    """Each column is dense over its N positions: (B, l, H, N, D), queries in groups of rows."""
    columns = torch.arange(stride, device=device)[:, None]
    step = max(1, _SCORES // (batch * stride * N))
    for a in range(0, N, step):
        b = min(a + step, N)
        first = 0
        if all(p.reach is not None for p in parts if isinstance(p, Column)):
            first = max(0, a - max(p.reach or 0 for p in parts if isinstance(p, Column)))
        i = torch.arange(a, b, device=device) * stride + columns  # (l, R)
        j = torch.arange(first, b, device=device) * stride + columns  # (l, K)
        mask = _mask(parts, done, i, j)[:, None]  # (l, 1, R, K)
        yield _Piece(_slice_columns(a, b), _slice_columns(first, b), mask)


def _slice_columns(a: int, b: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[:, a:b].permute(0, 2, 3, 1, 4)  # (B, N, l, H, D) -> (B, l, H, N', D)


def _row_pieces(
    parts: Sequence[AllowsKeys],
    done: Sequence[AllowsKeys],
    keeper: Summary | Global | None,
    N: int,
    stride: int,
    batch: int,
    device: torch.device,
) -> Iterator[_Piece]:
    """Groups of chunks of queries against the keys up to them that `keeper` keeps; all keys if it is None."""
    at = torch.arange(N * stride, device=device).view(N, stride)
    kept = stride if keeper is None else keeper.c if isinstance(keeper, Summary) else keeper.tokens / N
    fits = int(_SCORES // (batch * stride * N * kept))
    step = max(1, min(fits, -(-N // _GROUPS)))
    for a in range(0, N, step):
        b = min(a + step, N)
        i = at[a:b].flatten()
        if isinstance(keeper, Summary):
            columns = slice(keeper.first, keeper.first + keeper.c)
            mask = _mask(parts, done, i, at[:b, columns].flatten())
            yield _Piece(_slice_rows(a, b), _slice_rows(0, b, columns), mask, split=(True, True))
        else:
            last = b * stride if keeper is None else min(keeper.tokens, b * stride)
            mask = _mask(parts, done, i, at.flatten()[:last])
            yield _Piece(_slice_rows(a, b), _slice_first(last), mask, split=(True, False))


def _slice_rows(a: int, b: int, columns: slice = slice(None)) -> Callable[[Tensor], Tensor]:
    return lambda t: t[:, a:b, columns].permute(0, 3, 1, 2, 4)  # (B, N, l, H, D) -> (B, H, N', l', D)


def _slice_first(last: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.flatten(1, 2)[:, :last].transpose(1, 2)  # (B, N, l, H, D) -> (B, H, last, D)
