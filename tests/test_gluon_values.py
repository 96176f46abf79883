"""Values of the kernels in Gluon without a GPU: their code, run by `emulator.py`, against formulas in float64.

Attention as a GPU of compute capability 9.0 runs it, with the kernels in plain Triton that stand beside them.
"""

import os
import random

import pytest
import torch

pytest.importorskip("triton")

import emulator
from every_pattern import patterns_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels_compile import KERNELS, warps_of
from torch.nn.functional import layer_norm, linear
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparse_tx.attention import Column, Window
from sparse_tx.attention.kernels.shared_memory import barriers, block_descriptor
from sparse_tx.attention.oracle import oracle_attention
from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.model.decoder import LayerWeights

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the emulator takes its place")


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.fixture
def pauses(monkeypatch):
    """Chooses how roles overtake each other."""

    def choose(seed, delay=0.002, held=0.0):
        monkeypatch.setattr(emulator, "delay", delay)
        monkeypatch.setattr(emulator, "held", held)
        monkeypatch.setattr(emulator, "jitter", random.Random(seed))

    return choose


@pytest.fixture
def attention(monkeypatch):
    """Forward and backward pass by the kernels that an H100 takes; kernels: how often each was launched."""
    from sparse_tx.attention.kernels import copies, launch, walks
    from sparse_tx.attention.kernels.plan import plan

    kernels = {}
    for module in (launch, walks):
        for name in KERNELS[module.__name__.rpartition(".")[2]]:
            kernels[name] = emulator.Emulated(getattr(module, name))
            monkeypatch.setattr(module, name, kernels[name])
    monkeypatch.setattr(launch, "is_large", lambda device: True)
    monkeypatch.setattr(walks, "has_roles", lambda device: True)
    monkeypatch.setattr(copies, "has_copy_engine", lambda device: True)
    launch.forget_plans()

    def run(q, k, v, d_out, patterns, d_lse=None):
        out, lse = torch.full_like(d_out, torch.nan), torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
        gradients = [torch.full_like(t, torch.nan) for t in (q, k, v)]
        numbers, scale = plan(patterns), q.shape[-1] ** -0.5
        launch.forward(q, k, v, out, lse, numbers, scale)
        launch.backward(q, k, v, out, lse, d_out, d_lse, *gradients, numbers, scale)
        return [out, lse, *gradients]

    run.kernels = kernels
    yield run
    launch.forget_plans()


def inputs(patterns, S, Dqk, Dv, dtype, B=1):
    generator = torch.Generator().manual_seed(0)
    H = len(patterns)
    return [torch.randn(B, S, H, d, generator=generator).to(dtype) for d in (Dqk, Dqk, Dv, Dv)]


def reference(q, k, v, d_out, patterns, dtype, d_lse=None):
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
    out, lse = oracle_attention(q, k, v, patterns, q.shape[-1] ** -0.5)
    torch.autograd.backward((out, lse), (d_out.to(dtype), torch.zeros_like(lse) if d_lse is None else d_lse.to(dtype)))
    return [out.detach(), lse.detach(), q.grad, k.grad, v.grad]


def near_the_truth(attention, given, patterns, dtype):
    """What attention gives, which is as near to float64 as dense torch in this dtype."""
    found = attention(*given, patterns)
    exact, dense = (reference(*given, patterns, t) for t in (torch.float64, dtype))
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), found, exact, dense, strict=True):
        seen = torch.isfinite(b)
        assert torch.equal(seen, torch.isfinite(a)), name
        assert relative(a[seen], b[seen]) <= 2 * relative(c[seen], b[seen]) + 1e-6, name
    return found


