"""The decode cache: what it keeps, and that a step over it gives the logits of the whole forward pass."""

from functools import reduce
from operator import or_

import pytest
import torch
from every_pattern import patterns_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tx.attention import Block, Column, Full, Global, Summary, Window, sparse_attention
from sparse_tx.attention.cache import cached_rows
from sparse_tx.attention.decode import SlicedReads, StaticReads, Store


class Checkered:
    """Known by `allows` alone: every second key, the first query with none."""

    def allows(self, i, j):
        return (j < i) & ((i - j) % 2 == 1)

    def __repr__(self):  # every worker must name the tests alike
        return "Checkered()"


def stepwise(q, k, v, patterns, n, start, static):
    """Outputs of queries from `start` on, over a cache filled with the keys before."""
    B, S, _, _ = q.shape
    store = Store(patterns, n, B, q.shape[-1], v.shape[-1], q.dtype, q.device)
    if start:
        store.fill(k[:, :start], v[:, :start], torch.arange(B), torch.arange(B))
    sliced, outs = SlicedReads(n), []
    for i in range(start, S):
        sliced.position = i
        reads = StaticReads(torch.tensor([i])) if static else sliced
        outs.append(store.attend(q[:, i], k[:, i], v[:, i], store.steps(reads)))
    return torch.stack(outs, 1)


def inputs(B, S, H, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, S, H, D, generator=generator, dtype=torch.float64) for D in (4, 4, 6)]


@pytest.mark.parametrize("static", [False, True], ids=["sliced", "static"])
@pytest.mark.parametrize("pattern", [*patterns_of(5), *patterns_of(1), Checkered(), Block(3) | Column(4)], ids=str)
def test_steps_over_the_cache_equal_attention_at_every_length_and_prompt(pattern, static):
    n = 23
    q, k, v = inputs(2, n, 1)
    whole = sparse_attention(q, k, v, pattern, backend="oracle")
    for start in range(n):
        out = stepwise(q, k, v, [pattern], n, start, static)
        torch.testing.assert_close(out, whole[:, start:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("static", [False, True], ids=["sliced", "static"])
@pytest.mark.parametrize("n", [1, 4, 5, 6, 11, 29])
def test_heads_keep_summary_slots_and_patterns_of_their_own(n, static):
    patterns = [Block(6) | Summary(6, 2, h % 3) for h in range(3)] + [Window(2), Summary(6, 2), Window(2), Full()]
    q, k, v = inputs(2, n, len(patterns))
    whole = sparse_attention(q, k, v, patterns, backend="oracle")
    for start in sorted({0, n // 2, n - 1}):
        out = stepwise(q, k, v, patterns, n, start, static)
        torch.testing.assert_close(out, whole[:, start:], rtol=0, atol=1e-12)


@st.composite
def any_pattern(draw):
    l = draw(st.integers(1, 13))
    c = draw(st.integers(1, l))
    summary = Summary(l, c, draw(st.integers(0, l // c - 1)))
    reaching, tokens = Column(l, reach=draw(st.integers(0, 5))), Global(draw(st.integers(1, 40)))
    return draw(st.sampled_from([Full(), Window(l), Column(l), reaching, Block(l), summary, tokens]))


@st.composite
def any_heads(draw):
    """Patterns of 1 to 4 heads, each the union of 1 to 4 parts of any strides."""

    def head():
        return reduce(or_, [draw(any_pattern()) for _ in range(draw(st.integers(1, 4)))])

    heads = draw(st.integers(1, 4))
    return [head()] * heads if draw(st.booleans()) else [head() for _ in range(heads)]


@settings(max_examples=150, deadline=None)
@given(patterns=any_heads(), data=st.data())
def test_steps_over_the_cache_equal_attention_for_any_union_of_patterns(patterns, data):
    n = data.draw(st.integers(1, 70), "positions that the cache is made for")
    S = data.draw(st.integers(1, n), "positions")
    start = data.draw(st.integers(0, S - 1), "prompt")
    q, k, v = inputs(1, S, len(patterns), seed=n + S)
    whole = sparse_attention(q, k, v, patterns, backend="oracle")
    out = stepwise(q, k, v, patterns, n, start, static=data.draw(st.booleans(), "static"))
    torch.testing.assert_close(out, whole[:, start:], rtol=0, atol=1e-11)


def most_needed(pattern, n):
    """The most keys that at one time a query at hand or a later one still sees."""
    mask = pattern.allows(torch.arange(n)[:, None], torch.arange(n)[None])
    later = mask.flip(0).cummax(0).values.flip(0)  # row i: keys that some query from i on sees
    return max(int(later[i, : i + 1].sum()) for i in range(n))


@pytest.mark.parametrize("n", [1, 4, 5, 6, 23, 40])
@pytest.mark.parametrize("pattern", [p for p in patterns_of(5) if len(p.parts) == 1], ids=str)
def test_no_more_is_kept_than_later_queries_can_ask_for(pattern, n):
    keeps_few = (isinstance(pattern, Global) and pattern.tokens < n) or (isinstance(pattern, Summary) and pattern.c < 5)
    spare = 1 if keeps_few else 0  # where the others are written over each other
    kept, needed = cached_rows(pattern, n) - spare, most_needed(pattern, n)
    if isinstance(pattern, Column):
        # Whole columns: those that a last row, or with a reach the newest row, has not come to yet are kept for.
        assert needed <= kept <= needed + 2 * pattern.stride
    elif isinstance(pattern, Summary):
        assert kept == pattern.c * -(-n // pattern.stride)
        assert needed <= kept <= needed + pattern.c
    elif isinstance(pattern, Global):
        assert needed == min(pattern.tokens, n) == kept
    else:
        assert needed == kept


@pytest.mark.parametrize("pattern", patterns_of(5), ids=str)
def test_the_bytes_told_are_those_allocated(pattern):
    store = Store([pattern] * 3, 23, 2, 4, 6, torch.float32, "cpu")
    assert store.bytes == 2 * 3 * cached_rows(pattern, 23) * (4 + 6) * 4


def test_memory_at_the_papers_sizes_is_what_the_design_tabulates():
    n, l = 12288, 128
    assert cached_rows(Window(l), n) == 129
    assert cached_rows(Block(l), n) == 128
    assert cached_rows(Column(l), n) == cached_rows(Full(), n) == n
    assert cached_rows(Window(l) | Column(l), n) == n + 129
    assert cached_rows(Block(l) | Summary(l, 32), n) == 128 + 32 * 96 + 1
    assert cached_rows(Column(l, reach=32), n) == 33 * l
