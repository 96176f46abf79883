"""One recording to its bytes: mono, 12 kHz, 8-bit mu-law."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_tx.data.mu_law import RATE, encode_mu_law
from sparse_tx.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")
BLOCK = 1 << 18  # frames at a time: a recording of hours takes the memory of seconds
STREAMED = 0xFFFFFF00  # a WAV header written before the length was known claims about 2^32 bytes


def read_recording(path: str | Path) -> np.ndarray:
    """A whole recording as (N,) uint8 codes. UserError, naming it, if it cannot be read to its end."""
    return np.concatenate(list(stream_recording(Path(path), str(path))))


def stream_recording(source: Path | BinaryIO, where: str) -> Iterator[np.ndarray]:
    """The codes of a recording in pieces; `source` is a path or an open file that can seek, `where` names it.

    Channels are averaged. Other rates are resampled by soxr at its very high quality (a linear-phase filter), so that
    nothing above 6 kHz folds back: unlike scipy's it works on a stream, and unlike torchaudio's it comes without a
    release of torch to match.
    """
    soundfile, soxr = _libraries()
    try:
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


def _libraries() -> tuple[Any, Any]:
    try:
        import soundfile
        import soxr
    except (ImportError, OSError) as error:  # OSError: soundfile without its libsndfile
        raise UserError(f"recordings need soundfile and soxr ({error}): pip install soundfile soxr") from error
    return soundfile, soxr


def _check_whole(log: str, where: str):
    """libsndfile reads a WAV file that was cut short as a shorter one, and says so only in its log."""
    match = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if match is not None and int(match[2]) < int(match[1]) < STREAMED:
        raise UserError(f"{where} breaks off after {match[2]} of {match[1]} bytes of sound: get it again")