CASES = [
    ([Window(96)] * 2, 300, 64, 128, torch.bfloat16),
    ([Window(16)], 132, 64, 64, torch.bfloat16),
    ([Window(128)] * 2, 420, 32, 32, torch.bfloat16),
    ([Window(250)], 640, 64, 64, torch.float16),
    ([Window(64), Window(96)], 256, 64, 64, torch.bfloat16),
    ([Window(96) | Column(96)] * 2, 384, 64, 128, torch.bfloat16),
    ([Window(128) | Column(128), Window(128)], 128 * 12, 32, 32, torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_by_roles_is_as_near_the_truth_as_dense_torch(attention, case):
    patterns, _, _, _, dtype = case
    given = inputs(*case)
    near_the_truth(attention, given, patterns, dtype)
    narrow = given[0].shape[-1] < 64
    assert attention.kernels[f"{'narrow' if narrow else 'window'}_backward_by_roles"].launched
    assert narrow or attention.kernels["window_forward_by_roles"].launched


ALONE = [
    ([Window(128)] * 4, 420, 32, 32, torch.bfloat16),
    ([Window(40)] * 8, 300, 32, 32, torch.float16),
    ([Column(16)] * 4, 16 * 23, 32, 32, torch.bfloat16),
    ([Column(8, reach=5)] * 4, 8 * 100, 32, 32, torch.float16),
    ([Column(24)] * 2, 24 * 20, 64, 128, torch.bfloat16),
    ([Window(16) | Column(16)] * 4, 16 * 96, 32, 32, torch.bfloat16),
    ([Window(96) | Column(96, reach=3)] * 4, 96 * 6, 32, 32, torch.bfloat16),
]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_attention_by_warps_that_work_alone_is_as_near_the_truth_as_dense_torch(monkeypatch, attention, pauses, case):
    warps_of(monkeypatch)
    patterns, _, _, _, dtype = case
    given = inputs(*case, B=2)
    found = near_the_truth(attention, given, patterns, dtype)
    launched = {name for name, kernel in attention.kernels.items() if kernel.launched}
    assert all(name.endswith("by_warps") for name in launched if "_forward" in name)
    pauses(0)
    assert all(map(torch.equal, found, attention(*given, patterns)))


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("pattern", [Window(15), Window(16), Window(17), Column(1), Column(17), Window(1) | Column(2)])
def test_edges_of_blocks_packed_inputs_and_gradients_of_the_log_sum_exp(monkeypatch, attention, pattern, alone):
    """q, k and v of one projection; a sequence of fewer entries than a block, too. alone: by warps that work alone."""
    from sparse_tx.attention.kernels import configs

    if not alone:
        monkeypatch.setattr(configs, "WARPS", {})
    for S in (12, 68):
        if isinstance(pattern, Column):
            S = pattern.stride * (S // 4)
        packed = torch.randn(2, S, 4 * 96, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        q, k, v = (t.unflatten(-1, (4, 32)) for t in packed.split(128, -1))
        d_out, d_lse = torch.randn(2, S, 4, 32).to(torch.bfloat16), torch.randn(2, 4, S)
        found = attention(q, k, v, d_out, [pattern] * 4, d_lse)
        exact, dense = (reference(q, k, v, d_out, [pattern] * 4, t, d_lse) for t in (torch.float64, torch.bfloat16))
        for a, b, c in zip(found, exact, dense, strict=True):
            assert float((a - b).norm()) <= 2 * float((c - b).norm()) + 1e-4


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape_and_any_heads_as_an_h100_runs_them(monkeypatch, attention, data):
    """With the copy engine, roles and warps that work alone wherever they are taken, and where they could be."""
    with monkeypatch.context() as patched:
        if data.draw(st.booleans(), "alone wherever they could"):
            warps_of(patched)
        l = data.draw(st.sampled_from([4, 8, 12, 17, 32, 64, 96]), "l")
        H = data.draw(st.sampled_from([1, 2, 4]), "H")
        heads = data.draw(st.lists(st.sampled_from(patterns_of(l)), min_size=H, max_size=H), "heads")
        if data.draw(st.booleans(), "alike"):
            heads = heads[:1] * H
        widths = data.draw(st.sampled_from([(32, 32), (64, 64), (64, 128), (24, 40)]), "widths")
        dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]), "dtype")
        # Of enough entries that errors are like dense torch's and not a single one's.
        S = l * data.draw(st.integers(max(2, 64 // l), max(3, 320 // l)), "rows") + 4 * data.draw(
            st.integers(0, 1), "more"
        )
        tensors = inputs(heads, S, *widths, dtype)
        found = attention(*tensors, heads)
        exact, dense = (reference(*tensors, heads, t) for t in (torch.float64, dtype))
        for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), found, exact, dense, strict=True):
            seen = torch.isfinite(b)
            assert torch.equal(seen, torch.isfinite(a)), name
            off, allowed = (float((x[seen] - b[seen]).norm()) for x in (a, c))
            assert off <= 2 * allowed + 3e-4 * float(b[seen].norm()) + 1e-5, name


WINDOW, COLUMN, NARROW = "window_backward_by_roles", "column_backward_by_roles", "narrow_backward_by_roles"
WINDOW_FORWARD, COLUMN_FORWARD, DELTA = "window_forward_by_roles", "column_forward_by_roles", "attention_delta"
BY_ROLES = [
    ([Column(6)] * 2, 6 * 256, 64, 64, torch.bfloat16, {COLUMN_FORWARD: 1, COLUMN: 1, DELTA: 0}),
    ([Column(8, reach=70)], 8 * 150, 64, 64, torch.float16, {COLUMN_FORWARD: 1, COLUMN: 1, DELTA: 0}),
    ([Column(5)], 5 * 128, 64, 64, torch.bfloat16, {COLUMN_FORWARD: 1, COLUMN: 1, DELTA: 0}),
    ([Column(3, reach=300)], 3 * 380, 64, 64, torch.bfloat16, {COLUMN_FORWARD: 1, COLUMN: 2, DELTA: 0}),
    ([Column(2)], 2 * 510, 64, 64, torch.float16, {COLUMN_FORWARD: 1, COLUMN: 2, DELTA: 0}),
    ([Column(2)], 2 * 600, 64, 64, torch.float16, {COLUMN_FORWARD: 1, COLUMN: 3, DELTA: 0}),
    ([Window(4) | Column(4)], 4 * 260, 64, 64, torch.bfloat16, {COLUMN_FORWARD: 1, COLUMN: 2, DELTA: 0}),
    ([Window(12) | Column(12), Column(12)], 12 * 100, 64, 64, torch.bfloat16, {COLUMN_FORWARD: 2, COLUMN: 2, DELTA: 0}),
    # More tiles than the gradients of queries fit the registers for.
    ([Window(400)], 700, 64, 64, torch.bfloat16, {WINDOW_FORWARD: 1, WINDOW: 2, DELTA: 1}),
    ([Window(520)], 580, 64, 64, torch.float16, {WINDOW_FORWARD: 1, WINDOW: 2, DELTA: 1}),
    ([Window(700)], 800, 64, 64, torch.bfloat16, {WINDOW_FORWARD: 0, WINDOW: 3, DELTA: 1}),
    ([Window(320) | Column(320)], 640, 64, 64, torch.bfloat16, {WINDOW: 2, DELTA: 0}),
    ([Window(300)], 500, 32, 32, torch.bfloat16, {WINDOW: 2, NARROW: 0, DELTA: 1}),
    ([Window(30)] * 2, 200, 32, 32, torch.bfloat16, {NARROW: 1, DELTA: 0}),
    ([Window(128)] * 2, 420, 32, 32, torch.float16, {NARROW: 1, DELTA: 0}),
    ([Window(200), Window(150)], 460, 32, 32, torch.bfloat16, {NARROW: 2, DELTA: 0}),
    ([Column(4)] * 2, 4 * 100, 32, 32, torch.bfloat16, {NARROW: 1, DELTA: 0}),
    ([Column(4, reach=70)], 4 * 150, 32, 32, torch.float16, {NARROW: 1, DELTA: 0}),
    ([Window(12) | Column(12), Column(12)], 12 * 100, 32, 32, torch.bfloat16, {NARROW: 3, DELTA: 0}),
]


@pytest.mark.parametrize("case", BY_ROLES, ids=str)
def test_roles_launch_what_they_should_and_are_as_near_the_truth_as_dense_torch(attention, pauses, case):
    *case, launches = case
    patterns, _, _, _, dtype = case
    given = inputs(*case, B=2)
    found = near_the_truth(attention, given, patterns, dtype)
    assert {name: attention.kernels[name].launched for name in launches} == launches
    pauses(0)
    assert all(map(torch.equal, found, attention(*given, patterns)))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(257, 1300), st.integers(64, 300), st.sampled_from([32, 64]), st.booleans())
