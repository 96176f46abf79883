"""Muon's step by kernels against its passes in torch, and Newton-Schulz: on a GPU, or in Triton's interpreter on a CPU.

`test_fused_interpreted.py` runs this file in the interpreter, in a process of its own.
"""

import math

import pytest
import torch
from kernels_here import DEVICE, INTERPRETED, LOW, MARKS
from torch import nn
from torch.optim import Muon
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS

from sparse_tx.training import muon, muon_kernels
from sparse_tx.training.muon import BatchedMuon, orthogonal
from sparse_tx.training.tables import table

pytestmark = MARKS
COEFFICIENTS = DEFAULT_A, DEFAULT_B, DEFAULT_C
ULP = 2.0**-7 if INTERPRETED else 2.0**-8  # relative error of a bfloat16: the interpreter cuts off, it does not round
# Square, wide and tall; less than a block, several, and tails that are no multiple of 16 bytes.
SHAPES = [(64, 64), (48, 160), (160, 48), (33, 127), (127, 33), (130, 64)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def optimizer(shape, rows=None, N=3, **settings):
    params = [nn.Parameter(randn(*shape, seed=i)) for i in range(N)]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9} | settings
    return BatchedMuon([{"params": params, "rows": rows}], adjust_lr_fn="match_rms_adamw", **settings), params


def stepped(shape, rows=None, *, kernels, steps=3, scale=None, skip=(), dtype=torch.bfloat16, **settings):
    """Weights and momentum after steps in which those of `skip` have gradients that are not finite.

    dtype: of the iteration, whose products kernels take only if they multiply it rightly.
    """
    one, params = optimizer(shape, rows, **settings)
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        can = {None, LOW} if kernels else ()
        patch.setattr(muon, "no_kernels", lambda _, dtype=None: None if dtype in can else "torch is to be taken")
        patch.setattr(muon, "DTYPE", dtype)
        for name in ("_launch", "_passes"):
            real = getattr(one, name)
            patch.setattr(one, name, lambda *a, name=name, real=real: (taken.append(name), real(*a))[1])
        for i in range(steps):
            for j, p in enumerate(params):
                p.grad = 3 * randn(*shape, seed=100 + 10 * i + j)
            if i in skip:
                params[0].grad[3, 5], params[-1].grad[-1, -1] = math.nan, math.inf
            if scale is not None:
                one.grad_scale = torch.tensor(scale, device=DEVICE)
            if skip:
                one.found_inf = torch.tensor(float(i in skip), device=DEVICE)
            one.step()
    assert taken == ["_launch" if kernels else "_passes"] * steps
    return [p.detach() for p in params], [one.state[p]["momentum_buffer"] for p in params]


def agree(got, want, bound=0.05):
    """Momentum but for the order of float32 operations, weights but for that of bfloat16 sums: up to 3% of a step."""
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for i, (a, b) in enumerate(zip(got[0], want[0], strict=True)):
        moved = (b - randn(*b.shape, seed=i)).abs().max()
        assert (a - b).abs().max() <= bound * moved


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 7.0])
def test_two_launches_do_what_the_passes_do(shape, scale):
    got, want = (stepped(shape, kernels=k, scale=scale) for k in (True, False))
    agree(got, want)


@pytest.mark.parametrize(("shape", "rows"), [((64, 96), None), ((136, 72), [40, 48, 48]), ((65, 33), None)])
def test_a_whole_step_by_kernels_is_that_of_torch(shape, rows):
    got, want = (stepped(shape, rows, kernels=k, steps=1, dtype=LOW) for k in (True, False))
    agree(got, want, min(0.05, 10 * torch.finfo(LOW).eps))


PARTS = [((192, 64), [64, 64, 64]), ((160, 64), [48, 48, 64]), ((70, 50), [10, 60])]


