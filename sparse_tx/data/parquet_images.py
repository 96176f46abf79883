"""Images in parquet files, as the hub keeps them: an encoded picture a row, or its pixels as nested lists."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tx.data.images import decode_rgb
from sparse_tx.data.progress import Progress
from sparse_tx.data.unreadable import Unreadable
from sparse_tx.errors import UserError

COLUMNS = ("img", "image", "jpg", "png")
BATCH = 1024


def check_shards(files: list[Path]):
    """Every one of NAME-00000-of-00003.parquet and so on."""
    for path in files:
        if match := re.search(r"-of-(\d+)\.parquet$", path.name):
            alike = [other for other in files if other.name.endswith(match[0])]
            if len(alike) != int(match[1]):
                raise UserError(f"{path.parent} holds {len(alike)} of {int(match[1])} files *{match[0]}: get the rest")


def read_parquet(paths: list[Path], side: int, unreadable: Unreadable, what: str) -> Iterator[np.ndarray]:
    """(n, 3 side side) uint8 at a time, row by row, R G B of a pixel together, in the files' order."""
    import pyarrow
    import pyarrow.parquet as parquet

    with Progress(f"decoding {what}", None, "images") as progress:
        for path in paths:
            row = 0
            try:
                with parquet.ParquetFile(path) as file:
                    column = image_column(file.schema_arrow.names, str(path))
                    for batch in file.iter_batches(batch_size=BATCH, columns=[column]):
                        yield decode_rows(batch.column(0), side, unreadable, str(path), row)
                        row += batch.num_rows
                        progress.add(batch.num_rows)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{path} is not a whole parquet file: {str(error).splitlines()[0]}") from error


def image_column(names: list[str], where: str) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    raise UserError(
        f"{where} has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, but {', '.join(names) or 'none'}"
    )


def decode_rows(column: Any, side: int, unreadable: Unreadable, where: str, first: int) -> np.ndarray:
    """A pyarrow column of pictures, the rows `first` and on of `where`, as (n, 3 side side)."""
    import pyarrow

    if isinstance(column, pyarrow.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type):
        return _pixels(column, side, f"{where}, images {first} and on,")
    images = []
    for offset, value in enumerate(column.to_pylist()):
        data = value.get("bytes") if isinstance(value, dict) else value
        try:
            images.append(decode_rgb(data, side, f"image {first + offset} of {where}").reshape(-1))
        except UserError as problem:
            unreadable(problem)
    return np.stack(images) if images else np.empty((0, 3 * side * side), np.uint8)


def _pixels(column: Any, side: int, where: str) -> np.ndarray:
    """Nested lists, as `datasets` writes Array3D: rows of pixels of three bytes."""
    import pyarrow.compute as compute

    rows, shape = len(column), []
    while hasattr(column.type, "value_type"):
        lengths = set(compute.list_value_length(column).to_pylist())
        shape.append(lengths.pop() if len(lengths) == 1 else None)
        column = column.flatten()
    if shape != [side, side, 3] or str(column.type) != "uint8" or column.null_count:
        raise UserError(f"{where} are lists of shape {shape} of {column.type}: [{side}, {side}, 3] of uint8 is needed")
    return column.to_numpy(zero_copy_only=False).reshape(rows, 3 * side * side)
