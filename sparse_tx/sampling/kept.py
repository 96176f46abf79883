"""Samples on the disk as they are drawn: each batch is written when it is whole, with the manifest of all so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparse_tx.errors import UserError
from sparse_tx.model import ModelSpec
from sparse_tx.sampling.manifest import bits_by_sample, write_manifest
from sparse_tx.sampling.sampler import Samples
from sparse_tx.sampling.spectrogram import STRIPS
from sparse_tx.sampling.writers import write_grid, write_samples, write_spectrograms


class Kept:
    """Writes samples into a folder. files: of each sample, in order; entries: what the manifest says of each.

    prompt: bytes that each starts with; prompts: the files they are from, which samples take in turn.
    """

    def __init__(
        self, folder: Path, spec: ModelSpec, format: str, described: dict[str, Any], prompt: int, prompts: list[Path]
    ) -> None:
        self.folder, self.spec, self.format = folder, spec, format
        self.described, self.prompt, self.prompts = described, prompt, prompts
        self.files: list[Path] = []
        self.entries: list[dict[str, Any]] = []
        self.first: bytes = b""  # the first sample
        self._pictured: list[np.ndarray] = []

    def add(self, samples: Samples) -> None:
        """samples: the next ones, of fewer bytes than asked for if they were interrupted."""
        tokens, nats = samples.tokens.cpu().numpy(), samples.nats.cpu().numpy()
        if not np.isfinite(nats).all():
            raise UserError(
                f"precision={self.described['settings']['precision']}: the model's logits are not finite from byte "
                f"{int((~np.isfinite(nats)).any(0).argmax())} on; use precision=32, or bf16-mixed on a GPU"
            )
        number = len(self.files)
        files = write_samples(tokens, self.spec.context, self.format, self.folder, number)
        for file, bits in zip(files, bits_by_sample(nats, self.prompt), strict=True):
            entry: dict[str, Any] = {"file": file.name, "number": number, "bytes": tokens.shape[1]}
            if self.prompts:
                entry["prompt"] = self.prompts[number % len(self.prompts)].name
            self.entries.append(entry | bits)
            number += 1
        self.first = self.first or tokens[0].tobytes()
        self.files += files
        if self.format == "png":
            self._pictured += list(tokens)
        elif self.format == "wav":
            self._pictured = [*self._pictured, *tokens][:STRIPS]
        write_manifest(self.folder, self.described, self.entries)

    def paths(self) -> list[Path]:
        """Of all files, with the grid of images or the spectrograms of sound, written here, before the others."""
        if not self._pictured:
            return self.files
        if self.format == "png":
            picture = write_grid(self._pictured, self.spec.context, self.folder)
        else:
            picture = write_spectrograms(self._pictured, self.folder, self.prompt)
        return [picture, *self.files]