def test_windows_of_any_number_of_passes(attention, R, quads, D, merged):
    """Also longer than the sequence, and than passes are taken for."""
    S = 4 * quads
    patterns = [Window(R) | Column(4)] if merged else [Window(R)]
    near_the_truth(attention, inputs(patterns, S, D, D, torch.bfloat16), patterns, torch.bfloat16)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_roles_that_overtake_each_other_write_the_same_bits(attention, pauses, case):
    given = inputs(*case)
    first = attention(*given, case[0])
    for seed in range(2):
        pauses(seed)
        assert all(map(torch.equal, first, attention(*given, case[0])))


LATE = [
    ([Column(2)] * 2, 2 * 128, 64, 64, torch.bfloat16),
    ([Column(2)], 2 * 300, 64, 64, torch.bfloat16),
    ([Window(64)] * 2, 64 * 18, 64, 64, torch.bfloat16),
    ([Window(96) | Column(96)], 96 * 18, 64, 128, torch.bfloat16),
    ([Window(256)], 64 * 18, 64, 64, torch.bfloat16),
    ([Window(128)], 64 * 18, 32, 32, torch.bfloat16),
]


@pytest.mark.parametrize("case", LATE, ids=str)
def test_copies_that_come_late_are_waited_for(monkeypatch, attention, pauses, case):
    """However late: a barrier tells its last phase from the next alone, which no role may take one for the other."""
    from sparse_tx.attention.kernels import walks

    monkeypatch.setattr(walks, "multiprocessors", lambda index: 2)
    given = inputs(*case, B=3 if isinstance(case[0][0], Column) else 1)
    first = attention(*given, case[0])
    for seed in range(3):
        pauses(seed, delay=0.0, held=0.15)
        assert all(map(torch.equal, first, attention(*given, case[0])))


