"""The model: parameter counts, causality, initial values, recompute and dropout by counter."""

import dataclasses
import math

import pytest
import torch

from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.model.dropout import counter_dropout, dropout_keys
from sparse_tx.model.embedding import Embedding
from sparse_tx.model.transformer import count_parameters

STRIDED = AttentionSpec("strided", stride=96, combine="interleaved")


def small(**change):
    spec = {
        "kind": "text",
        "context": 40,
        "layers": 2,
        "width": 16,
        "heads": 2,
        "qk": 8,
        "ff": 32,
        "attention": AttentionSpec("fixed", stride=8, c=2),
    }
    return ModelSpec(**(spec | change))


def trained(spec, seed=0):
    """A model whose output matrix is no longer 0, so that every part moves the logits."""
    torch.manual_seed(seed)
    model = Transformer(spec)
    torch.nn.init.normal_(model.output.weight)
    return model


@pytest.mark.parametrize(
    ("sizes", "kind", "context", "attention", "millions"),
    [
        ((32, 256, 2, 128, 512), "image", 3072, STRIDED, "14.9"),
        ((128, 256, 2, 128, 512), "image", 3072, STRIDED, "59.20"),
        ((30, 512, 8, 512, 2048), "text", 12288, AttentionSpec("fixed", stride=128, c=32), "94.95"),
        ((48, 512, 16, 512, 2048), "image", 12288, AttentionSpec("strided", stride=128), "151.65"),
    ],
)
def test_parameter_counts_are_the_papers(sizes, kind, context, attention, millions):
    names = ("layers", "width", "heads", "qk", "ff")
    spec = ModelSpec(kind=kind, context=context, attention=attention, **dict(zip(names, sizes, strict=True)))
    with torch.device("meta"):
        count = count_parameters(Transformer(spec))
    assert f"{count / 1e6:.{len(millions.split('.')[1])}f}" == millions


def test_a_new_model_gives_every_byte_the_same_probability():
    logits = Transformer(small())(torch.randint(256, (2, 40)))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(256, (80,)))
    assert abs(nats.item() / math.log(2) - 8) < 1e-5


@pytest.mark.parametrize("kind", ["text", "image"])
def test_logits_depend_on_earlier_tokens_alone(kind):
    spec = small(kind=kind, context=48, attention=AttentionSpec("strided", stride=7))
    model = trained(spec).double()
    tokens = torch.randint(256, (1, 48))
    base = model(tokens)
    for i in (0, 5, 20, 46):
        other = tokens.clone()
        other[0, i] = (other[0, i] + 1) % 256
        moved = (model(other) - base).abs().amax(-1)[0] > 1e-12
        assert not moved[: i + 1].any()
        assert moved[i + 1]


def test_a_prefix_gives_the_same_logits():
    model = trained(small())
    tokens = torch.randint(256, (2, 40))
    torch.testing.assert_close(model(tokens[:, :13]), model(tokens)[:, :13], rtol=1e-4, atol=1e-5)


def test_image_positions_are_the_sum_of_row_column_and_channel():
    embedding = Embedding(256, 4, (2, 2, 3))
    row, column, channel = embedding.positions
    got = embedding._positions()
    for i in range(12):
        torch.testing.assert_close(got[i], row[i // 6] + column[i // 3 % 2] + channel[i % 3])


def test_the_input_that_predicts_a_position_carries_its_own_embedding():
    embedding = Embedding(256, 4, (3, 4))
    tokens = torch.randint(256, (1, 12))
    h = embedding(tokens)[0]
    torch.testing.assert_close(h[0], embedding.start + embedding._positions()[0])
    torch.testing.assert_close(h[5], embedding.tokens[tokens[0, 4]] + embedding._positions()[5])


def test_embedding_gradient_is_that_of_a_lookup():
    embedding = Embedding(256, 4, (3, 4)).double()
    tokens = torch.randint(5, (3, 12))
    d_out = torch.randn(3, 12, 4, dtype=torch.float64)
    embedding(tokens).backward(d_out)
    want = torch.zeros(256, 4, dtype=torch.float64)
    want.index_put_((tokens[:, :-1].flatten(),), d_out[:, 1:].reshape(-1, 4), accumulate=True)
    torch.testing.assert_close(embedding.tokens.grad, want)


def loss_and_gradients(model, tokens):
    model.train().zero_grad()
    logits = model(tokens, seed=3, step=torch.tensor(7))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_recompute_gives_the_same_bits_with_dropout(recompute):
    tokens = torch.randint(256, (2, 40))
    plain = loss_and_gradients(trained(small(dropout=0.3)), tokens)
    again = loss_and_gradients(trained(small(dropout=0.3, recompute=recompute)), tokens)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_step_is_deterministic():
    tokens = torch.randint(256, (2, 40))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (loss_and_gradients(trained(small(dropout=0.3)), tokens) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_keeps_the_mean_and_the_stated_share():
    keys = dropout_keys(1, torch.tensor(0), torch.arange(4), 1)[0, 0]
    out = counter_dropout(torch.ones(4, 500, 64), keys, 0.25)
    share = (out == 0).double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / out.numel()) ** 0.5
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])


