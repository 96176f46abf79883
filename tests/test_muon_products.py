"""The products of Muon's iteration against float64 and torch: on a GPU, or in Triton's interpreter on a CPU.

`test_fused_interpreted.py` runs this file in the interpreter, in a process of its own.
"""

import pytest
import torch
import triton
import triton.language as tl
from kernels_here import DEVICE, LOW, MARKS
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS

from sparse_tx.training import muon, muon_products
from sparse_tx.training.muon_products import Chosen, Tiles, iterated, launches, lower_tile

pytestmark = MARKS
COEFFICIENTS = DEFAULT_A, DEFAULT_B, DEFAULT_C
# Square, wide, tall; one tile and several, with tails; rows of whole 16 bytes and of none.
SHAPES = [(1, 64, 64), (3, 200, 72), (3, 72, 200), (1, 264, 136), (3, 33, 127), (1, 127, 33), (3, 130, 136), (1, 1, 5)]
FEW = Chosen(Tiles(64, 64, 32, 4, 2), Tiles(64, 64, 32, 4, 2), Tiles(64, 128, 32, 4, 2))


def randn(*shape, seed=0, dtype=LOW):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def nought(*shape):
    """Not a number, dense, at the start of a longer piece of memory, with what follows it there."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 4096,), float("nan"), dtype=LOW, device=DEVICE)
    return memory[:size].view(shape), memory[size:]


def rounded_once(got, want):
    """To half a unit of the last place, and what sums of float32 in another order may differ by."""
    info = torch.finfo(LOW)
    assert got.dtype == LOW
    error = (got.double() - want).abs()
    assert (error <= info.eps / 2 * want.abs() + info.tiny * info.eps + 1e-5 * want.abs().max()).all()


def factors(shape, scale=1.0):
    N, R, C = shape
    x = scale * randn(*shape)
    others = [nought(N, min(R, C), min(R, C)), nought(N, min(R, C), min(R, C)), nought(N, R, C)]
    return (x, *(t for t, _ in others)), [rest for _, rest in others]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("copied", [True, False], ids=["by copy engine", "by pointer"])
@pytest.mark.parametrize("tiles", [FEW, None], ids=["small", "in use"])
def test_each_product_takes_its_addition_and_is_rounded_once(monkeypatch, shape, copied, tiles):
    if not copied:
        monkeypatch.setattr(muon_products, "has_copy_engine", lambda device: False)
    tensors, rests = factors(shape, 0.1)
    x, g, h, out = tensors
    gram, square, update = launches(shape, LOW, x.device, COEFFICIENTS, tiles)
    tall = shape[1] > shape[2]
    a, b, c = COEFFICIENTS
    gram(tensors)
    exact = x.double()
    rounded_once(g, exact.mT @ exact if tall else exact @ exact.mT)
    assert torch.equal(g, g.mT)
    square(tensors)
    exact = g.double()
    rounded_once(h, b * exact + c * exact @ exact)
    assert torch.equal(h, h.mT)
    update(tensors)
    exact = x.double()
    rounded_once(out, a * exact + (exact @ h.double() if tall else h.double() @ exact))
    assert all(rest.isnan().all() for rest in rests)


@triton.jit
def _each_tile(ROWS, COLUMNS, count, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = lower_tile(t, count)
    inside = t < count * (count + 1) // 2
    tl.store(ROWS + t, row, mask=inside)
    tl.store(COLUMNS + t, column, mask=inside)


def test_the_programs_are_all_tiles_on_and_below_the_diagonal_once_each_and_those_of_a_row_together():
    for count in range(1, 201):
        n = count * (count + 1) // 2
        rows, columns = torch.full((2, n), -1, dtype=torch.int32, device=DEVICE)
        _each_tile[(triton.cdiv(n, 4096),)](rows, columns, count, BLOCK=4096)
        found = list(zip(rows.tolist(), columns.tolist(), strict=True))
        assert sorted(found) == [(i, j) for i in range(count) for j in range(i + 1)]
        assert sum(a != b for a, b in zip(rows.tolist(), rows.tolist()[1:], strict=False)) == count - 1


def orthogonal(g, monkeypatch, kernels):
    monkeypatch.setattr(muon, "DTYPE", LOW)
    monkeypatch.setattr(muon, "no_kernels", lambda *_: None if kernels else "torch is to be taken")
    return muon.orthogonal(g, COEFFICIENTS, 5, EPS)


@pytest.mark.parametrize("shape", [(3, 72, 72), (1, 64, 192), (3, 192, 64), (3, 33, 127), (1, 127, 33)], ids=str)
def test_the_iteration_is_no_rougher_than_torchs(monkeypatch, shape):
    g = randn(*shape, dtype=torch.float32)
    ours, torchs = (orthogonal(g, monkeypatch, kernels) for kernels in (True, False))
    a, b, c = COEFFICIENTS
    x = g.to(LOW)
    x = (x / x.norm(dim=(1, 2), keepdim=True)).double()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    assert ours.dtype == LOW
    assert ours.is_contiguous()
    assert (ours.double() - x).norm() <= 1.1 * (torchs.double() - x).norm()


def test_the_same_numbers_come_out_again_and_the_gradient_stays(monkeypatch):
    g = randn(3, 136, 72)
    kept = g.clone()
    first = orthogonal(g, monkeypatch, True)
    assert torch.equal(first, orthogonal(g, monkeypatch, True))
    assert torch.equal(g, kept)
    assert torch.equal(first[1:], orthogonal(g[1:], monkeypatch, True))  # whatever stands beside a matrix


def test_matrices_that_are_cut_from_others_or_turned_come_out_dense(monkeypatch):
    g = randn(3, 136, 72)
    for part in (g[:, 8:72], g.mT, g[:, :, 1:34]):
        got = orthogonal(part, monkeypatch, True)
        assert got.is_contiguous()
        assert torch.equal(got, orthogonal(part.contiguous(), monkeypatch, True))


def test_no_steps_and_no_matrices_are_no_trouble():
    x = randn(2, 16, 24)
    assert torch.equal(iterated(x.clone(), COEFFICIENTS, 0), x)
    assert iterated(x[:0], COEFFICIENTS, 5).shape == (0, 16, 24)
