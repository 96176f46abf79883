"""The data as Lightning takes it: batches of bytes, the same ones for any number of ranks and after a restart."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparse_tx.data.order import Place, StepSampler, TrainingOrder
from sparse_tx.data.prepare import Prepared, prepare
from sparse_tx.data.spec import DataSpec, check_mirror
from sparse_tx.data.windows import EvaluationWindows, Window
from sparse_tx.errors import UserError

Batch = dict[str, Tensor]


class Rows(Dataset):
    """The bytes of one split, a batch at a time: (B, S) uint8."""

    def __init__(self, prepared: Prepared, split: str):
        self.prepared, self.split = prepared, split

    def tokens(self, starts: Sequence[int], length: int) -> Tensor:
        array = self.prepared.split(self.split)
        if self.prepared.spec.kind == "image":
            return torch.from_numpy(np.array(array[list(starts)]))
        tokens = np.empty((len(starts), length), np.uint8)
        for row, start in zip(tokens, starts, strict=True):
            row[:] = array[start : start + length]
        return torch.from_numpy(tokens)


class TrainingRows(Rows):
    def __getitems__(self, places: list[Place]) -> Batch:
        starts, rows, mirrored = zip(*places, strict=True)
        tokens = self.tokens(starts, self.prepared.spec.context)
        if any(mirrored):
            which, side = list(mirrored), self.prepared.spec.side
            if side is not None:
                images = tokens.view(-1, side, side, 3)
                images[which] = images[which].flip(2)
            else:
                tokens[which] = 255 - tokens[which]  # mu-law: the sound with its sign inverted, exactly
        return {"tokens": tokens, "rows": torch.tensor(rows)}


class EvaluationRows(Rows):
    def __getitems__(self, windows: list[Window]) -> Batch:
        tokens = self.tokens([window.start for window in windows], windows[0].length)
        return {"tokens": tokens, "first_scored": torch.tensor([window.first_scored for window in windows])}


class EvaluationBatches:
    """Batch sampler over a rank's windows."""

    def __init__(self, windows: EvaluationWindows, size: int):
        self._batches = windows.batches(size)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Window]]:
        return iter(self._batches)


class FirstBatch(StepSampler):
    """The batch of step 0 at every step: what one batch takes to be learnt by heart."""

    def batch(self, step: int) -> list[Place]:
        return super().batch(0)


def _as_is(batch: Any) -> Any:
    return batch


class DataModule(lightning.LightningDataModule):
    """batch_size: of one optimizer step, all ranks together; eval_batch_size: of one rank, the same share if None.

    Training batches: tokens (b, S) uint8 and rows (b,) int64, each row's place in the global batch. Evaluation: tokens
    (b, S) uint8 and first_scored (b,) int64: positions from there on are scored. overfit: the first training batch over
    and over. mirror: half of the training images are mirrored left to right, half of the windows of audio inverted in
    sign. Ranks share the windows exactly, so one may have a batch more than another: reduce sums after the last batch,
    not in between.
    Without a trainer it is the only rank and starts at step 0. The trainer must not put samplers of its own in
    (`use_distributed_sampler=False`), nor accumulate batches: a batch is a whole step.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        batch_size: int,
        seed: int,
        max_steps: int,
        workers: int = 0,
        eval_batch_size: int | None = None,
        min_context: int = 0,
        eval_limit: int | None = None,
        overfit: bool = False,
        mirror: bool = False,
    ):
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size={batch_size} must be 1 or more")
        if workers < 0:
            raise UserError(f"data.workers={workers} must be 0 or more")
        if mirror:
            check_mirror(spec.name, spec.kind)
        self.spec, self.batch_size, self.seed, self.max_steps, self.mirror = spec, batch_size, seed, max_steps, mirror
        self.workers, self.eval_batch_size = workers, eval_batch_size
        self.min_context, self.eval_limit, self.overfit = min_context, eval_limit, overfit
        self._prepared: Prepared | None = None

    @property
    def prepared(self) -> Prepared:
        if self._prepared is None:
            self._prepared = prepare(self.spec, download=False)
        return self._prepared

    def prepare_data(self):
        prepare(self.spec)

    def setup(self, stage: str | None = None):
        _ = self.prepared

    def train_dataloader(self) -> DataLoader:
        if self.trainer is not None and self.trainer.accumulate_grad_batches != 1:
            raise UserError("trainer.accumulate_grad_batches must be 1: data.batch_size is that of a whole step")
        rank, world = self._place()
        order = TrainingOrder(self.prepared.split("train"), self.spec.kind, self.spec.context, self.seed)
        start = self.trainer.global_step if self.trainer is not None else 0
        batches = FirstBatch if self.overfit else StepSampler
        sampler = batches(
            order,
            batch_size=self.batch_size,
            rank=rank,
            world=world,
            start_step=start,
            steps=self.max_steps,
            mirror=self.mirror,
        )
        return self._loader(TrainingRows(self.prepared, "train"), sampler)

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_loader("test")

    def evaluation_windows(self, split: str) -> EvaluationWindows:
        """The windows of a split, of all ranks together."""
        length = len(self.prepared.split(split))
        return EvaluationWindows(
            length, self.spec.context, self.min_context, kind=self.spec.kind, limit=self.eval_limit
        )

    def evaluation_loader(self, split: str) -> DataLoader:
        """Batches of this rank's windows of a split."""
        rank, world = self._place()
        windows = self.evaluation_windows(split)
        if len(windows) < world:
            raise UserError(f"{split} has {len(windows)} windows for {world} ranks: use at most {len(windows)} devices")
        size = self.eval_batch_size or max(1, self.batch_size // world)
        return self._loader(EvaluationRows(self.prepared, split), EvaluationBatches(windows.shard(rank, world), size))

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(self, rows: Rows, batches) -> DataLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            rows,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=on_gpu,
            persistent_workers=self.workers > 0,
        )
