"""Forward and backward time of the fused attention kernels against what a user could pick instead.

    python benchmarks/attention.py                              # all workloads and rivals: minutes, mostly compiling
    python benchmarks/attention.py --workloads cifar10 --rivals dense
    python benchmarks/attention.py --sweep                      # cost against n at 2^20 positions

Every arm runs under CUDA graphs over several sets of inputs (together larger than the L2 cache); medians of replays.
Before anything is timed the kernels are compared, gradients too, with the float64 oracle on a shorter sequence.
Floor: the larger of bytes (each tensor once) and products over the two rates measured on an H200; both passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparse_tx.attention import Block, Column, Summary, Window
from sparse_tx.attention.kernels import triton_attention
from sparse_tx.attention.oracle import oracle_attention
from sparse_tx.attention.patterns import Pattern

BYTES_PER_SECOND = 4.27e12  # device-to-device copy, H200
FLOPS_PER_SECOND = 673e12  # bf16 matrix product, H200
L2_BYTES = 60e6


@dataclass(frozen=True)
class Workload:
    B: int
    S: int
    H: int
    Dqk: int
    Dv: int
    patterns: tuple[Pattern, ...]  # one per head
    goal: float | None = None  # ms, forward and backward

    def inputs(self) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        widths = (self.Dqk, self.Dqk, self.Dv, self.Dv)
        make = [torch.randn(self.B, self.S, self.H, D, device="cuda", dtype=torch.bfloat16) for D in widths]
        return [t.requires_grad_(i < 3) for i, t in enumerate(make)]

    def floor(self) -> tuple[float, float]:
        """ms of forward and backward."""
        elements = 2 * self.B * self.S * self.H
        pairs = self.B * sum(p.count(self.S) for p in self.patterns)
        moved = [elements * (2 * self.Dqk + 2 * self.Dv), elements * (4 * self.Dqk + 4 * self.Dv)]
        flops = [2 * pairs * (self.Dqk + self.Dv), 2 * pairs * (3 * self.Dqk + 2 * self.Dv)]
        times = [max(m / BYTES_PER_SECOND, f / FLOPS_PER_SECOND) for m, f in zip(moved, flops, strict=True)]
        return times[0] * 1e3, times[1] * 1e3


def _strided(l: int, H: int) -> tuple[Pattern, ...]:
    return (Window(l) | Column(l),) * H


WORKLOADS = {
    "cifar10 merged": Workload(16, 3072, 2, 64, 128, _strided(96, 2), 0.15),
    "cifar10 window": Workload(16, 3072, 2, 64, 128, (Window(96),) * 2, 0.10),
    "cifar10 column": Workload(16, 3072, 2, 64, 128, (Column(96),) * 2, 0.10),
    "cifar10 8 heads merged": Workload(16, 3072, 8, 64, 64, _strided(96, 8)),
    "enwik8 fixed": Workload(4, 12288, 8, 64, 64, tuple(Block(128) | Summary(128, 32, h % 4) for h in range(8)), 1.8),
    "imagenet64 merged": Workload(4, 12288, 16, 32, 32, _strided(128, 16), 0.50),
    "imagenet64 window": Workload(4, 12288, 16, 32, 32, (Window(128),) * 16, 0.25),
    "imagenet64 column": Workload(4, 12288, 16, 32, 32, (Column(128),) * 16, 0.25),
    "audio merged": Workload(1, 65536, 8, 64, 64, _strided(256, 8), 0.75),
}


def median_ms(calls: list[Callable[[], object]], replays: int = 7) -> float:
    """Of one call; the calls do the same on different inputs."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls * 2:
            call()
        stream.synchronize()
        begin.record(stream)
        calls[0]()
        end.record(stream)
        stream.synchronize()
        count = len(calls) * max(1, int(10 / max(begin.elapsed_time(end), 0.05) / len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                calls[i % len(calls)]()
        graph.replay()
        times = []
        for _ in range(replays):
            begin.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            times.append(begin.elapsed_time(end) / count)
    return statistics.median(times)


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def timed(work: Workload, attention: Attention) -> tuple[float, float]:
    """ms of the forward pass alone, and of forward and backward."""
    size = 2 * work.B * work.S * work.H * (2 * work.Dqk + 2 * work.Dv)
    sets = [work.inputs() for _ in range(max(2, int(2 * L2_BYTES / size) + 1))]

    def forward(q, k, v, g):
        with torch.no_grad():
            attention(q, k, v)

    def both(q, k, v, g):
        torch.autograd.grad(attention(q, k, v), (q, k, v), g)

    return tuple(median_ms([lambda s=s, f=f: f(*s) for s in sets]) for f in (forward, both))


def fused(work: Workload) -> Attention:
    return lambda q, k, v: triton_attention(q, k, v, work.patterns, work.Dqk**-0.5)[0]


def dense(backend: SDPBackend) -> Callable[[Workload], Attention]:
    def make(work: Workload) -> Attention:
        def attend(q, k, v):
            with sdpa_kernel([backend]):
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return attend

    return make


def flex(work: Workload) -> Attention:
    """FlexAttention with the mask as a user writes it: the pattern's own definition, by head where heads differ."""
    same = len(set(work.patterns)) == 1
    first = work.patterns[0]
    if same:
        parts = first.parts

        def mask(b, h, i, j):
            seen = parts[0].allows(i, j)
            for part in parts[1:]:
                seen = seen | part.allows(i, j)
            return seen
    else:  # Block(l) | Summary(l, c, h % slots)
        summary = next(p for p in first.parts if isinstance(p, Summary))
        l, c = summary.stride, summary.c

        def mask(b, h, i, j):
            low = l - (h % (l // c) + 1) * c
            return (j <= i) & ((i // l == j // l) | ((j % l >= low) & (j % l < low + c)))

    blocks = create_block_mask(mask, None, None if same else work.H, work.S, work.S, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2)

    return attend


def column_view(work: Workload) -> Attention:
    """What an expert does for a column: cuDNN's dense attention on the (S / l, l) view."""
    columns = [p for p in work.patterns[0].parts if isinstance(p, Column)]
    if not columns or work.S % columns[0].stride:
        raise NotImplementedError("no column")
    l = columns[0].stride

    def attend(q, k, v):
        # (B, S, H, D) -> (B, l * H, S / l, D)
        q, k, v = (t.unflatten(1, (-1, l)).flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return (
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(1, 2)
                .reshape(work.B, work.S, work.H, work.Dv)
            )

    return attend


RIVALS: dict[str, Callable[[Workload], Attention]] = {
    "dense": dense(SDPBackend.CUDNN_ATTENTION),
    "flash": dense(SDPBackend.FLASH_ATTENTION),
    "column view": column_view,
    "flex": flex,
}


def verify(work: Workload, most: int, heads: int = 4) -> str:
    """Errors of out, dq, dk, dv over those of dense torch in the same dtype, against float64. At most 2 each."""
    patterns = work.patterns[:heads]
    small = Workload(1, min(work.S, most), len(patterns), work.Dqk, work.Dv, patterns)
    *qkv, g = small.inputs()

    def run(attend, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in qkv]
        out, _ = attend(*inputs, patterns, work.Dqk**-0.5)
        return out, *torch.autograd.grad(out, inputs, g.detach().to(dtype))

    exact = run(oracle_attention, torch.float64)
    plain, ours = run(oracle_attention, torch.bfloat16), run(triton_attention, torch.bfloat16)
    again = run(triton_attention, torch.bfloat16)
    if not all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)):
        return "NOT REPEATABLE"
    ratios = [float((a - e).abs().max() / (p - e).abs().max()) for a, p, e in zip(ours, plain, exact, strict=True)]
    return ("ok " if max(ratios) <= 2 else "WRONG ") + " ".join(f"{r:.2f}" for r in ratios)


def compare(names: list[str], rivals: list[str], most: int) -> list[dict]:
    rows = []
    print("| workload | error / dense torch's | floor | goal | ours: fwd, both (floor / both) | rivals: both (ratio) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names:
        work = WORKLOADS[name]
        row = {"workload": name, "check": verify(work, most), "floor": sum(work.floor()), "goal": work.goal}
        row["fwd"], row["both"] = timed(work, fused(work))
        row["rivals"] = {}
        for rival in rivals:
            try:
                row["rivals"][rival] = timed(work, RIVALS[rival](work))[1]
            except (NotImplementedError, RuntimeError) as error:
                print(f"{name}, {rival}: {str(error).splitlines()[0]}", file=sys.stderr)
        beside = ", ".join(f"{r} {t:.3f} ({t / row['both']:.1f}x)" for r, t in row["rivals"].items())
        goal = "" if work.goal is None else f"{work.goal:.2f}"
        print(
            f"| {name} | {row['check']} | {row['floor']:.3f} | {goal} "
            f"| {row['fwd']:.3f}, {row['both']:.3f} ({row['floor'] / row['both']:.0%}) | {beside} |",
            flush=True,
        )
        rows.append(row)
    return rows


def sweep() -> list[dict]:
    """Merged strided attention at B n = 2^20, H 8, D 64, l a power of two near sqrt(n)."""
    rows = []
    print("| n | l | floor | ours: fwd, both | over the floor |")
    print("| --- | --- | --- | --- | --- |")
    for power in range(12, 21, 2):
        n, l = 1 << power, 1 << (power // 2)
        work = Workload(1 << (20 - power), n, 8, 64, 64, _strided(l, 8))
        floor = sum(work.floor())
        fwd, both = timed(work, fused(work))
        rows.append({"n": n, "l": l, "floor": floor, "fwd": fwd, "both": both})
        print(f"| {n} | {l} | {floor:.2f} | {fwd:.2f}, {both:.2f} | {both / floor:.2f} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="", help="comma-separated beginnings of names; all if empty")
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--check", type=int, default=12288, help="most positions compared with the oracle")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16, ms\n")
    if options.sweep:
        rows = sweep()
    else:
        names = [n for n in WORKLOADS if any(n.startswith(w) for w in options.workloads.split(","))]
        rows = compare(names, [r for r in options.rivals.split(",") if r], options.check)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
