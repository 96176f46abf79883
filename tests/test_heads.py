"""How `attention.combine` and `attention.order` give patterns to layers and heads."""

import pytest

from sparse_tx.attention import Block, Column, Full, Global, Summary, Window
from sparse_tx.attention.heads import layer_patterns


def test_interleaved_strided_on_images_is_one_column_layer_to_three_windows():
    layers = layer_patterns("strided", layers=6, heads=2, stride=96, combine="interleaved", image=True)
    column, window = (Column(96),) * 2, (Window(96),) * 2
    assert layers == [column, window, window, window, column, window]


def test_interleaved_strided_on_text_alternates():
    layers = layer_patterns("strided", layers=3, heads=1, stride=128, combine="interleaved")
    assert layers == [(Column(128),), (Window(128),), (Column(128),)]


def test_merged_fixed_heads_take_distinct_slots_in_turn():
    (heads,) = layer_patterns("fixed", layers=1, heads=6, stride=128, c=32, combine="merged")
    assert heads == tuple(Block(128) | Summary(128, 32, slot) for slot in (0, 1, 2, 3, 0, 1))


def test_fixed_attention_may_have_a_window_in_place_of_the_block():
    (heads,) = layer_patterns("fixed", layers=1, heads=3, stride=8, c=4, combine="merged", order=["window", "summary"])
    assert heads == tuple(Window(8) | Summary(8, 4, slot) for slot in (0, 1, 0))
    layers = layer_patterns(
        "fixed", layers=2, heads=1, stride=8, c=4, combine="interleaved", order=["window", "summary"]
    )
    assert layers == [(Window(8),), (Summary(8, 4),)]


def test_split_gives_contiguous_groups_and_counts_slots_among_the_summary_heads():
    (heads,) = layer_patterns("fixed", layers=1, heads=4, stride=8, c=4, combine="split")
    assert heads == (Block(8), Block(8), Summary(8, 4, 0), Summary(8, 4, 1))


def test_sliding_merges_window_dilated_window_and_global():
    (heads,) = layer_patterns("sliding", layers=1, heads=1, stride=8, reach=3, global_tokens=2, combine="merged")
    assert heads == (Window(8) | Column(8, 3) | Global(2),)


def test_full_needs_no_stride():
    assert layer_patterns("full", layers=2, heads=2) == [(Full(), Full())] * 2


def test_an_order_of_ones_own_is_cycled():
    layers = layer_patterns("strided", layers=3, heads=1, stride=4, combine="interleaved", order=["window", "column"])
    assert layers == [(Window(4),), (Column(4),), (Window(4),)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dense"}, "'dense' is not known"),
        ({"combine": "mixed"}, "'mixed' is not known"),
        ({"order": ["row"]}, "'row'"),
        ({"order": []}, "empty"),
        ({"stride": 0}, "attention.stride=0"),
        ({"stride": None}, "attention.stride=None"),
        ({"c": 9}, "attention.c=9 does not fit attention.stride=8: a summary has at most stride columns; use 1 to 8"),
        ({"c": 0}, "attention.c=0"),
        ({"combine": "split", "heads": 3}, "multiple of 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(change, message):
    settings = {"kind": "fixed", "layers": 2, "heads": 2, "stride": 8, "c": 4} | change
    with pytest.raises(ValueError, match=message):
        layer_patterns(settings.pop("kind"), **settings)
