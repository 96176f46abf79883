"""The products that take the activation with them, against torch: on a GPU, or in Triton's interpreter on a CPU.

`test_fused_interpreted.py` runs this file in the interpreter, in a process of its own.
"""

import pytest
import torch
from kernels_here import DEVICE, LOW, MARKS

from sparse_tx.model.block import activate
from sparse_tx.model.fused import WIDEST
from sparse_tx.model.fused.products import Tiles, contract, hidden_gradient, usable

pytestmark = MARKS
# Rows, width, hidden units: whole tiles, and with tails of each and no power of two.
SIZES = [(128, 64, 128), (150, 40, 88), (37, 72, 200), (1, 16, 24)]
TILES = [Tiles(64, 64, 32, 4, 2), Tiles(64, 32, 32, 4, 2)]


def made(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def exact(*tensors):
    return [t.detach().double() for t in tensors]


def close(ours, right, dtype):
    """To a few units of the last place of the largest number: what sums in another order may differ by."""
    assert ours.dtype == dtype
    right = right.detach()
    error = float((ours.double() - right).abs().max()) / float(right.abs().max())
    assert error <= 8 * torch.finfo(dtype).eps


def weight(C, F, dtype):
    return made(C, F, seed=3, dtype=dtype)


CASES = pytest.mark.parametrize(
    ("sizes", "dtype", "kind"),
    [(s, d, k) for s in SIZES for d in (torch.float32, LOW) for k in ("gelu", "relu2")],
    ids=str,
)


@CASES
@pytest.mark.parametrize("tiles", TILES, ids=["wide", "narrow"])
def test_the_second_product_takes_the_activation_of_what_it_reads(sizes, dtype, kind, tiles):
    T, C, F = sizes
    u, w = made(T, F, dtype=dtype), weight(C, F, dtype)
    out = torch.full((T, C), float("nan"), dtype=dtype, device=DEVICE)
    contract(u, w, kind, out, tiles)
    u, w = exact(u, w)
    close(out, activate(u, kind) @ w.t(), dtype)


@CASES
@pytest.mark.parametrize("tiles", TILES, ids=["wide", "narrow"])
@pytest.mark.parametrize("again", [False, True])
def test_the_gradient_of_hidden_units_leaves_the_product_with_the_sums_of_its_columns(sizes, dtype, kind, tiles, again):
    T, C, F = sizes
    u, d_a, w = made(T, F, dtype=dtype), made(T, C, seed=4, dtype=dtype), weight(C, F, dtype)
    d_u, y, sums = hidden_gradient(d_a, w, u, kind, again=again, tiles=tiles)
    u64, d64, w64 = exact(u, d_a, w)
    u64.requires_grad_()
    right = activate(u64, kind)
    (gradient,) = torch.autograd.grad(right, u64, d64 @ w64)
    close(d_u, gradient, dtype)
    assert (y is not None) == again
    if y is not None:
        close(y, right.detach(), dtype)
    torch.testing.assert_close(sums, d_u.float().sum(0), rtol=1e-5, atol=1e-4)


def test_the_tiles_in_use_give_the_same():
    T, C, F = 200, WIDEST, 320
    u, d_a, w = made(T, F, dtype=LOW), made(T, C, seed=4, dtype=LOW), weight(C, F, LOW)
    a = torch.empty(T, C, dtype=LOW, device=DEVICE)
    contract(u, w, "gelu", a)
    d_u, _, _ = hidden_gradient(d_a, w, u, "gelu", again=False)
    other, y, _ = hidden_gradient(d_a, w, u, "gelu", again=True)
    u64, d64, w64 = exact(u, d_a, w)
    activation = activate(u64.requires_grad_(), "gelu")
    close(a, activation @ w64.t(), LOW)
    close(y, activation, LOW)
    (gradient,) = torch.autograd.grad(activation, u64, d64 @ w64)
    close(d_u, gradient, LOW)
    close(other, gradient, LOW)


def test_the_activation_of_large_numbers_is_finite():
    """exp2 of 2,455 is infinite: the activation of -1,000 is 0, as is its slope; those of 1,000 are 1,000 and 1."""
    u = torch.tensor([-1000.0, -60.0, 60.0, 1000.0], dtype=LOW, device=DEVICE).repeat(16, 4)
    w = torch.eye(16, dtype=LOW, device=DEVICE)
    a = torch.empty(16, 16, dtype=LOW, device=DEVICE)
    contract(u, w, "gelu", a)
    assert torch.equal(a, u.clamp(min=0))
    d_u, _, _ = hidden_gradient(torch.ones_like(u), w, u, "gelu", again=False)
    assert torch.equal(d_u, (u > 0).to(LOW))


def test_matrices_that_the_copy_engine_cannot_take_are_known():
    assert usable(made(8, 16, dtype=LOW))
    assert not usable(made(8, 12, dtype=LOW))  # rows of 24 bytes
    assert not usable(made(16, 8, dtype=LOW).t())
    assert not usable(made(130, dtype=LOW)[2:].view(8, 16))  # 4 bytes from the start
