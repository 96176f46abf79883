"""The pattern objects: counting, combining, and what two steps of attention reach."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_tx.attention import Block, Column, Full, Global, Summary, Union, Window


@st.composite
def simple_patterns(draw, stride=None):
    l = stride or draw(st.integers(1, 9))
    c = draw(st.integers(1, l))
    return draw(
        st.sampled_from(
            [
                Full(),
                Window(draw(st.integers(1, 12))),
                Column(l),
                Column(l, draw(st.integers(0, 4))),
                Block(draw(st.integers(1, 12))),
                Summary(l, c, draw(st.integers(0, l // c - 1))),
                Global(draw(st.integers(1, 9))),
            ]
        )
    )


@given(st.lists(simple_patterns(), min_size=1, max_size=4), st.integers(0, 40))
def test_count_is_the_number_of_allowed_pairs(parts, n):
    union = parts[0]
    for part in parts[1:]:
        union = union | part
    assert union.count(n) == int(union.mask(n).sum())


def test_counts_of_the_papers_shapes():
    # Mean keys a query at n = 3072, l = 96 (dense 1536.5).
    assert Full().count(3072) / 3072 == 1536.5
    assert Column(96).count(3072) / 3072 == 16.5
    assert (Window(96) | Column(96)).count(3072) == Window(95).count(3072) + Column(96).count(3072) - 3072
    assert Full().count(1 << 20) == (1 << 20) * ((1 << 20) + 1) // 2
    assert (Block(1024) | Summary(1024, 8)).count(1 << 20) == 1024 * (1024 * 1025 // 2) + 1024 * 8 * 1023 * 1024 // 2


def test_a_union_flattens_drops_repeats_and_equals_any_order_of_its_parts():
    a, b, c = Window(3), Column(3), Global(2)
    assert (a | b) | c == a | (b | c) == c | b | a
    assert hash(a | b) == hash(b | a)
    assert ((a | b) | (b | a)).parts == (a, b)
    assert a | a == a
    assert Union((a, Union((b, c)))) == a | b | c
    assert a | b != a | c
    assert len({a | b, b | a, a}) == 2


def test_patterns_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window(3).stride = 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: Window(0),
        lambda: Column(0),
        lambda: Column(3, reach=-1),
        lambda: Block(0),
        lambda: Summary(4, 0),
        lambda: Summary(4, 5),
        lambda: Summary(4, 2, slot=2),
        lambda: Summary(4, 2, slot=-1),
        lambda: Global(0),
        lambda: Union(()),
    ],
)
def test_impossible_patterns_are_refused(make):
    with pytest.raises(ValueError, match=r"at least|between|slots|None or"):
        make()


def two_steps(first, second, n):
    """(n, n) bool: j reaches i through some m that i sees in the second layer and that sees j in the first."""
    one, two = first.mask(n).float(), second.mask(n).float()
    return two @ one > 0


@given(st.integers(1, 8), st.integers(1, 60))
def test_strided_attention_reaches_every_earlier_position_in_two_steps(l, n):
    assert torch.equal(two_steps(Column(l), Window(l), n), Full().mask(n))


@given(st.integers(1, 8), st.data(), st.integers(1, 60))
def test_fixed_attention_reaches_all_in_two_steps_over_the_union_of_heads_with_the_residual_as_self(l, data, n):
    """Block first, then the union of all summary slots with the query itself.

    A key of an earlier block is summed up by a later column of its own block, so the columns after the last slot's
    reach must all be summary columns: with slot 0 among the heads and c >= 1, the last column of each block is one.
    """
    c = data.draw(st.integers(1, l))
    heads = Summary(l, c)
    for slot in range(l // c):
        heads = heads | Summary(l, c, slot)
    with_self = heads.mask(n) | torch.eye(n, dtype=torch.bool)
    reached = with_self.float() @ Block(l).mask(n).float() > 0
    assert torch.equal(reached, Full().mask(n))


@given(st.integers(2, 8), st.data())
def test_a_later_slot_alone_leaves_out_what_comes_after_it_in_each_earlier_block(l, data):
    c = data.draw(st.integers(1, l // 2))
    slot = data.draw(st.integers(1, l // c - 1))
    n = 4 * l
    summary = Summary(l, c, slot)
    reached = (summary.mask(n) | torch.eye(n, dtype=torch.bool)).float() @ Block(l).mask(n).float() > 0
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    after_the_slot = (j // l < i // l) & (j % l >= summary.first + c)
    assert torch.equal(~reached & Full().mask(n), after_the_slot)
