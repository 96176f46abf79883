"""Recordings as bytes: mu-law there and back, one rate, and nothing that is broken taken for sound."""

import hashlib
import struct
import sys
import tarfile

import numpy as np
import pytest
import soundfile

from sparse_tx import UserError
from sparse_tx.data import DataModule, DataSpec, EvaluationWindows, TrainingOrder, prepare
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


def test_255_less_a_code_is_the_same_sound_with_its_sign_inverted():
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(expand_mu_law(255 - codes), -expand_mu_law(codes))
    assert np.array_equal(encode_mu_law(-expand_mu_law(codes) / 32767), 255 - codes)
    samples = np.arange(-32767, 32768)  # of a 16-bit recording: all but silence, which lies between two codes
    (other,) = np.nonzero(encode_mu_law(-samples / 32768) != 255 - encode_mu_law(samples / 32768))
    assert samples[other].tolist() == [0]


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


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "opus", "mp3", "aiff", "rf64"])
def test_a_recording_that_breaks_off_is_refused_by_name(tmp_path, form):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 8 * RATE)  # noise: an Ogg file of many pages
    whole = tmp_path / f"whole.{form}"
    soundfile.write(whole, sound, RATE, format={"opus": "OGG"}.get(form), subtype={"opus": "OPUS"}.get(form))
    assert len(read_recording(whole)) == pytest.approx(len(sound), rel=0.05)
    data = whole.read_bytes()
    for share in (0.3, 0.5, 0.9):
        (tmp_path / f"cut.{form}").write_bytes(data[: int(len(data) * share)])
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


def write_recordings(folder, count, form="wav", seconds=0.1):
    """Tones of different pitch and length: no two the same."""
    for k in range(count):
        path = folder / ("deep" if k % 2 else "") / f"{k}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(200 + 10 * k, seconds + k / 1000), RATE)
    return folder


def audio(source, **change):
    return DataSpec(**({"name": "audio", "kind": "audio", "context": 256, "source": str(source)} | change))


