"""The Sparse Transformer in plain torch: knows neither Hydra nor Lightning."""

from sparse_tx.model.spec import AttentionSpec, ModelSpec
from sparse_tx.model.transformer import Transformer

__all__ = ["AttentionSpec", "ModelSpec", "Transformer"]
