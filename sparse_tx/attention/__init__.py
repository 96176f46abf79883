"""Sparse attention: the patterns, the oracle and the backends behind `sparse_attention`. Needs torch alone."""

from sparse_tx.attention.api import backend_for, packed_attention, sparse_attention
from sparse_tx.attention.patterns import Block, Column, Full, Global, Pattern, Summary, Union, Window

__all__ = [
    "Block",
    "Column",
    "Full",
    "Global",
    "Pattern",
    "Summary",
    "Union",
    "Window",
    "backend_for",
    "packed_attention",
    "sparse_attention",
]