def test_dropout_masks_differ_by_seed_step_layer_site_and_row_and_look_independent():
    def mask(seed, step, layer, site, row):
        key = dropout_keys(seed, torch.tensor(step), torch.tensor([row]), 3)[layer, site]
        return counter_dropout(torch.ones(1, 64, 256), key, 0.5)[0] == 0

    base = mask(1, 0, 0, 0, 0)
    for other in [
        (2, 0, 0, 0, 0),
        (1, 1, 0, 0, 0),
        (1, 0, 1, 0, 0),
        (1, 0, 0, 1, 0),
        (1, 0, 0, 0, 1),
        (1 + 2**32, 0, 0, 0, 0),
    ]:
        agree = (mask(*other) == base).double().mean().item()
        assert abs(agree - 0.5) < 5 * 0.5 / base.numel() ** 0.5, other
    neighbours = (base[:, 1:] == base[:, :-1]).double().mean().item()
    assert abs(neighbours - 0.5) < 5 * 0.5 / base.numel() ** 0.5


def test_a_rows_mask_does_not_depend_on_which_rank_holds_it():
    x = torch.ones(4, 8, 16)
    whole = counter_dropout(x, dropout_keys(1, torch.tensor(5), torch.arange(4), 1)[0, 0], 0.5)
    parts = [
        counter_dropout(x[:2], dropout_keys(1, torch.tensor(5), torch.arange(r, 4, 2), 1)[0, 0], 0.5) for r in (0, 1)
    ]
    assert torch.equal(whole[0::2], parts[0])
    assert torch.equal(whole[1::2], parts[1])


def test_dropout_gradient_uses_the_same_mask():
    key = dropout_keys(1, torch.tensor(5), torch.arange(2), 1)[0, 0]
    x = torch.randn(2, 8, 16, requires_grad=True)
    out = counter_dropout(x, key, 0.5)
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)


def test_initial_values_have_the_papers_spread():
    torch.manual_seed(0)
    spec = small(
        width=256, heads=2, qk=128, ff=512, layers=8, context=1024, attention=AttentionSpec("strided", stride=32)
    )
    model = Transformer(spec)
    block = model.blocks[3]
    want = {
        block.attention.qkv.weight: (0.125 / 256) ** 0.5,
        block.attention.out.weight: (0.125 / 256) ** 0.5 / 4,
        block.ff.expand.weight: (0.125 / 256) ** 0.5,
        block.ff.contract.weight: (0.125 / 512) ** 0.5 / 4,
        model.embedding.tokens: 0.125 / 16,
        model.embedding.positions[0]: 0.125 / 16 / 2**0.5,
    }
    for weight, std in want.items():
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert (model.output.weight == 0).all()
    assert (block.attention.qkv.bias == 0).all()


def test_a_spec_survives_being_plain_data():
    spec = small(attention=AttentionSpec("strided", stride=8, combine="interleaved", order=("window", "column")))
    assert ModelSpec.of(spec.plain()) == spec
    assert not dataclasses.is_dataclass(spec.plain()["attention"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "model.heads=3 does not divide model.width=16"),
        ({"qk": 9}, "model.heads=2 does not divide model.qk=9"),
        ({"layers": 0}, "model.layers=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"recompute": "all"}, "model.recompute='all'"),
        ({"kind": "image"}, "data.context=40 is not a square RGB image"),
        ({"attention": AttentionSpec("fixed", stride=8, c=9)}, "attention.c=9"),
        ({"attention": AttentionSpec("fixed", stride=8, c=2, backend="fast")}, "attention.backend='fast'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


def test_tokens_beyond_the_context_are_refused():
    with pytest.raises(ValueError, match="1 to 40 positions"):
        Transformer(small())(torch.zeros(1, 41, dtype=torch.long))
