"""One encoded picture to its bytes."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from sparse_tx.errors import UserError

MODES = {"L": "grey", "LA": "grey", "1": "black and white", "I;16": "grey", "P": "of a palette", "RGBA": "with alpha"}


def decode_rgb(data: bytes | None, side: int, where: str) -> np.ndarray:
    """A picture of side x side RGB pixels as (side, side, 3) uint8. UserError, naming `where`, for any other."""
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            if image.size != (side, side):
                raise UserError(f"{where} is {image.size[0]} x {image.size[1]} pixels: {side} x {side} are needed")
            if image.mode != "RGB":
                raise UserError(f"{where} is {MODES.get(image.mode, 'not RGB')} (mode {image.mode}): RGB is needed")
            return np.asarray(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, TypeError) as error:
        raise UserError(f"{where} cannot be decoded: {error}") from error
