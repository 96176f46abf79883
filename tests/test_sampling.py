"""Sampling: draws follow the model, a seed reproduces, prompts are kept, files are what they say."""

import wave

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_tx import UserError, load
from sparse_tx.model.counter import uniform
from sparse_tx.sampling.sampler import draw, generate
from sparse_tx.sampling.writers import image_of


@pytest.fixture
def sample(compose):
    from sample import sample

    return lambda *overrides: sample(compose("sample", "device=cpu", *overrides))


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    logits = probabilities.log().expand(20_000, -1)
    drawn = draw(logits, uniform(1, 5, torch.arange(20_000)), 1.0, None, None)
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.all((share - probabilities).abs() < 0.015)
    assert share[1] == 0


def test_temperature_zero_takes_the_likeliest():
    assert draw(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.99]), 0, None, None).tolist() == [1]


def test_top_k_and_top_p_keep_the_likeliest_bytes():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1)
    u = uniform(1, 0, torch.arange(4000))
    assert set(draw(logits, u, 1.0, 2, None).tolist()) == {0, 1}
    assert set(draw(logits, u, 1.0, None, 0.75).tolist()) == {0, 1}
    assert set(draw(logits, u, 1.0, None, 0.85).tolist()) == {0, 1, 2}
    assert set(draw(logits, u, 1.0, None, 0.01).tolist()) == {0}


def test_the_ends_of_the_unit_interval_stay_on_bytes_with_probability():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, None, None).tolist() == [1, 2]


def test_uniform_numbers_are_uniform_and_differ_by_seed_position_and_sample():
    u = uniform(3, 7, torch.arange(100_000))
    assert abs(u.mean().item() - 0.5) < 0.005
    assert torch.all((torch.histc(u, 10, 0, 1) / 1e5 - 0.1).abs() < 0.005)
    assert not (uniform(4, 7, torch.arange(1000)) == u[:1000]).any()
    assert not (uniform(3, 8, torch.arange(1000)) == u[:1000]).any()
    assert u.unique().numel() == 100_000


def test_a_sample_depends_on_the_seed_and_its_number_not_on_the_batch(trained):
    model = load(trained()["checkpoint"])
    nothing = torch.zeros(4, 0, dtype=torch.uint8)
    together = generate(model, nothing, 20, seed=5)
    alone = torch.cat([generate(model, nothing[:1], 20, seed=5, first=k) for k in range(4)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, generate(model, nothing, 20, seed=6))
    assert together.unique(dim=0).shape[0] == 4


def test_greedy_sampling_takes_the_likeliest_byte_at_each_position(trained):
    model = load(trained("trainer.max_steps=60", "callbacks.validate_every=60")["checkpoint"])
    prompt = torch.tensor([[116, 104, 101]], dtype=torch.uint8)
    tokens = generate(model, prompt, 20, temperature=0)
    assert torch.equal(tokens[:, :3], prompt)
    with torch.inference_mode():
        likeliest = model(tokens.long()).argmax(-1)
    assert torch.equal(tokens[:, 3:].long(), likeliest[:, 3:])


def test_text_is_written_as_the_bytes_drawn_and_keeps_its_prompt(trained, sample, tmp_path):
    (tmp_path / "start.txt").write_bytes(b"import ")
    path = trained()["checkpoint"]
    paths = sample(f"checkpoint={path}", "count=3", "length=30", f"prompt={tmp_path / 'start.txt'}", "batch_size=2")
    texts = [p.read_bytes() for p in paths]
    assert [len(t) for t in texts] == [30] * 3
    assert all(t.startswith(b"import ") for t in texts)
    again = sample(f"checkpoint={path}", "count=3", "length=30", f"prompt={tmp_path / 'start.txt'}", "output=again")
    assert [p.read_bytes() for p in again] == texts


def test_images_are_written_as_files_and_a_grid_and_complete_an_upper_half(trained, sample, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "upper.png")
    path = trained("data=cifar10", "attention=strided")["checkpoint"]
    grid, *files = sample(f"checkpoint={path}", "count=2", f"prompt={tmp_path / 'upper.png'}")
    assert Image.open(grid).size == (22, 12)
    for file in files:
        drawn = np.asarray(Image.open(file))
        assert drawn.shape == (8, 8, 3)
        assert (drawn[:4] == pixels[:4]).all()
    assert (np.asarray(Image.open(grid))[2:10, 2:10] == np.asarray(Image.open(files[0]))).all()


def test_bytes_of_an_image_are_row_by_row_with_r_g_b_of_a_pixel_together():
    image = image_of(np.arange(12, dtype=np.uint8))
    assert image[0, 1].tolist() == [3, 4, 5]
    assert image[1, 0].tolist() == [6, 7, 8]


def test_audio_is_written_as_wav_at_12_khz(trained, sample):
    path = trained("data=audio", "attention=strided")["checkpoint"]
    (file, _) = sample(f"checkpoint={path}", "count=2", "length=32")
    with wave.open(str(file)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth(), sound.getnframes()) == (
            12000,
            1,
            2,
            32,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["length=100"], "length=100: this model has a context of 64 bytes"),
        (["prompt=missing.txt"], "prompt=missing.txt does not exist"),
        (["format=png"], "format=png does not fit samples of kind text: use txt or bin"),
        (["prompt=long.txt"], "prompt=long.txt has 64 bytes"),
        (["prompt=short.txt", "length=5"], "prompt=short.txt fills all 5 bytes"),
    ],
)
def test_what_cannot_be_sampled_is_refused(trained, sample, tmp_path, settings, message):
    (tmp_path / "long.txt").write_bytes(b"x" * 64)
    (tmp_path / "short.txt").write_bytes(b"x" * 5)
    with pytest.raises(UserError, match=message):
        sample(f"checkpoint={trained()['checkpoint']}", *settings)


def test_an_image_prompt_of_another_size_is_refused(trained, sample, tmp_path):
    Image.new("RGB", (9, 8)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_bytes(b"no image")
    path = trained("data=cifar10", "attention=strided")["checkpoint"]
    with pytest.raises(UserError, match="9 x 8: this model draws 8 x 8"):
        sample(f"checkpoint={path}", f"prompt={tmp_path / 'wide.png'}")
    with pytest.raises(UserError, match="cannot be read as an image"):
        sample(f"checkpoint={path}", f"prompt={tmp_path / 'text.png'}")
