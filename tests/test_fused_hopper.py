"""The kernels whose warps have roles, on a GPU of compute capability 9.0. `test_fused_compile.py` compiles them."""

import pytest
import torch
from kernels_here import INTERPRETED
from test_fused import error, model_of, trained

from sparse_tx.model.fused import hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
    ),
]


def relative(a, b):
    return float((a.float() - b).norm() / b.norm())


@pytest.mark.parametrize(("T", "C", "F"), [(19, 64, 80), (1000, 128, 512), (4097, 200, 264), (30000, 256, 512)])
@pytest.mark.parametrize("kind", ["gelu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_formula_and_the_same_bits_each_time(T, C, F, kind, dtype):
    torch.manual_seed(0)
    d_a, weight, u = (torch.randn(*s, device="cuda").to(dtype) for s in ((T, C), (C, F), (T, F)))
    assert hopper.usable(d_a, weight, u)
    x = u.double().requires_grad_()
    y = x * torch.sigmoid(1.702 * x) if kind == "gelu" else x.relu().square()
    d_y = d_a.double() @ weight.double()
    (d_u,) = torch.autograd.grad(y, x, d_y)
    found = hopper.contract_gradients(d_a, weight, u, kind)
    eps = 0.004 if dtype == torch.bfloat16 else 0.001
    assert relative(found[0], d_u.float()) < eps
    assert relative(found[1], d_u.sum(0).float()) < 1e-3
    assert relative(found[2], (d_a.double().t() @ y.detach()).float()) < eps
    again = hopper.contract_gradients(d_a, weight, u, kind)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize(("T", "C", "F"), [(19, 264, 80), (777, 264, 520), (1000, 512, 2048), (30000, 400, 1000)])
@pytest.mark.parametrize("kind", ["gelu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_hidden_gradient_of_wide_models_is_that_of_the_formula_with_the_same_bits_each_time(T, C, F, kind, dtype):
    """Also where f(u) is made again."""
    torch.manual_seed(0)
    d_a, weight, u = (torch.randn(*s, device="cuda").to(dtype) for s in ((T, C), (C, F), (T, F)))
    assert hopper.usable_wide(d_a, weight, u)
    x = u.double().requires_grad_()
    y = x * torch.sigmoid(1.702 * x) if kind == "gelu" else x.relu().square()
    (exact,) = torch.autograd.grad(y, x, d_a.double() @ weight.double())
    d_u, nothing, sums = hopper.hidden_gradient(d_a, weight, u, kind, again=False)
    assert nothing is None
    eps = 0.004 if dtype == torch.bfloat16 else 0.001
    assert relative(d_u, exact.float()) < eps
    assert relative(sums, exact.sum(0).float()) < 1e-3
    for again in (False, True, True):
        other, made, other_sums = hopper.hidden_gradient(d_a, weight, u, kind, again=again)
        assert torch.equal(other, d_u)
        assert torch.equal(other_sums, sums)
        if again:
            assert relative(made, y.detach().float()) < eps


def test_the_wide_kernel_takes_no_other_widths():
    for C, taken in ((256, False), (264, True), (512, True), (520, False)):
        d_a, weight, u = (torch.zeros(*s, device="cuda", dtype=torch.bfloat16) for s in ((16, C), (C, 64), (16, 64)))
        assert hopper.usable_wide(d_a, weight, u) == taken


@pytest.mark.parametrize("recompute", ["none", "feedforward", "block"])
def test_a_model_with_it_errs_no_more_than_twice_what_plain_blocks_err(monkeypatch, recompute):
    model = model_of(layers=2)
    _, exact = trained(model)
    _, plain = trained(model, dtype=torch.bfloat16)
    model.fuse_blocks()
    for block in model.blocks:
        block.recompute = recompute
    called, real = [], hopper.contract_gradients
    monkeypatch.setattr(hopper, "contract_gradients", lambda *a: (called.append(1), real(*a))[1])
    loss, grads = trained(model, dtype=torch.bfloat16)
    assert len(called) == 2
    assert error(grads, exact) <= 2 * error(plain, exact)
    again, same = trained(model, dtype=torch.bfloat16)
    assert torch.equal(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(same, grads, strict=True))


@pytest.mark.parametrize("recompute", ["none", "activation", "feedforward", "block"])
def test_a_wide_model_errs_no_more_than_twice_what_plain_blocks_err_and_keeps_its_bits(recompute):
    model = model_of(layers=2, width=264, qk=264, ff=520)
    _, exact = trained(model)
    _, plain = trained(model, dtype=torch.bfloat16)
    model.fuse_blocks()
    loss, grads = trained(model, dtype=torch.bfloat16)
    assert error(grads, exact) <= 2 * error(plain, exact)
    called, real = [], hopper.hidden_gradient
    for block in model.blocks:
        block.recompute = recompute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "hidden_gradient", lambda *a, **k: (called.append(k["again"]), real(*a, **k))[1])
        again, same = trained(model, dtype=torch.bfloat16)
    assert called == [recompute in ("activation", "feedforward")] * 2
    assert torch.equal(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(same, grads, strict=True))