@pytest.mark.parametrize(("shape", "rows"), PARTS)
def test_parts_are_made_orthogonal_each_by_itself(shape, rows):
    got, want = (stepped(shape, rows, kernels=k) for k in (True, False))
    agree(got, want)
    parts = [nn.Parameter(part.clone()) for i in range(3) for part in randn(*shape, seed=i).split(rows)]
    reference = Muon(parts, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for i in range(3):
        grads = [g for j in range(3) for g in (3 * randn(*shape, seed=100 + 10 * i + j)).split(rows)]
        for p, g in zip(parts, grads, strict=True):
            p.grad = g
        reference.step()
    whole = [torch.cat([p.detach() for p in parts[i : i + len(rows)]]) for i in range(0, len(parts), len(rows))]
    agree(got, (whole, want[1]))


@pytest.mark.parametrize(
    ("rows", "batches"),
    [
        ([64, 64, 64], [(9, 64, 64)]),
        ([48, 48, 96], [(6, 48, 64), (3, 96, 64)]),
        ([48, 96, 48], [(3, 48, 64), (3, 96, 64), (3, 48, 64)]),
        (None, [(3, 192, 64)]),
    ],
)
def test_neighbouring_parts_of_one_size_are_one_batch(monkeypatch, rows, batches):
    taken = []
    real = muon.orthogonal
    monkeypatch.setattr(muon, "orthogonal", lambda g, *rest: (taken.append(tuple(g.shape)), real(g, *rest))[1])
    stepped((192, 64), rows, kernels=True, steps=1)
    assert taken == batches


@pytest.mark.parametrize("kernels", [True, False])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_momentum(kernels):
    before, after = (stepped((130, 64), [30, 100], kernels=kernels, steps=n, skip=(1, 2)) for n in (1, 3))
    for a, b in zip(before, after, strict=True):
        assert all(map(torch.equal, a, b))
    assert all(m.abs().max() > 0 for m in after[1])


@pytest.mark.parametrize("settings", [{"lr": 1.0}, {"lr": 0.0}, {"weight_decay": 0.0}, {"momentum": 0.0}])
def test_shares_of_nought_and_one_are_like_all_others(settings):
    got, want = (stepped((48, 64), kernels=k, **settings) for k in (True, False))
    agree(got, want)


def test_the_moments_are_those_of_nesterov_in_bfloat16():
    g, m = randn(2, 70, 90), randn(2, 70, 90, seed=1)
    kept = m.clone()
    addresses = table(tuple((a.data_ptr(), b.data_ptr(), 0) for a, b in zip(g, m, strict=True)), g.device)
    one, none = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    got = muon_kernels.gather(addresses, (70, 90), 4 * one, none, 0.9)
    moved = kept.double() * 0.9 + g.double() / 4 * 0.1
    torch.testing.assert_close(m.double(), moved, rtol=1e-6, atol=1e-6)
    wanted = g.double() / 4 * 0.1 + moved * 0.9
    assert got.dtype == torch.bfloat16
    assert ((got.double() - wanted).abs() <= ULP * wanted.abs() + 1e-6).all()


def test_the_weights_of_a_part_decay_and_take_their_step_and_the_others_stay():
    p, x = randn(2, 70, 90), randn(2, 20, 90, seed=1).bfloat16()
    wanted = p.double()
    wanted[:, 30:50] = wanted[:, 30:50] * (1 - 0.125) - 0.3 * x.double()
    addresses = table(tuple((0, 0, matrix.data_ptr()) for matrix in p), p.device)
    muon_kernels.apply(addresses, x, 30, torch.zeros((), device=DEVICE), 0.125, 0.3)
    torch.testing.assert_close(p.double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_launches_grow_with_shapes_and_parts_not_with_matrices(monkeypatch):
    one, params = optimizer((96, 32), [32, 64], N=5)
    for p in params:
        p.grad = randn(96, 32)
    calls = []
    for name in ("gather", "apply"):
        real = getattr(muon_kernels, name)
        monkeypatch.setattr(muon_kernels, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    one.step()
    assert calls == ["gather", "apply", "apply"]


@pytest.mark.parametrize("spoil", ["dtype", "layout", "address"])
def test_what_the_launches_cannot_take_is_left_to_torch(spoil):
    one, params = optimizer((64, 48))
    taken = []
    one._launch = lambda *_: taken.append("launch")
    one._passes = lambda *_: taken.append("passes")
    for p in params:
        p.grad = randn(64, 48)
    one.step()
    if spoil == "dtype":
        one.state[params[1]]["momentum_buffer"] = torch.zeros(64, 48, device=DEVICE, dtype=torch.bfloat16)
    elif spoil == "layout":
        params[1].grad = randn(48, 64).mT
    else:
        params[1].grad = randn(64 * 48 + 1)[1:].view(64, 48)
    one.step()
    assert taken == ["launch", "passes"]


def test_gradients_that_moved_are_met_where_they_are():
    one, params = optimizer((64, 48))
    other, same = optimizer((64, 48))
    held = []
    for i in range(3):
        for j, (p, q) in enumerate(zip(params, same, strict=True)):
            p.grad = randn(64, 48, seed=10 * i + j)
            held.append(p.grad)  # so that the next lies elsewhere
            q.grad = p.grad.clone() if q.grad is None else q.grad.copy_(p.grad)
        one.step()
        other.step()
    assert all(map(torch.equal, params, same))


@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 40, 100), (2, 100, 40)])
def test_wide_and_tall_matrices_are_made_orthogonal_alike_and_stay_dense(shape):
    g = randn(*shape)
    got = orthogonal(g, COEFFICIENTS, 5, EPS)
    assert got.is_contiguous()
    assert got.dtype == torch.bfloat16
    turned = orthogonal(g.mT.contiguous(), COEFFICIENTS, 5, EPS).mT
    # The coefficients send singular values to about 0.7 to 1.2, not to 1: the polynomial itself, in float64.
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    wanted = u * s[:, None] @ vh
    for found in (got, turned):
        assert (found.double() - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_another_share_compiles_nothing_anew(monkeypatch):
    one, params = optimizer((160, 64), [48, 48, 64])
    for p in params:
        p.grad = randn(160, 64)
    one.step()

    def compiled(*_, **__):
        raise AssertionError("compiled anew")

    for kernel in (muon_kernels.muon_gather, muon_kernels.muon_apply):
        monkeypatch.setattr(kernel, "_do_compile", compiled)
    for lr in (1.0, 0.0, 1e-3, 1):
        one.param_groups[0] |= {"lr": lr, "momentum": lr, "weight_decay": lr}
        one.step()
    with pytest.raises(AssertionError, match="compiled anew"):
        muon_kernels.muon_apply[(1,)](None, None, None, 0, 1, 0, 1, BLOCK=16)
