"""Sampling: draws follow the model, a seed reproduces, prompts are kept, files are what they say."""

import hashlib
import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_tx import UserError, load
from sparse_tx.data.recordings import read_recording
from sparse_tx.evaluation.bits import Score
from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.model.counter import uniform
from sparse_tx.sampling.manifest import bits_by_sample
from sparse_tx.sampling.sampler import Sampler, draw
from sparse_tx.sampling.writers import image_of


@pytest.fixture
def sample(compose):
    from sample import sample

    return lambda *overrides: sample(compose("sample", "device=cpu", *overrides))


def chance(counts, probabilities):
    """That counts of draws lie as far from these probabilities, or farther: Pearson's chi-square test."""
    some = probabilities > 0
    assert counts[~some].sum() == 0
    expected = counts.sum() * probabilities[some]
    distance = ((counts[some] - expected) ** 2 / expected).sum()
    return torch.special.gammaincc((some.sum().double() - 1) / 2, distance / 2).item()


@pytest.mark.parametrize("along", ["samples", "positions"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.7, None, None), (1.5, 9, None), (1, None, 0.8), (2, 9, 0.7)],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p, along):
    N = 100_000
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    probabilities = (logits.double() / temperature).softmax(0)
    order = probabilities.argsort(descending=True)
    if top_k is not None:
        probabilities[order[top_k:]] = 0
    if top_p is not None:
        ordered = probabilities[order] / probabilities.sum()
        probabilities[order[1 + int((ordered.cumsum(0) < top_p).sum()) :]] = 0
    every = torch.arange(N)
    u = uniform(1, 5, every) if along == "samples" else uniform(1, every, torch.full((N,), 5))
    drawn = draw(logits.expand(N, -1), u, temperature, top_k, top_p)
    counts = torch.bincount(drawn, minlength=40).double()
    # Fixed by the seed: a draw of another distribution fails by many orders of magnitude.
    assert chance(counts, probabilities / probabilities.sum()) > 1e-3
    assert chance(counts, (probabilities + 0.002 * (probabilities > 0)).div(probabilities.sum() + 0.05)) < 1e-3


def test_temperature_zero_takes_the_likeliest():
    assert draw(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.99]), 0, None, None).tolist() == [1]


def test_top_k_and_top_p_keep_the_likeliest_bytes():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1)
    u = uniform(1, 0, torch.arange(4000))
    assert set(draw(logits, u, 1.0, 2, None).tolist()) == {0, 1}
    assert set(draw(logits, u, 1.0, None, 0.75).tolist()) == {0, 1}
    assert set(draw(logits, u, 1.0, None, 0.85).tolist()) == {0, 1, 2}
    assert set(draw(logits, u, 1.0, None, 0.01).tolist()) == {0}


def test_of_bytes_equally_likely_top_k_keeps_the_first():
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]).expand(4000, -1)
    u = uniform(1, 0, torch.arange(4000))
    assert set(draw(logits, u, 1.0, 2, None).tolist()) == {0, 1}
    assert set(draw(torch.zeros(4000, 256), u, 1.0, 1, None).tolist()) == {0}


@pytest.mark.parametrize("temperature", [1e-5, 1e-308, 1e-320])
def test_the_smallest_temperatures_take_the_likeliest(temperature):
    logits = torch.tensor([[-5.0, 3.0, 1.0], [300.0, -3.0, 301.0]])
    assert draw(logits, torch.tensor([0.2, 0.99]), temperature, None, None).tolist() == [1, 2]


def test_the_ends_of_the_unit_interval_stay_on_bytes_with_probability():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, None, None).tolist() == [1, 2]


def test_uniform_numbers_are_uniform_and_differ_by_seed_position_and_sample():
    u = uniform(3, 7, torch.arange(100_000))
    assert chance(torch.histc(u, 100, 0, 1).double(), torch.full((100,), 0.01, dtype=torch.float64)) > 1e-3
    assert u.unique().numel() == 100_000


@pytest.mark.parametrize("seed", [4, 3 + 2**32, -3, 3 + 2**40], ids="seed {}".format)
def test_numbers_of_other_seeds_positions_and_samples_tell_nothing_of_each_other(seed):
    at = torch.arange(600)
    u, other = (uniform(s, at[:, None], at.expand(600, -1)) for s in (3, seed))
    upper = torch.ones(600, 600, dtype=torch.bool).triu(1)
    pairs = {
        "seeds": (u, other),
        "positions": (u[:-1], u[1:]),
        "samples": (u[:, :-1], u[:, 1:]),
        "position and sample exchanged": (u[upper], u.T[upper]),
        "position of another seed": (u[:-1], other[1:]),
    }
    for name, (a, b) in pairs.items():
        cells = (a * 24).long() * 24 + (b * 24).long()
        counts = torch.bincount(cells.flatten(), minlength=576).double()
        assert chance(counts, torch.full((576,), 1 / 576, dtype=torch.float64)) > 1e-3, name


