"""The forms in which CIFAR-10 lies on a disk: parquet files, python batch files, the archive of those."""

import gzip
import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tx.data.parquet_images import check_shards, read_parquet
from sparse_tx.data.unreadable import Unreadable
from sparse_tx.errors import UserError

SIDE = 32
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
TRAIN_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
TEST_BATCH = "test_batch"


@dataclass(frozen=True)
class Files:
    form: str  # "parquet", "batches" or "archive" (one file that holds both splits)
    train: list[Path]
    test: list[Path]

    @property
    def all(self) -> list[Path]:
        return self.train + self.test


def find(path: Path, told: str) -> Files:
    """What a file or folder holds; `told` is how the user named it."""
    if path.is_file():
        if path.suffix == ".parquet":
            return Files("parquet", [path], [])
        if path.name.endswith((".tar.gz", ".tgz")):
            return Files("archive", [path], [])
        raise UserError(f"data.source={told} is neither *.parquet nor {ARCHIVE}: give one of these or their folder")
    for pattern in ("train*.parquet", "**/train*.parquet"):
        if train := sorted(path.glob(pattern)):
            test = sorted(path.glob(pattern.replace("train", "test")))
            for files in (train, test):
                check_shards(files)
            return Files("parquet", train, test)
    for folder in (path, path / FOLDER):
        there = [name for name in (*TRAIN_BATCHES, TEST_BATCH) if (folder / name).is_file()]
        if there:
            if missing := sorted({*TRAIN_BATCHES, TEST_BATCH} - set(there)):
                raise UserError(f"data.source={told} lacks {', '.join(missing)}: unpack {ARCHIVE} again")
            return Files("batches", [folder / name for name in TRAIN_BATCHES], [folder / TEST_BATCH])
    if (path / ARCHIVE).is_file():
        return Files("archive", [path / ARCHIVE], [])
    raise UserError(
        f"data.source={told} holds no CIFAR-10: expected train*.parquet and test*.parquet, "
        f"{TRAIN_BATCHES[0]} to {TRAIN_BATCHES[-1]} and {TEST_BATCH}, or {ARCHIVE}"
    )


def read(files: Files, unreadable: Unreadable) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images, (N, 3072) uint8, row by row, R G B of a pixel together.

    unreadable: told of each picture in parquet that cannot be used; a batch file is whole or refused.
    """
    if files.form == "parquet":
        return _read_parquet(files.train, unreadable), _read_parquet(files.test, unreadable)
    if files.form == "batches":
        batches = {path.name: _read_batch(path.read_bytes(), str(path)) for path in files.all}
    else:
        batches = _read_archive(files.train[0])
    return np.concatenate([batches[name] for name in TRAIN_BATCHES]), batches[TEST_BATCH]


def _read_parquet(paths: list[Path], unreadable: Unreadable) -> np.ndarray:
    parts = list(read_parquet(paths, SIDE, unreadable, "CIFAR-10"))
    return np.concatenate(parts) if parts else np.empty((0, 3 * SIDE * SIDE), np.uint8)


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    batches = {}
    try:
        with gzip.open(path) as unzipped, tarfile.open(fileobj=unzipped, mode="r:") as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in (*TRAIN_BATCHES, TEST_BATCH):
                    file = archive.extractfile(member)
                    assert file is not None
                    batches[name] = _read_batch(file.read(), f"{name} in {path}")
            while unzipped.read(1 << 20):  # to the checksum at the end
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} is not a whole archive ({error}): remove it and get it again") from error
    if missing := sorted({*TRAIN_BATCHES, TEST_BATCH} - set(batches)):
        raise UserError(f"{path} lacks {', '.join(missing)}: it is not {ARCHIVE}")
    return batches


class _Plain(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and nothing else a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):
            import _codecs

            return _codecs.encode
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_batch(data: bytes, where: str) -> np.ndarray:
    """A python batch file: rows of 1,024 red, then 1,024 green, then 1,024 blue bytes."""
    try:
        batch = _Plain(io.BytesIO(data), encoding="bytes").load()
        planes = batch[b"data"] if b"data" in batch else batch["data"]
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{where} is not a CIFAR-10 batch file ({type(error).__name__}: {error})") from error
    size = 3 * SIDE * SIDE
    if not isinstance(planes, np.ndarray) or planes.dtype != np.uint8 or planes.shape[1:] != (size,):
        raise UserError(f"{where} holds no rows of {size} bytes")
    return np.ascontiguousarray(planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)).reshape(-1, size)
