"""Sparse Transformers (Child et al. 2019) for images, text and audio as raw bytes."""

from sparse_tx.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "load"]


def __getattr__(name: str):
    # `import sparse_tx.attention` must need torch alone, so the loader is imported when it is asked for.
    if name == "load":
        from sparse_tx.checkpoint import load

        return load
    raise AttributeError(f"module 'sparse_tx' has no attribute {name!r}")
