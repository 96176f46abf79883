"""enwik8, the first 10^8 bytes of a Wikipedia dump of 2006, or any local file in its place."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sparse_tx.data.download import fetch
from sparse_tx.data.progress import Progress
from sparse_tx.data.source import file_identity, local_path, read_chunks
from sparse_tx.data.spec import DataSpec
from sparse_tx.data.store import SPLITS, Writer
from sparse_tx.errors import UserError

VERSION = 1
# The official address, then DeepAI's copy (as in the README of BlinkDL/RWKV-LM): the unzipped bytes are checked.
URLS = ("https://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip")
MD5 = "a1fa5ffddb56f4953e226637dabbb36a"  # of the unzipped file, as stated at mattmahoney.net/dc/textdata.html
BYTES = 10**8
RULE = "in order: the first 90 percent train, the next 5 percent validation, the rest test"


def split_lengths(length: int) -> tuple[int, int, int]:
    train, validation = length * 90 // 100, length * 5 // 100
    return train, validation, length - train - validation


def smallest_length(context: int) -> int:
    """The shortest file with a whole training window and a byte to validate on."""
    return max(-(-context * 10 // 9), 20)


def identify(spec: DataSpec) -> dict[str, Any]:
    if spec.source is None:
        return {"url": URLS[0], "md5": MD5}
    path = _local_file(spec.source)
    with _open(path) as (_, length):
        if length < smallest_length(spec.context):
            raise UserError(
                f"data.source={spec.source} has {length} bytes: too short for data.context={spec.context}, "
                f"which needs at least {smallest_length(spec.context)}"
            )
    return {"files": file_identity([path])}


def build(spec: DataSpec, writer: Writer, *, download: bool) -> dict[str, Any]:
    path = _local_file(spec.source) if spec.source else _downloaded(spec, download)
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()

    def counted(file: BinaryIO, length: int, progress: Progress) -> Iterator[bytes]:
        for chunk in read_chunks(file, length):
            md5.update(chunk)
            sha256.update(chunk)
            progress.add(len(chunk))
            yield chunk

    try:
        with _open(path) as (file, total), Progress("preparing text", total, "MB", 1e6) as progress:
            for split, length in zip(SPLITS, split_lengths(total), strict=True):
                writer.save(split, (length,), counted(file, length, progress))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        _refuse(spec, path, f"{path} is a broken zip file ({error})")
    if spec.source is None and md5.hexdigest() != MD5:  # damaged since it was downloaded
        _refuse(spec, path, f"{path} does not hold enwik8: md5 {md5.hexdigest()}, expected {MD5}")
    return {
        "source": str(path) if spec.source else URLS[0],
        "is_enwik8": md5.hexdigest() == MD5,
        "md5": md5.hexdigest(),
        "sha256": {"source": sha256.hexdigest()},
        "split_rule": RULE,
    }


def _refuse(spec: DataSpec, path: Path, problem: str):
    if spec.source is not None:
        raise UserError(f"{problem}: give another data.source")
    path.unlink(missing_ok=True)
    raise UserError(f"{problem}; it has been removed: run the command again to download it anew")


def _downloaded(spec: DataSpec, download: bool) -> Path:
    return fetch(
        URLS,
        Path(spec.root).expanduser() / "downloads" / "enwik8.zip",
        what="enwik8",
        check=_not_enwik8,
        download=download,
        manual="Download it elsewhere, or take any text file, and give data.source=FILE (enwik8 or enwik8.zip)",
    )


def _not_enwik8(path: Path) -> str | None:
    """What is wrong with a zip; None if it holds the bytes that the publisher states the md5 of."""
    md5 = hashlib.md5(usedforsecurity=False)
    try:
        with zipfile.ZipFile(path) as archive, archive.open("enwik8") as member:
            for chunk in read_chunks(member):
                md5.update(chunk)
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
        return f"no zip file with enwik8 ({error})"
    return None if md5.hexdigest() == MD5 else f"md5 of the text {md5.hexdigest()} instead of {MD5}"


def _local_file(source: str) -> Path:
    path = local_path(source)
    if not path.is_dir():
        return path
    for name in ("enwik8", "enwik8.zip"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"data.source={source} is a folder without enwik8 or enwik8.zip: give a file")


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The bytes of a file and how many there are; of a zip that holds `enwik8`, that member's."""
    if path.suffix == ".zip" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if "enwik8" in archive.namelist():
                with archive.open("enwik8") as member:
                    yield member, archive.getinfo("enwik8").file_size  # type: ignore[misc]
                return
    elif path.name == "enwik8.zip":
        raise UserError(f"{path} is no zip file: it was cut short, or is something else; remove it and try again")
    with path.open("rb") as file:
        yield file, path.stat().st_size
