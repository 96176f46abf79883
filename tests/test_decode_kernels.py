"""Decoding steps in fused kernels against the forward pass and the plain ones: on a GPU, or in Triton's interpreter.

`test_kernels_interpreted.py` runs this file in the interpreter, in a process of its own.
"""

import pytest
import torch
from kernels_here import DEVICE, INTERPRETED, LOW, MARKS
from test_decode import Checkered
from test_decoder import ATTENTIONS, OTHER, model_of, steps
from torch.nn.functional import cross_entropy, layer_norm, linear

from sparse_tx.model.decode_kernels import configs, unsupported
from sparse_tx.model.decode_kernels.steps import EPS, FusedSteps
from sparse_tx.model.decoder import Decoder
from sparse_tx.sampling.sampler import Sampler, draw

pytestmark = MARKS


def model_here(name, **change):
    return model_of(ATTENTIONS[name], **{"heads": 2, "qk": 16} | change).to(DEVICE)


def tokens_of(rows, length):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def small_tiles(monkeypatch):
    """Several blocks of keys, and splits of them, in a model as small as this."""
    monkeypatch.setattr(configs, "attend", lambda *_: (4, 4, 2))
    monkeypatch.setattr(configs, "splits", lambda programs, slots, gpu: 2)


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.inference_mode()
def test_fused_logits_equal_the_forward_pass(name):
    model, tokens = model_here(name), tokens_of(1, 20)
    whole = model(tokens)
    # From nothing, and from prompts that end beside an edge of a block, in caches as long as the context and shorter.
    for length, P, end in ((36, 0, 2), (36, 7, 10), (36, 15, 18), (17, 14, 17)):
        decoder = Decoder(model, 1, length, fused=True)
        if P:
            decoder.prefill(tokens[:, :P], torch.zeros(1, dtype=torch.long, device=DEVICE))
        torch.testing.assert_close(steps(decoder, tokens[:, :end], P), whole[:, P:end], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("change", [OTHER, {"qk_norm": True, "qk": 10}, {"rotary": "position"}], ids=str)
@torch.inference_mode()
def test_other_models_than_the_papers_are_decoded_as_well(change, kind):
    tokens = tokens_of(2, 14)
    model = model_here("strided merged", kind=kind, context=48, **change)
    torch.testing.assert_close(steps(Decoder(model, 2, fused=True), tokens), model(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "strided merged", "fixed", "sliding"])
@torch.inference_mode()
def test_blocks_and_splits_make_no_difference(monkeypatch, name):
    model, tokens = model_here(name, layers=1), tokens_of(1, 20)
    whole = model(tokens)
    small_tiles(monkeypatch)
    decoder = Decoder(model, 1, fused=True)
    decoder.prefill(tokens[:, :17], torch.zeros(1, dtype=torch.long, device=DEVICE))
    torch.testing.assert_close(steps(decoder, tokens, 17), whole[:, 17:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 17])
@torch.inference_mode()
def test_in_16_bits_fused_logits_are_as_near_the_truth_as_plain_ones(rows):
    model, tokens = model_here("strided merged"), tokens_of(rows, 5)
    plain = steps(Decoder(model, rows, static=True, fused=False, dtype=LOW), tokens)
    fused = steps(Decoder(model, rows, fused=True, dtype=LOW), tokens)
    exact = model.double()(tokens)
    assert (fused - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["full", "strided merged", "strided split", "fixed", "sliding"])
@torch.inference_mode()
def test_attention_joined_to_its_output_matrix_gives_the_logits_of_two_launches(monkeypatch, name, heads):
    """Also where a part has more keys than are read ahead: 16 of up to 20."""
    rows, change = 1 + heads % 4, {"heads": heads, "width": 40, "qk": 16, "ff": 36, "layers": 2}
    if name == "strided split" and heads == 1:
        pytest.skip("one head cannot be split")
    model, tokens = model_here(name, **change), tokens_of(rows, 20)
    monkeypatch.setattr(configs, "attend_out", lambda *_: (16, 16, 4))
    found = []
    for joined in (True, False):
        monkeypatch.setattr(configs, "joins", lambda rows, heads, joined=joined: joined)
        decoder = Decoder(model, rows, fused=True)
        assert decoder.kernels.joined == joined
        decoder.prefill(tokens[:, :16], torch.arange(rows, device=DEVICE))
        found.append(steps(decoder, tokens, 16))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0], model(tokens)[:, 16:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "change",
    [{}, {"layers": 1}, {"heads": 4, "width": 40, "ff": 36}, {"activation": "relu2", "width": 24, "ff": 100}],
    ids=str,
)
@torch.inference_mode()
def test_a_feedforward_of_one_launch_gives_the_logits_of_two(monkeypatch, change, rows):
    """Of 8 hidden units a program, the last of fewer, and in both orders of the two residual streams."""
    model, tokens = model_here("strided merged", **{"layers": 3} | change), tokens_of(rows, 12)
    for name in ("joins", "joins_feedforward"):
        monkeypatch.setattr(configs, name, lambda *_: True)
    monkeypatch.setattr(configs, "feedforward", lambda width, ff: (8, 4))
    decoder = Decoder(model, rows, fused=True)
    assert decoder.kernels.of_ff == -(-model.spec.ff // 8)
    decoder.prefill(tokens[:, :8], torch.arange(rows, device=DEVICE))
    torch.testing.assert_close(steps(decoder, tokens, 8), model(tokens)[:, 8:], rtol=0, atol=1e-4)


def test_what_lies_between_two_attentions_is_one_launch_for_many_rows_of_narrow_models_in_16_bits():
    gpu, rows = configs.Gpu(132, 232448), configs.SHARED_ROWS + 1
    assert configs.between(rows, 256, 512, 2, gpu)
    assert configs.between(rows, 200, 264, 2, gpu)
    one, two = (configs.between(n, 256, 512, 2, gpu).rows for n in (16 * 132, 16 * 132 + 1))
    assert one < two
    for other in ((rows - 1, 256, 512, 2), (rows, 264, 512, 2), (rows, 252, 512, 2), (rows, 256, 500, 2)):
        assert configs.between(*other, gpu) is None
    assert configs.between(rows, 256, 512, 4, gpu) is None


def test_a_feedforward_of_too_many_shares_stays_two_launches(monkeypatch):
    monkeypatch.setattr(configs, "JOINED_FF", 2)
    assert configs.joins_feedforward(2, 256, 512)
    assert not configs.joins_feedforward(3, 256, 512)
    assert not configs.joins_feedforward(1, 512, 2048)


@pytest.mark.parametrize("change", [OTHER, {"qk_norm": True, "qk": 10}, {"rotary": "position"}], ids=str)
@torch.inference_mode()
def test_joined_launches_decode_other_models_than_the_papers_as_well(monkeypatch, change):
    tokens = tokens_of(2, 14)
    model = model_here("strided merged", kind="image", context=48, **change)
    for name in ("joins", "joins_feedforward"):
        monkeypatch.setattr(configs, name, lambda *_: True)
    decoder = Decoder(model, 2, fused=True)
    assert decoder.kernels.joined_ff
    torch.testing.assert_close(steps(decoder, tokens), model(tokens), rtol=0, atol=1e-4)


def test_attention_is_joined_up_to_a_bound_and_where_a_head_is_one_program(monkeypatch):
    monkeypatch.setattr(configs, "JOINED", 4)
    monkeypatch.setattr(configs, "JOINED_FF", 4)
    model = model_here("strided merged", layers=1)  # 2 heads
    found = {rows: Decoder(model, rows, fused=True).kernels for rows in (1, 2, 3)}
    assert {rows: k.joined for rows, k in found.items()} == {1: True, 2: True, 3: False}
    assert {rows: k.joined_ff for rows, k in found.items()} == {1: True, 2: True, 3: False}
    monkeypatch.setattr(configs, "JOINED", 100)
    assert configs.joins(4, 25)
    assert not configs.joins(5, 1)  # more rows than plain sums serve
    monkeypatch.setattr(configs, "splits", lambda *_: 2)
    split = Decoder(model, 1, fused=True).kernels
    assert (split.joined, split.joined_ff) == (False, False)


@pytest.mark.parametrize("joined_ff", [False, True])
@torch.inference_mode()
def test_in_16_bits_joined_launches_are_as_near_the_truth_as_plain_ones(monkeypatch, joined_ff):
    model, tokens = model_here("strided merged", layers=2), tokens_of(2, 5)
    plain = steps(Decoder(model, 2, static=True, fused=False, dtype=LOW), tokens)
    monkeypatch.setattr(configs, "joins", lambda *_: True)
    monkeypatch.setattr(configs, "joins_feedforward", lambda *_: joined_ff)
    fused = steps(Decoder(model, 2, fused=True, dtype=LOW), tokens)
    exact = model.double()(tokens)
    assert (fused - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("rows", [1, 3, 5, 70])
@torch.inference_mode()
def test_a_linear_step_is_norm_product_activation_and_residual(rows):
    model = model_here("full", width=48, heads=2, qk=32, ff=80)
    kernels = Decoder(model, rows, fused=True).kernels
    assert isinstance(kernels, FusedSteps)
    generator = torch.Generator().manual_seed(0)
    norm = [torch.randn(48, generator=generator).to(DEVICE) for _ in range(2)]
    for dtype in (torch.float32, LOW):
        w, b = torch.randn(80, 48, generator=generator), torch.randn(80, generator=generator)
        w, b = w.to(DEVICE, dtype), b.to(DEVICE, dtype)
        x = torch.randn(rows, 48, generator=generator).to(DEVICE)
        y = torch.randn(rows, 80, generator=generator).to(DEVICE)
        normal = layer_norm(x, (48,), *norm, eps=EPS).to(dtype).float()
        expected = y + linear(x.to(dtype).float(), w.float(), b.float())
        near = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        kernels._linear(x.to(dtype), (w, b), y, add=True)
        torch.testing.assert_close(y, expected, **near)
        kernels._linear(x, (w, b), y, norm=norm, activation="gelu")
        product = linear(normal, w.float(), b.float())
        torch.testing.assert_close(y, product * torch.sigmoid(1.702 * product), **near)
        kernels._linear(x, (w, None), y, norm=norm)
        torch.testing.assert_close(y, linear(normal, w.float()), **near)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@torch.inference_mode()
def test_draws_are_those_of_the_plain_path(temperature):
    B, length, position = 64, 30, 11
    kernels = Decoder(model_here("full", layers=1), B, fused=True).kernels
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(B, 256, generator=generator)
    logits[0, 5:] = -torch.inf
    logits[1, :250] = -torch.inf
    kernels.logits.copy_(logits)
    uniforms = torch.rand(8, B, generator=generator, dtype=torch.float64)
    uniforms[3, :3], uniforms[3, 3:6] = 0.0, 1 - 2**-53
    uniforms[3, 0], uniforms[3, 1] = 1 - 2**-53, 0.0
    tokens, nats = torch.zeros(B, length, dtype=torch.uint8, device=DEVICE), torch.zeros(B, length, device=DEVICE)
    previous = torch.zeros(B, dtype=torch.long, device=DEVICE)
    at = torch.tensor([position], device=DEVICE)
    kernels.draw(at, uniforms.to(DEVICE), tokens, nats, previous, temperature)
    expected = draw(logits, uniforms[position % 8], temperature, None, None)
    assert torch.equal(previous.cpu(), expected)
    assert torch.equal(tokens[:, position].long().cpu(), expected)
    torch.testing.assert_close(nats[:, position].cpu(), cross_entropy(logits, expected, reduction="none"))
    assert tokens.count_nonzero(1).max() <= 1


@pytest.mark.parametrize("settings", [{}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_fused_samples_are_the_plain_ones(monkeypatch, settings):
    from sparse_tx.attention import ranges

    monkeypatch.setattr(ranges, "CHUNK", 8)
    model = model_here("strided", layers=1)
    prompts = tokens_of(2, 5).to(torch.uint8).cpu()
    samples = []
    for fused in (False, True):
        sampler = Sampler(model, 10, 8, seed=2, fused=fused, **settings)
        samples += sampler.draw(prompts, 8)
    assert torch.equal(samples[0].tokens, samples[1].tokens)
    torch.testing.assert_close(samples[0].nats, samples[1].nats, rtol=0, atol=1e-4)


def test_what_the_kernels_cannot_do_is_said():
    model = model_here("fixed")
    with pytest.raises(ValueError, match="fused kernels is static"):
        Decoder(model, 1, fused=True, static=False)
    with pytest.raises(NotImplementedError, match=r"float64: the kernels know .*; use fused=False"):
        Decoder(model.double(), 1, fused=True)


def test_patterns_without_runs_are_left_to_the_plain_path(monkeypatch):
    spec = model_here("fixed").spec
    assert unsupported(spec, 36, torch.float32, torch.device(DEVICE)) is None
    monkeypatch.setattr(type(spec), "patterns", lambda self: [(Checkered(),)])
    assert "no single run of slots" in unsupported(spec, 36, torch.float32, torch.device(DEVICE))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter captures nothing")
@pytest.mark.parametrize("name", ["strided", "strided merged", "fixed", "full"])
def test_a_captured_fused_step_draws_the_bytes_of_plain_launches_run_after_run(name):
    model, prompts = model_here(name, layers=6), torch.zeros(1, 0, dtype=torch.uint8)
    runs = []
    for graph in (False, True, True):
        (samples,) = Sampler(model, 36, 4, seed=3, dtype=LOW, fused=True, graph=graph).draw(prompts, 4)
        runs.append(samples)
    assert all(torch.equal(runs[0].tokens, r.tokens) and torch.equal(runs[0].nats, r.nats) for r in runs[1:])
