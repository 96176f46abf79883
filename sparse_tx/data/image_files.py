"""The forms in which a set of images lies on a disk: parquet, .npy, .npz (in zip files too), picture files."""

import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_tx.data.images import decode_rgb
from sparse_tx.data.parquet_images import check_shards, read_parquet
from sparse_tx.data.progress import Progress
from sparse_tx.data.unreadable import Unreadable
from sparse_tx.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
FORMS = {".parquet": "parquet", ".npy": "npy", ".npz": "npz", ".zip": "npz"} | dict.fromkeys(PICTURES, "pictures")
SPLIT_NAMES = {"train": "train", "valid": "validation", "validation": "validation", "val": "validation", "test": "test"}
BATCH = 1024


@dataclass(frozen=True)
class ImageSet:
    """Images in one order. form: "parquet", "npy", "npz" or "pictures"."""

    form: str
    paths: list[Path]

    def mapped(self, side: int) -> np.ndarray | None:
        """(N, 3 side side) as it lies on the disk, if one .npy file has it just so."""
        if self.form != "npy" or len(self.paths) > 1:
            return None
        array, planar = _open_npy(self.paths[0], side)
        return None if planar else array.reshape(len(array), -1)

    def read(self, side: int, unreadable: Unreadable, what: str) -> Iterator[np.ndarray]:
        """(n, 3 side side) uint8 at a time: row by row, R G B of a pixel together."""
        if self.form == "parquet":
            yield from read_parquet(self.paths, side, unreadable, what)
            return
        reader = {"npy": _read_npy, "npz": _read_npz, "pictures": _read_pictures}[self.form]
        total = len(self.paths) if self.form == "pictures" else None
        with Progress(f"decoding {what}", total, "images") as progress:
            for chunk in reader(self.paths, side, unreadable):
                progress.add(len(chunk))
                yield chunk


def find(path: Path, told: str) -> dict[str, ImageSet]:
    """The sets "train", "validation" and "test" that a file or folder holds, "train" at least; `told`: as named.

    Whose split a file is in is said by its own name or its folder's (pictures: by the folder's alone): train, valid,
    val, validation or test as a word of it. Without any such name all are for training.
    """
    if path.is_file():
        files = [path] if path.suffix.lower() in FORMS else []
    else:
        files = sorted(_files(path), key=lambda p: _natural(p.relative_to(path).as_posix()))
    if not files:
        raise UserError(
            f"data.source={told} holds no images: expected *.parquet, *.npy, *.npz (also in *.zip), or pictures "
            f"({', '.join(PICTURES[:4])}, ...)"
        )
    forms = sorted({FORMS[file.suffix.lower()] for file in files})
    if len(forms) > 1:
        raise UserError(f"data.source={told} holds images as {' and as '.join(forms)}: give the folder of one of them")
    splits: dict[str | None, list[Path]] = defaultdict(list)
    for file in files:
        splits[_split_of(file.relative_to(path) if path.is_dir() else Path(file.name), forms[0])].append(file)
    if None in splits and len(splits) == 1:
        splits["train"] = splits.pop(None)
    if None in splits:
        named = ", ".join(sorted(s for s in splits if s))
        raise UserError(
            f"data.source={told} has images of {named} and others beside them, such as {splits[None][0]}: "
            "put each in the folder of its split"
        )
    if "train" not in splits:
        raise UserError(f"data.source={told} holds no images for training, only {', '.join(sorted(map(str, splits)))}")
    if forms[0] == "parquet":
        for paths in splits.values():
            check_shards(paths)
    return {str(split): ImageSet(forms[0], paths) for split, paths in splits.items()}


def _files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.suffix.lower() in FORMS and not file.name.startswith(".") and file.is_file():
            yield file


