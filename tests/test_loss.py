"""The loss by chunks: cross entropy of the whole sequence's logits, its gradients too, in every precision."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sparse_tx.model import loss as loss_module
from sparse_tx.model.loss import mean_nats, position_nats

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def case(dtype=torch.float32, positions=37, device="cpu"):
    """h, norm, output, tokens and the leaves, in float64 values that every dtype here can hold."""
    torch.manual_seed(0)
    h = (3 * torch.randn(2, positions, 24)).to(dtype).to(device).requires_grad_()
    norm, output = nn.LayerNorm(24), nn.Linear(24, 256, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    wide = torch.promote_types(dtype, torch.float32)
    norm, output = norm.to(device, wide), output.to(device, wide)
    tokens = torch.randint(256, (2, positions), device=device)
    return h, norm, output, tokens, [h, norm.weight, norm.bias, output.weight]


def whole(h, norm, output, tokens):
    logits = output(norm(h))
    return cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), tokens.flatten())


def both(loss, leaves, scale=1.0):
    return [loss.detach(), *torch.autograd.grad(loss * scale, leaves)]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("chunk", [8, 10, 74, 1000])
def test_the_loss_is_cross_entropy_of_all_logits(chunk, device):
    h, norm, output, tokens, leaves = case(device=device)
    got = both(mean_nats(h, norm, output, tokens, chunk=chunk), leaves)
    want = both(whole(h, norm, output, tokens), leaves)
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_in_float64_its_gradients_are_exact():
    h, norm, output, tokens, leaves = case(torch.float64)
    got = both(mean_nats(h, norm, output, tokens, chunk=10), leaves)
    for a, b in zip(got, both(whole(h, norm, output, tokens), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_under_autocast_it_errs_no_more_than_twice_what_torch_does(residual, device):
    h, norm, output, tokens, leaves = case(residual, positions=200, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = both(mean_nats(h, norm, output, tokens, chunk=64), leaves)
        plain = both(whole(h, norm, output, tokens), leaves)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    x = nn.functional.layer_norm(exact_leaves[0], (24,), exact_leaves[1], exact_leaves[2])
    exact = both(cross_entropy((x @ exact_leaves[3].t()).flatten(0, 1), tokens.flatten()), exact_leaves)
    for a, b, e in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + 1e-7


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_loss_scale_is_only_a_factor_in_float16(device):
    h, norm, output, tokens, leaves = case(device=device)
    with torch.autocast(device, torch.float16):
        scaled, plain = (both(mean_nats(h, norm, output, tokens), leaves, s) for s in (65536.0, 1.0))
    assert torch.equal(scaled[0], plain[0])
    for a, b in zip(scaled[1:], plain[1:], strict=True):
        assert torch.equal(a, b * 65536)
        assert b.abs().max() > 0


def test_the_same_bits_each_time_and_no_second_backward_by_mistake():
    h, norm, output, tokens, leaves = case()
    first, second = (both(mean_nats(h, norm, output, tokens, chunk=10), leaves) for _ in range(2))
    assert all(map(torch.equal, first, second))
    loss = mean_nats(h, norm, output, tokens)
    torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


def test_without_gradients_it_is_the_same_loss_and_the_mean_of_the_positions():
    h, norm, output, tokens, _ = case()
    want = whole(h, norm, output, tokens)
    with torch.no_grad():
        torch.testing.assert_close(mean_nats(h, norm, output, tokens, chunk=10), want)
    nats = position_nats(h, norm, output, tokens, chunk=10)
    logits = output(norm(h)).detach()
    torch.testing.assert_close(nats, cross_entropy(logits.transpose(1, 2), tokens, reduction="none"))


def test_the_fused_softmax_gives_the_loss_of_the_plain_one():
    h, norm, output, tokens, leaves = case(positions=64)
    got, want = (both(mean_nats(h, norm, output, tokens, chunk=64, compiled=c), leaves) for c in (True, False))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_more_sizes_in_one_process_than_torch_compiles_are_no_error(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: compile_(f, backend="eager", **settings))
    torch._dynamo.reset()
    loss_module._fused_nats_and_gradient.cache_clear()
    try:
        for positions in range(8, 20):
            h, norm, output, tokens, leaves = case(positions=positions)
            got, want = (both(mean_nats(h, norm, output, tokens, compiled=c), leaves) for c in (True, False))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    finally:
        loss_module._fused_nats_and_gradient.cache_clear()
        torch._dynamo.reset()
