"""Local files as a source: whether they are there, who they are, what they hold."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparse_tx.errors import UserError

CHUNK = 1 << 22


def local_path(source: str) -> Path:
    """`data.source` as a path that exists."""
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"data.source={source} is not there: give an existing file or folder")
    return path.resolve()


def file_identity(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Path, size and time of each file: another file, or the same one edited, never meets the old one's cache."""
    found = []
    for path in paths:
        stat = path.stat()
        found.append({"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return found


def read_chunks(file, limit: int | None = None) -> Iterator[bytes]:
    """The next `limit` bytes of an open binary file (all of them if None), a few megabytes at a time."""
    left = limit
    while left is None or left > 0:
        chunk = file.read(CHUNK if left is None else min(CHUNK, left))
        if not chunk:
            return
        if left is not None:
            left -= len(chunk)
        yield chunk


def file_digest(path: Path, kind: str) -> str:
    """The "md5" or "sha256" of a file, in hexadecimal."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        for chunk in read_chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    return file_digest(path, "sha256")


def listing_identity(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """The same as `file_identity` in a few words, for folders of a million files."""
    digest, count = hashlib.sha256(), 0
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        count += 1
    return {"folder": str(folder), "files": count, "listing": digest.hexdigest()}
