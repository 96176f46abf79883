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


def bits_by_sample(nats: np.ndarray, prompt: int) -> list[dict[str, float]]:
    """Bits a byte of each sample under the model as it is: of the whole, prompt included, and of what was drawn.

    nats: (N, S), -log of the probability of each byte.
    """
    bits = nats.astype(np.float64) / math.log(2)
    return [{"bits_per_dim": float(row.mean()), "bits_per_dim_drawn": float(row[prompt:].mean())} for row in bits]


def write_manifest(
    folder: Path,
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    prompts: list[Path],
    files: list[Path],
    bits: list[dict[str, float]],
    device: torch.device,
) -> Path:
    """Returns the path of the file. files and bits: of each sample, in order."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    manifest = {
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
        "samples": [{"file": f.name, "number": k, **b} for k, (f, b) in enumerate(zip(files, bits, strict=True))],
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    return path
