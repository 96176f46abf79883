"""ImageNet at 64 x 64 in its two published versions, which are never mixed up; or images of one's own.

They differ in how ImageNet was made small, and a number on one says nothing about the other: i-DODE (thu-ml/i-DODE)
gets 3.69 bits/dim on the first and 3.43 on the second at 32 x 32.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tx.data import image_files
from sparse_tx.data.download import fetch
from sparse_tx.data.hub import HubSet, hub_set
from sparse_tx.data.image_files import ImageSet
from sparse_tx.data.parquet_images import decode_rows, image_column
from sparse_tx.data.progress import Progress
from sparse_tx.data.source import file_identity, file_sha256, listing_identity, local_path
from sparse_tx.data.spec import DataSpec
from sparse_tx.data.store import Writer
from sparse_tx.data.unreadable import Unreadable
from sparse_tx.errors import UserError

VERSION = 1
NAMES = {
    "oord": "version oord: van den Oord et al. 2016, the paper's",
    "box": "version box: box-resized, Chrabaszcz et al. 2017, not the paper's",
    "other": "images of your own, neither published version",
}
# How many images the published versions have: oord 1,281,149 and 49,999 (tensorflow/datasets, downsampled_imagenet and
# issue 4662), box 1,281,167 and 50,000 as all of ILSVRC 2012 (arXiv 1707.08819).
COUNTS = {"oord": (1_281_149, 49_999), "box": (1_281_167, 50_000)}
# oord: the address in openai/distribution_augmentation (datasets.py); its own, image-net.org/small, is gone.
OORD = "https://openaipublic.blob.core.windows.net/distribution-augmentation-assets/"
# box: the addresses that tensorflow/datasets lists (imagenet_resized). Neither publisher states a hash: that of the
# first download is recorded, and a later change refused.
BOX = "https://image-net.org/data/downsample/"
FILES = {
    "oord": [OORD + name for name in ("imagenet64-train.npy", "imagenet64-valid.npy")],
    "box": [BOX + f"Imagenet64_{part}_npz.zip" for part in ("train_part1", "train_part2", "val")],
}
MANUAL = {
    "oord": (
        "Get train_64x64 and valid_64x64 from https://academictorrents.com/details/"
        "96816a530ee002254d29bf7a61c0c158d3dedc3b, unpack both into one folder and give data.source=FOLDER. Any other "
        "images of 64 x 64 work too, and data.version=box is the version that is easier to get"
    ),
    "box": (
        "Log in at https://image-net.org/download-images, get the three npz files of Downsampled ImageNet 64x64 and "
        "give data.source=FOLDER data.version=box"
    ),
}
HELD_OUT = 50_000  # as in openai/distribution_augmentation: 1,231,149 of van den Oord's images train
RULES = {
    "official": "test: the official validation set; validation: the last {k} training images, in the source's order",
    "given": "as the source has them",
    "one": "test: the source's {name} set; validation: the {k} training images with the smallest sha256 of their bytes",
    "none": "by the sha256 of an image's bytes: the {k} smallest test, the next {k} validation, the rest train",
}

Plan = dict[str, tuple[np.ndarray, np.ndarray]]  # of a split: an array of images, and which of them


def identify(spec: DataSpec) -> dict[str, Any]:
    if spec.source is None:
        return {"version": _wanted(spec), "urls": FILES[_wanted(spec)]}
    told: dict[str, Any] = {"version": spec.version, "side": spec.side, "unreadable": spec.unreadable}
    if (hub := hub_set(spec.source)) is not None:
        return told | {"hub": str(hub)}
    path = local_path(spec.source)
    paths = [p for found in image_files.find(path, spec.source).values() for p in found.paths]
    return told | (listing_identity(path, paths) if path.is_dir() else {"files": file_identity(paths)})


def build(spec: DataSpec, writer: Writer, *, download: bool) -> dict[str, Any]:
    assert spec.side is not None
    unreadable = Unreadable(spec.unreadable)
    scratch = writer.folder / "scratch"
    scratch.mkdir()
    arrays: dict[str, np.ndarray] = {}
    told: dict[str, Any] = {}
    if (hub := hub_set(spec.source)) is not None:
        if not download:
            raise UserError(f"{hub} is not prepared in data.root={spec.root} and downloads are off")
        form, source = "hub", str(hub)
        for name, split in _hub_splits(hub).items():
            arrays[split] = _decoded(scratch / split, _hub_images(hub, name, spec.side, unreadable), spec.side)
    else:
        sets = _downloaded(spec, download) if spec.source is None else _local(spec.source)
        form = sets["train"].form
        source = str(local_path(spec.source)) if spec.source else {"oord": OORD, "box": BOX}[_wanted(spec)]
        for split, found in sets.items():
            array = found.mapped(spec.side)
            if array is None:
                array = _decoded(scratch / split, found.read(spec.side, unreadable, f"{split} images"), spec.side)
            arrays[split] = array
        if form != "pictures":
            paths = [path for found in sets.values() for path in found.paths]
            told["sha256"] = {"source": {f"{path.parent.name}/{path.name}": file_sha256(path) for path in paths}}
    unreadable.report()
    version = _version(spec, form, {split: len(array) for split, array in arrays.items()})
    plan, rule = _plan(arrays, version, source)
    for split, (array, rows) in plan.items():
        writer.save(split, (len(rows), array.shape[1]), (array[rows[k : k + 1024]] for k in range(0, len(rows), 1024)))
    del arrays, plan
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()
    return told | {
        "source": source,
        "version": version,
        "version_name": NAMES[version],
        "split_rule": rule,
        **unreadable.meta(),
    }


def _wanted(spec: DataSpec) -> str:
    """The version to download."""
    return spec.version or "oord"


def _local(source: str) -> dict[str, ImageSet]:
    return image_files.find(local_path(source), source)


def _downloaded(spec: DataSpec, download: bool) -> dict[str, ImageSet]:
    version = _wanted(spec)
    folder = Path(spec.root).expanduser() / "downloads" / f"imagenet64-{version}"
    for url in FILES[version]:
        what = f"ImageNet64 ({NAMES[version]})"
        fetch([url], folder / url.rpartition("/")[2], what=what, manual=MANUAL[version], download=download)
    return image_files.find(folder, str(folder))


def _hub_splits(hub: HubSet) -> dict[str, str]:
    """The splits there by name, and what each is here."""
    names = hub.splits()
    if "train" not in names:
        raise UserError(f"{hub} has no train split, but {', '.join(names)}")
    return {name: image_files.SPLIT_NAMES[name] for name in names if name in image_files.SPLIT_NAMES}


def _hub_images(hub: HubSet, split: str, side: int, unreadable: Unreadable) -> Iterator[np.ndarray]:
    row = 0
    with Progress(f"streaming {split} images", None, "images") as progress:
        for table in hub.tables(split):
            column = table.column(image_column(table.schema.names, str(hub)))
            yield decode_rows(column, side, unreadable, f"{split} of {hub}", row)
            row += len(table)
            progress.add(len(table))


def _decoded(path: Path, chunks: Iterator[np.ndarray], side: int) -> np.ndarray:
    """All images as one array on disk: how many there are, and which are held out, is known only at the end."""
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk).data)
        size = file.tell()
    shape = (-1, 3 * side * side)
    return np.memmap(path, np.uint8, mode="r").reshape(shape) if size else np.empty((0, shape[1]), np.uint8)


def _version(spec: DataSpec, form: str, counts: dict[str, int]) -> str:
    """Which version a source holds: as told, unless its counts or form say otherwise; "other" if nothing tells."""
    held_out = counts.get("validation", counts.get("test"))
    if spec.source is None:
        version = _wanted(spec)
        if (counts["train"], held_out) != COUNTS[version]:
            raise UserError(
                f"what was downloaded for {NAMES[version]} has {counts['train']} training and {held_out} held-out "
                f"images, not {COUNTS[version]}: remove it from {spec.root} and run the command again"
            )
        return version
    for version, (train, valid) in COUNTS.items():
        sure = version == "oord" or form == "npz"  # any other shrinking of ImageNet has the counts of box
        if counts["train"] != train and held_out != valid:
            continue
        if spec.version not in (None, version):
            raise UserError(
                f"data.version={spec.version} does not fit data.source={spec.source}: its {counts['train']} training "
                f"and {held_out} held-out images are those of {NAMES[version]}; leave data.version out"
            )
        if sure or spec.version is not None:
            return version
    return spec.version or "other"


def _plan(arrays: dict[str, np.ndarray], version: str, source: str) -> tuple[Plan, str]:
    train = arrays["train"]
    rows = np.arange(len(train))
    held_out = {name: arrays[name] for name in ("validation", "test") if name in arrays}
    if len(train) < (3 if not held_out else 2):
        raise UserError(f"{source} has {len(train)} training images that can be used: at least 3 are needed")
    k = min(HELD_OUT, max(1, len(train) // 25))
    if version != "other":
        test = held_out.get("validation", held_out.get("test", train[:0]))
        return _splits((train, rows[:-k]), (train, rows[-k:]), test), RULES["official"].format(k=k)
    if len(held_out) == 2:
        validation_set = held_out["validation"]
        return _splits((train, rows), (validation_set, _all(validation_set)), held_out["test"]), RULES["given"]
    by_hash = np.array(sorted(rows, key=[hashlib.sha256(image).digest() for image in train].__getitem__))
    if held_out:
        ((name, test),) = held_out.items()
        validation, rest = np.sort(by_hash[:k]), np.sort(by_hash[k:])
        return _splits((train, rest), (train, validation), test), RULES["one"].format(name=name, k=k)
    k = max(1, len(train) * 5 // 100)
    test_rows, validation, rest = (np.sort(part) for part in np.split(by_hash, [k, 2 * k]))
    plan = {"train": (train, rest), "validation": (train, validation), "test": (train, test_rows)}
    return plan, RULES["none"].format(k=k)


def _splits(train: tuple, validation: tuple, test: np.ndarray) -> Plan:
    return {"train": train, "validation": validation, "test": (test, _all(test))}


def _all(array: np.ndarray) -> np.ndarray:
    return np.arange(len(array))
