"""The fused blocks against the plain ones: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) on a CPU.

`test_fused_interpreted.py` runs this file in the interpreter, in a process of its own.
"""

import copy
import dataclasses

import pytest
import torch
from kernels_here import DEVICE, LOW, MARKS
from torch.nn.functional import cross_entropy

from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.model.dropout import counter_dropout
from sparse_tx.model.fused import hopper
from sparse_tx.model.fused import linear as linear_module
from sparse_tx.model.fused.linear import activation, bias_gradient, feed_forward, joined, linear
from sparse_tx.model.fused.norm import norm
from sparse_tx.training.memory import memory_of

pytestmark = MARKS
POLICIES = ("activation", "feedforward", "attention", "cheap", "block")
OTHER = {"qk_norm": True, "rotary": "axes", "activation": "relu2"}  # than the paper's


def model_of(name="full", dropout=0.3, **changes):
    """Every parameter is away from where its gradient could hide: no zero biases, no unit gains.

    Dense attention by default: it is torch's, and quick in the interpreter.
    """
    attention = AttentionSpec(name, stride=6, c=2 if name == "fixed" else None, combine="merged")
    spec = ModelSpec(
        "text", context=40, layers=3, width=48, heads=3, qk=48, ff=80, attention=attention, dropout=dropout
    )
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(spec, **changes)).to(DEVICE)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=0.5, std=0.3)
    return model


def trained(model, S=19, step=5, dtype=None):
    """Loss and gradients of one step."""
    tokens = torch.randint(256, (2, S), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    model.zero_grad()
    at = torch.tensor(step, device=DEVICE)
    with torch.autocast(DEVICE, dtype or torch.float16, enabled=dtype is not None):
        logits = model(tokens, seed=3, step=at, rows=torch.arange(2, device=DEVICE))
    loss = cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def error(grads, exact):
    """Of the gradient as a whole, relative."""
    return float((sum((a - b).square().sum() for a, b in zip(grads, exact, strict=True))) ** 0.5) / float(
        sum(b.square().sum() for b in exact) ** 0.5
    )


@pytest.mark.parametrize(
    ("name", "dropout", "other"),
    [
        ("full", 0.0, {}),
        ("full", 0.3, {}),
        ("strided", 0.3, OTHER),
        ("full", 0.0, {"qk_norm": True, "qk": 27}),
        ("full", 0.0, {"rotary": "axes", "kind": "image", "context": 48}),
        ("full", 0.0, {"rotary": "position", "kind": "image", "context": 48}),
        ("strided", 0.0, {**OTHER, "rotary": "position"}),
    ],
    ids=str,
)
def test_fused_blocks_give_the_losses_and_gradients_of_plain_ones_with_the_same_masks(name, dropout, other):
    model = model_of(name, dropout, **other)
    loss, grads = trained(model)
    model.fuse_blocks()
    fused_loss, fused_grads = trained(model)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=0)
    for ours, theirs in zip(fused_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6 * float(theirs.abs().max()) + 1e-8)


def test_the_masks_change_with_the_step_and_not_between_two_runs():
    model = model_of()
    model.fuse_blocks()
    (first, grads), (again, same), (other, _) = trained(model), trained(model), trained(model, step=6)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert first != other


def same_bits(model, recompute, **how):
    """Of a step in which nothing is run again and of one by this policy."""
    model.fuse_blocks()
    loss, grads = trained(model, **how)
    for block in model.blocks:
        block.recompute = recompute
    again, others = trained(model, **how)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("other", [{}, OTHER], ids=["paper", "other"])
def test_recomputed_blocks_give_the_same_bits(recompute, other):
    same_bits(model_of(**other), recompute)


@pytest.mark.parametrize("recompute", POLICIES)
def test_recomputed_blocks_of_wide_models_give_the_same_bits_in_16_bits(monkeypatch, recompute):
    """Where f(u) is kept or made again, as the policy says."""
    for module in (linear_module, hopper):
        monkeypatch.setattr(module, "WIDEST", 16)
    same_bits(model_of(layers=2), recompute, dtype=LOW)


def test_hidden_units_by_parts_of_the_rows_give_the_gradients_of_the_whole(monkeypatch):
    from sparse_tx.model.fused import blocks, linear

    model = model_of()
    model.fuse_blocks()
    loss, grads = trained(model)
    monkeypatch.setattr(linear, "ROWS", 16)  # of 38: three parts, the last shorter
    monkeypatch.setattr(blocks, "ROWS", 16)
    for recompute in ("feedforward", "block"):
        for block in model.blocks:
            block.recompute = recompute
        again, others = trained(model)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
        for ours, theirs in zip(others, grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6 * float(theirs.abs().max()) + 1e-9)


