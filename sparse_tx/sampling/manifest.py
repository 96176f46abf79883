"""What samples came from, beside them: manifest.json."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparse_tx
from sparse_tx.checkpoint import Checkpoint
from sparse_tx.data.source import file_sha256
from sparse_tx.files import whole

MANIFEST = "manifest.json"


def bits_by_sample(nats: np.ndarray, prompt: int) -> list[dict[str, float]]:
    """Bits a byte of each sample under the model as it is: of the whole, prompt included, and of what was drawn.

    nats: (N, S), -log of the probability of each byte; S above the prompt's length.
    """
    bits = nats.astype(np.float64) / math.log(2)
    return [{"bits_per_dim": float(row.mean()), "bits_per_dim_drawn": float(row[prompt:].mean())} for row in bits]


def describe(
    checkpoint: Checkpoint, settings: dict[str, Any], prompts: list[Path], device: torch.device
) -> dict[str, Any]:
    """All that is known before the first byte is drawn. Hashed here: a run may replace its checkpoint, and a user a
    prompt, while samples are drawn from what they were."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "checkpoint": str(checkpoint.path.resolve()),
        "checkpoint_sha256": file_sha256(checkpoint.file),
        "step": checkpoint.step,
        "data": checkpoint.config["data"]["name"],
        "kind": checkpoint.spec.kind,
        "settings": settings,
        "prompts": [{"file": str(p.resolve()), "sha256": file_sha256(p)} for p in prompts],
        "versions": {
            "sparse_tx": sparse_tx.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": f"{device.type} ({name})",
        "likelihood": "bits a byte under the model without temperature, top_k and top_p",
    }


def write_manifest(folder: Path, described: dict[str, Any], samples: list[dict[str, Any]]) -> Path:
    """Whole or not at all: it is written again with each batch. samples: of each, in order. Returns the path."""
    path = folder / MANIFEST
    with whole(path) as partial:
        partial.write_text(json.dumps(described | {"samples": samples}, indent=2, allow_nan=False) + "\n")
    return path
