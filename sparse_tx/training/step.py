"""A step's loss and gradients, launch by launch or as one CUDA graph. Torch alone: no Lightning."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_tx.model import Transformer
from sparse_tx.model.loss import mean_nats


class StepLoss(nn.Module):
    """Mean nats of a batch: all of a step's forward pass as a function of tensors alone."""

    def __init__(self, model: Transformer, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        self.compiled = False  # whether torch.compile fuses the softmax

    def forward(self, tokens: Tensor, step: Tensor, rows: Tensor) -> Tensor:
        """tokens: (B, S) integers, step: () int64, rows: (B,) int64."""
        h = self.model.hidden(tokens, seed=self.seed, step=step, rows=rows)
        return mean_nats(h, self.model.norm, self.model.output, tokens, compiled=self.compiled)


class Gradients:
    """Leaves the gradients of a loss in `.grad`, by one CUDA graph from the second call on.

    128 thin layers are some ten thousand launches a step, which take the CPU three times as long as the GPU (the 59M
    model on one H200: 340 ms of which the GPU works 109). The first call compiles and allocates whatever the capture
    must not, and is a step like all others: nothing is run only to warm up, so that no state can differ. A batch of
    another shape is run launch by launch, as all are on a CPU. The gradients stay in place: set none of them to None
    between calls.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        parameters: list[nn.Parameter],
        *,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """failed: called where the capture fails, and the steps go on launch by launch; None lets the error through."""
        self.loss, self.parameters, self.failed = loss, parameters, failed
        self.captures = True
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._kept: list[Tensor | None] = []
        self._shape: torch.Size | None = None
        self._step: Tensor | None = None

    def __call__(self, tokens: Tensor, step: int, rows: Tensor) -> Tensor:
        """tokens: (B, S) integers, rows: (B,) int64, on the device. Returns the loss (), not to be differentiated."""
        if self._step is None:
            self._step = torch.zeros((), dtype=torch.long, device=tokens.device)
        self._step.fill_(step)  # a launch that carries the number: a copy from the host would wait for the device
        inputs = tokens, self._step, rows
        if self._graph is not None and tokens.shape == self._shape:
            return self._replay(inputs)
        if self._graph is not None or tokens.shape != self._shape or not (self.captures and tokens.is_cuda):
            if self._graph is None:
                self._shape = tokens.shape
            return self._launch(inputs)
        try:
            self._capture(inputs)
        except RuntimeError as error:
            if self.failed is None:
                raise
            self.captures, self._graph, self._inputs = False, None, ()
            torch.cuda.empty_cache()
            self.failed(error)
            return self._launch(inputs)
        return self._replay(inputs)

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for p in self.parameters:
            p.grad = None
        loss = self.loss(*inputs)
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        return loss.detach()

    def _launch(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if not inputs[0].is_cuda:
            return self._run(inputs)
        # On the stream that the capture takes: libraries keep workspaces by stream.
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._run(inputs)
        current.wait_stream(self._stream)
        return loss

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        for p in self.parameters:
            p.grad = None
        self._inputs = tuple(t.clone() for t in inputs)
        gc.collect()  # which the capture leaves to us
        graph = torch.cuda.CUDAGraph()
        # The memory of the first call is given back on entry: the graph has a pool of its own. Other threads may pin
        # batches meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._run(self._inputs)
        self._kept = [p.grad for p in self.parameters]
        self._graph = graph

    def _replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        assert self._graph is not None
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        first = next(i for i, grad in enumerate(self._kept) if grad is not None)  # a frozen one has none
        if self.parameters[first].grad is not self._kept[first]:  # after a batch of another shape
            for p, grad in zip(self.parameters, self._kept, strict=True):
                p.grad = grad
        self._graph.replay()
        return self._loss.clone()
