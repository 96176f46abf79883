"""The decoder: logits one position at a time equal those of the forward pass."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.model.decoder import Decoder, cache_bytes

ATTENTIONS = {
    "full": AttentionSpec("full"),
    "strided": AttentionSpec("strided", stride=8, combine="interleaved"),
    "strided merged": AttentionSpec("strided", stride=7),
    "strided split": AttentionSpec("strided", stride=8, combine="split"),
    "fixed": AttentionSpec("fixed", stride=8, c=2),
    "fixed interleaved": AttentionSpec("fixed", stride=8, c=3, combine="interleaved"),
    "fixed with a window": AttentionSpec("fixed", stride=8, c=3, order=("window", "summary")),
    "fixed split": AttentionSpec("fixed", stride=7, c=2, combine="split"),
    "sliding": AttentionSpec("sliding", stride=5, reach=2, global_tokens=3),
    "longer than the context": AttentionSpec("strided", stride=100),
}


OTHER = {"qk_norm": True, "rotary": "axes", "activation": "relu2"}  # than the paper's


def model_of(attention, kind="text", context=36, **change):
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 32, "heads": 4, "qk": 16, "ff": 48} | change
    model = Transformer(ModelSpec(kind=kind, context=context, attention=attention, **sizes)).eval()
    torch.nn.init.normal_(model.output.weight)  # else every logit is 0
    for block in model.blocks:
        if sizes.get("qk_norm"):
            torch.nn.init.normal_(block.attention.query_key.temperature)
    return model


def steps(decoder, tokens, start=0):
    """Logits (B, S - start, V), teacher-forced."""
    logits = []
    for i in range(start, tokens.shape[1]):
        previous = tokens[:, max(i - 1, 0)]
        logits.append(decoder.step(previous, torch.tensor([i], device=tokens.device), i))
    return torch.stack(logits, 1)


@pytest.mark.parametrize("static", [False, True], ids=["sliced", "static"])
@pytest.mark.parametrize("name", ATTENTIONS)
@torch.inference_mode()
def test_cached_logits_equal_the_forward_pass(name, static):
    model = model_of(ATTENTIONS[name])
    tokens = torch.randint(256, (2, 36))
    whole = model(tokens)
    # Prompts that end around a block's edge, and none; lengths below and above it, and the whole context.
    for length, prompts in ((36, (0, 1, 6, 7, 8, 9, 16, 35)), (9, (0, 7, 8)), (1, (0,))):
        for P in prompts:
            decoder = Decoder(model, 2, length, static=static)
            if P:
                nats = decoder.prefill(tokens[:, :P], torch.arange(2))
                expected = cross_entropy(whole[:, :P].mT, tokens[:, :P], reduction="none")
                torch.testing.assert_close(nats, expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(steps(decoder, tokens[:, :length], P), whole[:, P:length], rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", [OTHER, {"qk_norm": True}, {"rotary": "axes"}, {"rotary": "position"}], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["sliced", "static"])
@torch.inference_mode()
def test_queries_and_keys_normed_and_turned_are_kept_as_they_are_seen(static, change):
    model = model_of(ATTENTIONS["strided merged"], **change)
    tokens = torch.randint(256, (2, 36))
    decoder = Decoder(model, 2, static=static)
    decoder.prefill(tokens[:, :13], torch.arange(2))
    torch.testing.assert_close(steps(decoder, tokens, 13), model(tokens)[:, 13:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", [{}, OTHER], ids=["paper", "other"])
@torch.inference_mode()
def test_an_image_is_decoded_with_its_row_column_and_channel(change):
    model = model_of(ATTENTIONS["strided"], kind="image", context=48, **change)
    tokens = torch.randint(256, (2, 48))
    torch.testing.assert_close(steps(Decoder(model, 2), tokens), model(tokens), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_cached_logits_in_bf16_are_as_near_the_truth_as_those_of_the_forward_pass():
    model = model_of(ATTENTIONS["fixed"])
    tokens = torch.randint(256, (4, 36))
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(tokens).float()
    cached = steps(Decoder(model, 4, dtype=torch.bfloat16), tokens)
    exact = model.double()(tokens)
    assert (cached - exact).abs().max() <= 2 * (plain - exact).abs().max()


@torch.inference_mode()
def test_rows_go_on_from_the_prompt_that_they_name():
    model = model_of(ATTENTIONS["fixed"])
    tokens = torch.randint(256, (2, 36))
    decoder = Decoder(model, 3)
    decoder.prefill(tokens[:, :10], torch.tensor([1, 0, 1]))
    rows = tokens[[1, 0, 1]]
    torch.testing.assert_close(steps(decoder, rows, 10), model(rows)[:, 10:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_memory_told_for_a_sample_is_what_the_cache_takes(name):
    model = model_of(ATTENTIONS[name])
    for length, dtype in ((36, torch.float32), (20, torch.bfloat16)):
        assert Decoder(model, 3, length, dtype=dtype).bytes == 3 * cache_bytes(model.spec, length, dtype)


def test_lengths_and_prompts_that_do_not_fit_are_refused():
    model = model_of(ATTENTIONS["fixed"])
    with pytest.raises(ValueError, match="length=37: this model has a context of 36"):
        Decoder(model, 1, 37)
    with pytest.raises(ValueError, match="prompt of 21 positions does not fit a length of 20"):
        Decoder(model, 1, 20).prefill(torch.zeros(1, 21, dtype=torch.uint8), torch.zeros(1))
    with pytest.raises(ValueError, match="prompt for 2 rows: this decoder has a batch of 1"):
        Decoder(model, 1).prefill(torch.zeros(1, 5, dtype=torch.uint8), torch.zeros(2))
