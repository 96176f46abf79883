"""Drawing bytes from a model, one position at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparse_tx.model import Transformer
from sparse_tx.model.counter import uniform
from sparse_tx.model.decoder import Decoder

# Samples at a time on a CPU. A product of other shapes rounds otherwise there, so that samples are drawn in sets of one
# size: sample k is always row k mod 8 of set k // 8, whatever the batch. 8 rows cost 1.6 times one row (the demo and
# the 15M model, one core).
CPU_ROWS = 8
_UNIFORMS = 1024  # positions whose random numbers are made at a time
_REPORT = 64  # steps in flight on a GPU before the host waits for those before them


class Samples(NamedTuple):
    """tokens: (B, length) uint8. nats: (B, length) float32, -log of each byte's probability under the model as it is,
    without temperature, top-k and top-p; of the prompt's bytes too."""

    tokens: Tensor
    nats: Tensor


class Sampler:
    """Draws samples of `length` bytes. What a sample is depends on (seed, its number, the prompt) alone: on a CPU bit
    for bit, on a GPU at one batch size.

    temperature 0 takes the likeliest byte. dtype: of the products and the cache; None for the model's own. graph:
    capture a step in a CUDA graph; None does so on a GPU. fused: take it from Triton kernels, as `Decoder`
    does; None where they can run.
    """

    def __init__(
        self,
        model: Transformer,
        length: int,
        batch: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1,
        dtype: torch.dtype | None = None,
        graph: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self.length, self.seed = length, seed
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.device = device = model.output.weight.device
        self.batch = CPU_ROWS if device.type == "cpu" else batch
        self.graphed = device.type == "cuda" if graph is None else graph
        self.decoder = Decoder(model, self.batch, length, dtype=dtype, fused=fused)
        # All that a step changes lies in these and in the cache: a captured step finds it where it was.
        self._tokens = torch.zeros(self.batch, length, dtype=torch.uint8, device=device)
        self._nats = torch.zeros(self.batch, length, device=device)
        self._previous = torch.zeros(self.batch, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._uniforms = torch.zeros(_UNIFORMS, self.batch, dtype=torch.float64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rows = slice(0, 0)  # of them, those that were asked for

    def draw(
        self,
        prompts: Tensor,
        count: int,
        *,
        first: int = 0,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Iterator[Samples]:
        """Samples first to first + count - 1, batch by batch. prompts: (U, P) uint8, P may be 0: sample k starts with
        prompts[k mod U]. on_bytes is told how many more bytes have been drawn."""
        if prompts.shape[1] >= self.length:
            raise ValueError(f"a prompt of {prompts.shape[1]} bytes leaves none of {self.length} to draw")
        end = first + count
        # Sets that begin at multiples of the batch on a CPU, at the first sample elsewhere.
        start = first - first % self.batch if self.device.type == "cpu" else first
        for a in range(start, end, self.batch):
            low, high = max(first - a, 0), min(end - a, self.batch)
            on_step = None if on_bytes is None else lambda steps, rows=high - low: on_bytes(steps * rows)
            self._rows = slice(low, high)
            with torch.inference_mode():
                self._draw(prompts.to(self.device), torch.arange(a, a + self.batch, device=self.device), on_step)
            yield Samples(self._tokens[low:high].clone(), self._nats[low:high].clone())

    def begun(self) -> Samples | None:
        """What there is of the samples at hand where `draw` was interrupted, (B, fewer than length); None of none."""
        i = int(self._position)
        if not 0 < i < self.length:
            return None
        return Samples(self._tokens[self._rows, :i].clone(), self._nats[self._rows, :i].clone())

    def _draw(self, prompts: Tensor, numbers: Tensor, on_step: Callable[[int], None] | None) -> None:
        P = prompts.shape[1]
        if P:
            rows = numbers % len(prompts)
            used, rows = rows.unique(return_inverse=True)
            self._tokens[:, :P] = prompts[used][rows]
            self._nats[:, :P] = self.decoder.prefill(prompts[used], rows)[rows]
        self.advance(P, self.length, numbers, on_step)

    def advance(self, start: int, end: int, numbers: Tensor, on_step: Callable[[int], None] | None = None) -> None:
        """Draw positions start to end - 1 of the samples with these numbers, (batch,): what comes before is there."""
        self._begin(start)
        self.decoder.prepare(start)
        if self.graphed and self._graph is None:
            self._graph = self._capture(start)
        progress = _Progress(on_step, self.device)
        for i in range(start, end):
            if i == start or i % _UNIFORMS == 0:
                chunk = torch.arange(i - i % _UNIFORMS, i - i % _UNIFORMS + _UNIFORMS, device=self.device)
                self._uniforms.copy_(uniform(self.seed, chunk[:, None], numbers))
            self.decoder.prepare(i)
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step(i)
            progress.step()
        progress.close()

    def _step(self, at: int | None = None) -> None:
        """Draw the byte at the position, and go one on: no number is read back to the host."""
        position = self._position
        kernels = self.decoder.kernels
        if kernels is not None and self.top_k is None and self.top_p is None:
            kernels(self._previous, position)
            kernels.draw(position, self._uniforms, self._tokens, self._nats, self._previous, self.temperature)
            position += 1
            return
        logits = self.decoder.step(self._previous, position, at)
        u = self._uniforms.index_select(0, position % _UNIFORMS)[0]
        drawn = draw(logits, u, self.temperature, self.top_k, self.top_p)
        self._nats.index_copy_(1, position, cross_entropy(logits, drawn, reduction="none")[:, None])
        self._tokens.index_copy_(1, position, drawn[:, None].to(torch.uint8))
        self._previous.copy_(drawn)
        position += 1

    def _begin(self, position: int) -> None:
        """Have the next step draw the byte at this position."""
        self._position.fill_(position)
        self._previous.copy_(self._tokens[:, max(position - 1, 0)])

    def _capture(self, position: int) -> torch.cuda.CUDAGraph:
        """A step as a CUDA graph. The steps that warm up write at `position` alone, which the first one drawn writes
        again: nothing that it reads is lost."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
                self._begin(position)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._begin(position)
        return graph


class _Progress:
    """Tells of steps that are done: on a GPU some steps late, so that the host never waits for the newest."""

    def __init__(self, on_step: Callable[[int], None] | None, device: torch.device) -> None:
        self.on_step, self.gpu = on_step, device.type == "cuda"
        self.untold = 0
        self._flying: list[tuple[torch.cuda.Event, int]] = []

    def step(self) -> None:
        if self.on_step is None:
            return
        self.untold += 1
        if not self.gpu:
            self._tell(self.untold)
        elif self.untold >= _REPORT:
            event = torch.cuda.Event()
            event.record()
            self._flying.append((event, self.untold))
            self.untold = 0
            if len(self._flying) > 2:
                event, steps = self._flying.pop(0)
                event.synchronize()
                self._tell(steps, keep=True)

    def close(self) -> None:
        if self.on_step is not None:
            if self.gpu:
                torch.cuda.synchronize()
            self._tell(self.untold + sum(steps for _, steps in self._flying))

    def _tell(self, steps: int, keep: bool = False) -> None:
        assert self.on_step is not None
        if steps:
            self.on_step(steps)
        if not keep:
            self.untold = 0


def draw(logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits: (B, V) float32, u: (B,) in [0, 1). Returns (B,) int64, by inversion of the distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    # Below 0 first: the smallest temperatures would make infinities of both signs.
    logits = (logits.double() - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None or top_p is not None:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        ordered = logits.gather(-1, order)
        if top_k is not None:
            ordered[:, top_k:] = -torch.inf  # by rank: in half precision the k-th likeliest is often one of several
        if top_p is not None and top_p < 1:
            probabilities = ordered.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities  # the likeliest is always kept
            ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    cumulative = logits.softmax(-1).cumsum(-1)
    # Below the total even after rounding: a draw never lands on a byte without probability.
    total = cumulative[:, -1:]
    target = torch.minimum(u.double()[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return (cumulative <= target).sum(-1)
