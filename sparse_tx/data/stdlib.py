"""The default data: the standard library of the Python that runs this, as text, with no download."""

import hashlib
import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

from sparse_tx.data.source import file_sha256, local_path
from sparse_tx.data.spec import DataSpec
from sparse_tx.data.store import SPLITS, Writer
from sparse_tx.errors import UserError

VERSION = 2
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
RULE = (
    "whole files: the first 8 bytes of the md5 of the path below the library's folder, as a fraction of 2^64: "
    "below 0.90 train, below 0.95 validation, the rest test; sorted by path, joined as they are"
)


def library_folder(spec: DataSpec) -> Path:
    return local_path(spec.source) if spec.source else Path(sysconfig.get_path("stdlib")).resolve()


def library_files(folder: Path) -> list[str]:
    """The *.py files below a folder as sorted relative paths, leaving out installed packages and tests.

    A folder is left out by its own name: every `test` and `tests`, wherever it lies (`lib2to3/tests` too), and
    `site-packages` or Debian's `dist-packages`.
    """
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED]
        for name in files:
            path = Path(place, name)
            if name.endswith(".py") and path.is_file():
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def split_of(path: str) -> str:
    share = int.from_bytes(hashlib.md5(path.encode(), usedforsecurity=False).digest()[:8], "big") / 2**64
    return "train" if share < 0.90 else "validation" if share < 0.95 else "test"


def identify(spec: DataSpec) -> dict[str, Any]:
    folder = library_folder(spec)
    files = library_files(folder)
    if missing := set(SPLITS) - {split_of(path) for path in files}:
        why = "" if spec.source else ": this Python comes without its library as source"
        raise UserError(
            f"too few *.py files in {folder} ({len(files)}; none for {', '.join(sorted(missing))}){why}; give a folder "
            "of Python files by data.source=FOLDER, or text of any kind by data=enwik8 data.source=FILE"
        )
    # By content: another release, or the same one elsewhere, is told by its bytes and not by its place.
    return {"files": [[path, file_sha256(folder / path)] for path in files]}


def build(spec: DataSpec, writer: Writer, *, download: bool) -> dict[str, Any]:
    folder = library_folder(spec)
    files = library_files(folder)
    whole = hashlib.sha256()
    counts = {}
    for split in SPLITS:
        mine = [(folder / path).read_bytes() for path in files if split_of(path) == split]
        for data in mine:
            whole.update(data)
        writer.save(split, (sum(map(len, mine)),), mine)
        counts[split] = len(mine)
    return {
        "source": str(folder),
        "python": platform.python_version(),
        "files": counts,
        "split_rule": RULE,
        "sha256": {"source": whole.hexdigest()},
    }
