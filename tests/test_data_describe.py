"""`describe`: what is printed and drawn is what training will see."""

import wave

import numpy as np
import pytest
from PIL import Image

from sparse_tx.config import training
from sparse_tx.data import DataModule, describe, prepare
from sparse_tx.data.__main__ import describe as command
from sparse_tx.data.mu_law import expand_mu_law


def first_windows(config, count):
    data = DataModule(config.data.spec(), batch_size=1, seed=config.seed, max_steps=count)
    return [batch["tokens"][0].numpy() for batch in data.train_dataloader()]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("data", ["cifar10", "imagenet64"])
def test_the_grid_shows_the_first_images_of_training(compose, data):
    cfg = compose("train", f"data={data}", "debug=fast")
    (picture,) = command(cfg)
    drawn = pixels(picture)
    for n, window in enumerate(first_windows(training(cfg), 9)):
        top, left = 2 + n // 8 * 10, 2 + n % 8 * 10  # images of 8 x 8, 8 in a row, 2 pixels apart
        assert np.array_equal(drawn[top : top + 8, left : left + 8], window.reshape(8, 8, 3))


def test_recordings_are_drawn_and_can_be_heard(compose, capsys):
    cfg = compose("train", "experiment=audio_65k", "debug=fast")
    picture, *sounds = command(cfg)
    assert "mirror" not in capsys.readouterr().out
    assert pixels(picture).shape[1] > 500
    for path, window in zip(sounds, first_windows(training(cfg), 3), strict=True):
        with wave.open(str(path)) as file:
            assert np.array_equal(np.frombuffer(file.readframes(1 << 20), np.int16), expand_mu_law(window))


@pytest.mark.parametrize(
    ("data", "done"),
    [
        ("cifar10", "half of the images mirrored left to right"),
        ("audio", "half of the windows inverted in sign"),
    ],
)
def test_what_is_mirrored_in_training_is_told_of_the_examples(compose, capsys, data, done):
    cfg = compose("train", f"data={data}", "data.mirror=true", "debug=fast")
    command(cfg)
    assert f"mirror: {done} in training, none of the examples" in capsys.readouterr().out


def test_text_is_printed_with_counts_and_hashes(compose, tmp_path, capsys):
    (tmp_path / "file.txt").write_bytes(b"abc\x00\xff\xe2\x82\xac$ " * 40)
    cfg = compose("train", "data=enwik8", f"data.source={tmp_path}/file.txt", "data.context=30", "attention=full")
    (picture,) = command(cfg)
    assert pixels(picture).shape[1] > 500
    out = capsys.readouterr().out
    meta = prepare(training(cfg).data.spec()).meta
    for split, count in (("train", 360), ("validation", 20), ("test", 20)):
        assert f"{split}: {count} bytes, sha256 {meta['sha256'][split]}" in out
    assert "split rule: in order: the first 90 percent train" in out
    assert "\\x00\\xff€$" in out


def test_bytes_that_cannot_be_printed_are_shown_as_such():
    assert describe.text_of(np.frombuffer("é\t\x1b[31m\n".encode() + b"\xff", np.uint8)) == "é\\t\\x1b[31m\n\\xff"


def test_a_script_that_the_font_lacks_is_drawn_without_warnings(tmp_path):
    text = "日本語の文章 $x^2$ $ and a long line " * 20
    describe.draw_text(np.frombuffer(text.encode()[:600], np.uint8)[None], tmp_path / "text.png")
    assert (tmp_path / "text.png").stat().st_size > 1000
