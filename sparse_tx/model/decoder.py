"""A trained model one position at a time: only the keys that the patterns still need are kept (section 8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear

from sparse_tx.attention import Pattern, packed_attention
from sparse_tx.attention.cache import cached_rows
from sparse_tx.attention.decode import SlicedReads, StaticReads, Step, Store
from sparse_tx.model.block import ResidualBlock, activate
from sparse_tx.model.decode_kernels import unsupported
from sparse_tx.model.query_key import QueryKey
from sparse_tx.model.spec import ModelSpec
from sparse_tx.model.transformer import Transformer

if TYPE_CHECKING:
    from sparse_tx.model.decode_kernels.steps import FusedSteps

_LOGITS = 4096  # positions of a prompt whose logits are made at a time
Pair = tuple[Tensor, Tensor]  # weight and bias


@dataclass(frozen=True)
class LayerWeights:
    """A residual block's weights: matrices in the dtype of the products, norms in float32 as under autocast."""

    attention_norm: Pair
    qkv: Pair
    out: Pair
    ff_norm: Pair
    expand: Pair
    contract: Pair
    query_key: QueryKey | None
    activation: str

    @classmethod
    def of(cls, block: ResidualBlock, dtype: torch.dtype) -> LayerWeights:
        def pair(layer: nn.Linear | nn.LayerNorm, dtype: torch.dtype = dtype) -> Pair:
            return layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)

        own = block.attention_norm.weight.dtype
        return cls(
            pair(block.attention_norm, own),
            pair(block.attention.qkv),
            pair(block.attention.out),
            pair(block.ff_norm, own),
            pair(block.ff.expand),
            pair(block.ff.contract),
            block.attention.query_key,
            block.ff.activation,
        )


def layer(h: Tensor, w: LayerWeights, attend: Callable[[Tensor], Tensor], position: Tensor | None = None) -> Tensor:
    """A residual block in eval mode around any way to attend. h: (..., C), the residual stream.

    attend: projections (..., 2 qk + C) -> (..., C). position: (1,) int64 of all rows of h; None: those of (B, S, C).
    """
    x = _norm(h, w.attention_norm).to(w.qkv[0].dtype)
    qkv = linear(x, *w.qkv)
    if w.query_key is not None:
        qkv = w.query_key(qkv, position)
    h = h + linear(attend(qkv), *w.out)
    x = linear(_norm(h, w.ff_norm).to(w.expand[0].dtype), *w.expand)
    return h + linear(activate(x, w.activation), *w.contract)


def split_heads(qkv: Tensor, heads: int, qk: int) -> list[Tensor]:
    """(..., 2 qk + C) -> q, k (..., H, Dqk), v (..., H, Dv)."""
    return [t.unflatten(-1, (heads, -1)) for t in qkv.split((qk, qk, qkv.shape[-1] - 2 * qk), -1)]


def _norm(h: Tensor, weights: Pair) -> Tensor:
    return layer_norm(h, h.shape[-1:], *weights)


