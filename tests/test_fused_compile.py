"""Every launch of the fused blocks compiles for each GPU generation and fits its shared memory; no GPU needed."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")

from test_kernels_compile import SHARED_KIB, Recorder, compiled  # noqa: E402

from sparse_tx.model.block import FeedForward  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

KERNELS = {
    "norm": ("add_norm_forward", "add_norm_backward", "add_shares"),
    "linear": ("activation_forward", "activation_backward", "column_sums"),
}


def launches(monkeypatch, C, F, dtype, residual, p):
    """Of a norm, a sum and a feed-forward of (2, 3072, C), forward and backward."""
    from sparse_tx.model.fused import linear, norm

    found = []
    for module, names in ((norm, KERNELS["norm"]), (linear, KERNELS["linear"])):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    with torch.device("meta"):
        ln, out, qkv, ff = torch.nn.LayerNorm(C), torch.nn.Linear(C, C), torch.nn.Linear(C, 2 * C), FeedForward(C, F, 1)
        h = torch.empty(2, 3072, C, dtype=residual, requires_grad=True)
        key = torch.empty(2, 2, dtype=torch.long) if p else None
    low = [
        t.detach().to(dtype) for t in (qkv.weight, qkv.bias, out.weight, *ff.expand.parameters(), ff.contract.weight)
    ]
    h, x = norm.norm(h, ln, dtype)
    qkv_ = linear.linear(x, qkv, low[0], low[1])
    h, x = linear.joined(qkv_[..., :C].contiguous(), out, low[2], h, key, p, ln)
    h, x = linear.feed_forward(x, ff, low[3:], "none", h, key, p, ln)
    h, x = linear.feed_forward(x, ff, low[3:], "both", h, key, p, None)
    h.float().sum().backward()
    monkeypatch.undo()
    return found


CASES = [
    (256, 512, torch.bfloat16, torch.bfloat16, 0.25),
    (512, 2048, torch.bfloat16, torch.float32, 0.0),
    (40, 96, torch.float16, torch.float32, 0.1),
    (512, 2048, torch.float32, torch.float32, 0.25),
    (8192, 16384, torch.float32, torch.float32, 0.25),
]


@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_launch_compiles_and_fits_shared_memory(monkeypatch, case, capability):
    found = launches(monkeypatch, *case)
    assert {kernel.__name__ for kernel, _, _ in found} == {name for names in KERNELS.values() for name in names}
    for kernel, args, named in found:
        binary = compiled(kernel, args, named, capability)
        assert binary.metadata.shared <= SHARED_KIB[capability] * 1024, (kernel.__name__, named)
