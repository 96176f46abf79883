"""What a model is, as plain numbers: enough to build it again from a checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparse_tx.attention.api import BACKENDS
from sparse_tx.attention.heads import layer_patterns
from sparse_tx.attention.patterns import Pattern

VOCABULARY = 256  # bytes
DATA_KINDS = ("image", "text", "audio")
# What a block runs again in the backward pass in place of keeping it, the cheapest in time first: the activation of the
# feed-forward; its first product too; the attention half; all but the output of attention itself; all.
RECOMPUTE = ("none", "activation", "feedforward", "attention", "cheap", "block")
ACTIVATIONS = ("gelu", "relu2")  # x sigmoid(1.702 x) (the paper's code); max(x, 0)^2 (So et al. 2021)
# Of the two matrices of a block that add to the residual stream: small by its depth, as in the paper, or zero.
INITS = ("paper", "zero")
# What queries and keys are turned by: nothing, row and column, the position; and what a head's width is a multiple of.
ROTARY = {"none": 1, "axes": 4, "position": 2}


@dataclass(frozen=True)
class AttentionSpec:
    """The patterns of a model, by name and numbers: see `sparse_tx.attention.heads.layer_patterns`."""

    name: str
    stride: int | None = None
    c: int | None = None
    reach: int | None = None
    global_tokens: int | None = None
    combine: str = "merged"
    order: tuple[str, ...] | None = None
    backend: str = "auto"


@dataclass(frozen=True)
class ModelSpec:
    """A Sparse Transformer. qk is the width of queries and keys over all heads; ff the inner width of the feed-forward.

    kind ("image", "text", "audio") decides the position tables: rows, columns and channels of an image; rows and
    columns of a matrix of width stride otherwise. qk_norm, rotary: see `QueryKey`. activation is one of ACTIVATIONS,
    init of INITS. Raises ValueError for numbers that do not fit together.
    """

    kind: str
    context: int
    layers: int
    width: int
    heads: int
    qk: int
    ff: int
    attention: AttentionSpec
    dropout: float = 0.0
    recompute: str = "none"
    qk_norm: bool = False
    rotary: str = "none"
    activation: str = "gelu"
    init: str = "paper"

    def __post_init__(self) -> None:
        for name in ("context", "layers", "width", "heads", "qk", "ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_key(name)}={getattr(self, name)}: it must be at least 1")
        for name in ("width", "qk"):
            if getattr(self, name) % self.heads:
                raise ValueError(
                    f"model.heads={self.heads} does not divide model.{name}={getattr(self, name)}: "
                    f"use a number of heads that divides it, such as {_divisor(getattr(self, name), self.heads)}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: it must be at least 0 and below 1")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"model.recompute={self.recompute!r} is not known: use one of {', '.join(RECOMPUTE)}")
        for name, known in (("rotary", ROTARY), ("activation", ACTIVATIONS), ("init", INITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name}={getattr(self, name)!r} is not known: use one of {', '.join(known)}")
        multiple = ROTARY[self.rotary]
        if self.qk // self.heads % multiple:
            raise ValueError(
                f"model.rotary={self.rotary} turns pairs of numbers: model.qk={self.qk} over model.heads={self.heads} "
                f"is {self.qk // self.heads} a head, which must be a multiple of {multiple}"
            )
        if self.kind not in DATA_KINDS:
            raise ValueError(f"data.kind={self.kind!r} is not known: use one of {', '.join(DATA_KINDS)}")
        if self.attention.backend not in BACKENDS:
            raise ValueError(
                f"attention.backend={self.attention.backend!r} is not known: use one of {', '.join(BACKENDS)}"
            )
        if self.kind == "image" and 3 * math.isqrt(self.context // 3) ** 2 != self.context:
            raise ValueError(
                f"data.context={self.context} is not a square RGB image: give 3 x side x side bytes, such as 3072"
            )
        self.patterns()

    def patterns(self) -> list[tuple[Pattern, ...]]:
        """Patterns by layer and head."""
        a = self.attention
        return layer_patterns(
            a.name,
            layers=self.layers,
            heads=self.heads,
            stride=a.stride,
            c=a.c,
            reach=a.reach,
            global_tokens=a.global_tokens,
            combine=a.combine,
            order=a.order,
            image=self.kind == "image",
        )

    def position_shape(self) -> tuple[int, ...]:
        """Axes of the learned position tables; their product is at least the context."""
        if self.kind == "image":
            side = math.isqrt(self.context // 3)
            return side, side, 3
        width = self.attention.stride or math.isqrt(self.context - 1) + 1
        width = min(width, self.context)
        return -(-self.context // width), width

    def recomputing(self, again: str) -> ModelSpec:
        """The same model with another `recompute`."""
        return replace(self, recompute=again)

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> ModelSpec:
        """From what `plain` gave."""
        attention = dict(plain["attention"])
        attention["order"] = None if attention["order"] is None else tuple(attention["order"])
        if isinstance(plain.get("rotary"), bool):  # of checkpoints from when there was one way
            plain = {**plain, "rotary": "axes" if plain["rotary"] else "none"}
        return cls(**{**plain, "attention": AttentionSpec(**attention)})


def _key(name: str) -> str:
    return f"data.{name}" if name == "context" else f"model.{name}"


def _divisor(width: int, near: int) -> int:
    return min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(h - near))
