"""The numbers that kernels read the decode cache by name exactly the keys that a query sees, its own aside."""

import pytest
import torch
from every_pattern import patterns_of
from test_decode import Checkered

from sparse_tx.attention import Block, Column, Full, Global, Summary, Window
from sparse_tx.attention.cache import layouts
from sparse_tx.attention.ranges import ReadTable, one_run

CPU = torch.device("cpu")


def keys_named(table, layer, head, i, parts):
    """The positions that query i reads, by part, and whether it sees its own."""
    own, *numbers = table.table[table.kind[layer], i % table.positions, head].tolist()
    keys = []
    for number, (_, layout) in enumerate(parts):
        slot, start, first, count = numbers[4 * number : 4 * number + 4]
        assert slot == (int(layout.slot(torch.tensor(i))) if int(layout.slot(torch.tensor(i))) < layout.slots else -1)
        for k in range(count):
            held = layout.held(torch.tensor(i), torch.tensor(start + (first + k) % layout.strip))
            keys.append(int(held))
    return own, keys


@pytest.mark.parametrize("n", [1, 4, 5, 6, 23])
@pytest.mark.parametrize("pattern", [*patterns_of(5), *patterns_of(1), Column(4) | Window(4)], ids=str)
def test_the_numbers_name_every_key_once(pattern, n):
    assert one_run((pattern,), n, CPU)
    table = ReadTable([(pattern,)], n, CPU)
    parts = layouts(pattern, n)
    for i in range(n):
        table.prepare(i)
        own, keys = keys_named(table, 0, 0, i, parts)
        seen = [j for j in range(n) if pattern.allows(torch.tensor(i), torch.tensor(j))]
        assert own == (i in seen)
        assert sorted(keys) == [j for j in seen if j != i]


def test_chunks_of_positions_follow_one_another(monkeypatch):
    from sparse_tx.attention import ranges

    monkeypatch.setattr(ranges, "CHUNK", 8)
    monkeypatch.setattr(ranges, "_CELLS", 20)  # planned a few positions at a time
    layers = [(Window(3), Block(4) | Summary(4, 2, 1)), (Full(), Full()), (Window(3), Block(4) | Summary(4, 2, 1))]
    table = ReadTable(layers, 21, CPU)
    assert table.kind == [0, 1, 0]
    for i in (0, 7, 8, 20, 3):
        table.prepare(i)
        for layer in (0, 1):
            for head, pattern in enumerate(layers[layer]):
                own, keys = keys_named(table, layer, head, i, layouts(pattern, 21))
                seen = [j for j in range(21) if pattern.allows(torch.tensor(i), torch.tensor(j))]
                assert sorted(keys + [i] * own) == seen


@pytest.mark.parametrize("pattern", [Checkered(), Column(4) | Summary(4, 2), Full() | Global(3) | Window(2)], ids=str)
def test_what_is_no_run_is_found_out(pattern):
    expected = not isinstance(pattern, Checkered) and Summary(4, 2) not in pattern.parts
    assert one_run((pattern,), 23, CPU) == expected
