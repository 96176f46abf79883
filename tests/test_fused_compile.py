"""Every launch of the fused blocks compiles for each GPU generation and fits its shared memory; no GPU needed."""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")

from test_kernels_compile import SHARED_KIB, Recorder, compiled  # noqa: E402

from sparse_tx.model import AttentionSpec, ModelSpec, Transformer  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

KERNELS = {
    "norm": ("add_norm_forward", "add_norm_backward", "add_shares"),
    "linear": ("activation_forward", "activation_backward", "column_sums"),
    "query_key": ("query_key_forward", "query_key_backward"),
}


def launches(monkeypatch, C, F, dtype, residual, p, kind):
    """Of a norm, queries and keys, a sum and a feed-forward of (2, 3072, C), forward and backward."""
    from sparse_tx.model.fused import linear, norm, products, query_key

    found = []
    monkeypatch.setattr(products, "usable", lambda *_: False)  # below
    for module in (norm, linear, query_key):
        for name in KERNELS[module.__name__.rpartition(".")[2]]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    with torch.device("meta"):
        spec = ModelSpec(
            "image", 3072, 1, C, C // 8, C // 2, F, AttentionSpec("full"), activation=kind, **QUERY_KEY[kind]
        )
        (block,) = Transformer(spec).blocks
        ln, out, qkv, ff = block.ff_norm, block.attention.out, block.attention.qkv, block.ff
        h = torch.empty(2, 3072, C, dtype=residual, requires_grad=True)
        key = torch.empty(2, 2, dtype=torch.long) if p else None
    low = [
        t.detach().to(dtype) for t in (qkv.weight, qkv.bias, out.weight, *ff.expand.parameters(), ff.contract.weight)
    ]
    h, x = norm.norm(h, ln, dtype)
    qkv_ = query_key.prepared(linear.linear(x, qkv, low[0], low[1]), block.attention.query_key)
    h, x = linear.joined(qkv_[..., :C].contiguous(), out, low[2], h, key, p, ln)
    h, x = linear.feed_forward(x, ff, low[3:], "none", h, key, p, ln)
    h, x = linear.feed_forward(x, ff, low[3:], "both", h, key, p, None)
    h.float().sum().backward()
    monkeypatch.undo()
    return found


QUERY_KEY = {"gelu": {"qk_norm": True, "rotary": "axes"}, "relu2": {"qk_norm": True, "rotary": "position"}}
CASES = [
    (256, 512, torch.bfloat16, torch.bfloat16, 0.25, "gelu"),
    (512, 2048, torch.bfloat16, torch.float32, 0.0, "relu2"),
    (40, 96, torch.float16, torch.float32, 0.1, "gelu"),
    (512, 2048, torch.float32, torch.float32, 0.25, "gelu"),
    (8192, 16384, torch.float32, torch.float32, 0.25, "relu2"),
]


@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_launch_compiles_and_fits_shared_memory(monkeypatch, case, capability):
    found = launches(monkeypatch, *case)
    assert {kernel.__name__ for kernel, _, _ in found} == {name for names in KERNELS.values() for name in names}
    for kernel, args, named in found:
        binary = compiled(kernel, args, named, capability)
        assert binary.metadata.shared <= SHARED_KIB[capability] * 1024, (kernel.__name__, named)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_a_norm_sums_its_rows_in_one_order_after_a_sum_and_by_itself(monkeypatch, case):
    """So blocks that are run again, which make their norm by themselves, give the bits of those that are not."""
    orders = {True: set(), False: set()}
    for kernel, args, named in launches(monkeypatch, *case):
        if kernel.__name__ == "add_norm_backward" and named["NORM"]:
            code = compiled(kernel, args, named, 90).asm["ttgir"]
            layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", code, re.MULTILINE))
            sums = re.findall(r'"tt\.reduce".*?axis = (\d).*?\}\) : \(tensor<[\dx]+xf32, (#\w+)>', code, re.DOTALL)
            orders[named["ADD"]] |= {layouts[layout] for axis, layout in sums if axis == "1"}
    assert len(orders[True]) == 1
    assert orders[True] == orders[False]


