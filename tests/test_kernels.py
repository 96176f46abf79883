"""The Triton kernels against the float64 oracle: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) on a CPU.

`test_kernels_interpreted.py` runs this file in the interpreter, in a process of its own.
"""

import pytest
import torch
from every_pattern import patterns_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_here import DEVICE, INTERPRETED, LOW, MARKS

from sparse_tx.attention import Block, Column, Full, Global, Summary, Window
from sparse_tx.attention.kernels import packed_attention, triton_attention, unsupported
from sparse_tx.attention.oracle import oracle_attention

pytestmark = MARKS


@pytest.fixture(autouse=True)
def no_plans():
    """Tests that exchange kernels or tables leave none of their plans behind, and find none."""
    from sparse_tx.attention.kernels import launch

    launch.forget_plans()
    yield
    launch.forget_plans()


def kernel_patterns(l):
    c = max(1, l // 2)
    return [
        *patterns_of(l),
        Window(l) | Summary(l, c) | Global(3),
        Column(l) | Summary(l, c) | Global(3),
        Block(l) | Column(l),
        Block(l) | Global(4),
        Window(2 * l) | Column(l, reach=1),
        Window(2 * l + 1) | Column(l),
        Window(3 * l) | Column(l),
        Window(l) | Column(l) | Summary(l, 1) | Global(2),
    ]


def inputs(S, H=1, Dqk=16, Dv=16, dtype=torch.float32, B=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, S, H, D, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for D in (Dqk, Dqk, Dv)]


def results(attend, qkv, patterns, scale=0.25):
    """out, lse and the gradients of a random function of both."""
    qkv = [t.detach().requires_grad_() for t in qkv]
    out, lse = attend(*qkv, patterns, scale)
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    d_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse)
    loss = (out * d_out).sum() + (lse * d_lse).masked_fill(lse == -torch.inf, 0).sum()
    return out, lse, *torch.autograd.grad(loss, qkv)


def compare(qkv, patterns, scale=0.25, tolerance=2e-5):
    assert unsupported(*qkv, patterns) is None
    got = results(triton_attention, qkv, patterns, scale)
    want = results(oracle_attention, [t.double() for t in qkv], patterns, scale)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("S", "l"), [(1, 1), (7, 3), (5, 9), (29, 8), (70, 1), (133, 8), (150, 33)])
def test_every_pattern_equals_the_oracle_forward_and_backward(S, l):
    for pattern in kernel_patterns(l):
        compare(inputs(S), (pattern,))


@pytest.mark.parametrize(("S", "l"), [(300, 70), (520, 64)])
def test_several_tiles_equal_the_oracle(S, l):
    for pattern in (Window(l), Window(l) | Column(l), Block(l) | Summary(l, 8, 1), Column(2), Full()):
        compare(inputs(S), (pattern,))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_and_any_heads_equal_the_oracle(data):
    l = data.draw(st.integers(1, 40), "l")
    H = data.draw(st.integers(1, 4), "H")
    heads = data.draw(st.lists(st.sampled_from(kernel_patterns(l)), min_size=H, max_size=H), "heads")
    widths = data.draw(st.sampled_from([(16, 16), (24, 40), (32, 16), (16, 64)]), "widths")
    compare(inputs(data.draw(st.integers(1, 150), "S"), H, *widths), tuple(heads))


def test_heads_with_their_own_slots_share_launches():
    from sparse_tx.attention.kernels.plan import plan, runs_of

    heads = tuple(Block(12) | Summary(12, 3, slot % 4) for slot in range(6))
    assert len(runs_of(plan(heads))) == 1
    compare(inputs(50, 6), heads)


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("index", range(len(kernel_patterns(4))))
def test_an_output_moves_with_a_key_exactly_where_the_pattern_allows(index, name):
    pattern, n = kernel_patterns(4)[index], 19
    q, k, v = inputs(n)
    moved = torch.cat([torch.zeros(1, n), torch.eye(n)]).to(q)[:, :, None, None]  # entry j + 1 has key j moved
    many = [t.expand(n + 1, -1, -1, -1) for t in (q, k, v)]
    many[1 if name == "key" else 2] = many[1 if name == "key" else 2] + moved
    out, _ = triton_attention(*many, (pattern,), 0.25)
    changed = (out[1:] != out[:1]).any(-1)[..., 0].T.cpu()  # (query, key)
    want = pattern.mask(n)
    if name == "key":  # the only key of a query has weight 1 whatever its score
        want = want & (want.sum(1) > 1)[:, None]
    assert torch.equal(changed, want)


@pytest.mark.parametrize("dtype", [LOW, torch.float32])
def test_low_precision_is_no_worse_than_twice_dense_torch(dtype):
    for pattern in (Window(16) | Column(16), Block(16) | Summary(16, 4, 1), Column(16)):
        low = inputs(200, dtype=dtype)
        got, dense = results(triton_attention, low, (pattern,)), results(oracle_attention, low, (pattern,))
        exact = results(oracle_attention, [t.double() for t in low], (pattern,))
        for a, b, c in zip(got, dense, exact, strict=True):
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 2e-5 * c.abs().max(), (pattern, dtype)


