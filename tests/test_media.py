"""Samples during training: what is drawn, where it goes, and that training does not notice."""

import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from sparse_tx import UserError, load
from sparse_tx.model import AttentionSpec, ModelSpec
from sparse_tx.sampling.sampler import Sampler
from sparse_tx.training.media import log_media

EVERY = ("callbacks.sample_every=3", "callbacks.sample_count=2")


def folder_of(run):
    return Path(run["checkpoint"]).parent.parent


def test_samples_are_those_of_the_averaged_weights_at_that_step(trained):
    run = trained(*EVERY, "callbacks.checkpoint_every=3", "callbacks.sample_length=20")
    model = load(folder_of(run) / "checkpoints" / "step-00000003.ckpt")
    nothing = torch.zeros(1, 0, dtype=torch.uint8)
    (expected,) = Sampler(model, 20, 2, seed=1).draw(nothing, 2)
    files = sorted((folder_of(run) / "samples" / "step-00000003").iterdir())
    assert [f.read_bytes() for f in files] == [t.numpy().tobytes() for t in expected.tokens]
    assert (folder_of(run) / "samples" / "step-00000006").is_dir()


def test_a_run_that_draws_samples_ends_with_the_bits_of_one_that_does_not(trained):
    states = []
    for settings in ((), EVERY):
        run = trained("model.dropout=0.2", *settings)
        states.append(torch.load(folder_of(run) / "checkpoints" / "last.ckpt", weights_only=True))
    for key in ("state_dict", "ema"):
        assert all(torch.equal(t, states[1][key][name]) for name, t in states[0][key].items())


def test_a_sample_longer_than_the_context_is_refused(trained):
    with pytest.raises(UserError, match=r"callbacks\.sample_length=65: a sample has at most the 64 bytes"):
        trained("callbacks.sample_length=65")


def test_a_gpu_without_memory_for_samples_goes_on_training_without_them(trained, monkeypatch, capsys):
    def out_of_memory(*_, **__):
        raise torch.cuda.OutOfMemoryError("none left")

    monkeypatch.setattr("sparse_tx.training.media.Sampler", out_of_memory)
    run = trained(*EVERY)
    assert run["steps"] == 6
    assert capsys.readouterr().err.count("samples: not enough memory") == 1
    assert not (folder_of(run) / "samples").exists()


def test_samples_that_cannot_be_written_do_not_end_the_training(trained, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_tx.training.media.write_samples", full)
    assert trained(*EVERY)["steps"] == 6
    said = capsys.readouterr().err
    assert [f"those of step {n} are not written: [Errno 28] No space left" in said for n in (3, 6)] == [True, True]


def test_images_cut_short_keep_the_rows_of_the_whole(trained):
    run = trained("data=cifar10", "attention=strided", *EVERY, "callbacks.sample_length=30")
    with Image.open(folder_of(run) / "samples" / "step-00000003" / "sample-0000.png") as image:
        assert image.size == (8, 8)
    with Image.open(folder_of(run) / "samples" / "step-00000003" / "grid.png") as image:
        assert image.size == (22, 12)


def test_samples_of_an_audio_run_are_sound_and_its_spectrograms(trained):
    run = trained("data=audio", "attention=strided", *EVERY, "callbacks.sample_length=30")
    with wave.open(str(folder_of(run) / "samples" / "step-00000006" / "sample-0001.wav")) as sound:
        assert (sound.getframerate(), sound.getnframes()) == (12_000, 30)
    with Image.open(folder_of(run) / "samples" / "step-00000006" / "spectrograms.png") as image:
        assert image.size == (5, 2 + 2 * 130)


class Recorder(WandbLogger):
    """Weights & Biases' logger without its package or its server: keeps what it is given."""

    def __init__(self):
        self.calls = []

    def log_image(self, key, images, step=None, **kwargs):
        self.calls.append((key, step, [image.size for image in images]))

    def log_audio(self, key, audios, step=None, **kwargs):
        self.calls.append(
            (key, step, [(len(a), a.dtype, r) for a, r in zip(audios, kwargs["sample_rate"], strict=True)])
        )

    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.calls.append((key, step, data))


def spec_of(kind):
    return ModelSpec(kind, 48, 1, 16, 1, 16, 16, AttentionSpec("full"))


def test_each_kind_is_handed_over_as_what_it_is():
    recorder = Recorder()
    trainer = SimpleNamespace(loggers=[recorder])
    for kind, length in (("image", 48), ("audio", 30), ("text", 5)):
        log_media(trainer, spec_of(kind), np.full((2, length), 65, np.uint8), 7)
    assert recorder.calls == [
        ("samples", 7, [(14, 8)]),
        ("samples", 7, [(30, np.dtype(np.int16), 12_000)] * 2),
        ("spectrograms", 7, [(5, 262)]),
        ("samples", 7, [["0", "AAAAA"], ["1", "AAAAA"]]),
    ]


@pytest.mark.parametrize(
    ("kind", "length", "tag"), [("image", 48, "samples"), ("audio", 30, "samples/0"), ("text", 5, "samples/0")]
)
def test_tensorboard_can_read_back_what_it_was_given(tmp_path, kind, length, tag):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    log_media(SimpleNamespace(loggers=[logger]), spec_of(kind), np.full((2, length), 65, np.uint8), 7)
    logger.finalize("success")
    read = events.EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    kept = {"image": read.Images, "audio": read.Audio}.get(kind)
    if kept is None:
        (event,) = read.Tensors(f"{tag}/text_summary")
        assert b"AAAAA" in event.tensor_proto.string_val[0]
    else:
        (event,) = kept(tag)
    assert event.step == 7
    if kind == "audio":
        (picture,) = read.Images("spectrograms")
        assert (picture.step, picture.width, picture.height) == (7, 5, 262)