@pytest.mark.parametrize(("C", "F"), [(256, 512), (512, 2048), (40, 88)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_with_the_activation_compile_for_the_copy_engine_and_fit_shared_memory(monkeypatch, C, F, dtype):
    from sparse_tx.model.fused import products

    found = []
    for name in ("contract_product", "contract_backward"):
        monkeypatch.setattr(products, name, Recorder(getattr(products, name), found))
    monkeypatch.setattr(products, "total", lambda shares: shares[0])
    d_a, weight, u = (torch.empty(*s, dtype=dtype, device="meta") for s in ((6144, C), (C, F), (6144, F)))
    for kind in ("gelu", "relu2"):
        products.contract(u, weight, kind, torch.empty_like(d_a))
        for again in (False, True):
            products.hidden_gradient(d_a, weight, u, kind, again=again)
    monkeypatch.undo()
    assert len(found) == 6
    for kernel, args, named in found:
        binary = compiled(kernel, args, named, 90)
        assert binary.metadata.shared <= SHARED_KIB[90] * 1024, (kernel.__name__, named)
        assert "wgmma.mma_async" in binary.asm["ptx"]  # Triton 3.6 needs it where the copy engine brings the tiles


@pytest.mark.parametrize(("C", "F"), [(256, 512), (128, 1024), (40, 88)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_whose_warps_have_roles_compiles_and_fits_shared_memory(monkeypatch, C, F, dtype):
    from sparse_tx.model.fused import hopper

    found = []
    monkeypatch.setattr(hopper, "contract_backward_by_roles", Recorder(hopper.contract_backward_by_roles, found))
    monkeypatch.setattr(hopper, "total", lambda shares: shares[0])
    monkeypatch.setattr(hopper, "multiprocessors", lambda index: 132)
    d_a, weight, u = (torch.empty(*s, dtype=dtype, device="meta") for s in ((6144, C), (C, F), (6144, F)))
    for kind in ("gelu", "relu2"):
        hopper.contract_gradients(d_a, weight, u, kind)
    monkeypatch.undo()
    assert len(found) == 2
    for kernel, args, named in found:
        binary = compiled(kernel, args, named, 90)
        assert binary.metadata.shared <= SHARED_KIB[90] * 1024
        assert "wgmma.mma_async" in binary.asm["ptx"]


@pytest.mark.parametrize(("C", "F"), [(512, 2048), (264, 1000), (48, 80)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_wide_kernel_whose_warps_have_roles_compiles_and_fits_shared_memory(monkeypatch, C, F, dtype):
    from sparse_tx.model.fused import hopper

    found = []
    monkeypatch.setattr(hopper, "hidden_gradient_by_roles", Recorder(hopper.hidden_gradient_by_roles, found))
    monkeypatch.setattr(hopper, "total", lambda shares: shares[0])
    monkeypatch.setattr(hopper, "multiprocessors", lambda index: 132)
    d_a, weight, u = (torch.empty(*s, dtype=dtype, device="meta") for s in ((6144, C), (C, F), (6144, F)))
    for kind in ("gelu", "relu2"):
        for again in (False, True):
            hopper.hidden_gradient(d_a, weight, u, kind, again=again)
    monkeypatch.undo()
    assert len(found) == 4
    for kernel, args, named in found:
        binary = compiled(kernel, args, named, 90)
        assert binary.metadata.shared <= SHARED_KIB[90] * 1024
        assert "wgmma.mma_async" in binary.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_average_of_many_tensors_compiles_with_whole_loads(monkeypatch, capability):
    from sparse_tx.training import average

    found = []
    monkeypatch.setattr(average, "move", Recorder(average.move, found))
    tensors = [torch.zeros(5000), torch.zeros(3)]
    average.move_all(tensors, [t.clone() for t in tensors], torch.tensor(0.5))
    monkeypatch.undo()
    ((kernel, args, named),) = found
    assert "ld.global.v4" in compiled(kernel, args, named, capability).asm["ptx"]


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_muons_two_passes_compile_with_whole_loads_and_stores(monkeypatch, capability):
    from sparse_tx.training import muon_kernels

    found = []
    for name in ("muon_gather", "muon_apply"):
        monkeypatch.setattr(muon_kernels, name, Recorder(getattr(muon_kernels, name), found))
    addresses, zero = torch.zeros(2, 3, dtype=torch.long), torch.zeros(())
    x = muon_kernels.gather(addresses, (96, 80), zero, zero, 0.95)
    muon_kernels.apply(addresses, x[:, :32].contiguous(), 32, zero, 1e-3, 1e-2)
    monkeypatch.undo()
    assert len(found) == 2
    for kernel, args, named in found:
        text = compiled(kernel, args, named, capability).asm["ptx"]
        assert "ld.global.v4.b32" in text
        assert "st.global.v4.b32" in text


@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("shape", [(16, 2048, 512), (16, 512, 2048), (3, 72, 520), (3, 127, 33)], ids=str)
def test_muons_products_compile_for_tensor_cores_and_fit_shared_memory(monkeypatch, shape, capability):
    from sparse_tx.training import muon_products

    found = []
    for name in ("muon_symmetric", "muon_update"):
        monkeypatch.setattr(muon_products, name, Recorder(getattr(muon_products, name), found))
    monkeypatch.setattr(muon_products, "has_copy_engine", lambda device: capability >= 90)
    monkeypatch.setattr(muon_products, "is_large", lambda device: capability == 90)
    N, R, C = shape
    S = min(R, C)
    tensors = [torch.empty(N, *s, dtype=torch.bfloat16, device="meta") for s in ((R, C), (S, S), (S, S), (R, C))]
    for launch in muon_products.launches(shape, torch.bfloat16, tensors[0].device, (3.0, -4.0, 2.0)):
        launch(tensors)
    monkeypatch.undo()
    assert len(found) == 3
    whole = S % 8 == 0 and C % 8 == 0
    for kernel, args, named in found:
        binary = compiled(kernel, args, named, capability)
        assert binary.metadata.shared <= SHARED_KIB[capability] * 1024, (kernel.__name__, named)
        text = binary.asm["ptx"]
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in text
        assert not whole or ("cp.async.bulk.tensor" if capability == 90 else "cp.async.cg") in text
        assert not whole or "st.global.v4.b32" in text
