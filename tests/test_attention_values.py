"""Values and gradients of the backends against the float64 oracle."""

import pytest
import torch
from every_pattern import patterns_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tx.attention import (
    Block,
    Column,
    Full,
    Global,
    Summary,
    Window,
    backend_for,
    blocked,
    packed_attention,
    sparse_attention,
)

STRIDES = (1, 3, 8)


class EveryThird:
    """A pattern of a user's own: nothing but `allows`."""

    def allows(self, i, j):
        return (j <= i) & ((i + j) % 3 == 0)


def blocked_patterns(l):
    c = max(1, l // 2)
    many = Window(l) | Block(l) | Column(l) | Summary(l, 1) | Summary(l, c, l // c - 1) | Global(3)
    return [*patterns_of(l), many, Window(l) | Column(l + 1), EveryThird()]


def inputs(S, H=2, Dqk=4, Dv=6, dtype=torch.float64, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, S, H, Dqk), (B, S, H, Dqk), (B, S, H, Dv)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def run(qkv, pattern, backend, seed=1):
    """out, lse and the gradients of a random function of both."""
    out, lse = sparse_attention(*qkv, pattern, backend=backend, return_lse=True)
    generator = torch.Generator().manual_seed(seed)
    d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    d_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.dtype)
    loss = (out * d_out).sum() + (lse * d_lse).masked_fill(lse == -torch.inf, 0).sum()
    return out, lse, *torch.autograd.grad(loss, qkv)


@pytest.fixture
def small_tiles(monkeypatch):
    """Every view and several groups of rows already at small lengths."""
    monkeypatch.setattr(blocked, "_TILE", 2)
    monkeypatch.setattr(blocked, "_SCORES", 1 << 8)


@pytest.mark.parametrize("l", STRIDES)
@pytest.mark.parametrize("S", [1, 2, 7, 24, 29])
def test_blocked_equals_the_oracle_forward_and_backward(small_tiles, S, l):
    for pattern in blocked_patterns(l):
        qkv = inputs(S)
        for got, want in zip(run(qkv, pattern, "blocked"), run(qkv, pattern, "oracle"), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda m, p=pattern: f"{p}: {m}")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocked_equals_the_oracle_for_any_shape_and_any_heads(data):
    l = data.draw(st.integers(1, 20), "l")
    S = data.draw(st.integers(1, 90), "S")
    H = data.draw(st.integers(1, 4), "H")
    heads = data.draw(st.lists(st.sampled_from(blocked_patterns(l)), min_size=H, max_size=H), "heads")
    qkv = inputs(S, H, data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), B=1)
    tile, blocked._TILE = blocked._TILE, data.draw(st.sampled_from([1, 16, 256]), "tile")
    try:
        got = run(qkv, heads, "blocked")
    finally:
        blocked._TILE = tile
    for a, b in zip(got, run(qkv, heads, "oracle"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", [Window(4) | Column(4), Block(4) | Summary(4, 2), Summary(4, 1, 1)])
@pytest.mark.parametrize("backend", ["blocked", "oracle"])
def test_gradients_pass_gradcheck(small_tiles, pattern, backend):
    qkv = inputs(11, H=1, Dqk=3, Dv=2, B=1)

    def joint(q, k, v):
        out, lse = sparse_attention(q, k, v, pattern, backend=backend, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(joint, qkv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_low_precision_is_no_worse_than_twice_dense_torch(dtype, size):
    for pattern in (Window(16) | Column(16), Block(16) | Summary(16, 4, 1), Column(16)):
        low = [(t * size if t.shape[-1] == 4 else t).detach().to(dtype).requires_grad_() for t in inputs(600)]
        exact = [t.detach().double().requires_grad_() for t in low]
        got, dense, want = (
            run_plain(*args)
            for args in ((low, pattern, "blocked"), (low, pattern, "oracle"), (exact, pattern, "oracle"))
        )
        for a, b, c in zip(got, dense, want, strict=True):
            allowed = 2 * (b.double() - c).abs().max() + 1e-5 * c.abs().max()
            assert (a.double() - c).abs().max() <= allowed, (pattern, dtype)


@pytest.mark.parametrize("S", [5, 300, 600])
def test_attention_without_lse_equals_the_oracle_with_gradients(S):
    for pattern in blocked_patterns(8):
        qkv = inputs(S, B=1)
        for a, b in zip(run_plain(qkv, pattern, "blocked"), run_plain(qkv, pattern, "oracle"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def run_plain(qkv, pattern, backend):
    out = sparse_attention(*qkv, pattern, backend=backend)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad((out * d_out).sum(), qkv)


def test_a_query_without_keys_gives_zero_and_no_gradient(small_tiles):
    qkv = inputs(16)
    for backend in ("blocked", "oracle"):
        out, lse, dq, *_ = run(qkv, Summary(8, 2), backend)
        assert (out[:, :6] == 0).all()
        assert (lse[..., :6] == -torch.inf).all()
        assert (dq[:, :6] == 0).all()
        assert (out[:, 6:] != 0).all()


def test_huge_logits_stay_finite(small_tiles):
    q, k, v = inputs(40, dtype=torch.float32)
    for pattern in (Window(8) | Column(8), Block(8) | Summary(8, 2)):
        results = run([(q * 1e4).detach().requires_grad_(), k, v], pattern, "blocked")
        assert all(t[t != -torch.inf].isfinite().all() for t in results)


def test_repeated_runs_give_the_same_bits():
    qkv = inputs(300, dtype=torch.float32)
    first, second = (run(qkv, Window(16) | Column(16), "blocked") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_million_positions_need_no_square_tensor():
    q = torch.randn(1, 1 << 20, 1, 2)
    with torch.no_grad():
        out = sparse_attention(q, q, q, Window(64), backend="blocked")
    near = sparse_attention(q[:, -200:], q[:, -200:], q[:, -200:], Window(64), backend="oracle")
    torch.testing.assert_close(out[:, -64:], near[:, -64:])


def test_non_contiguous_inputs_are_taken_as_they_are():
    packed = torch.randn(2, 300, 3, 2, 4, dtype=torch.float64)
    q, k, v = packed.unbind(2)
    pattern = Window(16) | Column(16)
    got = sparse_attention(q, k, v, pattern, backend="blocked")
    want = sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), pattern, backend="oracle")
    torch.testing.assert_close(got, want)


def test_packed_attention_is_attention_of_its_parts():
    qkv = torch.randn(2, 300, 2 * (4 + 4 + 6), dtype=torch.float64, requires_grad=True)
    q, k, v = (t.unflatten(-1, (2, -1)) for t in qkv.split((8, 8, 12), -1))
    pattern = Window(16) | Column(16)
    got, want = packed_attention(qkv, 2, 8, pattern), sparse_attention(q, k, v, pattern, backend="oracle")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), qkv)[0] for t in (got, want)))
    with pytest.raises(ValueError, match="does not hold q and k of width 9"):
        packed_attention(qkv, 2, 9, pattern)


def test_dense_attention_goes_to_torch_and_everything_else_on_a_cpu_to_blocked():
    q, k, v = inputs(8, Dqk=4, Dv=4, dtype=torch.float32)
    assert backend_for(q, k, v, Full()) == "sdpa"
    assert backend_for(q, k, v, [Full(), Window(2)]) == "blocked"
    assert backend_for(q, k, v[..., :2], Full()) == "blocked"
    torch.testing.assert_close(
        sparse_attention(q, k, v, Full()), sparse_attention(q, k, v, Full(), backend="oracle"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v, Full()), "must be (batch, sequence, heads, width)"),
        (lambda q, k, v: (q, k[:, :3], v, Full()), "same shape"),
        (lambda q, k, v: (q, k, v[:, :3], Full()), "agree"),
        (lambda q, k, v: (q, k.float(), v, Full()), "one float dtype"),
        (lambda q, k, v: (q.long(), k.long(), v.long(), Full()), "one float dtype"),
        (lambda q, k, v: (q, k, v, [Full()]), "1 patterns for 2 heads"),
        (lambda q, k, v: (q, k, v, "full"), "4 patterns for 2 heads"),
        (lambda q, k, v: (q, k, v, 3), "is no pattern"),
    ],
)
def test_inputs_that_disagree_are_refused(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        sparse_attention(*change(*inputs(5)))


def test_a_backend_that_cannot_run_raises_instead_of_falling_back():
    q, k, v = inputs(8, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="sdpa"):
        sparse_attention(q, k, v, Window(2), backend="sdpa")
    with pytest.raises(NotImplementedError, match="blocked"):
        sparse_attention(q, k, v, EveryThird(), backend="triton")
    with pytest.raises(ValueError, match="use one of"):
        sparse_attention(q, k, v, Window(2), backend="fast")
