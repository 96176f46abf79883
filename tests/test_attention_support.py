"""Exact support: the output of query i moves with key j if and only if the pattern allows it."""

import pytest
import torch

from sparse_tx.attention import Block, Column, Full, Global, Summary, Window, blocked, sparse_attention

PATTERNS = {
    "full": Full(),
    "window": Window(4),
    "column": Column(4),
    "column, reach": Column(3, reach=1),
    "block": Block(4),
    "summary": Summary(4, 2),
    "summary, slot": Summary(6, 2, slot=2),
    "global": Global(3),
    "strided": Window(5) | Column(5),
    "fixed": Block(4) | Summary(4, 1, slot=1),
    "sliding": Window(3) | Column(3, reach=2) | Global(2),
}


def allowed_by_definition(name, i, j):
    """The table of definitions in plain Python, written apart from the pattern objects."""
    if j > i:
        return False
    match name:
        case "full":
            return True
        case "window":
            return i - 4 <= j
        case "column":
            return (i - j) % 4 == 0
        case "column, reach":
            return i - j in (0, 3)
        case "block":
            return i // 4 == j // 4
        case "summary":
            return j % 4 in (2, 3)
        case "summary, slot":
            return j % 6 in (0, 1)
        case "global":
            return j < 3
        case "strided":
            return i - j <= 5 or (i - j) % 5 == 0
        case "fixed":
            return i // 4 == j // 4 or j % 4 == 2
        case "sliding":
            return i - j <= 3 or i - j in (6,) or j < 2


@pytest.mark.parametrize("name", PATTERNS)
def test_mask_is_the_definition(name):
    n = 19
    want = torch.tensor([[allowed_by_definition(name, i, j) for j in range(n)] for i in range(n)])
    assert torch.equal(PATTERNS[name].mask(n), want)


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("backend", ["oracle", "blocked", "blocked in small tiles"])
@pytest.mark.parametrize("name", PATTERNS)
def test_an_output_moves_with_a_key_exactly_where_the_pattern_allows(name, backend, part, monkeypatch):
    if backend.endswith("tiles"):
        monkeypatch.setattr(blocked, "_TILE", 2)
        monkeypatch.setattr(blocked, "_SCORES", 1 << 6)
    n = 19
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    # Batch entry j + 1 has key (or value) j moved; entry 0 is as it was.
    moved = torch.cat([torch.zeros(1, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)])[:, :, None, None]
    ks, vs = (k + moved, v.expand(n + 1, -1, -1, -1)) if part == "key" else (k.expand(n + 1, -1, -1, -1), v + moved)
    out = sparse_attention(q.expand(n + 1, -1, -1, -1), ks, vs, PATTERNS[name], backend=backend.split()[0])
    # A matrix product may round one batch entry otherwise than the next; a key that counts moves far more.
    changed = ((out[1:] - out[:1]).abs() > 1e-10).any(-1)[..., 0].T  # (query, key)
    want = PATTERNS[name].mask(n)
    if part == "key":  # the only key of a query has weight 1 whatever its score
        alone = (want.sum(1) == 1)[:, None]
        assert not (changed & alone).any()
        want = want & ~alone
    assert torch.equal(changed, want)