@pytest.fixture
def training(monkeypatch):
    from sparse_tx.model.fused import hopper

    for name in ("contract_backward_by_roles", "hidden_gradient_by_roles"):
        monkeypatch.setattr(hopper, name, emulator.Emulated(getattr(hopper, name)))
    monkeypatch.setattr(hopper, "total", lambda shares: shares.sum(0))
    monkeypatch.setattr(hopper, "multiprocessors", lambda index: 7)
    return hopper


def feed_forward(T, C, F, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    d_a, weight, u = (torch.randn(*s, generator=generator).to(dtype) for s in ((T, C), (C, F), (T, F)))
    x = u.double().requires_grad_()
    y = x * torch.sigmoid(1.702 * x) if kind == "gelu" else x.relu().square()
    (d_u,) = torch.autograd.grad(y, x, d_a.double() @ weight.double())
    return (d_a, weight, u), y.detach(), d_u


@pytest.mark.parametrize("kind", ["gelu", "relu2"])
@pytest.mark.parametrize(("T", "C", "F"), [(19, 64, 80), (500, 256, 136), (1000, 200, 264)])
def test_the_narrow_feed_forward_has_the_gradients_of_the_formula(training, pauses, T, C, F, kind):
    given, y, d_u = feed_forward(T, C, F, kind, torch.bfloat16)
    found = training.contract_gradients(*given, kind)
    for a, b in zip(found, (d_u, d_u.sum(0), given[0].double().T @ y), strict=True):
        assert relative(a, b) < 0.004
    pauses(0)
    assert all(map(torch.equal, found, training.contract_gradients(*given, kind)))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("T", "C", "F"), [(19, 264, 80), (500, 512, 264)])
def test_the_wide_feed_forward_has_the_gradients_of_the_formula(training, pauses, T, C, F, again):
    given, y, d_u = feed_forward(T, C, F, "gelu", torch.bfloat16)
    found = training.hidden_gradient(*given, "gelu", again=again)
    assert relative(found[0], d_u) < 0.004
    assert relative(found[2], d_u.sum(0)) < 0.004
    assert relative(found[1], y) < 0.004 if again else found[1] is None
    pauses(0)
    other = training.hidden_gradient(*given, "gelu", again=again)
    assert torch.equal(found[0], other[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "ff", "activation"), [(256, 512, "gelu"), (200, 264, "relu2"), (40, 600, "gelu")])
