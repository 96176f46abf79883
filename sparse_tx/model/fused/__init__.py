"""The residual blocks with fused kernels around the library's products. Importable without triton."""

from __future__ import annotations

import os

import torch

from sparse_tx.attention.kernels import no_kernels

__all__ = ["unsupported"]


def unsupported(device: torch.device) -> str | None:
    """Why fused blocks cannot run on this device, with what would; None if they can."""
    reason = no_kernels(device)
    return None if reason is None else f"{reason}; use trainer.fused=false"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
