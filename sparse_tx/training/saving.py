"""Checkpoints on the disk: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sparse_tx.errors import UserError
from sparse_tx.files import whole


class NotWritten(UserError):
    """A checkpoint did not fit on the disk, or may not be there."""


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then puts it there: what stood there lasts until the new one is whole.

    Lightning's own way holds it twice in memory, writes it where temporary files go and copies it onto the old one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Raises NotWritten, which says why, and leaves what was there."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as partial, open(partial, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__  # of what torch says of a full disk
            if not isinstance(reason, OSError):
                raise
            raise NotWritten(
                f"{path} cannot be written: {reason.strerror}. The checkpoints before it are whole: mend that, and the "
                "same command with resume=auto goes on from the newest"
            ) from None
