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
from sparse_tx.errors import UserError

VERSION = 1
URLS = ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",)
MD5 = "c58f30108f718f92721af3b95e74349a"  # as stated at www.cs.toronto.edu/~kriz/cifar.html
RULE = (
    "validation: the 2,000 training images with the smallest sha256 of their 3,072 bytes (row by row, R G B of a pixel "
    "together), 1 in 25 of a set smaller than 50,000; every split in the order of that hash"
)


def identify(spec: DataSpec) -> dict[str, Any]:
    if spec.source is None:
        return {"url": URLS[0], "md5": MD5}
    files = cifar10_files.find(local_path(spec.source), spec.source)
    return {"files": file_identity(files.all)}


def build(spec: DataSpec, writer: Writer, *, download: bool) -> dict[str, Any]:
    if spec.source is None:
        archive = fetch(
            URLS,
            Path(spec.root).expanduser() / "downloads" / "cifar-10-python.tar.gz",
            what="CIFAR-10",
            md5=MD5,
            download=download,
            manual=(
                "Get cifar-10-python.tar.gz or the hub's parquet files (uoft-cs/cifar10) on another machine and give "
                "data.source=PATH, the archive or the folder"
            ),
        )
        files = cifar10_files.Files("archive", [archive], [])
    else:
        files = cifar10_files.find(local_path(spec.source), spec.source)
    train, test = cifar10_files.read(files)
    if len(train) < 2:
        raise UserError(f"data.source={spec.source} has {len(train)} training images: at least 2 are needed")
    train, test = _by_hash(train), _by_hash(test)
    held_out = min(2000, max(1, len(train) // 25))
    for split, images in (("validation", train[:held_out]), ("train", train[held_out:]), ("test", test)):
        writer.save(split, images.shape, np.array_split(images, max(1, len(images) // 4096)))
    return {
        "source": URLS[0] if spec.source is None else str(local_path(spec.source)),
        "sha256": {"source": {path.name: file_sha256(path) for path in files.all}},
        "split_rule": RULE,
    }


def _by_hash(images: np.ndarray) -> np.ndarray:
    """In the order of their hashes: the same array from every source, however it was ordered."""
    hashes = [hashlib.sha256(image.tobytes()).digest() for image in images]
    return images[sorted(range(len(images)), key=hashes.__getitem__)]