def cache_bytes(spec: ModelSpec, length: int, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one sample of `length` positions take."""
    width = (spec.qk + spec.width) // spec.heads
    rows = {p: cached_rows(p, length) for layer in spec.patterns() for p in dict.fromkeys(layer)}
    return sum(rows[p] for layer in spec.patterns() for p in layer) * width * dtype.itemsize


class Decoder:
    """Logits of `batch` sequences, one position after the other.

    dtype: of the products and of the cache; None for the model's own. static: fixed shapes and positions as tensors
    alone, for CUDA graphs; False reads exactly the live slots; None takes what suits the device. fused: take the
    step from Triton kernels, static too; None does so on a GPU where they can run, unless `static` is named. Raises
    NotImplementedError with the reason if fused is True and they cannot run.
    """

    def __init__(
        self,
        model: Transformer,
        batch: int,
        length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        static: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        spec = model.spec
        length = spec.context if length is None else length
        if not 1 <= length <= spec.context:
            raise ValueError(f"length={length}: this model has a context of {spec.context} positions; use at most that")
        self.model, self.spec, self.length, self.batch = model, spec, length, batch
        self.device = model.output.weight.device
        self.dtype = dtype or model.output.weight.dtype
        self.static = self.device.type != "cpu" if static is None else static
        fused = self._choose_fused(fused, static)
        self.output = model.output.weight.detach().to(self.dtype)
        self.patterns = spec.patterns()
        widths = spec.qk // spec.heads, spec.width // spec.heads
        self.stores = [Store(p, length, batch, *widths, self.dtype, self.device) for p in self.patterns]
        self.weights = [LayerWeights.of(block, self.dtype) for block in model.blocks]  # type: ignore[arg-type]
        self._norm = model.norm.weight.detach(), model.norm.bias.detach()
        self.kernels: FusedSteps | None = None
        if fused:
            from sparse_tx.model.decode_kernels.steps import FusedSteps

            self.kernels = FusedSteps(model, self.weights, self.output, self.stores, length, batch)
        self._sliced = SlicedReads(length)

    def _choose_fused(self, fused: bool | None, static: bool | None) -> bool:
        if fused and static is False:
            raise ValueError("a step of fused kernels is static: static=False needs fused=False")
        self.reason = "plain torch"
        if fused is False or (fused is None and (static is not None or self.device.type != "cuda")):
            return False
        reason = unsupported(self.spec, self.length, self.dtype, self.device)
        if reason is None:
            return True
        if fused:
            raise NotImplementedError(f"{reason}; use fused=False")
        self.reason += f", no fused kernels: {reason}"
        return False

    @property
    def how(self) -> str:
        """What a step runs, in words."""
        return self.reason if self.kernels is None else "fused kernels"

    @property
    def bytes(self) -> int:
        """Of all keys and values kept."""
        return sum(store.bytes for store in self.stores)

    def prefill(self, prompts: Tensor, rows: Tensor) -> Tensor:
        """Keep the keys of prompts by one forward pass over each. prompts: (U, P); rows: (B,) which of them a row has.

        Returns (U, P) float32 nats of each byte of the prompts under the model. A CPU takes them one by one: products
        of other shapes would round otherwise, and what is drawn depend on which prompts are drawn together.
        """
        U, P = prompts.shape
        if not 1 <= P <= self.length:
            raise ValueError(f"a prompt of {P} positions does not fit a length of {self.length}")
        if len(rows) != self.batch:
            raise ValueError(f"rows names a prompt for {len(rows)} rows: this decoder has a batch of {self.batch}")
        size = 1 if self.device.type == "cpu" else U
        return torch.cat([self._prefill(prompts[a : a + size], rows, a) for a in range(0, U, size)])

    def _prefill(self, prompts: Tensor, rows: Tensor, first: int) -> Tensor:
        into = ((rows >= first) & (rows < first + len(prompts))).nonzero()[:, 0]
        h = self.model.embedding(prompts)  # (U, P, C)
        for w, store, patterns in zip(self.weights, self.stores, self.patterns, strict=True):
            h = layer(h, w, partial(self._fill, store, patterns, into, rows[into] - first))
        nats = []
        for start in range(0, prompts.shape[1], _LOGITS):
            part = slice(start, start + _LOGITS)
            nats.append(cross_entropy(self._logits(h[:, part]).mT, prompts[:, part].long(), reduction="none"))
        return torch.cat(nats, 1)

    def prepare(self, at: int) -> None:
        """Before a step at this position, where it is captured and cannot be told of it."""
        if self.kernels is not None:
            self.kernels.prepare(at)

    def step(self, previous: Tensor, position: Tensor, at: int | None = None) -> Tensor:
        """The logits (B, V) float32 at one position, whose keys are kept from then on.

        previous: (B,) the bytes before it; position: (1,) int64 on the device. at: the same position as a number, which
        a decoder that is not static needs; one with kernels needs it, or `prepare`, where a chunk of positions begins.
        """
        if self.kernels is not None:
            if at is not None:
                self.prepare(at)
            return self.kernels(previous, position).clone()
        reads: StaticReads | SlicedReads
        if self.static:
            reads = StaticReads(position)
        else:
            if at is None:
                raise ValueError("a decoder that is not static needs the position as a number too")
            self._sliced.position = at
            reads = self._sliced
        h = self.model.embedding.at(previous, position)  # (B, C)
        for w, store in zip(self.weights, self.stores, strict=True):
            h = layer(h, w, partial(self._attend, store, store.steps(reads)), position)
        return self._logits(h)

    def _attend(self, store: Store, steps: list[Step], qkv: Tensor) -> Tensor:
        q, k, v = split_heads(qkv, self.spec.heads, self.spec.qk)
        return store.attend(q, k, v, steps).flatten(-2)

    def _fill(self, store: Store, patterns: tuple[Pattern, ...], rows: Tensor, prompts: Tensor, qkv: Tensor) -> Tensor:
        _, k, v = split_heads(qkv, self.spec.heads, self.spec.qk)
        store.fill(k, v, rows, prompts)
        out = packed_attention(qkv, self.spec.heads, self.spec.qk, patterns, backend=self.spec.attention.backend)
        return out.flatten(-2)

    def _logits(self, h: Tensor) -> Tensor:
        return linear(_norm(h, self._norm).to(self.dtype), self.output).float()
