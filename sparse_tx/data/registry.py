"""Which module knows how to make which dataset. A new dataset is one module with three names and one line here."""

import importlib
from typing import Any, Protocol, cast

from sparse_tx.data.spec import DataSpec
from sparse_tx.data.store import Writer

RECIPES = {
    "stdlib": "sparse_tx.data.stdlib",
    "cifar10": "sparse_tx.data.cifar10",
    "enwik8": "sparse_tx.data.enwik8",
    "imagenet64": "sparse_tx.data.imagenet64",
    "audio": "sparse_tx.data.audio",
}


class Recipe(Protocol):
    """What a dataset's module holds."""

    VERSION: int  # raise it when the same source would give other bytes

    def identify(self, spec: DataSpec) -> dict[str, Any]:
        """Plain JSON data that decides the prepared bytes: cheap, no network, UserError if there is no source."""

    def build(self, spec: DataSpec, writer: Writer, *, download: bool) -> dict[str, Any]:
        """Writes train, validation and test; returns source, sha256 and split rule for meta.json."""


def recipe_for(name: str) -> Recipe:
    return cast(Recipe, importlib.import_module(RECIPES[name]))