@pytest.fixture
def walks(monkeypatch):
    """Tables by which windows and short columns of width 16 are walked, in tiles of 16."""
    from sparse_tx.attention.kernels import configs, walks

    parts = ("window", "column 32", "column 64", "column 128")
    table = {(k, p, 16, 16): configs.Walk(16, 4, 2, 2) for k in ("forward", "backward") for p in parts}
    monkeypatch.setattr(configs, "WALKS", table)
    ran = []
    for name in ("window_forward", "window_backward", "column_forward", "column_backward"):
        kernel = getattr(walks, name)
        recorded = type("Recorded", (), {"__getitem__": lambda _, grid, k=kernel, n=name: ran.append(n) or k[grid]})()
        recorded.arg_names = kernel.arg_names
        monkeypatch.setattr(walks, name, recorded)
    return ran


@pytest.mark.skipif(not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
                    reason="needs the copy engine")  # fmt: skip
@pytest.mark.parametrize(
    ("S", "l", "kernels"),
    [
        (96, 8, {"window_forward", "window_backward", "column_forward", "column_backward"}),
        (132, 33, {"window_forward", "window_backward", "column_forward", "column_backward"}),
        (64, 1, {"window_forward", "window_backward"}),
        (300, 64, {"window_forward", "window_backward"}),  # 64 does not divide 300
        (97, 8, set()),  # rows of 97 numbers are no whole 16 bytes
    ],
)
def test_walks_are_no_worse_than_twice_dense_torch(walks, S, l, kernels):
    patterns = (Window(l), Window(l) | Column(l), Column(l, reach=2), Window(2 * l) | Column(l))
    low = inputs(S, 4, dtype=LOW, B=2)
    got, dense = results(triton_attention, low, patterns), results(oracle_attention, low, patterns)
    exact = results(oracle_attention, [t.double() for t in low], patterns)
    assert set(walks) == kernels
    for a, b, c in zip(got, dense, exact, strict=True):
        error, allowed = ((x - c).masked_fill(c == -torch.inf, 0).abs().max() for x in (a, b))
        assert error <= 2 * allowed + 2e-5 * c[c.isfinite()].abs().max()


@pytest.mark.parametrize(
    ("pattern", "tile"),
    [
        *((pattern, (64, 64)) for pattern in (
            Block(32) | Summary(32, 8, 1), Summary(16, 4), Full(), Column(2), Block(48),
            # The first query that may see a key of these is at no multiple of 16 bytes of (B, H, S).
            Window(32) | Summary(32, 8, 1), Window(32) | Global(8), Summary(16, 4) | Global(13),
        )),
        # Steps of other sizes than the tile; a step that is a share of a block's summary.
        (Window(100), (128, 32)), (Full(), (64, 32)), (Column(2), (64, 32)), (Block(48), (64, 16)),
        (Summary(64, 32, 1), (64, 16)), (Window(32) | Summary(48, 16), (64, 32)),
    ],
)  # fmt: skip
def test_copied_blocks_are_no_worse_than_twice_dense_torch(pattern, tile, monkeypatch):
    """Lengths, strides and tiles at which the copy engine brings the blocks (it takes 16 bits alone)."""
    from sparse_tx.attention.kernels import configs

    parts = ("window", "full", "fixed", "summary", "column 128", "block 64")
    kernels = ("forward", "backward", "keys")
    table = {(k, p, 16, 16, 2): configs.Config(*tile, 4, 2) for k in kernels for p in parts}
    monkeypatch.setattr(configs, "TUNED", table)
    low = inputs(192, 2, dtype=LOW, B=2)
    got, dense = results(triton_attention, low, (pattern,) * 2), results(oracle_attention, low, (pattern,) * 2)
    exact = results(oracle_attention, [t.double() for t in low], (pattern,) * 2)
    for a, b, c in zip(got, dense, exact, strict=True):
        error, allowed = ((x - c).masked_fill(c == -torch.inf, 0).abs().max() for x in (a, b))
        assert error <= 2 * allowed + 2e-5 * c[c.isfinite()].abs().max()


def test_huge_logits_and_any_sign_of_scale():
    q, k, v = inputs(70)
    compare([q, k, v], (Window(8) | Column(8),), scale=-0.5)
    compare([q, k, v], (Window(8) | Column(8),), scale=0.0)
    for pattern in (Window(8) | Column(8), Block(8) | Summary(8, 2)):
        for t in results(triton_attention, [q * 1e4, k, v], (pattern,)):
            assert t[t != -torch.inf].isfinite().all()


def test_keys_that_nobody_may_see_pass_nothing_on():
    q, k, v = inputs(64)
    pattern = Summary(8, 2)
    hidden = torch.arange(64, device=q.device) % 8 < 6
    poisoned = [q, k.masked_fill(hidden[:, None, None], 1e30), v.masked_fill(hidden[:, None, None], 1e30)]
    for a, b in zip(
        results(triton_attention, [q, k, v], (pattern,))[:3],
        results(triton_attention, poisoned, (pattern,))[:3],
        strict=True,
    ):
        assert torch.equal(a, b)
    _, _, _, dk, dv = results(triton_attention, [q, k, v], (pattern,))
    assert (dk[:, hidden] == 0).all()
    assert (dv[:, hidden] == 0).all()