@pytest.mark.parametrize(("count", "held_out"), [(3, 1), (12, 1), (45, 2)])
def test_whole_recordings_are_held_out_in_order_of_the_hash_of_their_name(tmp_path, count, held_out):
    prepared = prepare(audio(write_recordings(tmp_path / "a", count)))
    files = sorted((tmp_path / "a").rglob("*.wav"))
    named = {p.relative_to(tmp_path / "a").as_posix(): read_recording(p) for p in files}
    order = sorted(named, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    wanted = {
        "test": order[:held_out],
        "validation": order[held_out : 2 * held_out],
        "train": order[2 * held_out :],
    }
    for split, names in wanted.items():
        assert np.array_equal(prepared.split(split), np.concatenate([named[name] for name in names]))
        assert prepared.meta["recordings"][split] == [{"name": n, "samples": len(named[n])} for n in names]
    assert sorted(p.name for p in prepared.folder.iterdir()) == ["meta.json", "test.npy", "train.npy", "validation.npy"]


def test_fewer_than_three_recordings_or_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="has 2 recordings that can be read: at least 3"):
        prepare(audio(write_recordings(tmp_path / "two", 2)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no recordings: expected \.wav, \.flac"):
        prepare(audio(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"0\.wav is one file: give a folder"):
        prepare(audio(tmp_path / "two" / "0.wav"))
    assert not list((tmp_path / "data" / "prepared").glob("*/*"))


def test_unreadable_recordings_are_all_named_and_left_out_on_request(tmp_path, capsys):
    folder = write_recordings(tmp_path / "a", 5)
    whole = (folder / "0.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[:1000])
    (folder / "text.mp3").write_bytes(b"no sound")
    (folder / "._0.wav").write_bytes(b"a file system's own")
    with pytest.raises(UserError, match=r"cut\.wav breaks off.*text\.mp3 cannot be read.*data\.unreadable=skip"):
        prepare(audio(folder))
    prepared = prepare(audio(folder, unreadable="skip"))
    told = capsys.readouterr().err
    assert "left out 2" in told
    assert "cut.wav" in told
    assert "text.mp3" in told
    assert prepared.meta["left_out"] == 2
    for path in (folder / "cut.wav", folder / "text.mp3"):
        path.unlink()
    alone = prepare(audio(folder))
    assert all(np.array_equal(prepared.split(s), alone.split(s)) for s in ("train", "validation", "test"))


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_a_missing_package_is_one_error_before_any_recording_is_read(tmp_path, monkeypatch, capsys, package, policy):
    folder = write_recordings(tmp_path / "a", 3)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, ".")
    for file in (*folder.rglob("*.wav"), tmp_path / "a.tar"):
        file.write_bytes(b"what only reading could tell is no sound")
    monkeypatch.setitem(sys.modules, package, None)
    for source in (folder, tmp_path / "a.tar"):
        with pytest.raises(UserError, match=rf"^recordings need the package {package}, .*: pip install") as refused:
            prepare(audio(source, unreadable=policy))
        assert str(refused.value).count("pip install") == 1
        assert "unreadable" not in str(refused.value)
    assert "left out" not in capsys.readouterr().err


def test_a_recording_that_breaks_off_while_it_is_read_leaves_nothing_of_itself(tmp_path):
    folder = write_recordings(tmp_path / "a", 5, "flac")
    soundfile.write(folder / "long.flac", np.random.default_rng(0).uniform(-1, 1, 3 * BLOCK), RATE)
    clean = prepare(audio(write_recordings(tmp_path / "b", 5, "flac")))
    data = bytearray((folder / "long.flac").read_bytes())
    data[-200_000:] = bytes(200_000)
    (folder / "long.flac").write_bytes(data)
    prepared = prepare(audio(folder, unreadable="skip"))
    assert prepared.meta["left_out"] == 1
    assert all(np.array_equal(prepared.split(s), clean.split(s)) for s in ("train", "validation", "test"))


def test_an_archive_is_read_as_the_folder_in_it(tmp_path):
    folder = write_recordings(tmp_path / "a", 12)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(folder, ".")
        info = tarfile.TarInfo("../outside.csv")
        archive.addfile(info)
    packed = prepare(audio(tmp_path / "a.tar.gz"))
    names = [r["name"] for split in packed.meta["recordings"].values() for r in split]
    assert len(names) == 12
    assert not (tmp_path / "outside.csv").exists()
    data = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is not a whole archive"):
        prepare(audio(tmp_path / "cut.tar.gz", unreadable="skip"))


def test_every_sample_is_scored_once_and_training_crops_move_from_epoch_to_epoch(tmp_path):
    prepared = prepare(audio(write_recordings(tmp_path / "a", 9, seconds=0.3)))
    windows = EvaluationWindows(len(prepared.split("validation")), 256, kind="audio")
    scored = [w.start + k for w in windows for k in range(w.first_scored, w.length)]
    assert scored == list(range(len(prepared.split("validation"))))
    order = TrainingOrder(prepared.split("train"), "audio", 256, seed=1)
    assert len({order.window(k) % 256 for k in range(0, 2000, 97)}) > 5


def test_a_million_samples_are_one_window(tmp_path):
    folder = write_recordings(tmp_path / "a", 3)
    long = max(
        (f"long{k}.wav" for k in range(20)), key=lambda name: hashlib.sha256(name.encode()).digest()
    )  # it trains
    soundfile.write(folder / long, np.random.default_rng(0).normal(0, 0.1, 2_200_000), RATE)
    data = DataModule(audio(folder, context=1 << 20), batch_size=1, seed=1, max_steps=2)
    assert [b["tokens"].shape for b in data.train_dataloader()] == [(1, 1 << 20)] * 2
    with pytest.raises(UserError, match="use a context of at most"):
        prepare(audio(folder, context=1 << 22))
