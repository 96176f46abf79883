"""`sparse_attention`: checks the inputs, chooses the backend and says which one it is.

One legend of shapes for the whole project: B batch, S sequence, H heads, D width of a head (Dqk, Dv where they differ),
C width of the model, V vocabulary, L layers; l stride, c summary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from sparse_tx.attention.kernels import packed_attention as triton_packed
from sparse_tx.attention.kernels import triton_attention, unsupported, unsupported_widths
from sparse_tx.attention.oracle import oracle_attention
from sparse_tx.attention.patterns import AllowsKeys, Full, Pattern

BACKENDS = ("auto", "triton", "blocked", "sdpa", "oracle")


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AllowsKeys | Sequence[AllowsKeys],
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AllowsKeys | Sequence[AllowsKeys],
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(q, k, v, pattern, *, scale=None, backend="auto", return_lse=False):
    """Attention in which query i sees only the keys that its pattern allows (Child et al. 2019, eq. 2-4).

    q, k: (B, S, H, Dqk), v: (B, S, H, Dv), one float dtype and device. Returns out (B, S, H, Dv), and with
    `return_lse` also the log-sum-exp of each query's scores, (B, H, S) float32 (float64 for float64 inputs), through
    which gradients flow. A query that sees no key gives 0 and -inf, and passes no gradient.
    pattern: one for all heads, or a sequence of H. scale: 1 / sqrt(Dqk) if None.
    backend: "auto" takes what `backend_for` says; "triton" the fused kernels; "blocked" plain torch, any device and
    pattern; "sdpa" torch's dense attention, for `Full` alone; "oracle" the dense reference.
    Raises ValueError for inputs that disagree, NotImplementedError if the backend named cannot run this here.
    """
    patterns = _check(q, k, v, pattern)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: use one of {', '.join(BACKENDS)}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if backend == "auto":
        backend = _choose(q, k, v, patterns, return_lse)
    elif (reason := _cannot(backend, q, k, v, patterns, return_lse)) is not None:
        raise NotImplementedError(f"backend={backend!r} cannot run this: {reason}")
    if backend == "sdpa":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    if backend == "blocked":
        # Not above: what keeps compilers out of it imports torch's compiler, nearly as long as torch itself.
        from sparse_tx.attention.blocked import blocked_attention

        out, lse = blocked_attention(q, k, v, patterns, scale, return_lse)
    else:
        out, lse = (triton_attention if backend == "triton" else oracle_attention)(q, k, v, patterns, scale)
    return (out, lse) if return_lse else out


def packed_attention(
    qkv: Tensor,
    heads: int,
    qk: int,
    pattern: AllowsKeys | Sequence[AllowsKeys],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`sparse_attention` of q, k and v as they lie in one projection: all q, then all k, then all v.

    qkv: (B, S, 2 qk + H Dv), where qk = H Dqk. Returns (B, S, H, Dv). The fused kernels write one gradient for all
    three; elsewhere they are split as views.
    """
    if qkv.dim() != 3 or heads < 1 or qk % heads or qkv.shape[-1] <= 2 * qk or (qkv.shape[-1] - 2 * qk) % heads:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} does not hold q and k of width {qk} and v of {heads} heads: "
            "it must be (batch, sequence, 2 qk + heads Dv)"
        )
    widths = (qk, qk, qkv.shape[-1] - 2 * qk)
    if backend in ("auto", "triton"):
        patterns = _by_head(pattern, heads)
        if (
            not (backend == "auto" and _all_full(patterns))
            and unsupported_widths(qkv, qk // heads, widths[2] // heads, patterns) is None
        ):
            return triton_packed(qkv, patterns, qk // heads, scale)[0]
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in qkv.split(widths, -1))  # (B, S, H, D)
    return sparse_attention(q, k, v, pattern, scale=scale, backend=backend)


def backend_for(q: Tensor, k: Tensor, v: Tensor, pattern: AllowsKeys | Sequence[AllowsKeys]) -> str:
    """The backend that "auto" takes for these inputs, by name; nothing is computed."""
    return _choose(q, k, v, _check(q, k, v, pattern), return_lse=False)


def _choose(q: Tensor, k: Tensor, v: Tensor, patterns: tuple[AllowsKeys, ...], return_lse: bool) -> str:
    for backend in ("sdpa", "triton"):
        if _cannot(backend, q, k, v, patterns, return_lse) is None:
            return backend
    return "blocked"


def _cannot(
    backend: str, q: Tensor, k: Tensor, v: Tensor, patterns: tuple[AllowsKeys, ...], return_lse: bool
) -> str | None:
    """Why this backend cannot run these inputs, with what would; None if it can."""
    if backend == "triton":
        return unsupported(q, k, v, patterns)
    if backend == "sdpa":
        if not _all_full(patterns):
            return "it knows no pattern but Full(); use backend='blocked'"
        if return_lse:
            return "it returns no log-sum-exp; use backend='blocked'"
        if q.shape[-1] != v.shape[-1] and not q.is_cuda:
            # Elsewhere torch would fall back to (S, S) scores in silence.
            return (
                f"q and v differ in width ({q.shape[-1]} and {v.shape[-1]}) on {q.device.type}; use backend='blocked'"
            )
    return None


def _all_full(patterns: tuple[AllowsKeys, ...]) -> bool:
    return all(p == Full() for p in patterns)


def _check(q: Tensor, k: Tensor, v: Tensor, pattern: AllowsKeys | Sequence[AllowsKeys]) -> tuple[AllowsKeys, ...]:
    """Patterns by head. ValueError for inputs that disagree."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: it must be (batch, sequence, heads, width)")
    if q.shape != k.shape:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must have the same shape")
    if q.shape[:3] != v.shape[:3]:
        raise ValueError(f"v {tuple(v.shape)} must agree with q {tuple(q.shape)} in batch, sequence and heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v must share one float dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device, not {q.device}, {k.device}, {v.device}")
    return _by_head(pattern, q.shape[2])


def _by_head(pattern: AllowsKeys | Sequence[AllowsKeys], H: int) -> tuple[AllowsKeys, ...]:
    """One for each of H heads. ValueError if it is not."""
    patterns = tuple(pattern) if isinstance(pattern, Sequence) else (pattern,) * H
    if len(patterns) != H:
        raise ValueError(f"{len(patterns)} patterns for {H} heads: give one for all heads, or one for each")
    for p in patterns:
        if not isinstance(p, Pattern) and not isinstance(p, AllowsKeys):  # the first is known much sooner
            raise ValueError(f"{p!r} is no pattern: a pattern has allows(i, j); see sparse_tx.attention.patterns")
    return patterns
