"""From a DataSpec to the bytes of its three splits."""

from pathlib import Path
from typing import Any

import numpy as np

from sparse_tx.data.registry import recipe_for
from sparse_tx.data.spec import DataSpec
from sparse_tx.data.store import SPLITS, open_array, stored
from sparse_tx.data.synthetic import synthetic_splits
from sparse_tx.errors import UserError


class Prepared:
    """The splits of a dataset as uint8: images (N, context), row by row, R G B of a pixel together; text, audio (N,).

    meta: plain JSON data: source, sha256, counts of each split, split rule. Arrays on disk are memory-mapped when
    first asked for and left out of a pickle, so that workers open their own.
    """

    def __init__(
        self,
        spec: DataSpec,
        meta: dict[str, Any],
        *,
        folder: Path | None = None,
        arrays: dict[str, np.ndarray] | None = None,
    ):
        self.spec, self.meta, self.folder = spec, meta, folder
        self._arrays = arrays or {}

    def split(self, name: str) -> np.ndarray:
        """The bytes of "train", "validation" or "test", read-only."""
        if name not in SPLITS:
            raise UserError(f"split={name} is not known: use one of {', '.join(SPLITS)}")
        if name not in self._arrays:
            assert self.folder is not None
            self._arrays[name] = open_array(self.folder, name)
        array = self._arrays[name]
        if len(array) == 0:
            raise UserError(f"data={self.spec.name} from {self.meta['source']} has no {name} split")
        return array

    @property
    def title(self) -> str:
        """What it is, for logs and reports: the name, the version where there are several, the source if one's own."""
        if self.spec.synthetic:
            return f"synthetic twin of {self.spec.name}"
        version = f" ({self.meta['version_name']})" if "version_name" in self.meta else ""
        return f"{self.spec.name}{version}" + (f" from {self.meta['source']}" if self.spec.source is not None else "")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_arrays": {}} if self.folder is not None else {})


def prepare(spec: DataSpec, *, download: bool = True) -> Prepared:
    """The dataset, made on the first call and found on later ones; safe to call from several processes at once.

    download=False never touches the network. Raises UserError for a source that is missing, broken or too short.
    """
    if spec.synthetic:
        meta, arrays = synthetic_splits(spec)
        return Prepared(spec, meta, arrays=arrays)
    recipe = recipe_for(spec.name)
    try:
        identity = {"recipe": recipe.VERSION, **recipe.identify(spec)}
    except OSError as error:  # no permission, say
        raise UserError(f"cannot read the source of data={spec.name}: {error}") from error
    folder, meta = stored(
        Path(spec.root).expanduser(), spec.name, identity, lambda writer: recipe.build(spec, writer, download=download)
    )
    prepared = Prepared(spec, meta, folder=folder)
    _check_length(prepared)
    return prepared


def _check_length(prepared: Prepared):
    spec, counts = prepared.spec, prepared.meta["counts"]
    if spec.kind != "image" and counts["train"] < spec.context:
        raise UserError(
            f"data.context={spec.context} is longer than the {counts['train']} training bytes of data={spec.name}: "
            f"use a context of at most {counts['train']}, or more data"
        )
