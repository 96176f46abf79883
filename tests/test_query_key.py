"""The norm and the rotation of queries and keys, the activations and first values that a model can ask for."""

import dataclasses
import math

import pytest
import torch
from test_model import small, trained

from sparse_tx.model import AttentionSpec, Transformer
from sparse_tx.model.block import activate
from sparse_tx.model.query_key import QueryKey


def split(qkv, heads, qk):
    q, k, v = qkv.split((qk, qk, qkv.shape[-1] - 2 * qk), -1)
    return q.unflatten(-1, (heads, -1)), k.unflatten(-1, (heads, -1)), v


def test_a_norm_leaves_root_mean_squares_of_one_and_the_temperature_scales_queries_alone():
    layer = QueryKey(2, 12, norm=True, rotary="none", shape=(5, 1))
    with torch.no_grad():
        layer.temperature.copy_(torch.tensor([0.0, 0.7]))
    qkv = 3 * torch.randn(2, 5, 12 + 12 + 8)
    q, k, v = split(layer(qkv), 2, 12)
    torch.testing.assert_close(q.square().mean(-1).sqrt(), torch.tensor([0.0, 0.7]).exp().expand(2, 5, 2))
    torch.testing.assert_close(k.square().mean(-1).sqrt(), torch.ones(2, 5, 2))
    assert torch.equal(v, qkv[..., 24:])


@pytest.mark.parametrize("shape", [(4, 6), (3, 3, 3)], ids=str)
def test_a_score_depends_on_the_distances_in_rows_and_columns_alone(shape):
    layer = QueryKey(1, 16, norm=False, rotary="axes", shape=shape)
    inner = shape[2] if len(shape) == 3 else 1
    q, k = torch.randn(2, 16)
    qkv = torch.cat([q, k, torch.randn(4)]).expand(1, shape[0] * shape[1] * inner, 36)
    turned_q, turned_k, _ = split(layer(qkv), 1, 16)
    scores = torch.einsum("bshd,bthd->st", turned_q, turned_k)
    places = [(r, c) for r in range(shape[0]) for c in range(shape[1]) for _ in range(inner)]
    seen = {}
    for i, (r, c) in enumerate(places):
        for j, (s, d) in enumerate(places):
            first = seen.setdefault((r - s, c - d), scores[i, j])
            torch.testing.assert_close(scores[i, j], first, rtol=1e-4, atol=1e-4)
    assert len({round(float(s), 3) for s in seen.values()}) > len(seen) / 2  # and they differ
    torch.testing.assert_close(seen[0, 0], q @ k)


@pytest.mark.parametrize("shape", [(4, 6), (3, 3, 3)], ids=str)
def test_turned_by_the_position_a_score_depends_on_the_distance_alone(shape):
    layer = QueryKey(1, 14, norm=False, rotary="position", shape=shape)
    n = math.prod(shape)
    q, k = torch.randn(2, 14)
    turned_q, turned_k, _ = split(layer(torch.cat([q, k, torch.randn(4)]).expand(1, n, 32)), 1, 14)
    scores = torch.einsum("bshd,bthd->st", turned_q, turned_k)
    for distance in range(n):
        same = scores.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-4, atol=1e-4)
    assert len({round(float(s), 3) for s in scores[:, 0]}) > n / 2  # and they differ
    torch.testing.assert_close(scores[0, 0], q @ k)


ANGLES = {  # of the four pairs at a position of 5 rows of 7
    "axes": lambda place: (place // 7, place // 7 / 5, place % 7, place % 7 / 7),
    "position": lambda place: (place, place * 35 ** (-1 / 3), place * 35 ** (-2 / 3), place / 35),
}


@pytest.mark.parametrize("rotary", ["axes", "position"])
def test_a_turn_is_the_product_with_a_complex_number(rotary):
    layer = QueryKey(1, 8, norm=False, rotary=rotary, shape=(5, 7))
    x = torch.randn(1, 35, 20, dtype=torch.float64)
    q, _, _ = split(layer(x), 1, 8)
    for place in (0, 8, 34):
        angles = torch.tensor(ANGLES[rotary](place), dtype=torch.float64)
        numbers = torch.complex(x[0, place, :4], x[0, place, 4:8]) * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(q[0, place, 0], torch.cat([numbers.real, numbers.imag]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rotary", ["axes", "position"])
def test_one_position_alone_is_turned_as_in_its_sequence(rotary):
    layer = QueryKey(2, 16, norm=True, rotary=rotary, shape=(5, 7))
    x = torch.randn(3, 35, 40)
    torch.testing.assert_close(layer(x[:, 12], torch.tensor([12])), layer(x)[:, 12])


def test_a_model_with_them_is_causal_and_learns_all_of_its_numbers():
    spec = small(qk_norm=True, rotary="axes", activation="relu2")
    model = trained(spec)
    tokens = torch.randint(256, (2, 40))
    other = tokens.clone()
    other[:, 20:] = (other[:, 20:] + 1) % 256
    a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :21], b[:, :21])
    a.square().mean().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in model.parameters() if p.dim() > 1)
    assert all(block.attention.query_key.temperature.grad.count_nonzero() == 2 for block in model.blocks)


def test_zero_first_values_make_blocks_that_add_nothing():
    model = Transformer(small(init="zero"))
    tokens = torch.randint(256, (2, 40))
    assert torch.equal(model.hidden(tokens), model.embedding(tokens))
    paper = Transformer(small())
    assert not torch.equal(paper.hidden(tokens), paper.embedding(tokens))


def test_activations_are_those_of_their_papers():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0])
    assert torch.equal(activate(x, "relu2"), torch.tensor([0.0, 0.0, 0.0, 0.25, 9.0]))
    torch.testing.assert_close(activate(x, "gelu"), x / (1 + torch.exp(-1.702 * x)))


def test_the_papers_model_has_none_of_it():
    names = {n for n, _ in Transformer(small()).named_parameters()}
    assert not any("query_key" in n for n in names)
    for rotary in ("axes", "position"):
        assert {n for n, _ in Transformer(small(rotary=rotary)).named_parameters()} == names
        assert set(Transformer(small(rotary=rotary)).state_dict()) == set(Transformer(small()).state_dict())


def test_a_checkpoint_from_before_they_were_there_is_the_papers():
    plain = small().plain()
    for name in ("qk_norm", "rotary", "activation", "init"):
        del plain[name]
    assert type(small()).of(plain) == small()
    assert type(small()).of({**plain, "rotary": True}) == small(rotary="axes")
    assert type(small()).of({**plain, "rotary": False}) == small()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary": "axes", "qk": 12}, r"model.qk=12 over model.heads=2 is 6 a head, which must be a multiple of 4"),
        ({"rotary": "position", "qk": 6}, r"model.qk=6 over model.heads=2 is 3 a head, which must be a multiple of 2"),
        ({"rotary": "True"}, "model.rotary='True' is not known: use one of none, axes, position"),
        ({"activation": "swish"}, "model.activation='swish' is not known: use one of gelu, relu2"),
        ({"init": "one"}, "model.init='one' is not known: use one of paper, zero"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small(attention=AttentionSpec("full")), **change)
