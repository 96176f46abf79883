"""Datasets as bytes: download, split, order and batches. Knows neither the model nor Hydra."""

from sparse_tx.data.order import StepSampler, TrainingOrder
from sparse_tx.data.prepare import Prepared, prepare
from sparse_tx.data.spec import DataSpec
from sparse_tx.data.windows import EvaluationWindows

__all__ = ["DataModule", "DataSpec", "EvaluationWindows", "Prepared", "StepSampler", "TrainingOrder", "prepare"]


def __getattr__(name: str):
    # Lightning takes seconds to import, and a process that only prepares data does not need it.
    if name == "DataModule":
        from sparse_tx.data.datamodule import DataModule

        return DataModule
    raise AttributeError(f"module 'sparse_tx.data' has no attribute {name!r}")
