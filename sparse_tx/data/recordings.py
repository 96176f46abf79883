"""One recording to its bytes: mono, 12 kHz, 8-bit mu-law."""

import importlib
import io
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_tx.data.mu_law import RATE, encode_mu_law
from sparse_tx.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")
BLOCK = 1 << 18  # frames at a time: a recording of hours takes the memory of seconds
OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the longest one
STREAMED = 0x7FFF0000  # a WAV header written before the length was known claims about 2^31 or 2^32 bytes


def read_recording(path: str | Path, at_most: int | None = None) -> np.ndarray:
    """A recording as (N,) uint8 codes, of which no more is read than the first `at_most` need. UserError, naming it, if
    it cannot be read so far."""
    pieces: list[np.ndarray] = []
    for piece in stream_recording(Path(path), str(path)):
        pieces.append(piece)
        if at_most is not None and sum(map(len, pieces)) >= at_most:
            break
    return np.concatenate(pieces)[:at_most]


def stream_recording(source: Path | BinaryIO, where: str) -> Iterator[np.ndarray]:
    """The codes of a recording in pieces; `source` is a path or an open file that can seek, `where` names it.

    Channels are averaged. Other rates are resampled by soxr at its very high quality (a linear-phase filter), so that
    nothing above 6 kHz folds back: unlike scipy's it works on a stream, and unlike torchaudio's it comes without a
    release of torch to match.
    """
    soundfile, soxr = _libraries()
    try:
        _check_ogg(source, where)
        with soundfile.SoundFile(source) as file:
            _check_whole(file.extra_info, where)
            resampler = soxr.ResampleStream(file.samplerate, RATE, 1, dtype="float32", quality="VHQ")
            frames = 0
            # Not file.blocks: at the end of a file that was cut short it yields memory that nothing was read into.
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise UserError(f"{where} holds samples that are not numbers (frames {frames} and on)")
                frames += len(block)
                yield encode_mu_law(resampler.resample_chunk(block.mean(axis=1)))
            if frames == 0:  # also what libsndfile makes of Ogg without its last page
                raise UserError(f"{where} holds no sound, or breaks off: it has no samples")
            # MP3 counts its frames in advance, give or take a few of them.
            if frames + file.samplerate // 10 < file.frames:
                raise UserError(f"{where} breaks off after {frames} of {file.frames} frames: get it again")
            yield encode_mu_law(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{where} cannot be read as a recording: {error}") from error


def probe_recording(path: Path):
    """UserError for what can be told without reading a recording to its end."""
    soundfile, _ = _libraries()
    try:
        _check_ogg(path, str(path))
        with soundfile.SoundFile(path) as file:
            _check_whole(file.extra_info, str(path))
            if file.frames == 0:
                raise UserError(f"{path} holds no sound, or breaks off: it has no samples")
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a recording: {error}") from error


def decoder() -> str:
    """What recordings are decoded and resampled by: another release may give other bytes for Ogg and MP3. UserError,
    naming the package, if one is missing."""
    soundfile, soxr = _libraries()
    return f"soundfile {soundfile.__version__} (libsndfile {soundfile.__libsndfile_version__}), soxr {soxr.__version__}"


def _libraries() -> tuple[Any, Any]:
    found = []
    for name in ("soundfile", "soxr"):
        try:
            found.append(importlib.import_module(name))
        except (ImportError, OSError) as error:  # OSError: soundfile without its libsndfile
            raise UserError(
                f"recordings need the package {name}, which cannot be imported ({error}): pip install soundfile soxr"
            ) from error
    return found[0], found[1]


def _check_ogg(source: Path | BinaryIO, where: str):
    """libsndfile reads an Ogg file that was cut short as a shorter one: its marked last page must be there, whole."""
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        start = file.read(4)
        file.seek(max(0, file.seek(0, io.SEEK_END) - 2 * OGG_PAGE))  # some bytes may follow the last page
        tail = file.read()
        file.seek(0)
    if start != b"OggS":
        return
    page = tail[max(0, tail.rfind(b"OggS\0")) :]
    # RFC 3533: flags at 5, of which 4 is the end; at 26 how many segments follow, at 27 and on how long they are.
    whole = len(page) > 27 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    if not (whole and page[5] & 4):
        raise UserError(f"{where} breaks off: the last page of its Ogg stream is missing. Get it again")


def _check_whole(log: str, where: str):
    """libsndfile reads WAV, RF64 and AIFF files that were cut short as shorter ones, and says so only in its log."""
    match = re.search(r"^\s*(?:data|SSND|Riff size) +: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if match is not None and int(match[2]) < int(match[1]) < STREAMED:
        raise UserError(f"{where} breaks off after {match[2]} of {match[1]} bytes of sound: get it again")