def _natural(name: str) -> list[tuple[str, int]]:
    """train_data_batch_2 before train_data_batch_10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _split_of(path: Path, form: str) -> str | None:
    parts = list(path.parts[:-1])
    if form != "pictures":
        parts.append(path.stem)
    for part in reversed(parts):
        for word in re.findall(r"[a-z]+", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None


def _read_pictures(paths: list[Path], side: int, unreadable: Unreadable) -> Iterator[np.ndarray]:
    images: list[np.ndarray] = []
    for path in paths:
        try:
            images.append(decode_rgb(path.read_bytes(), side, str(path)).reshape(-1))
        except UserError as problem:
            unreadable(problem)
        if len(images) == BATCH:
            yield np.stack(images)
            images = []
    if images:
        yield np.stack(images)


def _read_npy(paths: list[Path], side: int, _: Unreadable) -> Iterator[np.ndarray]:
    for path in paths:
        array, planar = _open_npy(path, side)
        for first in range(0, len(array), BATCH):
            yield _interleaved(array[first : first + BATCH], side, planar)


def _open_npy(path: Path, side: int) -> tuple[np.ndarray, bool]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a whole .npy file: {error}") from error
    return array, _planar(array.shape, array.dtype, side, flat_is_planar=False, where=str(path))


def _read_npz(paths: list[Path], side: int, _: Unreadable) -> Iterator[np.ndarray]:
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                if path.suffix.lower() == ".npz":
                    yield from _arrays(archive, side, str(path))
                    continue
                inside = sorted((n for n in archive.namelist() if n.endswith(".npz")), key=_natural)
                if not inside:
                    raise UserError(f"{path} holds no .npz file")
                for name in inside:
                    with archive.open(name) as file, zipfile.ZipFile(file) as inner:
                        yield from _arrays(inner, side, f"{name} in {path}")
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise UserError(f"{path} is not a whole zip file: {error}") from error


def _arrays(archive: zipfile.ZipFile, side: int, where: str) -> Iterator[np.ndarray]:
    """The images of a .npz: its array `data`, in which Chrabaszcz et al. keep flat rows of red, green, blue planes, or
    its only array of four dimensions. Read as a stream: the published files are some gigabytes each."""
    names = archive.namelist()
    wanted = "data.npy" if "data.npy" in names else "images.npy" if "images.npy" in names else "arr_0.npy"
    if wanted not in names:
        raise UserError(f"{where} has no array data, images or arr_0, but {', '.join(names)}")
    with archive.open(wanted) as file:
        shape, dtype = _header(file, where)
        planar = _planar(shape, dtype, side, flat_is_planar=wanted == "data.npy", where=where)
        size = 3 * side * side
        for first in range(0, shape[0], BATCH):
            count = min(BATCH, shape[0] - first)
            data = file.read(count * size)
            if len(data) != count * size:
                raise UserError(f"{where} breaks off after {first} of {shape[0]} images: get it again")
            yield _interleaved(np.frombuffer(data, np.uint8).reshape(count, *shape[1:]), side, planar)


def _header(file: BinaryIO | Any, where: str) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, EOFError) as error:
        raise UserError(f"{where} holds no array that can be read: {error}") from error
    if fortran:
        raise UserError(f"{where} is in Fortran order: C order is needed")
    return shape, dtype


def _planar(shape: tuple[int, ...], dtype: np.dtype, side: int, *, flat_is_planar: bool, where: str) -> bool:
    """Whether an array of images has the planes of a colour together."""
    if dtype == np.uint8:
        if shape[1:] == (side, side, 3):
            return False
        if shape[1:] == (3, side, side):
            return True
        if shape[1:] == (3 * side * side,):
            return flat_is_planar
    raise UserError(
        f"{where} has shape {shape} of {dtype}: (N, {side}, {side}, 3), (N, 3, {side}, {side}) or "
        f"(N, {3 * side * side}) of uint8 is needed"
    )


def _interleaved(images: np.ndarray, side: int, planar: bool) -> np.ndarray:
    if planar:
        images = images.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images).reshape(len(images), 3 * side * side)