@pytest.mark.parametrize("tile", [(16, 64, 6), (32, 128, 3), "shares"], ids=str)
def test_what_lies_between_two_attentions_is_that_of_plain_layers(
    monkeypatch, pauses, width, ff, activation, tile, dtype
):
    from sparse_tx.model.decode_kernels import configs, hopper, shares

    for module, name in ((hopper, "between_by_roles"), (shares, "feedforward_share"), (shares, "project_shares")):
        monkeypatch.setattr(module, name, emulator.Emulated(getattr(module, name)))
    torch.manual_seed(0)
    rows, qk = 37, width // 16 * 8
    model = Transformer(ModelSpec("text", 64, 2, width, 2, qk, ff, AttentionSpec("full"), activation=activation))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    w, after = (LayerWeights.of(block, dtype) for block in model.blocks)
    out, x = torch.randn(rows, width).to(dtype), torch.randn(rows, width)
    stream, y = x.clone(), torch.full((rows, len(after.qkv[0])), torch.nan, dtype=dtype)

    def layers(kind):
        """In this dtype, rounded where a product asks for 16 bits."""
        product = lambda x, pair: linear(x.to(dtype).to(kind), *(t.to(kind) for t in pair))  # noqa: E731
        norm = lambda x, pair: layer_norm(x, (width,), *(t.to(kind) for t in pair))  # noqa: E731
        h = x.to(kind) + product(out, w.out)
        u = product(norm(h, w.ff_norm), w.expand)
        h = h + product(u * torch.sigmoid(1.702 * u) if activation == "gelu" else u.relu().square(), w.contract)
        return h, product(norm(h, after.attention_norm), after.qkv)

    for seed in (None, 0, 1):
        if seed is not None:
            pauses(seed)
        stream.copy_(x)
        to = after.attention_norm, after.qkv, y
        if tile == "shares":
            cut = torch.full((-(-ff // configs.SHARE_UNITS), rows, width), torch.nan)
            shares.between(out, w, stream, cut, *to, 1e-5, True)
        else:
            hopper.between(out, w, stream, *to, configs.Between(*tile), 1e-5, True)
        h, projected = layers(torch.float64)
        assert relative(stream, h) < 1e-3
        assert relative(y, projected) < 0.004


# That the emulator finds what it is there to find.


@gluon.jit
def _load(X, x, full, empty, COUNT: gl.constexpr):
    for i in range(COUNT):
        mbarrier.wait(empty.index(0), (i & 1) ^ 1)
        mbarrier.expect(full.index(0), 2 * 64 * 64)
        tma.async_copy_global_to_shared(X, [i * 64, 0], full.index(0), x)


@gluon.jit
def _square(Y, x, full, empty, COUNT: gl.constexpr, EARLY: gl.constexpr, NEVER: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    at = (
        gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    )
    for i in range(COUNT):
        mbarrier.wait(full.index(0), i & 1)
        y = warpgroup_mma(x, x, gl.zeros([64, 64], gl.float32, layout), is_async=True)
        if EARLY:
            mbarrier.arrive(empty.index(0), count=1)
        y = warpgroup_mma_wait(0, deps=[y])
        if not (EARLY or NEVER):
            mbarrier.arrive(empty.index(0), count=1)
        gl.store(Y + i * 4096 + at, y)


@gluon.jit
def squares(X, Y, COUNT: gl.constexpr, EARLY: gl.constexpr, NEVER: gl.constexpr):
    """Y = X X of COUNT matrices of 64 x 64, through one place in shared memory."""
    x = gl.allocate_shared_memory(X.dtype, [64, 64], X.layout)
    full, empty = barriers(1), barriers(1)
    gl.warp_specialize(
        [(_square, (Y, x, full, empty, COUNT, EARLY, NEVER)), (_load, (X, x, full, empty, COUNT))], [1], [24]
    )


def run_squares(**wrong):
    x = torch.randn(5, 64, 64).bfloat16()
    y = torch.full((5, 64, 64), torch.nan)
    descriptor = block_descriptor(x, (320, 64), (64, 1), (64, 64))
    emulator.Emulated(squares)[(1,)](descriptor, y, COUNT=5, **{"EARLY": False, "NEVER": False} | wrong)
    torch.testing.assert_close(y, x.float() @ x.float())


def test_the_emulator_runs_a_kernel_whose_roles_meet_as_they_should(pauses):
    for seed in range(3):
        pauses(seed)
        run_squares()


def test_the_emulator_finds_a_place_that_is_given_back_too_early(pauses):
    pauses(0, delay=0.01)
    with pytest.raises(AssertionError, match="written while a product read it"):
        run_squares(EARLY=True)


def test_the_emulator_finds_roles_that_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(emulator, "PATIENCE", 0.3)
    with pytest.raises(AssertionError, match="roles wait for each other"):
        run_squares(NEVER=True)
