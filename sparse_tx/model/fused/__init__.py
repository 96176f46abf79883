"""The residual blocks with fused kernels around the library's products. Importable without triton."""

from __future__ import annotations

import torch

from sparse_tx.attention.kernels import no_kernels

__all__ = ["ROWS", "WIDEST", "fuses", "unsupported"]

# Rows of the feed-forward's hidden units that exist at a time where they are made again: in 16 bits and 2,048 wide,
# those of a million rows are 4 GiB, and the backward pass needs three such tensors.
ROWS = 1 << 17
# Width of a model up to which the activation of hidden units is never kept: the product that reads it makes it. Each
# tile of 256 columns of a wider one would make it again.
WIDEST = 256


def unsupported(device: torch.device) -> str | None:
    """Why fused blocks cannot run on this device, with what would; None if they can."""
    reason = no_kernels(device)
    return None if reason is None else f"{reason}; use trainer.fused=false"


def fuses(wanted: str, device: torch.device) -> bool:
    """Whether blocks run fused on this device. wanted: `trainer.fused`, "auto", "true" or "false"."""
    return (wanted == "true" or (wanted == "auto" and device.type == "cuda")) and unsupported(device) is None