@pytest.mark.parametrize(("widest", "usable"), [(256, True), (16, True), (256, False)])
@pytest.mark.parametrize("recompute", ["none", "activation", "feedforward"])
def test_products_with_the_activation_err_no_more_than_twice_what_plain_blocks_err(
    monkeypatch, widest, usable, recompute
):
    """Both products ours; the gradient's alone, with f(u) kept or made again; both the library's."""
    from sparse_tx.model.fused import products

    monkeypatch.setattr(hopper, "usable", lambda *_: False)  # test_fused_hopper.py
    model = model_of(layers=2)
    _, exact = trained(model)
    _, plain = trained(model, dtype=LOW)
    model.fuse_blocks()
    called = {"contract": 0, "hidden_gradient": 0}
    for name in called:
        real = getattr(products, name)
        counted = lambda *a, name=name, real=real, **k: (called.update({name: called[name] + 1}), real(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(products, name, counted)
    monkeypatch.setattr(linear_module, "WIDEST", widest)
    if not usable:
        monkeypatch.setattr(products, "usable", lambda *_: False)
    for block in model.blocks:
        block.recompute = recompute
    loss, grads = trained(model, dtype=LOW)
    assert error(grads, exact) <= 2 * error(plain, exact)
    if DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0):
        assert called == {"contract": 2 * (usable and widest == 256), "hidden_gradient": 2 * usable}
    again, same = trained(model, dtype=LOW)
    assert torch.equal(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(same, grads, strict=True))


def test_cheap_recompute_runs_attention_once_and_block_twice(monkeypatch):
    from sparse_tx.attention.kernels import launch

    counted, forward = [], launch.forward
    monkeypatch.setattr(launch, "forward", lambda *a: (counted.append(1), forward(*a))[1])
    model = model_of("strided", layers=1)
    model.fuse_blocks()
    for recompute, times in (("none", 1), ("cheap", 1), ("block", 2)):
        for block in model.blocks:
            block.recompute = recompute
        counted.clear()
        trained(model)
        assert len(counted) == times * len(model.blocks)


@pytest.mark.parametrize(("residual", "other"), [(None, {}), (LOW, {}), (None, OTHER)], ids=str)
def test_low_precision_errs_no_more_than_twice_what_plain_blocks_err(residual, other):
    # A width that the fused product takes, rows that no tile divides.
    model = model_of(width=64, qk=64, ff=128, heads=4, **other)
    _, exact = trained(model)
    _, plain = trained(model, dtype=LOW)
    model.fuse_blocks(residual)
    loss, grads = trained(model, dtype=LOW)
    assert loss.isfinite()
    assert all(g.dtype == torch.float32 for g in grads)
    # A stream in half precision rounds where the plain one does not.
    assert error(grads, exact) <= (2 if residual is None else 4) * error(plain, exact)


@pytest.mark.parametrize("C", [48, 256])
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_a_product_joins_the_stream_as_written_out(C, dtype):
    generator = torch.Generator().manual_seed(2)
    B, S, K, p = 2, 33, 72, 0.25
    layer = torch.nn.Linear(K, C).to(DEVICE)
    ln = torch.nn.LayerNorm(C).to(DEVICE)
    torch.nn.init.normal_(ln.weight), torch.nn.init.normal_(ln.bias)
    y = torch.randn(B, S, K, generator=generator).to(DEVICE, dtype).requires_grad_()
    h = torch.randn(B, S, C, generator=generator).to(DEVICE).requires_grad_()
    key = torch.randint(2**32, (B, 2), generator=generator).to(DEVICE)
    low = layer.weight.detach().to(dtype)
    out, x = joined(y, layer, low, h, key, p, ln)
    with torch.no_grad():
        a = (y.float() @ low.float().t()) + layer.bias
        expected = h + counter_dropout(a, key, p)
        eps = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(out, expected, rtol=0, atol=eps)
        torch.testing.assert_close(x.float(), ln(expected), rtol=eps, atol=2 * eps)
    assert (x.dtype, out.dtype) == (dtype, torch.float32)


def test_a_norm_hands_its_input_on_and_sums_both_gradients():
    h = torch.randn(1, 5, 24, device=DEVICE, requires_grad=True)
    ln = torch.nn.LayerNorm(24).to(DEVICE)
    same, x = norm(h, ln, torch.float32)
    assert torch.equal(same, h)
    (grad,) = torch.autograd.grad((same * 3).sum() + x.square().sum(), h)
    (expected,) = torch.autograd.grad((h * 3).sum() + ln(h).square().sum(), h)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_the_feed_forward_is_that_of_the_block():
    ff, ln = model_of(width=24, ff=40, qk=24, layers=1).blocks[0].ff, torch.nn.LayerNorm(24).to(DEVICE)
    x, h = (torch.randn(2, 7, 24, device=DEVICE) for _ in range(2))
    low = [p.detach() for p in (ff.expand.weight, ff.expand.bias, ff.contract.weight)]
    out, normed = feed_forward(x, ff, low, "u", h, None, 0.0, ln)
    torch.testing.assert_close(out, h + ff(x))
    torch.testing.assert_close(normed, ln(h + ff(x)), rtol=1e-4, atol=1e-5)


def test_sums_and_activation_of_rows_that_no_tile_divides():
    u = torch.randn(277, 80, device=DEVICE)
    torch.testing.assert_close(bias_gradient(u, torch.float32), u.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(activation(u, "gelu"), u * torch.sigmoid(1.702 * u))


@pytest.mark.parametrize("recompute", ["none", "activation", "feedforward", "attention", "block"])
@pytest.mark.parametrize("other", [{}, OTHER], ids=["paper", "other"])
def test_fused_blocks_keep_the_memory_that_is_expected(recompute, other):
    """But for "cheap", whose kept tensors pass by the hooks that count."""
    model = model_of(dropout=0.0, context=256, width=64, heads=2, qk=64, ff=256, recompute=recompute, **other)
    model.fuse_blocks()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h = model.hidden(torch.randint(256, (2, 256), device=DEVICE))
    assert h.requires_grad
    expected = memory_of(model.spec, 2, half=False, blocks="fused").kept - 2 * h.numel() * 4
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.05)


def test_a_product_takes_the_gradient_of_a_sum():
    layer, x = torch.nn.Linear(24, 40).to(DEVICE), torch.randn(2, 7, 24, device=DEVICE)
    linear(x, layer, layer.weight.detach(), layer.bias.detach()).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, 14))
    torch.testing.assert_close(layer.weight.grad, x.sum((0, 1)).expand(40, 24))


