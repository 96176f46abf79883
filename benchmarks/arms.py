"""The arms of the training benchmark: what each trains, and the operations and memory that it should take.

All arms have the same sizes, optimizer and average. "ours" is what train.py runs; "compiled" is ours with each block
left to torch.compile. "dense" is what a careful user writes: an nn.Module with SDPA (cuDNN first), nn.Dropout, each
block compiled, full logits, nothing recomputed; "flex" is the same with FlexAttention and the experiment's masks,
"without" has the values pass by attention. These run as one CUDA graph of forward and backward as ours do, "dense
launched" and "dense recomputed" (each block run again in the backward pass) do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack

import torch
from rival import Rival, causal, flex_attends
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_tx.config import OptimizerConfig
from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.model.cost import cost_of
from sparse_tx.training.memory import memory_of
from sparse_tx.training.optimizer import build_optimizer
from sparse_tx.training.step import Gradients, StepLoss
from sparse_tx.training.update import Clipping, move_average


@dataclasses.dataclass
class Work:
    name: str
    spec: ModelSpec
    optimizer: OptimizerConfig
    batch: int

    def tokens(self, device: torch.device) -> Tensor:
        return torch.randint(256, (self.batch, self.spec.context), dtype=torch.uint8, device=device)


class Trained:
    """A model, its optimizer and its average: one call is one step."""

    def __init__(
        self, model: nn.Module, loss: nn.Module, work: Work, device: torch.device, dtype: torch.dtype, graph: bool
    ) -> None:
        self.model, self.loss, self.device, self.dtype = model, loss, device, dtype
        self.cuda = device.type == "cuda"
        self.parameters = list(model.parameters())
        self.optimizer = build_optimizer(model, work.optimizer, fused=self.cuda)  # type: ignore[arg-type]
        self.clipping = Clipping(self.parameters, work.optimizer.clip)
        self.average = [p.detach().clone() for p in self.parameters]
        self.weights = [p.detach() for p in self.parameters]
        self.gradients = Gradients(loss, self.parameters) if graph and self.cuda else None
        self.rows = torch.arange(work.batch, device=device)
        self.done = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns the loss, without waiting for it."""
        with ExitStack() as stack:
            # cuDNN first: the fastest there is for dense causal attention on these GPUs.
            if self.cuda and isinstance(self.model, Rival):
                order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
                stack.enter_context(sdpa_kernel(order, set_priority=True))
            stack.enter_context(
                torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32, cache_enabled=False)
            )
            if self.gradients is not None:
                loss = self.gradients(tokens, self.done, self.rows)
            else:
                for p in self.parameters:
                    p.grad = None
                loss = self.loss(tokens, torch.full((), self.done, device=self.device), self.rows)
                with torch.autocast(self.device.type, enabled=False):
                    loss.backward()
        self.clipping(self.optimizer)
        self.optimizer.step()
        move_average(self.average, self.weights, 1e-3, self.clipping.skip)
        self.done += 1
        return loss.detach()


def ours(
    work: Work, device: torch.device, dtype: torch.dtype, graph: bool, how: str, residual: torch.dtype | None = None
) -> Trained:
    """how: "fused", "compiled" or "plain"."""
    torch.manual_seed(0)
    model = Transformer(work.spec).to(device).train()
    loss = StepLoss(model, seed=1)
    if how == "fused" and device.type == "cuda":
        model.fuse_blocks(residual)
    elif residual is not None:
        raise NotImplementedError("only fused blocks have a residual stream in 16 bits")
    elif how != "plain":
        model.compile_blocks()
    loss.compiled = how != "plain"
    return Trained(model, loss, work, device, dtype, graph)


def rival(work: Work, device: torch.device, dtype: torch.dtype, graph: bool, kind: str) -> Trained:
    torch.manual_seed(0)
    attends = {
        "dense": lambda: [causal] * work.spec.layers,
        "flex": lambda: flex_attends(work.spec, device),
        "without": lambda: [None] * work.spec.layers,
    }[kind.partition(" ")[0]]()
    model = Rival(work.spec, attends, again=kind.endswith("recomputed")).to(device).train()
    if device.type == "cuda":
        for block in model.blocks:
            block.compile(dynamic=False)
    return Trained(model, model, work, device, dtype, graph)


Make = Callable[[Work, torch.device, torch.dtype], Trained]
ARMS: dict[str, Make] = {
    "ours": lambda w, d, t: ours(w, d, t, True, "fused"),
    "ours bf16 residual": lambda w, d, t: ours(w, d, t, True, "fused", torch.bfloat16),
    "compiled": lambda w, d, t: ours(w, d, t, True, "compiled"),
    "dense": lambda w, d, t: rival(w, d, t, True, "dense"),
    "dense launched": lambda w, d, t: rival(w, d, t, False, "dense"),
    "dense recomputed": lambda w, d, t: rival(w, d, t, False, "dense recomputed"),
    "flex": lambda w, d, t: rival(w, d, t, True, "flex"),
    "without": lambda w, d, t: rival(w, d, t, True, "without"),
}
OURS = ("ours", "ours bf16 residual", "compiled")


def arm_spec(arm: str, spec: ModelSpec) -> ModelSpec:
    """Whose FLOPs the arm computes."""
    return dataclasses.replace(spec, attention=AttentionSpec("full")) if arm.startswith("dense") else spec


def flops(arm: str, work: Work) -> int:
    cost = cost_of(arm_spec(arm, work.spec))
    total = work.batch * cost.flops
    if arm == "without":
        spec = work.spec
        pairs = cost.pairs * spec.context * spec.layers * spec.heads
        total -= int(work.batch * 3 * 2 * pairs * (spec.qk + spec.width) / spec.heads)
    return total


def expected_memory(arm: str, work: Work) -> int:
    """Bytes that ours should take at most."""
    blocks = "compiled" if arm == "compiled" else "fused"
    return memory_of(work.spec, work.batch, half=True, blocks=blocks, residual=2 if "bf16 residual" in arm else 4).total
