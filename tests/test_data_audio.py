"""Recordings as bytes: mu-law there and back, one rate, and nothing that is broken taken for sound."""

import struct

import numpy as np
import pytest
import soundfile

from sparse_tx import UserError
from sparse_tx.data.mu_law import RATE, encode_mu_law, expand_mu_law
from sparse_tx.data.recordings import BLOCK, read_recording


def tone(pitch, seconds=1.0, rate=RATE, level=0.5):
    return level * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def strength(wave, pitch, rate=RATE):
    """How loud a pitch is: the length of the wave's projection on it, away from both ends."""
    wave = wave[rate // 10 : -rate // 10]
    turn = np.exp(-2j * np.pi * pitch * np.arange(len(wave)) / rate)
    return 2 * abs(np.mean(wave * turn * np.hanning(len(wave)))) / np.mean(np.hanning(len(wave)))


def heard(path):
    return expand_mu_law(read_recording(path)) / 32767


def test_every_code_survives_being_heard_and_written_again():
    codes = np.arange(256, dtype=np.uint8)
    samples = expand_mu_law(codes)
    assert np.array_equal(encode_mu_law(samples / 32767), codes)
    assert np.array_equal(encode_mu_law(samples / 32768), codes)  # as a WAV file is read back
    assert (np.diff(samples.astype(int)) > 0).all()
    assert (samples[0], samples[255]) == (-32767, 32767)
    assert samples[127] == -samples[128]
    assert abs(int(samples[128])) < 10


def test_mu_law_keeps_loud_and_quiet_sounds_alike():
    """Steps that grow with the level: some 38 dB between a sine and its error, over 40 dB of levels."""
    for level in (1.0, 0.1, 0.01):
        wave = tone(440, level=level)
        error = expand_mu_law(encode_mu_law(wave)) / 32767 - wave
        assert 10 * np.log10(np.mean(wave**2) / np.mean(error**2)) > 25
    assert encode_mu_law(np.array([0.0, -0.0, 1, -1, 7, -7])).tolist() == [128, 128, 255, 0, 255, 0]


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44100, 2)])
def test_any_rate_and_channels_become_mono_at_12_khz(tmp_path, form, rate, channels):
    left = tone(440, rate=rate, level=0.4)
    sound = np.stack([left, tone(1000, rate=rate, level=0.2)], 1) if channels == 2 else left
    soundfile.write(tmp_path / f"a.{form}", sound, rate)
    wave = heard(tmp_path / f"a.{form}")
    assert abs(len(wave) - RATE) < 0.15 * RATE  # MP3 adds silence at both ends
    assert strength(wave, 440) == pytest.approx(0.4 / channels, rel=0.1)
    if channels == 2:
        assert strength(wave, 1000) == pytest.approx(0.1, rel=0.1)


def test_what_12_khz_cannot_hold_does_not_fold_back(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(8000, rate=44100) + tone(500, rate=44100, level=0.25), 44100, "FLOAT")
    wave = heard(tmp_path / "a.wav")
    assert strength(wave, 500) == pytest.approx(0.25, rel=0.02)
    assert strength(wave, 4000) < 0.25 / 1000  # where 8 kHz would fold to


def test_a_long_recording_is_the_same_in_pieces(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 2 * BLOCK + 1000)
    soundfile.write(tmp_path / "a.wav", sound, RATE, "FLOAT")
    assert np.array_equal(read_recording(tmp_path / "a.wav"), encode_mu_law(sound.astype(np.float32)))


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3"])
def test_a_recording_that_breaks_off_is_refused_by_name(tmp_path, form):
    soundfile.write(tmp_path / f"whole.{form}", tone(440, 4), RATE)
    data = (tmp_path / f"whole.{form}").read_bytes()
    (tmp_path / f"cut.{form}").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"cut\.{form} .*(breaks off|cannot be read)"):
        read_recording(tmp_path / f"cut.{form}")


def test_what_is_no_sound_is_refused_by_name(tmp_path):
    (tmp_path / "text.wav").write_bytes(b"not a recording")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.1]), RATE, "FLOAT")
    for name, message in (
        ("text.wav", "cannot be read"),
        ("empty.wav", "holds no sound"),
        ("nan.wav", "not numbers"),
        ("missing.flac", "cannot be read"),
    ):
        with pytest.raises(UserError, match=rf"{name}.*{message}"):
            read_recording(tmp_path / name)


def test_a_wav_whose_length_was_not_known_when_it_began_is_read(tmp_path):
    """As written through a pipe: the sizes in its header are 2^32 - 1."""
    soundfile.write(tmp_path / "a.wav", tone(440), RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "pipe.wav").write_bytes(data)
    assert np.array_equal(read_recording(tmp_path / "pipe.wav"), read_recording(tmp_path / "a.wav"))