def drawn(sampler, prompts, count, first=0):
    return torch.cat([samples.tokens for samples in sampler.draw(prompts, count, first=first)])


@pytest.mark.parametrize("prompt", [0, 7], ids=["from nothing", "from prompts"])
@pytest.mark.parametrize("attention", ["fixed", "strided"])
def test_a_sample_is_the_same_bits_at_any_batch_size(trained, attention, prompt):
    model = load(trained(f"attention={attention}")["checkpoint"])
    prompts = torch.randint(256, (3, prompt), dtype=torch.uint8)
    sampler = Sampler(model, 20, 1, seed=5)
    together = list(sampler.draw(prompts, 19))
    tokens, nats = (torch.cat(t) for t in zip(*together, strict=True))
    assert tokens.shape == nats.shape == (19, 20)
    for first, count in ((0, 1), (3, 2), (6, 9), (18, 1)):
        part = list(sampler.draw(prompts, count, first=first))
        assert torch.equal(torch.cat([s.tokens for s in part]), tokens[first : first + count])
        assert torch.equal(torch.cat([s.nats for s in part]), nats[first : first + count])
    if prompt:
        assert torch.equal(tokens[:, :prompt], prompts[torch.arange(19) % 3])
    assert tokens.unique(dim=0).shape[0] == 19
    assert not torch.equal(tokens, drawn(Sampler(model, 20, 1, seed=6), prompts, 19))


def test_the_likelihood_beside_a_sample_is_the_models_own(trained):
    model = load(trained("trainer.max_steps=30")["checkpoint"])
    prompts = torch.randint(256, (2, 5), dtype=torch.uint8)
    (samples,) = Sampler(model, 40, 2, temperature=0.5, top_k=9, seed=3).draw(prompts, 2)
    score = Score()
    with torch.inference_mode():
        score.add(model(samples.tokens.long()), samples.tokens)
    bits = [b["bits_per_dim"] for b in bits_by_sample(samples.nats.numpy(), 5)]
    assert sum(bits) / 2 == pytest.approx(score.bits_per_dim, abs=1e-5)


def test_greedy_sampling_takes_the_likeliest_byte_at_each_position(trained):
    model = load(trained("trainer.max_steps=60", "callbacks.validate_every=60")["checkpoint"])
    prompt = torch.tensor([[116, 104, 101]], dtype=torch.uint8)
    tokens = drawn(Sampler(model, 20, 1, temperature=0), prompt, 1)
    assert torch.equal(tokens[:, :3], prompt)
    with torch.inference_mode():
        likeliest = model(tokens.long()).argmax(-1)
    assert torch.equal(tokens[:, 3:].long(), likeliest[:, 3:])


@pytest.mark.parametrize("attention", ["fixed", "strided", "full"])
def test_a_step_in_fixed_shapes_reads_nothing_back(attention):
    # The meta device has shapes and no numbers: a step that asked for one, as a captured step must not, would fail.
    attend = AttentionSpec(attention, stride=None if attention == "full" else 8, c=2 if attention == "fixed" else None)
    model = Transformer(ModelSpec("text", 32, 2, 16, 2, 8, 32, attend)).to("meta")
    sampler = Sampler(model, 32, 3, top_k=9, top_p=0.9)
    with torch.inference_mode():
        sampler.advance(0, 3, torch.arange(3, device="meta"))


def test_the_bytes_told_while_drawing_add_up(trained):
    told = []
    model = load(trained()["checkpoint"])
    for _ in Sampler(model, 12, 1).draw(torch.zeros(1, 4, dtype=torch.uint8), 10, on_bytes=told.append):
        pass
    assert sum(told) == 10 * 8


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
    with Image.open(grid) as image:
        assert image.size == (22, 12)
    for file in files:
        with Image.open(file) as image:
            drawn = np.asarray(image)
        assert drawn.shape == (8, 8, 3)
        assert (drawn[:4] == pixels[:4]).all()
    with Image.open(grid) as image, Image.open(files[0]) as first:
        assert (np.asarray(image)[2:10, 2:10] == np.asarray(first)).all()


