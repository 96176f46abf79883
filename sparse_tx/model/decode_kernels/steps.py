"""A decoding step as launches of the fused kernels: five for each layer; three or four for few rows; two for many rows
of a narrow model; one more where programs share a head's keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from sparse_tx.attention.decode import Store
from sparse_tx.attention.kernels import has_roles, interpreted  # noqa: F401
from sparse_tx.attention.kernels.decode import attend_out_step, attend_step, combine_step
from sparse_tx.attention.ranges import ReadTable
from sparse_tx.model.decode_kernels import configs, shares
from sparse_tx.model.decode_kernels.ends import draw_step, embed_step
from sparse_tx.model.decode_kernels.hopper import between
from sparse_tx.model.decode_kernels.linear import feedforward_step, linear_step, vector_step
from sparse_tx.model.query_key import EPS as QUERY_KEY_EPS
from sparse_tx.model.spec import VOCABULARY
from sparse_tx.model.transformer import Transformer

if TYPE_CHECKING:
    from sparse_tx.model.decoder import LayerWeights, Pair

EPS = 1e-5  # of every LayerNorm
_H100 = configs.Gpu(132, 232448)  # where there is no GPU to ask


def _gpu(device: torch.device) -> configs.Gpu:
    asked = torch.cuda.get_device_properties(device)
    return configs.Gpu(asked.multi_processor_count, asked.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def places(stores: Sequence[Store], heads: int, parts: int, device: torch.device) -> Tensor:
    """(L, H, parts, 4) int64: where each head keeps its keys, as the kernels read it."""
    table = torch.zeros(len(stores), heads, parts, 4, dtype=torch.long)
    for layer, store in enumerate(stores):
        for kept in store.kept:
            for number, (k, v) in enumerate(zip(kept.k, kept.v, strict=True)):
                _, Hg, slots, _ = k.shape
                for g, head in enumerate(kept.group.heads):
                    ring = kept.group.layouts[number].strip
                    at = [t.data_ptr() + g * slots * t.shape[-1] * t.element_size() for t in (k, v)]
                    table[layer, head, number] = torch.tensor([*at, Hg * slots, ring])
    return table.to(device)


class FusedSteps:
    """Steps of a decoder's model over its stores.

    dependent: let a kernel begin while the one before ends (compute capability 9.0 and newer). joined: attention and
    its output matrix in one launch, for VECTOR_ROWS rows at most and where programs do not share a head's keys.
    joined_ff: the feed-forward in one launch too, where attention is. None: each where it wins.
    """

    def __init__(
        self,
        model: Transformer,
        weights: Sequence[LayerWeights],
        output: Tensor,
        stores: Sequence[Store],
        length: int,
        batch: int,
        dependent: bool | None = None,
        joined: bool | None = None,
        joined_ff: bool | None = None,
    ) -> None:
        """weights: of each layer. output: (V, C) in the dtype of the products."""
        spec, device, dtype = model.spec, output.device, output.dtype
        self.spec, self.weights, self.output, self.batch = spec, weights, output, batch
        self.norm = model.norm.weight.detach(), model.norm.bias.detach()
        self.embedding = model.embedding
        self.Dqk, self.Dv = spec.qk // spec.heads, spec.width // spec.heads
        self.reads = ReadTable(spec.patterns(), length, device)
        self.places = places(stores, spec.heads, self.reads.parts, device)
        self._stores = stores  # whose tensors the places name
        layers = [w.query_key for w in weights if w.query_key is not None and w.query_key.norm]
        self.scales = [l.temperature.detach().float().exp() for l in layers]
        slots = [sum(l.strip for l in store.kept[0].group.layouts) for store in stores]
        gpu = device.type == "cuda"
        self.gpu = _gpu(device) if gpu else _H100
        if joined is None:
            joined = configs.joins(batch, spec.heads)
        if joined_ff is None:
            joined_ff = configs.joins_feedforward(batch, spec.width, spec.ff)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        C, projected = spec.width, 2 * spec.qk + spec.width
        self.x, self.logits = empty(batch, C), empty(batch, VOCABULARY)
        self._streams = self.x, torch.empty_like(self.x)  # of layers in turn: one is read while the other is written
        self.no_table = torch.zeros(1, C, device=device)
        self.qkv, self.out = empty(batch, projected, dtype=dtype), empty(batch, C, dtype=dtype)
        self.splits = [configs.splits(batch * spec.heads, n, self.gpu) for n in slots]
        self.strips = slots
        self.joined = joined and max(self.splits) == 1 and batch <= configs.VECTOR_ROWS
        self.joined_ff = joined_ff and self.joined
        # All between two attentions: in two launches by so many shares, or in one.
        self.cut = 0
        self.between: configs.Between | None = None
        if has_roles(device) and not self.joined:
            self.cut = configs.shares(batch, spec.width, spec.ff, dtype.itemsize)
            self.between = configs.between(batch, spec.width, spec.ff, dtype.itemsize, self.gpu)
        # The kernel after the wait reads what the one before wrote: Hopper's launches alone can overlap them.
        if dependent is None:
            dependent = configs.overlaps(batch * spec.heads, self._few_launches, self.gpu)
        self.dependent = dependent and gpu and torch.cuda.get_device_capability(device) >= (9, 0)
        # What is still to be added to the residual stream: by each head, and by each program of the feed-forward.
        self.of_heads = spec.heads if self.joined else 0
        self.of_ff = triton.cdiv(spec.ff, configs.feedforward(C, spec.ff)[0]) if self.joined_ff else 0
        self.shares = empty(batch, self.of_heads + self.of_ff, C) if self.joined else self.x
        self.hidden = empty(0 if self._few_launches else batch, spec.ff, dtype=dtype)
        self.cut_shares = empty(self.cut, batch, C)
        self.partial = empty(batch * spec.heads, max(self.splits), 2 + triton.next_power_of_2(self.Dv))

    @property
    def _few_launches(self) -> bool:
        return self.cut > 0 or self.between is not None

    def prepare(self, position: int) -> None:
        """Before a step, and before it is captured: have the numbers of its position at hand."""
        self.reads.prepare(position)

    def __call__(self, previous: Tensor, position: Tensor) -> Tensor:
        """previous: (B,), position: (1,) int64. Returns logits (B, V) float32, which the next step writes over."""
        self._embed(previous, position)
        if self._few_launches:
            self._linear(self.x, self.weights[0].qkv, self.qkv, norm=self.weights[0].attention_norm)
            for layer in range(self.spec.layers):
                self._attend(layer, position)
                self._between(layer)
            return self.logits
        for layer in range(self.spec.layers):
            self._layer(layer, position)
        x = self._streams[(self.spec.layers - 1) % 2] if self.joined_ff else self.x
        self._linear(x, (self.output, None), self.logits, norm=self.norm, shares=self._of_layer_ahead)
        return self.logits

    def draw(
        self, position: Tensor, uniforms: Tensor, tokens: Tensor, nats: Tensor, previous: Tensor, temperature: float
    ) -> None:
        """Draw a byte of each row from the logits of the last step: see `draw_step`."""
        options = self._options(4)
        draw_step[(self.batch,)](
            self.logits, uniforms, position, tokens, nats, previous, self.batch, len(uniforms), tokens.shape[1],
            TEMPERATURE=float(temperature), V=VOCABULARY, BV=triton.next_power_of_2(VOCABULARY), **options,
        )  # fmt: skip

    def _options(self, warps: int) -> dict[str, Any]:
        return {"DEPENDENT": self.dependent, "num_warps": warps} | ({"launch_pdl": True} if self.dependent else {})

    def _embed(self, previous: Tensor, position: Tensor) -> None:
        tables = [t.detach() for t in self.embedding.positions]
        tables = [self.no_table] * (3 - len(tables)) + tables
        C = self.spec.width
        embed_step[(self.batch,)](
            previous.contiguous(), position, self.embedding.tokens, self.embedding.start, *tables, self.x,
            len(tables[1]), len(tables[2]), C=C, BC=triton.next_power_of_2(C), **self._options(4),
        )  # fmt: skip

    def _layer(self, layer: int, position: Tensor) -> None:
        w = self.weights[layer]
        x = self.x
        if self.joined_ff and layer:
            ahead, x = self._streams[(layer - 1) % 2], self._streams[layer % 2]
            self._linear(ahead, w.qkv, self.qkv, norm=w.attention_norm, shares=self._of_layer_ahead, kept=x)
        else:
            self._linear(x, w.qkv, self.qkv, norm=w.attention_norm)
        if self.joined:
            self._attend_out(layer, position)
        else:
            self._attend(layer, position)
            self._linear(self.out, w.out, x, add=True)
        if self.joined_ff:
            self._feedforward(layer, x)
        else:
            new = 0, self.of_heads
            self._linear(x, w.expand, self.hidden, norm=w.ff_norm, activation=w.activation, shares=new)
            self._linear(self.hidden, w.contract, x, add=True, shares=(self.of_heads, 0))

    def _between(self, layer: int) -> None:
        """From the attention of a layer to the projections of the next, or to the logits."""
        norm: Pair = self.norm
        after: tuple[Tensor, Tensor | None] = self.output, None
        y = self.logits
        if layer + 1 < self.spec.layers:
            ahead = self.weights[layer + 1]
            norm, after, y = ahead.attention_norm, ahead.qkv, self.qkv
        of_layer = self.out, self.weights[layer], self.x
        if self.cut:
            shares.between(*of_layer, self.cut_shares, norm, after, y, EPS, self.dependent)
        else:
            assert self.between is not None
            between(*of_layer, norm, after, y, self.between, EPS, self.dependent)

    @property
    def _of_layer_ahead(self) -> tuple[int, int]:
        """Shares that the layer before has left, old and new ones."""
        return (self.of_heads, self.of_ff) if self.joined_ff else (0, 0)

    def _feedforward(self, layer: int, x: Tensor) -> None:
        w, C, F = self.weights[layer], self.spec.width, self.spec.ff
        units, warps = configs.feedforward(C, F)
        feedforward_step[(self.of_ff,)](
            x, *w.ff_norm, *w.expand, *w.contract, self.shares, F, EPS,
            ROWS=self.batch, C=C, BC=triton.next_power_of_2(C), BU=units, ALL=self.shares.shape[1], HEADS=self.of_heads,
            ACTIVATION=w.activation, **self._options(warps),
        )  # fmt: skip

    def _attend_out(self, layer: int, position: Tensor) -> None:
        """Attention and its output matrix: what each head adds to the residual stream, in `shares`."""
        C, H = self.spec.width, self.spec.heads
        keys, outputs, warps = configs.attend_out(self.strips[layer], max(self.Dqk, self.Dv) * self.out.element_size())
        attend_out_step[(self.batch * H, triton.cdiv(C, outputs))](
            self.qkv, *self.weights[layer].out, self.shares, *self._reads(layer, position), C,
            **self._sizes(), BN=keys, BO=outputs, ALL=self.shares.shape[1], **self._options(warps),
        )  # fmt: skip

    def _reads(self, layer: int, position: Tensor) -> tuple[Any, ...]:
        """What the attention kernels ask for of a layer and a position."""
        row = self.reads.kind[layer] * self.reads.positions
        found = self.weights[layer].query_key
        axes = (1, 1, 1) if found is None else found.axes
        turns = self.x if found is None or found.turns is None else found.turns  # any tensor where it takes none
        scale = self.scales[layer] if self.scales else self.x
        return (
            self.reads.table, self.places, position, self.reads.positions, row, layer, self.Dqk**-0.5,
            turns, scale, *axes, QUERY_KEY_EPS,
        )  # fmt: skip

    def _sizes(self) -> dict[str, Any]:
        sizes = {"H": self.spec.heads, "DQ": self.Dqk, "DV": self.Dv, "PARTS": self.reads.parts}
        sizes |= {"BDQ": triton.next_power_of_2(self.Dqk), "BDV": triton.next_power_of_2(self.Dv)}
        return {**sizes, "NORM": self.spec.qk_norm, "ROTARY": self.spec.rotary}

    def _attend(self, layer: int, position: Tensor) -> None:
        H, BDV, splits = self.spec.heads, triton.next_power_of_2(self.Dv), self.splits[layer]
        keys, warps, stages = configs.attend(max(self.Dqk, self.Dv), self.batch * H)
        attend_step[(self.batch * H, splits)](
            self.qkv, self.out, self.partial, *self._reads(layer, position),
            **self._sizes(), BN=keys, SPLITS=splits, STAGES=stages, **self._options(warps),
        )  # fmt: skip
        if splits > 1:
            combine_step[(self.batch * H,)](
                self.partial, self.out, H=H, DV=self.Dv, BDV=BDV, SPLITS=splits, **self._options(4)
            )

    def _linear(
        self,
        x: Tensor,
        layer: tuple[Tensor, Tensor | None],
        y: Tensor,
        *,
        norm: Pair | None = None,
        activation: str | None = None,
        add: bool = False,
        shares: tuple[int, int] = (0, 0),
        kept: Tensor | None = None,
    ) -> None:
        """y = act(LN?(x) W^T + b), or y += that. A tensor that is not used is given as any other.

        shares: so many, old and new as `vector_step` has them, are still to be added to the residual stream: x under a
        norm, or y. kept: where x with them is left.
        """
        weight, bias = layer
        N, K = weight.shape
        rows = self.batch
        given = norm or (self.x, self.x)
        before = (x, *given, weight, weight if bias is None else bias, y)
        flags = {"NORM": norm is not None, "BIASED": bias is not None, "ACTIVATION": activation, "ADD": add}
        if rows <= configs.VECTOR_ROWS:
            BN, warps = configs.vector(K)
            vector_step[(triton.cdiv(N, BN),)](
                *before, self.shares, self.x if kept is None else kept, y, N, EPS, ROWS=rows, K=K,
                BK=triton.next_power_of_2(K), BN=BN, ALL=self.shares.shape[1], OLD=shares[0], NEW=shares[1],
                KEEP=kept is not None, **flags, **self._options(warps),
            )  # fmt: skip
            return
        t = configs.tile(rows, N, K, norm is not None, weight.element_size(), self.gpu)
        linear_step[(triton.cdiv(N, t.outputs), triton.cdiv(rows, t.rows))](
            *before, y, rows, N, EPS, K=K, BM=t.rows, BN=t.outputs, BK=t.inputs, STAGES=t.stages,
            **flags, **self._options(t.warps),
        )  # fmt: skip
