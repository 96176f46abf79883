"""Sampling at its edges: what a user hands over, and what is on the disk at any time."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_tx import UserError
from sparse_tx.data.mu_law import encode_mu_law
from sparse_tx.sampling import run, writers
from sparse_tx.sampling.sampler import Sampler
from sparse_tx.sampling.writers import image_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sample(compose):
    from sample import sample

    return lambda *overrides: sample(compose("sample", "device=cpu", *overrides))


@pytest.fixture
def image_model(trained):
    return trained("data=cifar10", "attention=strided", "trainer.max_steps=1")["checkpoint"]


@pytest.fixture
def audio_model(trained):
    return trained("data=audio", "attention=strided", "trainer.max_steps=1")["checkpoint"]


@pytest.fixture
def text_model(trained):
    return trained("trainer.max_steps=1")["checkpoint"]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(K): Ctrl-C as the byte K (from 0, over all sets of samples) is about to be drawn."""

    def at(byte):
        whole, begun = Sampler._step, []

        def step(self, *arguments):
            begun.append(1)
            if len(begun) > byte:
                raise KeyboardInterrupt
            whole(self, *arguments)

        monkeypatch.setattr(Sampler, "_step", step)

    return at


def test_an_interrupt_keeps_what_was_drawn_with_grid_and_manifest_and_goes_on_to_the_caller(
    image_model, sample, interrupted, capsys
):
    asked = (f"checkpoint={image_model}", "count=20", "format=npy")
    expected = [np.load(p) for p in sample(*asked, "output=whole")]
    interrupted(192 + 50)
    with pytest.raises(KeyboardInterrupt):
        sample(*asked, "output=part")
    assert "8 of 20 samples are whole, 8 have 50 of 192 bytes: kept in part" in capsys.readouterr().err
    names = [f"sample-{k:04d}.npy" for k in range(16)]
    assert sorted(p.name for p in Path("part").iterdir()) == ["manifest.json", *names]
    told = manifest(Path("part"))["samples"]
    assert [(s["file"], s["bytes"]) for s in told] == [(n, 192 if k < 8 else 50) for k, n in enumerate(names)]
    for name, bytes_ in zip(names, expected[:16], strict=True):
        drawn = np.load(Path("part") / name)
        assert (drawn == bytes_[: len(drawn)]).all()
    bits = {"whole": manifest(Path("whole"))["samples"], "part": told}
    assert bits["part"][0]["bits_per_dim"] == bits["whole"][0]["bits_per_dim"]


def test_an_interrupted_image_is_black_where_it_was_not_drawn(image_model, sample, interrupted):
    interrupted(24)
    with pytest.raises(KeyboardInterrupt):
        sample(f"checkpoint={image_model}", "count=3", "output=part")
    with Image.open("part/grid.png") as grid, Image.open("part/sample-0002.png") as image:
        assert grid.size == (22, 22)
        assert image.size == (8, 8)
        assert (np.asarray(image)[1:] == 0).all()
        assert (np.asarray(image)[0] != 0).any()


def test_an_interrupt_before_the_first_byte_behind_a_prompt_leaves_no_folder(text_model, sample, interrupted, tmp_path):
    (tmp_path / "start.txt").write_text("import ")
    interrupted(0)
    with pytest.raises(KeyboardInterrupt):
        sample(f"checkpoint={text_model}", "count=3", f"prompt={tmp_path / 'start.txt'}")
    samples = Path(text_model).parent.parent / "samples" / "last"
    assert list(samples.iterdir()) == []


def test_samples_are_on_the_disk_while_the_next_are_drawn(text_model, sample, monkeypatch):
    seen, whole = [], Sampler.advance

    def advance(self, *arguments):
        there = Path("o").glob("sample-*")
        seen.append((len(list(there)), len(manifest(Path("o"))["samples"]) if Path("o/manifest.json").exists() else 0))
        whole(self, *arguments)

    monkeypatch.setattr(Sampler, "advance", advance)
    sample(f"checkpoint={text_model}", "count=18", "length=10", "output=o")
    assert seen == [(0, 0), (8, 8), (16, 16)]


