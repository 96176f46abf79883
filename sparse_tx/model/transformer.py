"""The Sparse Transformer: embedding, residual blocks, a final LayerNorm and an output matrix of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_tx.model.block import ResidualBlock
from sparse_tx.model.dropout import dropout_keys
from sparse_tx.model.embedding import Embedding
from sparse_tx.model.spec import VOCABULARY, ModelSpec

if TYPE_CHECKING:
    from sparse_tx.model.fused.blocks import FusedBlocks


class Transformer(nn.Module):
    """model(tokens (B, S)) -> logits (B, S, 256): tokens unshifted, S <= context; logits at i predict token i."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(VOCABULARY, spec.width, spec.position_shape())
        self.blocks = nn.ModuleList(ResidualBlock(spec, patterns) for patterns in spec.patterns())
        self.norm = nn.LayerNorm(spec.width)
        self.output = nn.Linear(spec.width, VOCABULARY, bias=False)
        nn.init.zeros_(self.output.weight)
        self._fused: FusedBlocks | None = None

    def forward(
        self, tokens: Tensor, *, seed: int = 0, step: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """tokens: (B, S) integers 0 to 255. Returns logits (B, S, 256). The rest: as in `hidden`."""
        return self.output(self.norm(self.hidden(tokens, seed=seed, step=step, rows=rows)))

    def hidden(
        self, tokens: Tensor, *, seed: int = 0, step: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """tokens: (B, S) integers 0 to 255. Returns (B, S, C), what the final norm and the output matrix take.

        In training mode, dropout masks are drawn for (seed, step, rows): step () int64, rows (B,) int64, the row's
        index in the whole batch; without a step nothing is dropped.
        """
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.spec.context:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}: give (batch, sequence), 1 to {self.spec.context} positions"
            )
        keys: Tensor | None = None
        if self.training and self.spec.dropout > 0 and step is not None:
            if rows is None:
                rows = torch.arange(len(tokens), device=tokens.device)
            keys = dropout_keys(seed, step, rows, self.spec.layers)
        h = self.embedding(tokens)  # (B, S, C)
        if self._fused is not None:
            return self._fused(h, keys)
        for layer, block in enumerate(self.blocks):
            h = block(h, None if keys is None else keys[layer])
        return h

    def fuse_blocks(self, residual: torch.dtype | None = None) -> None:
        """Run the blocks by fused kernels from now on. residual: dtype of the residual stream, the embedding's if None.

        Raises NotImplementedError where triton cannot run. The blocks' own forward is not called any more.
        """
        from sparse_tx.model import fused

        if (reason := fused.unsupported(self.output.weight.device)) is not None:
            raise NotImplementedError(f"the blocks cannot be fused: {reason}")
        from sparse_tx.model.fused.blocks import FusedBlocks

        self._fused = FusedBlocks(list(self.blocks), residual)  # type: ignore[arg-type]

    def compile_blocks(self) -> None:
        """Compile one block a pattern: layers alike share the code, so that depth does not cost compile time."""
        for block in self.blocks:
            block.compile()


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
