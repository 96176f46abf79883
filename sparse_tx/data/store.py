"""Prepared arrays on disk: made once, in a folder named by a hash of what made them, put in place by one rename."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tx.data.lock import exclusive
from sparse_tx.errors import UserError

SPLITS = ("train", "validation", "test")
FORMAT = 1  # of the folder: raise it when its files change their meaning


class Writer:
    """Writes the splits of one dataset into a folder and keeps their sizes and hashes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, list[int]] = {}
        self.sha256: dict[str, str] = {}

    def save(self, split: str, shape: tuple[int, ...], chunks: Iterable[np.ndarray | bytes]):
        """Writes the chunks one after another as one uint8 array of this shape.

        By ordinary writes, not through a memory map: a full disk is then an error and not a fatal signal.
        """
        digest, written = hashlib.sha256(), 0
        with array_path(self.folder, split).open("xb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(int(n) for n in shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                data = chunk if isinstance(chunk, bytes) else np.ascontiguousarray(chunk).reshape(-1).data
                file.write(data)
                digest.update(data)
                written += len(data)
            file.flush()
            os.fsync(file.fileno())
        wanted = int(np.prod(shape, dtype=np.int64))
        if written != wanted:
            raise UserError(f"the source changed while it was read: {split} got {written} bytes of {wanted}; try again")
        self.shapes[split] = [int(n) for n in shape]
        self.sha256[split] = digest.hexdigest()


Build = Callable[[Writer], dict[str, Any]]


def array_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.npy"


def open_array(folder: Path, split: str) -> np.ndarray:
    """The split as a read-only memory map (an empty split, which cannot be mapped, as an empty array)."""
    path = array_path(folder, split)
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return np.load(path, mmap_mode="r" if np.prod(shape) else None)


def stored(root: Path, name: str, identity: dict[str, Any], build: Build) -> tuple[Path, dict[str, Any]]:
    """The folder of what `identity` makes and its meta.json, built now if it is not there whole.

    identity: plain JSON data that decides the bytes. build: writes the splits, returns what else meta.json says.
    """
    key = hashlib.sha256(json.dumps([FORMAT, identity], sort_keys=True).encode()).hexdigest()[:16]
    parent = root / "prepared"
    folder = parent / f"{name}-{key}"
    meta = read_whole(folder)
    if meta is not None:
        return folder, meta
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with exclusive(parent / f"{folder.name}.lock", f"preparing {name}") as alone:
            meta = read_whole(folder)  # another process may have made it meanwhile
            if meta is None:
                if alone:
                    _sweep(folder)
                meta = _make(folder, name, identity, build)
    except OSError as error:
        remedy = ": make room, or give data.root another folder" if error.errno == errno.ENOSPC else ""
        raise UserError(f"cannot prepare {name} in data.root={root}: {error}{remedy}") from error
    return folder, meta


def read_whole(folder: Path) -> dict[str, Any] | None:
    """meta.json, if the folder holds all that it promises: every array there and of its full size."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for split in SPLITS:
            if list(open_array(folder, split).shape) != meta["shapes"][split]:
                return None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return meta


def _make(folder: Path, name: str, identity: dict[str, Any], build: Build) -> dict[str, Any]:
    temporary = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        writer = Writer(temporary)
        told = build(writer)
        meta = {"name": name, **told, "counts": {s: writer.shapes[s][0] for s in SPLITS}}
        meta |= {"shapes": writer.shapes, "sha256": {**told.get("sha256", {}), **writer.sha256}, "made_from": identity}
        with (temporary / "meta.json").open("x") as file:
            json.dump(meta, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists() and read_whole(folder) is None:
            shutil.rmtree(folder)  # damaged since it was made
        try:
            temporary.rename(folder)
        except OSError:
            other = read_whole(folder)  # without a lock another process may have been first: its bytes are the same
            if other is None:
                raise
            return other
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def _sweep(folder: Path):
    """Removes what killed processes left. Only the holder of the lock may: no other one is writing then."""
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
