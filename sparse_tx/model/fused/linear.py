"""Products of the block with weights that were rounded once a step, and the feed-forward around its activation.

The products are the library's. Gradients of weights leave them in the dtype of the parameters, not rounded on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_tx.attention.kernels import interpreted  # noqa: F401
from sparse_tx.model.activation import activated, activated_and_slope
from sparse_tx.model.fused import ROWS, WIDEST, hopper, products
from sparse_tx.model.fused.norm import Kept, Sum, sum_backward, sum_forward, tile_of, total
from sparse_tx.model.parts import parts, weight_gradient

# Programs, at most, of what adds up columns, and elements that one holds at a time. Tuned on an H100 for 512 and 2,048
# columns: both within 10 percent of what the bytes take.
_PROGRAMS = 528
_TILE = 4096


@triton.jit
def column_sums(X, SUMS, T, blocks, N: tl.constexpr, BN: tl.constexpr, R: tl.constexpr):
    """SUMS: (programs, BN), this program's share of the sums of the columns of X (T, N)."""
    columns = tl.arange(0, BN)
    total = tl.zeros([R, BN], tl.float32)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=2):
        rows = block * R + tl.arange(0, R)
        inside = (rows < T)[:, None] & (columns < N)[None, :]
        total += tl.load(X + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(SUMS + tl.program_id(0) * BN + columns, tl.sum(total, 0))


def bias_gradient(d_y: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of the columns of d_y (T, N), in a fixed order."""
    T, N = d_y.shape
    BN, R = tile_of(N, _TILE)
    blocks = triton.cdiv(T, R)
    sums = torch.empty(min(_PROGRAMS, blocks), BN, dtype=torch.float32, device=d_y.device)
    column_sums[(len(sums),)](d_y, sums, T, blocks, N=N, BN=BN, R=R, num_warps=4)
    return total(sums)[:N].to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, low, low_bias):
        ctx.save_for_backward(x, low)
        ctx.dtype = weight.dtype
        y = x.new_empty(*x.shape[:-1], len(low))  # no view: what follows may change it in place
        torch.addmm(low_bias, x.flatten(0, -2), low.t(), out=y.view(-1, len(low)))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        x, low = ctx.saved_tensors
        d_y = d_y.flatten(0, -2).contiguous()  # of a sum it is one number, expanded
        d_x = (d_y @ low).unflatten(0, x.shape[:-1])
        d_weight = weight_gradient(d_y, x.flatten(0, -2), ctx.dtype)
        return d_x, d_weight, bias_gradient(d_y, ctx.dtype), None, None


def linear(x: Tensor, layer: torch.nn.Linear, low: Tensor, low_bias: Tensor) -> Tensor:
    """layer(x), x (..., K). low, low_bias: the layer's weight and bias in the dtype of x."""
    return _Linear.apply(x, layer.weight, layer.bias, low, low_bias)


@triton.jit
def activation_forward(U, Y, T, F: tl.constexpr, BF: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr):
    """Y = f(u)."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, BF)
    inside = (rows < T)[:, None] & (columns < F)[None, :]
    at = rows.to(tl.int64)[:, None] * F + columns[None, :]
    u = tl.load(U + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + at, activated(u, KIND).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward(
    U, D, Y, SUMS, T, blocks,
    F: tl.constexpr, BF: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, STAGES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """D holds the gradient of the activation and gets that of u. AGAIN: Y gets the activation once more.

    SUMS: (programs, BF), this program's share of the gradient of the bias.
    """
    columns = tl.arange(0, BF)
    total = tl.zeros([R, BF], tl.float32)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        rows = block * R + tl.arange(0, R)
        inside = (rows < T)[:, None] & (columns < F)[None, :]
        at = rows.to(tl.int64)[:, None] * F + columns[None, :]
        u = tl.load(U + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(D + at, mask=inside, other=0.0).to(tl.float32)
        y, slope = activated_and_slope(u, KIND)
        d = (d * slope).to(D.dtype.element_ty)
        tl.store(D + at, d, mask=inside)
        total += d.to(tl.float32)
        if AGAIN:
            tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(SUMS + tl.program_id(0) * BF + columns, tl.sum(total, 0))


def activation(u: Tensor, kind: str) -> Tensor:
    """u (T, F) -> f(u)."""
    T, F = u.shape
    BF, R = tile_of(F, _TILE)
    y = torch.empty_like(u)
    activation_forward[(triton.cdiv(T, R),)](u, y, T, F=F, BF=BF, R=R, KIND=kind, num_warps=4)
    return y


class _Joined(torch.autograd.Function):
    """h' = h + drop(y W^T + bias), LN(h')."""

    @staticmethod
    def forward(ctx, y, weight, low, h, bias, key, p, gain, shift, eps):
        sum = Sum(bias, key, p, gain, shift, eps)
        out, x, kept = sum_forward(h, y.flatten(0, -2) @ low.t(), sum, y.dtype)
        ctx.save_for_backward(y, low, *kept)
        ctx.p, ctx.dtype = p, weight.dtype
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_x):
        y, low, *kept = ctx.saved_tensors
        d_h, d_a, d_bias, d_gain, d_shift = sum_backward(d_out, d_x, Kept(*kept), ctx.p, y.dtype)
        assert d_a is not None
        d_weight = weight_gradient(d_a, y.flatten(0, -2), ctx.dtype)
        return (d_a @ low).view(y.shape), d_weight, None, d_h, d_bias, None, None, d_gain, d_shift, None


def joined(y, layer, low, h, key, p, norm: torch.nn.LayerNorm | None) -> tuple[Tensor, Tensor | None]:
    """The residual stream h with drop(layer(y)) added, and its norm in the dtype of y. y: (B, S, K), h: (B, S, C).

    low: the layer's weight in the dtype of y. key: (B, 2) of `dropout_keys`; None drops nothing.
    """
    ends = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    return _Joined.apply(y, layer.weight, low, h, layer.bias, key, p, *ends)


class _FeedForward(torch.autograd.Function):
    """h' = h + drop(W2 f(u) + b2) with u = W1 x + b1, LN(h'). Keeps x, and of u and f(u) what `kept` says.

    With "none", u and f(u) exist for ROWS rows at a time; of more, the gradients of the weights are sums over parts.
    """

    @staticmethod
    def forward(
        ctx, x, expand, expand_bias, contract, low_expand, low_bias, low_contract, kind, kept,
        h, bias, key, p, gain, shift, eps,
    ):  # fmt: skip
        ctx.p, ctx.dtype, ctx.kind = p, expand.dtype, kind
        ctx.set_materialize_grads(False)
        rows = x.flatten(0, -2)
        hidden: tuple[Tensor | None, Tensor | None] = (None, None)
        a = torch.empty(len(rows), len(low_contract), dtype=x.dtype, device=x.device)
        for part in parts(len(rows), ROWS) if kept == "none" else [slice(None)]:
            u = torch.addmm(low_bias, rows[part], low_expand.t())
            y = _contracted(u, low_contract, kind, a[part])
            if kept != "none":
                hidden = u, y if kept == "both" and len(low_contract) > WIDEST else None
        out, next_x, ends = sum_forward(h, a, Sum(bias, key, p, gain, shift, eps), x.dtype)
        ctx.save_for_backward(x, *hidden, low_expand, low_bias, low_contract, *ends)
        return out, next_x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_next):
        x, u, y, low_expand, low_bias, low_contract, *kept = ctx.saved_tensors
        d_h, d_a, d_bias, d_gain, d_shift = sum_backward(d_out, d_next, Kept(*kept), ctx.p, x.dtype)
        assert d_a is not None
        rows, d_x = x.flatten(0, -2), torch.empty_like(x, memory_format=torch.contiguous_format)
        found: list[Tensor] = []
        for part in parts(len(rows), ROWS) if u is None else [slice(None)]:
            u_part = torch.addmm(low_bias, rows[part], low_expand.t()) if u is None else u
            d_u, d_expand_bias, d_contract = _contract_backward(d_a[part], low_contract, u_part, y, ctx.kind, ctx.dtype)
            torch.mm(d_u, low_expand, out=d_x.flatten(0, -2)[part])
            d_expand = weight_gradient(d_u, rows[part], ctx.dtype)
            these = [d_expand, d_expand_bias.to(ctx.dtype), d_contract]
            found = these if not found else [a.add_(b) for a, b in zip(found, these, strict=True)]
        return d_x, *found, *[None] * 5, d_h, d_bias, None, None, d_gain, d_shift, None


def _contracted(u: Tensor, low_contract: Tensor, kind: str, a: Tensor) -> Tensor | None:
    """a becomes f(u) W2^T. Returns f(u) where it was written. u (T, F), low_contract (C, F), a (T, C)."""
    if len(low_contract) <= WIDEST and products.usable(u, low_contract, a):
        products.contract(u, low_contract, kind, a)
        return None
    y = activation(u, kind)
    torch.mm(y, low_contract.t(), out=a)
    return y


def _contract_backward(
    d_a: Tensor, low_contract: Tensor, u: Tensor, y: Tensor | None, kind: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of u, the sums of its columns, and the gradient of W2 in `dtype`. d_a (T, C); u, y (T, F)."""
    if y is None and hopper.usable(d_a, low_contract, u):
        d_u, sums, d_contract = hopper.contract_gradients(d_a, low_contract, u, kind)
        return d_u, sums, d_contract.to(dtype)
    d_u, y, sums = _hidden_gradient(d_a, low_contract, u, y, kind)
    return d_u, sums, weight_gradient(d_a, y, dtype)