def test_other_weights_put_in_place_of_the_first_are_those_that_run():
    model, other = model_of(layers=1, dropout=0.0), model_of(layers=1, dropout=0.0)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    tokens = torch.randint(256, (1, 9), device=DEVICE)
    expected = other(tokens)
    model.fuse_blocks()
    called = torch.func.functional_call(model, dict(other.named_parameters()), (tokens,))
    torch.testing.assert_close(called, expected, rtol=1e-4, atol=1e-5)
    model.load_state_dict({n: p.detach().clone() for n, p in other.state_dict().items()}, assign=True)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


def test_weights_rounded_for_one_pass_are_not_those_of_another():
    """Scored in inference mode first, with other weights between two passes, as an average puts them in."""
    model = model_of(layers=1, dropout=0.0)
    model.fuse_blocks()
    tokens = torch.randint(256, (1, 9), device=DEVICE)
    weights = list(model.parameters())

    def loss():
        with torch.autocast(DEVICE, LOW):
            return model(tokens).float().square().mean()

    with torch.inference_mode():
        loss()
    alone = torch.autograd.grad(loss(), weights)
    pending = loss()
    loss()
    for a, b in zip(torch.autograd.grad(pending, weights), alone, strict=True):
        assert torch.equal(a, b)


def test_frozen_parameters_get_no_gradient_and_change_no_other():
    model = model_of(layers=2)
    model.fuse_blocks()
    _, whole = trained(model)
    frozen = [
        i for i, (n, _) in enumerate(model.named_parameters()) if "embedding" in n or "blocks.0" in n or i % 3 == 0
    ]
    parameters = list(model.parameters())
    for i in frozen:
        parameters[i].requires_grad_(False)
    _, some = trained(model)
    for i, (a, b) in enumerate(zip(some, whole, strict=True)):
        assert a is None if i in frozen else torch.equal(a, b)


def test_a_copy_of_a_fused_model_runs_its_own_weights():
    model = model_of(layers=1, dropout=0.0)
    names = list(model.state_dict())
    model.fuse_blocks()
    tokens = torch.randint(256, (1, 9), device=DEVICE)
    before = model(tokens).detach()
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == names
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.9)
    assert torch.equal(model(tokens), before)
    assert not torch.allclose(twin(tokens), before)


@pytest.mark.parametrize(("S", "width"), [(1, 48), (3, 40)])
@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_one_row_of_one_byte_and_widths_between_powers_of_two(S, width, recompute):
    model = model_of(layers=1, width=width, heads=1, qk=width, ff=24, recompute=recompute)
    tokens = torch.randint(256, (1, S), device=DEVICE)
    step = torch.tensor(2, device=DEVICE)

    def grads():
        model.zero_grad()
        model(tokens, seed=1, step=step).square().mean().backward()
        return [p.grad for p in model.parameters()]

    plain = grads()
    model.fuse_blocks()
    for a, b in zip(grads(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-9)