def test_repeated_runs_give_the_same_bits():
    qkv = inputs(150, dtype=LOW)
    for pattern in (Window(16) | Column(16), Block(16) | Summary(16, 4)):
        first, second = (results(triton_attention, qkv, (pattern,)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_packed_projection_gives_the_same_as_separate_tensors():
    B, S, H, Dqk, Dv = 2, 70, 2, 16, 24
    patterns = (Window(8) | Column(8), Block(8) | Summary(8, 2))
    qkv = torch.randn(B, S, H * (2 * Dqk + Dv), device=DEVICE, requires_grad=True)
    out, lse = packed_attention(qkv, patterns, Dqk)
    parts = [t.unflatten(-1, (H, -1)).detach().requires_grad_() for t in qkv.split([H * Dqk, H * Dqk, H * Dv], -1)]
    out2, lse2 = triton_attention(*parts, patterns, Dqk**-0.5)
    assert torch.equal(out, out2)
    assert torch.equal(lse, lse2)
    g = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, qkv, g)
    want = torch.cat([t.flatten(2) for t in torch.autograd.grad(out2, parts, g)], -1)
    assert torch.equal(got, want)


def test_strides_are_taken_as_they_are():
    q, k, v = (t.transpose(1, 2) for t in torch.randn(3, 2, 3, 50, 16, device=DEVICE).unbind())  # (B, S, H, D) views
    patterns = (Window(8) | Column(8),) * 3
    got = triton_attention(q, k, v, patterns, 0.25)
    want = triton_attention(q.contiguous(), k.contiguous(), v.contiguous(), patterns, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_operators_pass_opcheck():
    from sparse_tx.attention.kernels import ops
    from sparse_tx.attention.kernels.plan import plan

    numbers = plan((Window(8) | Column(8),) * 2)
    qkv = [t.requires_grad_() for t in inputs(40, 2)]
    torch.library.opcheck(ops.attention, (*qkv, numbers, 0.25))
    packed = torch.randn(1, 40, 2 * 48, device=DEVICE, requires_grad=True)
    torch.library.opcheck(ops.packed_attention, (packed, 2, 16, numbers, 0.25))


def test_a_second_derivative_is_refused():
    q, k, v = (t.requires_grad_() for t in inputs(24))
    out, _ = triton_attention(q, k, v, (Window(8),), 0.25)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='oracle'"):
        dq.sum().backward()


def test_a_call_is_planned_once_for_each_layout(monkeypatch):
    from sparse_tx.attention import sparse_attention
    from sparse_tx.attention.kernels import launch

    planned, runs_of = [], launch.runs_of  # called once for each plan
    monkeypatch.setattr(launch, "runs_of", lambda numbers: (planned.append(numbers), runs_of(numbers))[1])
    patterns = (Window(7) | Column(7), Block(7) | Summary(7, 2))
    v, *_ = inputs(28, 2, B=2)
    room = torch.zeros(v.numel() + 1, device=DEVICE)
    by_head = torch.empty_like(v.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    kinds = {"dense": torch.empty_like(v), "shifted": room[1:].view(v.shape), "by head": by_head}
    want = None
    for kind, plans in (("dense", 2), ("dense", 2), ("shifted", 4), ("by head", 6), ("shifted", 6), ("dense", 6)):
        qkv = [kinds[kind].copy_(v).requires_grad_(), v.clone().requires_grad_(), v.clone().requires_grad_()]
        out = sparse_attention(*qkv, patterns, backend="triton")
        got = out, *torch.autograd.grad(out, qkv, v)
        kinds[kind].requires_grad_(False)
        assert len(planned) == plans, kind  # one forward, one backward
        want = got if want is None else want
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), kind


def test_compiled_whole_it_gives_the_same():
    from sparse_tx.attention import sparse_attention

    patterns = (Window(8) | Column(8), Block(8) | Summary(8, 2, 1))

    def attend(q, k, v):
        return sparse_attention(q, k, v, patterns, backend="triton")

    qkv = [t.requires_grad_() for t in inputs(40, 2)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    g = torch.randn_like(qkv[2])
    for a, b in zip(
        torch.autograd.grad(compiled(*qkv), qkv, g), torch.autograd.grad(attend(*qkv), qkv, g), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double(), (Full(),)), "float64"),
        (lambda q, k, v: (q[..., :12], k[..., :12], v, (Full(),)), "width 12"),
        (lambda q, k, v: (q, k, v, (Window(3) | Block(3),)), "one window or one block"),
        (lambda q, k, v: (q, k, v, (Column(3) | Summary(4, 1),)), "stride"),
        (lambda q, k, v: (q, k, v, (object(),)), "no kernel"),
    ],
)
def test_what_the_kernels_cannot_run_is_named_with_the_remedy(change, message):
    reason = unsupported(*change(*inputs(8)))
    assert message in reason
    assert "backend='blocked'" in reason
