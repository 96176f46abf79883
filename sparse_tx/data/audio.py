"""Recordings as bytes: mono, 12 kHz, 8-bit mu-law; whole recordings are held out."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_tx.data.download import fetch
from sparse_tx.data.hub import HubSet, hub_set
from sparse_tx.data.mu_law import RATE
from sparse_tx.data.progress import Progress
from sparse_tx.data.recordings import SUFFIXES, decoder, probe_recording, stream_recording
from sparse_tx.data.source import file_identity, file_sha256, listing_identity, local_path
from sparse_tx.data.spec import DataSpec
from sparse_tx.data.store import Writer
from sparse_tx.data.unreadable import Unreadable
from sparse_tx.errors import UserError

VERSION = 2
# MusicNet (Thickstun, Harchaoui, Kakade 2017): 330 recordings of classical music, 34 hours, freely licensed (Creative
# Commons or public domain, by recording; see musicnet_metadata.csv at the same place), 11.1 GB. Zenodo's record, then
# the authors' own page.
URLS = (
    "https://zenodo.org/records/5120004/files/musicnet.tar.gz",
    "https://homes.cs.washington.edu/~thickstn/media/musicnet.tar.gz",
)
MANUAL = (
    "Give a folder of recordings (wav, flac, ogg, mp3) by data.source=FOLDER, or musicnet.tar.gz, got on another "
    "machine, by data.source=FILE. The recordings of Child et al. 2019 were never published"
)
ARCHIVES = (".tar", ".tar.gz", ".tgz")
RULE = (
    "whole recordings, in order of the sha256 of their name (the path below the folder): the first {k} test, the next "
    "{k} validation, the rest train; joined in that order"
)

Named = Iterator[tuple[str, Path | BinaryIO]]


def identify(spec: DataSpec) -> dict[str, Any]:
    if spec.source is None:
        return {"url": URLS[0], "unreadable": spec.unreadable}
    if (hub := hub_set(spec.source)) is not None:
        return {"hub": str(hub), "unreadable": spec.unreadable}
    path = local_path(spec.source)
    if path.is_dir():
        return listing_identity(path, _files(path)) | {"unreadable": spec.unreadable}
    return {"files": file_identity([_archive(path)]), "unreadable": spec.unreadable}


def build(spec: DataSpec, writer: Writer, *, download: bool) -> dict[str, Any]:
    # First: a missing package is no fault of a recording, to be told of each or skipped with it.
    told: dict[str, Any] = {"decoder": decoder()}
    named, count = _recordings(spec, download, told)
    unreadable = Unreadable(spec.unreadable)
    codes = writer.folder / "scratch"
    where = _decode(named, count, codes, unreadable)
    unreadable.report()
    splits = _split(sorted(where, key=_name_hash), told["source"])
    whole = np.memmap(codes, np.uint8, mode="r")
    for split, names in splits.items():
        pieces = [slice(*where[name]) for name in names]
        writer.save(split, (sum(p.stop - p.start for p in pieces),), (whole[p] for p in pieces))
    del whole
    codes.unlink()
    return told | {
        "encoding": f"mono, {RATE} Hz, 8-bit mu-law",
        "recordings": {s: [{"name": n, "samples": where[n][1] - where[n][0]} for n in splits[s]] for s in splits},
        "split_rule": RULE.format(k=len(splits["test"])),
        **unreadable.meta(),
    }


def _recordings(spec: DataSpec, download: bool, told: dict[str, Any]) -> tuple[Named, int | None]:
    """Every recording by name, in any order, and how many if that is known; `told` gets the source."""
    if (hub := hub_set(spec.source)) is not None:
        if not download:
            raise UserError(f"{hub} is not prepared in data.root={spec.root} and downloads are off")
        told["source"] = str(hub)
        return _from_hub(hub), None
    if spec.source is not None and (path := local_path(spec.source)).is_dir():
        files = _files(path)
        if spec.unreadable == "refuse":
            _refuse_broken(files)
        told |= {
            "source": str(path),
            "sha256": {"source": {n.relative_to(path).as_posix(): file_sha256(n) for n in files}},
        }
        return ((file.relative_to(path).as_posix(), file) for file in files), len(files)
    if spec.source is not None:
        archive = _archive(local_path(spec.source))
    else:
        target = Path(spec.root).expanduser() / "downloads" / "musicnet.tar.gz"
        archive = fetch(URLS, target, what="MusicNet (11 GB)", manual=MANUAL, download=download)
    told |= {"source": URLS[0] if spec.source is None else str(archive), "sha256": {"source": file_sha256(archive)}}
    return _from_archive(archive), None


def _files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if _is_recording(p.name) and p.is_file())
    if not files:
        raise UserError(f"data.source={folder} holds no recordings: expected {', '.join(SUFFIXES)}")
    return files


def _refuse_broken(files: list[Path]):
    """Names every file that cannot be opened, before any is decoded."""
    problems = []
    for file in files:
        try:
            probe_recording(file)
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError(f"{'; '.join(problems)}; data.unreadable=skip goes on without such files")


def _archive(path: Path) -> Path:
    if not path.name.endswith(ARCHIVES):
        raise UserError(
            f"data.source={path} is one file: give a folder of recordings, or a {' or '.join(ARCHIVES)} of them"
        )
    return path


def _is_recording(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _from_archive(path: Path) -> Named:
    """Nothing is unpacked: each recording is read into memory and no further."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and _is_recording(Path(member.name).name):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield member.name, io.BytesIO(file.read())
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} is not a whole archive ({error}): remove it and get it again") from error


def _from_hub(hub: HubSet) -> Named:
    """The column `audio` of every split, still encoded."""
    for split in hub.splits():
        row = 0
        for table in hub.tables(split):
            if "audio" not in table.schema.names:
                raise UserError(f"{hub} has no column audio, but {', '.join(table.schema.names)}")
            for value in table.column("audio").to_pylist():
                data = value.get("bytes") if isinstance(value, dict) else value
                yield f"{split}/{row:08d}", io.BytesIO(data or b"")
                row += 1


def _decode(named: Named, count: int | None, path: Path, unreadable: Unreadable) -> dict[str, tuple[int, int]]:
    """Writes the codes of all recordings one after another; where each begins and ends."""
    where: dict[str, tuple[int, int]] = {}
    with Progress("reading recordings", count, "recordings") as progress, path.open("wb") as file:
        for name, source in named:
            first = file.tell()
            try:
                for piece in stream_recording(source, str(source) if isinstance(source, Path) else name):
                    file.write(piece.data)
                where[name] = first, file.tell()
            except UserError as problem:
                unreadable(problem)
                file.seek(first)
                file.truncate()
            progress.add(1)
    return where


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _split(names: list[str], source: str) -> dict[str, list[str]]:
    if len(names) < 3:
        raise UserError(
            f"data.source={source} has {len(names)} recordings that can be read: at least 3 are needed, one each to "
            "train on, to validate on and to test on"
        )
    k = max(1, len(names) * 5 // 100)
    return {"train": names[2 * k :], "validation": names[k : 2 * k], "test": names[:k]}