def _hidden_gradient(
    d_a: Tensor, low_contract: Tensor, u: Tensor, y: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of u, f(u), made again if y is None, and the sums of the gradient's columns. d_a (T, C); u, y (T, F)."""
    if products.usable(d_a, low_contract, u):
        by = hopper if hopper.usable_wide(d_a, low_contract, u) else products
        d, made, sums = by.hidden_gradient(d_a, low_contract, u, kind, again=y is None)
        y = made if y is None else y
        assert y is not None
        return d, y, sums
    d = d_a @ low_contract
    T, F = u.shape
    BF, R = tile_of(F, _TILE)
    blocks = triton.cdiv(T, R)
    shares = torch.empty(min(_PROGRAMS, blocks), BF, dtype=torch.float32, device=u.device)
    again = y is None
    y = torch.empty_like(u) if y is None else y
    sizes = {"F": F, "BF": BF, "R": R, "KIND": kind, "STAGES": 2 if BF <= _TILE else 1}
    activation_backward[(len(shares),)](u, d, y, shares, T, blocks, **sizes, AGAIN=again, num_warps=4)
    return d, y, total(shares)[:F]


def feed_forward(x, layer, low: list[Tensor], kept: str, h, key, p, norm: torch.nn.LayerNorm | None):
    """As `joined`, of the whole feed-forward of x (B, S, C). low: weight and bias of `expand`, weight of `contract`.

    kept: what is not made again in the backward pass, of W1 x + b1 and its activation: "both" (the second only of
    models wider than WIDEST), "u" (the first), "none".
    """
    ends = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    expand, contract = layer.expand, layer.contract
    return _FeedForward.apply(
        x, expand.weight, expand.bias, contract.weight, *low, layer.activation, kept, h, contract.bias, key, p, *ends
    )
