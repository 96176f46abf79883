"""The moving average in one launch, against torch's lerp: on a GPU, or in Triton's interpreter on a CPU.

`test_fused_interpreted.py` runs this file in the interpreter, in a process of its own.
"""

import pytest
import torch
from kernels_here import DEVICE, MARKS

from sparse_tx.training import average as kernel
from sparse_tx.training.tables import usable
from sparse_tx.training.update import move_average

pytestmark = MARKS
SIZES = ((3,), (70, 1000), (4096,), (5, 1), (0,), (4097,))  # several blocks, tails, one whole block, nothing


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in SIZES]


@pytest.mark.parametrize("share", [0.25, 0.0, 1.0])
def test_all_tensors_move_by_the_share(share):
    average, weights = tensors(0), tensors(1)
    before, kept = [t.clone() for t in average], [t.clone() for t in weights]
    kernel.move_all(average, weights, torch.tensor(share, device=DEVICE))
    for a, b, w in zip(average, before, weights, strict=True):
        torch.testing.assert_close(a, b.lerp(w, share), rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, weights, kept))
    if share == 0:
        assert all(map(torch.equal, average, before))


def test_tensors_that_moved_get_a_table_of_their_own():
    average, weights = tensors(0), tensors(1)
    share = torch.tensor(0.5, device=DEVICE)
    kernel.move_all(average, weights, share)
    others = [t.clone() for t in tensors(2)]
    wanted = [a.lerp(w, 0.5) for a, w in zip(average, others, strict=True)]
    kernel.move_all(average, others, share)
    for a, b in zip(average, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_other_dtypes_layouts_and_addresses_are_left_to_torch():
    t = torch.zeros(8, 8, device=DEVICE)
    assert usable([t, t.clone()])
    assert not usable([t, t.double()])
    assert not usable([t, torch.zeros(8, 9, device=DEVICE)[:, :8]])
    assert not usable([t, torch.zeros(65, device=DEVICE)[1:]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_left_out_moves_nothing_and_others_take_the_kernel(monkeypatch):
    calls, real = [], kernel.move_all
    monkeypatch.setattr(kernel, "move_all", lambda *a: (calls.append(1), real(*a))[1])
    for skip, share in ((1.0, 0.0), (0.0, 0.25)):
        average, weights = tensors(0), tensors(1)
        before = [t.clone() for t in average]
        move_average(average, weights, 0.25, torch.tensor(skip, device=DEVICE))
        for a, b, w in zip(average, before, weights, strict=True):
            torch.testing.assert_close(a, b.lerp(w, share), rtol=1e-6, atol=1e-6)
    assert calls == [1, 1]
