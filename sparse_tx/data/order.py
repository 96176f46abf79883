"""The order of training: an endless sequence of shuffled epochs in which every place can be asked for directly."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sparse_tx.errors import UserError

MASK = (1 << 64) - 1


class Place(NamedTuple):
    """Where a row of a batch comes from: the start of its window, its place in the global batch, whether mirrored."""

    start: int
    row: int
    mirrored: bool = False


def _splitmix64(key: np.uint64, counters: np.ndarray) -> np.ndarray:
    """A random word (uint64) for each counter, without those before it (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = key + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class TrainingOrder:
    """Entry k of all epochs laid end to end, by (seed, k) alone.

    train: the training array or its length. An epoch of images is one permutation of the rows. An epoch of text or
    audio takes one random offset below the context, cuts windows side by side from there, and shuffles them: how many
    they are may differ by one with the offset. Only the current epoch's permutation is kept.
    """

    def __init__(self, train: np.ndarray | int, kind: str, context: int, seed: int):
        self.length = train if isinstance(train, int) else len(train)
        self.kind, self.context, self.seed = kind, context, seed & MASK
        least = 1 if kind == "image" else context
        if self.length < least:
            raise UserError(f"{self.length} training {'images' if kind == 'image' else 'bytes'}: {least} are needed")
        self._key = np.random.SeedSequence(self.seed).generate_state(1, np.uint64)[0]
        self._epoch, self._first, self._count = -1, 0, 0  # the epoch that is kept: its number, first entry, entries
        self._places = np.empty(0, np.int64)

    def offsets(self, epochs: np.ndarray) -> np.ndarray:
        """The offset of each epoch, of a whole range of epochs at once."""
        if self.kind == "image":
            return np.zeros(len(epochs), np.int64)
        z = _splitmix64(self._key, epochs)
        # A set shorter than two windows takes only the offsets that leave it one.
        choices = min(self.context, self.length - self.context + 1)
        return (z % np.uint64(choices)).astype(np.int64)

    def sizes(self, epochs: np.ndarray) -> np.ndarray:
        """How many windows each epoch has."""
        if self.kind == "image":
            return np.full(len(epochs), self.length, np.int64)
        return (self.length - self.offsets(epochs)) // self.context

    def locate(self, entry: int) -> tuple[int, int]:
        """The epoch that holds an entry, and the epoch's first entry."""
        if self.kind == "image":
            epoch = entry // self.length
            return epoch, epoch * self.length
        epoch, first = (self._epoch, self._first) if entry >= self._first and self._epoch >= 0 else (0, 0)
        many = 16
        while True:
            ends = first + np.cumsum(self.sizes(np.arange(epoch, epoch + many)))
            hit = int(np.searchsorted(ends, entry, side="right"))
            if hit < many:
                return epoch + hit, int(ends[hit - 1]) if hit else first
            epoch, first = epoch + many, int(ends[-1])
            many = min(2 * many, 1 << 16)

    def window(self, entry: int) -> int:
        """Where the entry's window starts: a byte of text or audio, a row of images."""
        if entry < 0:
            raise ValueError(f"entry {entry} is negative")
        if not self._first <= entry < self._first + self._count:
            self._enter(*self.locate(entry))
        return int(self._places[entry - self._first])

    def mirrored(self, entry: int) -> bool:
        """Whether the entry's image or sound is mirrored where half of them are."""
        # The lowest bit of a sound's word would be the parity of its offset where an epoch has one window.
        bit = np.uint64(0 if self.kind == "image" else 63)
        return bool(_splitmix64(self._key, np.array([entry]))[0] >> bit & np.uint64(1))

    def _enter(self, epoch: int, first: int):
        which = np.array([epoch])
        count, offset = int(self.sizes(which)[0]), int(self.offsets(which)[0])
        # Sorting raw words, whose stream numpy keeps for ever; it does not promise that of Generator.permutation.
        words = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(count)
        step = 1 if self.kind == "image" else self.context
        self._places = offset + step * np.argsort(words, kind="stable")
        self._epoch, self._first, self._count = epoch, first, count


class StepSampler:
    """The batches of one rank: for each step a list of places. mirror: half of the entries are mirrored.

    batch_size: of one optimizer step, all ranks together. Step t takes entries t B ... t B + B - 1, also across the
    end of an epoch; rank r takes every world-th of them from r. Iterating gives steps start_step ... steps - 1, and
    iterating again gives the same. The length is `steps`, from step 0: a trainer that resumes counts its batches from
    there too.
    """

    def __init__(
        self,
        order: TrainingOrder,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        steps: int,
        mirror: bool = False,
    ):
        if batch_size < 1 or batch_size % world:
            raise UserError(
                f"data.batch_size={batch_size} cannot be shared by {world} ranks: use a multiple, "
                f"such as {max(1, -(-batch_size // world)) * world}"
            )
        self.order, self.batch_size, self.rank, self.world = order, batch_size, rank, world
        self.start_step, self.steps, self.mirror = start_step, steps, mirror

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Place]]:
        for step in range(self.start_step, self.steps):
            yield self.batch(step)

    def batch(self, step: int) -> list[Place]:
        return [self._place(step * self.batch_size, row) for row in range(self.rank, self.batch_size, self.world)]

    def _place(self, first: int, row: int) -> Place:
        return Place(self.order.window(first + row), row, self.mirror and self.order.mirrored(first + row))
