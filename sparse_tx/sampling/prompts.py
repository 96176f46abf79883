"""What samples start with: the upper part of images, the start of texts or recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sparse_tx.data.image_files import PICTURES
from sparse_tx.data.recordings import SUFFIXES, read_recording
from sparse_tx.errors import UserError
from sparse_tx.model import ModelSpec


def prompt_files(path: str, kind: str) -> list[Path]:
    """The file named, or those of the kind in the folder named, in order of their names."""
    given = Path(path).expanduser()
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise UserError(f"prompt={path} does not exist: give the path of a file, or of a folder of them")
    suffixes = {"image": PICTURES, "audio": SUFFIXES}.get(kind)
    try:
        files = [p for p in sorted(given.iterdir()) if p.is_file() and not p.name.startswith(".")]
    except OSError as error:
        raise UserError(f"prompt={path} cannot be read: {error.strerror}") from None
    files = [p for p in files if suffixes is None or p.suffix.lower() in suffixes]
    if not files:
        what = f"files ending in {', '.join(suffixes)}" if suffixes is not None else "files"
        raise UserError(f"prompt={path} is a folder without {what}: give one that holds some, or a file")
    return files


def read_prompts(files: list[Path], spec: ModelSpec, length: int, keep: int | None) -> np.ndarray:
    """(U, P) uint8 bytes of U files, of which samples of `length` bytes take one each in turn.

    keep: bytes kept of each; None for the upper half of an image, all of a text or recording.
    """
    if keep is not None and keep >= length:
        raise UserError(f"prompt_length={keep} leaves none of the {length} bytes of a sample to draw: use less")
    prompts = [_read(path, spec, keep) for path in files]
    for path, prompt in zip(files, prompts, strict=True):
        if keep is not None and len(prompt) < keep:
            raise UserError(f"prompt={path} has {len(prompt)} bytes, fewer than prompt_length={keep}: use at most that")
        if len(prompt) >= length:
            raise UserError(
                f"prompt={path} fills all {length} bytes of a sample: give a shorter one, prompt_length or more length"
            )
    sizes = {len(p) for p in prompts}
    if len(sizes) > 1:
        raise UserError(
            f"the prompts in {files[0].parent} have {min(sizes)} to {max(sizes)} bytes, and samples drawn together "
            f"start with as many: set prompt_length={min(sizes)}, or less"
        )
    return np.stack(prompts)


def _read(path: Path, spec: ModelSpec, keep: int | None) -> np.ndarray:
    if spec.kind == "image":
        side = spec.position_shape()[0]
        half = 3 * side * (side // 2)
        return _pixels(path, side).reshape(-1)[: half if keep is None else keep]
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            # Of a text no more than fits: the file may be of any size.
            data = file.read(spec.context if keep is None else keep) if spec.kind == "text" else b""
    except OSError as error:
        raise UserError(f"prompt={path} cannot be read: {error.strerror}") from None
    codes = np.frombuffer(data, np.uint8)
    if spec.kind == "audio":
        codes = read_recording(path, keep)
        size = len(codes)
    if keep is None and not 0 < size < spec.context:
        raise UserError(
            f"prompt={path} has {size} bytes: this model needs 1 to {spec.context - 1}; prompt_length=N takes the "
            "first N of a longer one"
        )
    return codes[:keep]


def _pixels(path: Path, side: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.size != (side, side):
                raise UserError(f"prompt={path} is {image.width} x {image.height}: this model draws {side} x {side}")
            if image.mode.startswith(("I", "F")):
                # Pillow would clip to 255 what lies above.
                raise UserError(f"prompt={path} has more than 8 bits a channel (mode {image.mode}): convert it to RGB")
            if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                raise UserError(f"prompt={path} has transparent pixels, which no bytes stand for: convert it to RGB")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"prompt={path} cannot be read as an image: {error}") from None