def test_samples_take_the_images_of_a_folder_in_turn_and_keep_as_many_bytes_as_asked_for(trained, sample, tmp_path):
    images = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3), dtype=np.uint8)
    for k, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    path = trained("data=cifar10", "attention=strided")["checkpoint"]
    files = sample(f"checkpoint={path}", "count=3", f"prompt={tmp_path}", "prompt_length=150", "format=npy")
    for k, file in enumerate(files):
        assert (np.load(file)[:150] == images[k % 2].reshape(-1)[:150]).all()


def test_a_recording_goes_on_from_its_start(trained, sample, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "start.wav", 0.5 * np.sin(np.arange(400) / 5), 12_000)
    path = trained("data=audio", "attention=strided")["checkpoint"]
    prompt = f"prompt={tmp_path / 'start.wav'}"
    (file,) = sample(f"checkpoint={path}", "count=1", "length=48", prompt, "prompt_length=32", "format=npy")
    assert (np.load(file)[:32] == read_recording(tmp_path / "start.wav")[:32]).all()
    with pytest.raises(UserError, match=r"start.wav has 400 bytes: this model needs 1 to 255; prompt_length=N"):
        sample(f"checkpoint={path}", prompt)
    (tmp_path / "start.wav").write_bytes(b"no sound")
    with pytest.raises(UserError, match="cannot be read as a recording"):
        sample(f"checkpoint={path}", prompt)


def test_the_manifest_says_what_the_samples_came_from(trained, sample, tmp_path):
    (tmp_path / "start.txt").write_bytes(b"import ")
    path = trained()["checkpoint"]
    files = sample(
        f"checkpoint={path}", "count=2", "length=30", f"prompt={tmp_path / 'start.txt'}", "temperature=0.5", "seed=7"
    )
    manifest = json.loads((files[0].parent / "manifest.json").read_text())
    assert manifest["checkpoint_sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert manifest["prompts"][0]["sha256"] == hashlib.sha256(b"import ").hexdigest()
    settings = {k: manifest["settings"][k] for k in ("seed", "temperature", "weights", "prompt_length", "length")}
    assert settings == {"seed": 7, "temperature": 0.5, "weights": "ema", "prompt_length": 7, "length": 30}
    assert manifest["settings"]["decoding"] == "plain torch"
    assert [s["file"] for s in manifest["samples"]] == [f.name for f in files]
    assert all(0 < s["bits_per_dim_drawn"] < 20 for s in manifest["samples"])


def test_sampling_again_leaves_earlier_samples_alone(trained, sample):
    path = trained()["checkpoint"]
    first, again = (sample(f"checkpoint={path}", "count=1", f"seed={s}", "length=30")[0] for s in (1, 2))
    assert first != again
    assert first.read_bytes() != again.read_bytes()


def test_bytes_of_an_image_are_row_by_row_with_r_g_b_of_a_pixel_together():
    image = image_of(np.arange(12, dtype=np.uint8), 12)
    assert image[0, 1].tolist() == [3, 4, 5]
    assert image[1, 0].tolist() == [6, 7, 8]


def test_audio_is_written_as_wav_at_12_khz(trained, sample):
    path = trained("data=audio", "attention=strided")["checkpoint"]
    _, file, _ = sample(f"checkpoint={path}", "count=2", "length=32")
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
        (["prompt=empty.txt"], "prompt=empty.txt has 0 bytes"),
        (["prompt=short.txt", "prompt_length=9"], "has 5 bytes, fewer than prompt_length=9"),
        (["prompt=short.txt", "prompt_length=64"], "prompt_length=64 leaves none of the 64 bytes"),
        (["prompt_length=4"], "prompt_length=4 without a prompt"),
        (["prompt=texts"], "have 5 to 6 bytes.*set prompt_length=5"),
        (["prompt=none"], "prompt=none is a folder without files"),
        (["batch_size=0"], "batch_size=0: give a number of at least 1, or auto"),
        (["precision=8"], "precision=8 is not known"),
        (["precision=16"], "precision=16-mixed needs a GPU"),
        (["device=cuda:x"], "device=cuda:x is not known"),
        (["prompt="], "prompt is empty"),
        (["output=short.txt"], "output=short.txt cannot be a folder to write to"),
    ],
)
def test_what_cannot_be_sampled_is_refused(trained, sample, tmp_path, settings, message):
    (tmp_path / "long.txt").write_bytes(b"x" * 64)
    (tmp_path / "short.txt").write_bytes(b"x" * 5)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "texts").mkdir()
    for k in (5, 6):
        (tmp_path / "texts" / f"{k}.txt").write_bytes(b"x" * k)
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
