"""Datasets of the Hugging Face hub, streamed by the `datasets` library from one fixed revision."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparse_tx.errors import UserError

PREFIX = "hf://datasets/"
BATCH = 256


@dataclass(frozen=True)
class HubSet:
    """`hf://datasets/OWNER/NAME@REVISION`, as the hub's own file system names it; a configuration after a colon."""

    repository: str
    revision: str | None
    configuration: str | None = None

    def splits(self) -> list[str]:
        return list(self._load())

    def tables(self, split: str) -> Iterator[Any]:
        """The rows of a split as pyarrow tables: pictures and recordings stay as they are encoded."""
        try:
            yield from self._load()[split].with_format("arrow").iter(batch_size=BATCH)
        except Exception as error:  # of the hub's libraries and of whichever HTTP client they use
            raise UserError(f"{self} broke off: {_first_line(error)}. Run the command again") from error

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"{self} needs the datasets library: pip install 'sparse-tx[hub]'") from error
        try:
            return datasets.load_dataset(self.repository, self.configuration, revision=self.revision, streaming=True)
        except Exception as error:  # as above
            raise UserError(
                f"{self} cannot be opened: {_first_line(error)}. Without a network, get its files on another machine "
                "and give data.source=FOLDER"
            ) from error

    def __str__(self) -> str:
        configuration = f":{self.configuration}" if self.configuration else ""
        return f"{PREFIX}{self.repository}@{self.revision}{configuration}"


def hub_set(source: str | None) -> HubSet | None:
    """What a `data.source` of the hub names; None if it is not of the hub."""
    if source is None or not source.startswith("hf://"):
        return None
    match = re.fullmatch(re.escape(PREFIX) + r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w.-]+))?", source)
    if match is None:
        raise UserError(f"data.source={source} is not of the form {PREFIX}OWNER/NAME@REVISION")
    repository, revision, configuration = match.groups()
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(
            f"data.source={source} names no fixed revision, so that its bytes could change: add @ and the 40 digits of "
            f"a commit, see https://huggingface.co/datasets/{repository}/commits/main"
        )
    return HubSet(repository, revision, configuration)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