def test_ctrl_c_ends_a_sweep_of_samples_with_130(text_model):
    # The signal comes from the process itself, as the second member's first bytes are drawn.
    code = (
        "import os, signal, sys\n"
        "from sparse_tx import command, entry\n"
        "from sparse_tx.sampling.sampler import Sampler\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "whole, begun = Sampler.advance, []\n"
        "def advance(self, *a):\n"
        "    begun.append(1)\n"
        "    if len(begun) == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "    whole(self, *a)\n"
        "Sampler.advance = advance\n"
        "command.main(entry.sample, 'sample')\n"
    )
    arguments = ["-m", f"checkpoint={text_model}", "seed=1,2,3", "count=9", "length=9", "device=cpu"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    assert "8 of 9 samples are whole" in result.stderr
    assert "run 2 of 3" not in result.stdout


def test_a_sweep_into_one_folder_is_refused(text_model):
    from sparse_tx.sweep.run import sweep

    with pytest.raises(UserError, match="output=o would be written over by each member"):
        sweep(lambda _: None, "sample", [f"checkpoint={text_model}", "output=o", "temperature=0.8,1.0"])


def test_an_image_of_fewer_bytes_keeps_its_rows(image_model, sample):
    whole = sample(f"checkpoint={image_model}", "count=1")[1]
    _, cut = sample(f"checkpoint={image_model}", "count=1", "length=100")
    with Image.open(whole) as a, Image.open(cut) as b:
        a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape == (8, 8, 3)
    assert (a.reshape(-1)[:100] == b.reshape(-1)[:100]).all()
    assert (b.reshape(-1)[100:] == 0).all()
    assert image_of(np.ones(4, np.uint8), 12).sum(-1).tolist() == [[3, 1], [0, 0]]


def save(pixels, name):
    Image.fromarray(pixels).save(name)
    return f"prompt={name}"


def test_pictures_of_8_bits_are_taken_and_others_are_refused(image_model, sample):
    rng = np.random.default_rng(0)
    grey = rng.integers(256, size=(8, 8), dtype=np.uint8)
    opaque = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    for prompt in (save(grey, "grey.png"), save(opaque, "opaque.png")):
        (file,) = sample(f"checkpoint={image_model}", "count=1", prompt, "format=npy", "length=100")
        assert (np.load(file)[:96].reshape(-1, 3) == grey[:4].reshape(-1, 1)).all()
    opaque[0, 0, 3] = 254
    for prompt, message in (
        (save(grey.astype(np.uint16) * 257, "deep.png"), r"deep.png has more than 8 bits a channel \(mode I;16"),
        (save(opaque, "clear.png"), "clear.png has transparent pixels"),
    ):
        with pytest.raises(UserError, match=message):
            sample(f"checkpoint={image_model}", "count=1", prompt, "output=none")
    assert not Path("none").exists()


def test_debug_draws_a_few_bytes_behind_a_prompt_of_any_length(image_model, sample):
    prompt = save(np.zeros((8, 8, 3), np.uint8), "black.png")
    (file,) = sample(f"checkpoint={image_model}", "count=1", prompt, "format=npy", "debug=fast")
    assert len(np.load(file)) == 96 + 24


def test_of_a_long_recording_no_more_is_read_than_is_kept(monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    from sparse_tx.data import recordings

    soundfile.write("long.wav", 0.5 * np.sin(np.arange(60_000) / 5), 24_000)
    whole = recordings.read_recording("long.wav")
    monkeypatch.setattr(recordings, "BLOCK", 4096)
    taken = []
    encode = recordings.encode_mu_law
    monkeypatch.setattr(recordings, "encode_mu_law", lambda wave: taken.append(len(wave)) or encode(wave))
    assert (recordings.read_recording("long.wav", 100) == whole[:100]).all()
    assert sum(taken) < 10_000


def test_a_tilde_is_the_home_folder(text_model, sample, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(text_model, tmp_path / "model.ckpt")
    (tmp_path / "start.txt").write_text("import ")
    paths = sample('checkpoint="~/model.ckpt"', 'prompt="~/start.txt"', 'output="~/drawn"', "length=12", "count=1")
    assert paths == [tmp_path / "drawn" / "sample-0000.txt"]


def test_samples_of_a_checkpoint_that_left_its_run_go_to_outputs(text_model, sample, tmp_path):
    (tmp_path / "my models").mkdir()
    shutil.copy(text_model, tmp_path / "my models" / "step=5 best.ckpt")
    (path,) = sample('checkpoint="my models/step=5 best.ckpt"', "length=9", "count=1")
    assert path.parent.parent == Path("outputs", "samples", "step-5-best")
    assert not (tmp_path / "samples").exists()


def test_a_checkpoint_named_from_its_own_folder_keeps_its_samples_in_its_run(text_model, sample, monkeypatch):
    monkeypatch.chdir(Path(text_model).parent)
    (path,) = sample("checkpoint=last.ckpt", "length=9", "count=1")
    assert path.parent.parent.resolve() == Path("..", "samples", "last").resolve()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_byte(text_model, sample, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="output=o cannot be a folder to write to: Permission denied"):
        sample(f"checkpoint={text_model}", "output=o")


def test_a_full_disk_is_told_in_one_line(text_model, sample, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_tx.sampling.kept.write_samples", full)
    with pytest.raises(UserError, match="samples cannot be written to o: No space left on device"):
        sample(f"checkpoint={text_model}", "output=o", "length=9")


def test_weights_that_diverged_are_refused(text_model, sample):
    contents = torch.load(text_model, weights_only=True)
    next(iter(contents["ema"].values()))[0] = torch.nan
    torch.save(contents, "diverged.ckpt")
    with pytest.raises(UserError, match=r"diverged\.ckpt has ema weights that are not finite"):
        sample("checkpoint=diverged.ckpt", "output=none")
    assert not Path("none").exists()
    sample("checkpoint=diverged.ckpt", "weights=live", "length=9", "count=1")


def test_the_manifest_names_the_checkpoint_and_prompt_that_were_read(text_model, sample, monkeypatch, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / name).write_text(f"{name}{name}")
    hashed = hashlib.sha256(Path(text_model).read_bytes()).hexdigest()
    whole = Sampler.advance

    def advance(self, *arguments):
        Path("later").write_bytes(b"a later checkpoint")
        os.replace("later", text_model)  # as training does
        (tmp_path / "texts" / "a").write_text("another text")
        whole(self, *arguments)

    monkeypatch.setattr(Sampler, "advance", advance)
    paths = sample(f"checkpoint={text_model}", f"prompt={tmp_path / 'texts'}", "count=3", "length=9", "output=o")
    told = manifest(paths[0].parent)
    assert told["checkpoint_sha256"] == hashed
    assert told["prompts"][0]["sha256"] == hashlib.sha256(b"aa").hexdigest()
    assert [s["prompt"] for s in told["samples"]] == ["a", "b", "a"]


def test_any_bytes_are_printed_without_commands_to_the_terminal(monkeypatch):
    text = "a\x1b[2Jé\u202e\n\tb".encode() + b"\xff"
    monkeypatch.setattr(run.sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert run._shown(text) == "a\ufffd[2Jé\ufffd\n\tb\ufffd"
    monkeypatch.setattr(run.sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert run._shown(text) == "a?[2J??\n\tb?"


def test_every_format_can_be_read_back(tmp_path):
    tokens = np.arange(24, dtype=np.uint8).reshape(2, 12)
    for format in ("png", "npy", "txt", "bin", "wav"):
        paths = writers.write_samples(tokens, 12, format, tmp_path, 9999)
        assert [p.name for p in paths] == [f"sample-9999.{format}", f"sample-10000.{format}"]
    with Image.open(tmp_path / "sample-9999.png") as image:
        assert np.asarray(image).reshape(-1).tolist() == list(range(12))
    assert np.load(tmp_path / "sample-10000.npy").tolist() == list(range(12, 24))
    assert (tmp_path / "sample-9999.txt").read_bytes() == bytes(range(12))


def spectrograms(samples, prompt=0):
    """(height, width, 3) of the picture of samples, as one finds it on the disk."""
    with Image.open(writers.write_spectrograms(samples, Path(), prompt)) as image:
        assert (image.format, image.mode) == ("PNG", "P")
        return np.asarray(image.convert("RGB")).astype(int)


def tone(hertz, bytes_):
    return encode_mu_law(0.5 * np.sin(2 * np.pi * hertz / 12_000 * np.arange(bytes_)))


@pytest.mark.parametrize("hertz", [117, 440, 3000, 5800])
def test_a_tone_is_a_bright_line_at_its_frequency_from_when_it_begins(hertz):
    samples = [tone(1000, 24_000), np.concatenate([np.full(12_000, 128, np.uint8), tone(hertz, 12_000)])]
    strip = spectrograms(samples)[2 + 130 :][:128, 2:-2].sum(-1)
    before, after = np.split(strip[:, : strip.shape[1] // 2 * 2], 2, axis=1)
    steady = after[:, after.shape[1] // 4 : -after.shape[1] // 4]
    from_below = 127 - steady.argmax(0)
    assert abs((from_below + 0.5) * 6000 / 128 - hertz).max() < 6000 / 128
    assert np.median(steady) < steady.max() / 3
    assert (before[:, : before.shape[1] // 2] == strip.min()).all()


def test_colours_are_decibels_below_the_loudest_of_all_samples():
    samples = [encode_mu_law(a * np.sin(np.arange(12_000) / 2)) for a in (0.09, 0.9, 0.009, 0)]
    levels = [strip[2:, 2:-2].max() for strip in np.split(np.asarray(writers.spectrograms(samples))[:-2], 4)]
    assert np.array(levels) * 2.0 == pytest.approx([60, 80, 40, 0], abs=3)


@pytest.mark.parametrize("bytes_", [1, 300, 1023, 5000])
def test_silence_is_dark_at_any_length(bytes_):
    hiss = np.random.default_rng(0).integers(127, 129, bytes_, dtype=np.uint8)
    with np.errstate(all="raise"):
        picture = spectrograms([np.full(bytes_, 128, np.uint8), np.full(bytes_, 127, np.uint8), hiss])
    columns = -(-bytes_ // 64)
    assert picture.shape == (2 + 3 * 130, columns + 4, 3)
    white = picture.sum(-1) == 3 * 255
    assert (picture[~white] == (0, 0, 4)).all()
    assert (~white).sum() == 3 * 128 * columns


@pytest.mark.parametrize(("bytes_", "columns"), [(1, 1), (12_288, 192), (65_536, 763), (1_048_576, 768)])
def test_a_strip_is_128_pixels_tall_and_at_most_768_wide(bytes_, columns):
    assert spectrograms([tone(440, bytes_)]).shape == (132, columns + 4, 3)


def test_the_first_16_samples_have_a_strip():
    samples = [tone(100 + 300 * k, 2000) for k in range(18)]
    assert (spectrograms(samples) == spectrograms(samples[:16])).all()
    assert len(spectrograms(samples)) == 2 + 16 * 130


def test_a_white_line_is_where_a_prompt_ends_and_white_is_behind_a_shorter_sample():
    white = (spectrograms([tone(440, 6400), tone(440, 3200)], prompt=1280).sum(-1) == 3 * 255)[:, 2:-2]
    assert np.flatnonzero(white[2:130].all(0)).tolist() == [20]
    assert np.flatnonzero(white[132:260].all(0)).tolist() == [20, *range(50, 100)]


def test_drawn_sound_comes_with_a_picture_that_is_told_before_it(audio_model, sample, interrupted, capsys):
    asked = (f"checkpoint={audio_model}", "count=18", "length=70")
    paths = sample(*asked, "output=o")
    names = ["spectrograms.png", *(f"sample-{k:04d}.wav" for k in range(18))]
    assert paths == [Path("o") / name for name in names]
    assert re.findall("wrote: o/(.*)", capsys.readouterr().out) == names
    assert [s["file"] for s in manifest(Path("o"))["samples"]] == names[1:]
    with Image.open(paths[0]) as image:
        assert image.size == (4 + 2, 2 + 16 * 130)
    assert [p.suffix for p in sample(*asked, "format=npy", "output=bytes")] == [".npy"] * 18
    interrupted(3)
    with pytest.raises(KeyboardInterrupt):
        sample(*asked, "output=part")
    with Image.open("part/spectrograms.png") as image:
        assert image.size == (4 + 1, 2 + 8 * 130)


def test_the_line_in_the_picture_is_at_the_length_of_the_prompt(audio_model, sample):
    writers.write_wav(Path("start.wav"), tone(440, 140))
    picture, _ = sample(f"checkpoint={audio_model}", "count=1", "prompt=start.wav")
    with Image.open(picture) as image:
        white = np.asarray(image.convert("L"))[2:130, 2:-2].min(0) == 255
    assert white.tolist() == [False, False, True, False]
