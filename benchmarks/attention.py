"""Forward and backward time of the fused attention kernels against what a user could pick instead.

    python benchmarks/attention.py                              # all workloads and rivals: minutes, mostly compiling
    python benchmarks/attention.py --workloads cifar10 --rivals dense
    python benchmarks/attention.py --sweep                      # cost against n at 2^20 positions

Every arm runs under CUDA graphs over several sets of inputs (together larger than the L2 cache); medians of replays.
Before an arm is timed it is compared, gradients too, with the float64 oracle: at most twice the error of dense torch in
the same dtype. "flex" is FlexAttention with the mask as a user writes it; "flex tuned" gives it small blocks of keys
and max-autotune; "expert" composes library kernels, merged by log-sum-exp, with gradients from the merged one.
Floor: the larger of bytes (each tensor once) and products over the two rates measured on an H200; both passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from masks import mask_of, summary_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparse_tx.attention import Block, Column, Full, Summary, Window
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
    "text window": Workload(1, 12288, 8, 64, 64, (Window(1024),) * 8),
    "text summary": Workload(1, 12288, 8, 64, 64, tuple(Summary(1024, 128, h) for h in range(8))),
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


def flex(work: Workload, block: int | tuple[int, int] = 128, mode: str | None = None) -> Attention:
    mask, heads = mask_of(work.patterns)
    blocks = create_block_mask(mask, None, heads, work.S, work.S, device="cuda", BLOCK_SIZE=block, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)

    def attend(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2)

    return attend


def flex_tuned(work: Workload) -> Attention:
    """Key blocks of 64 (of 32 it does not compile for the fixed pattern), every template tried."""
    return flex(work, (128, 64), "max-autotune-no-cudagraphs")


def _merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """outs (B, S, H, D), lses (B, S, H): one softmax over all parts. A part without keys has lse -inf."""
    lse = torch.logsumexp(torch.stack(lses), 0)
    out = sum(o * (n - lse).exp()[..., None] for o, n in zip(outs, lses, strict=True))
    return out.to(outs[0].dtype), lse


class _FlashParts(torch.autograd.Function):
    """FlashAttention-2 (inside torch) on each part of a strided pattern, merged; backward from the merged result.

    Autograd through its own operator would lose the gradient of the log-sum-exp, and be wrong in silence.
    """

    @staticmethod
    def parts(work: Workload, tensors):
        """Views of (q, k, v, ...) and the window of each part: the local keys, then the column before them."""
        l = work.patterns[0].parts[0].stride
        merged = len(work.patterns[0].parts) > 1
        views = []
        if any(isinstance(p, Window) for p in work.patterns[0].parts):
            views.append((tensors, l - 1 if merged else l, 0))
        if any(isinstance(p, Column) for p in work.patterns[0].parts):
            columns = [t.unflatten(1, (-1, l)).flatten(2, 3) for t in tensors]  # (B, S / l, l H, D)
            n = columns[0].shape[1]
            cut = [c[:, 1:] if i not in (1, 2) else c[:, : n - 1] for i, c in enumerate(columns)] if merged else columns
            views.append((cut, None, l))
        return views

    @staticmethod
    def forward(ctx, q, k, v, work):
        B, S, H, _ = q.shape
        outs, lses = [], []
        for (pq, pk, pv), window, l in _FlashParts.parts(work, (q, k, v)):
            o, n, *_ = torch.ops.aten._flash_attention_forward(
                pq, pk, pv, None, None, pq.shape[1], pk.shape[1], 0.0, True, False, scale=work.Dqk**-0.5,
                window_size_left=window, window_size_right=None if window is None else 0,
            )  # fmt: skip
            n = n.transpose(1, 2)  # (B, S, H)
            if l:  # back from columns; the first row of blocks has no key before it
                o, n = o.unflatten(2, (l, H)).flatten(1, 2), n.unflatten(2, (l, H)).flatten(1, 2)
                if o.shape[1] < S:
                    o = torch.cat([o.new_zeros(B, l, H, o.shape[-1]), o], 1)
                    n = torch.cat([n.new_full((B, l, H), -torch.inf), n], 1)
            outs.append(o)
            lses.append(n)
        out, lse = _merge_compiled(outs, lses) if len(outs) > 1 else (outs[0], lses[0])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.work = work
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, out, lse = ctx.saved_tensors
        work = ctx.work
        B, S, H, _ = q.shape
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        total: list[Tensor] = []
        for (pq, pk, pv, po, pn, pg), window, l in _FlashParts.parts(work, (q, k, v, out, lse[..., None], g)):
            grads = torch.ops.aten._flash_attention_backward(
                pg.contiguous(), pq, pk, pv, po.contiguous(), pn[..., 0].transpose(1, 2).contiguous(), None, None,
                pq.shape[1], pk.shape[1], 0.0, True, seed, unused, scale=work.Dqk**-0.5,
                window_size_left=window, window_size_right=None if window is None else 0,
            )  # fmt: skip
            if l:
                grads = [t.unflatten(2, (l, H)).flatten(1, 2) for t in grads]
            if not total:
                total = [t if t.shape[1] == S else torch.cat([t, t.new_zeros(B, l, H, t.shape[-1])], 1) for t in grads]
            else:
                total[0][:, l:] += grads[0]
                for i in (1, 2):
                    total[i][:, : grads[i].shape[1]] += grads[i]
        return *total, None


_merge_compiled = torch.compile(_merge, dynamic=False)


def expert(work: Workload) -> Attention:
    if all(isinstance(p, Window | Column) for p in work.patterns[0].parts):
        width = max(work.Dqk, work.Dv)

        def attend(q, k, v):
            q, k = (torch.nn.functional.pad(t, (0, width - work.Dqk)) for t in (q, k))  # the kernel has one width
            return _FlashParts.apply(q, k, v, work)

        return attend
    l, c = summary_of(work.patterns)
    blocks = work.S // l
    own = Block(l) in work.patterns[0].parts
    if not own and len(work.patterns[0].parts) > 1:
        raise NotImplementedError(f"no composition is written for {work.patterns[0]}")

    def first(h):  # of the head's columns in a block
        return l - (h % (l // c) + 1) * c

    if own:
        local = create_block_mask(lambda b, h, i, j: (j <= i) & (i // l == j // l), None, None, work.S, work.S, "cuda")
        before = create_block_mask(lambda b, h, i, j: j // c < i // l, None, None, work.S, blocks * c, "cuda")
    else:
        before = create_block_mask(
            lambda b, h, i, j: j // c * l + first(h) + j % c <= i, None, work.H, work.S, blocks * c, "cuda"
        )
    index = first(torch.arange(work.H, device="cuda"))[:, None] + torch.arange(c, device="cuda")  # (H, c)

    def gather(t):  # (B, S, H, D) -> (B, H, S / l * c, D)
        t = t.unflatten(1, (blocks, l)).permute(0, 3, 1, 2, 4)
        at = index[None, :, None, :, None].expand(t.shape[0], -1, blocks, -1, t.shape[-1])
        return t.gather(3, at).flatten(2, 3)

    def both(q, k, v):
        qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
        summary = flex_attention(qt, gather(k), gather(v), block_mask=before, return_lse=True)
        if not own:
            return summary[0].transpose(1, 2)
        outs, lses = zip(flex_attention(qt, kt, vt, block_mask=local, return_lse=True), summary, strict=True)
        return _merge([o.transpose(1, 2) for o in outs], [n.transpose(1, 2) for n in lses])[0]

    return torch.compile(both, dynamic=False)


def column_view(work: Workload) -> Attention:
    """What an expert does for a column: cuDNN's dense attention on the (S / l, l) view."""
    column = work.patterns[0]
    if not isinstance(column, Column) or work.S % column.stride:
        raise NotImplementedError("for a column alone")
    l = column.stride

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
    "flex tuned": flex_tuned,
    "expert": expert,
}
DENSE = ("dense", "flash")  # attend to everything: the line to beat, not the same function


class Check:
    """The oracle's results for some heads of one batch entry, on at most `most` positions."""

    def __init__(self, work: Workload, most: int, heads: int = 4) -> None:
        self.work = work if most >= work.S else replace(work, S=most)
        self.heads = min(heads, work.H)
        *self.qkv, self.g = self.work.inputs()
        self.exact, self.plain = self._oracle(torch.float64), self._oracle(torch.bfloat16)

    def _few(self, t: Tensor) -> Tensor:
        return t.detach()[:1, :, : self.heads]

    def _oracle(self, dtype: torch.dtype) -> list[Tensor]:
        inputs = [self._few(t).to(dtype).requires_grad_() for t in self.qkv]
        out, _ = oracle_attention(*inputs, self.work.patterns[: self.heads], self.work.Dqk**-0.5)
        return [out.detach(), *torch.autograd.grad(out, inputs, self._few(self.g).to(dtype))]

    def results(self, attend: Attention) -> list[Tensor]:
        out = attend(*self.qkv)
        return [out.detach(), *torch.autograd.grad(out, self.qkv, self.g)]

    def __call__(self, attend: Attention) -> str:
        """Errors of out, dq, dk, dv over those of dense torch in bfloat16: at most 2 each."""
        got = [self._few(t) for t in self.results(attend)]
        errors = zip(got, self.plain, self.exact, strict=True)
        ratios = [float((a - e).abs().max() / (p - e).abs().max()) for a, p, e in errors]
        return ("ok " if max(ratios) <= 2 else "WRONG ") + " ".join(f"{r:.2f}" for r in ratios)


def compare(names: list[str], rivals: list[str], most: int) -> list[dict]:
    rows = []
    print("| workload | error / dense torch's | floor | goal | ours: fwd, both (floor / both) | rivals: both (ratio) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names:
        work = WORKLOADS[name]
        check = Check(work, most)
        check_dense = Check(replace(work, patterns=(Full(),) * work.H), most)
        ours = fused(check.work)
        pairs = zip(check.results(ours), check.results(ours), strict=True)
        repeats = all(torch.equal(a, b) for a, b in pairs)
        row = {"workload": name, "check": check(ours), "repeats": repeats, "floor": sum(work.floor())}
        row["goal"] = work.goal
        row["fwd"], row["both"] = timed(work, fused(work))
        row["rivals"] = {}
        for rival in rivals:
            begun = time.perf_counter()
            torch._dynamo.reset()  # or it gives up compiling after a few workloads
            try:
                attend = RIVALS[rival](check.work)
                found = (check_dense if rival in DENSE else check)(attend)
                if found.startswith("WRONG"):
                    row["rivals"][rival] = found
                else:
                    row["rivals"][rival] = timed(work, attend if check.work is work else RIVALS[rival](work))[1]
            except Exception as error:  # a rival that cannot run this is no reason to lose the others
                print(f"{name}, {rival}: {(str(error).splitlines() or [repr(error)])[0][:200]}", file=sys.stderr)
            torch.cuda.empty_cache()
            print(f"{name}, {rival}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        beside = ", ".join(
            f"{r} {t}" if isinstance(t, str) else f"{r} {t:.3f} ({t / row['both']:.1f}x)"
            for r, t in row["rivals"].items()
        )
        goal = "" if work.goal is None else f"{work.goal:.2f}"
        print(
            f"| {name} | {row['check']}{'' if repeats else ' NOT REPEATABLE'} | {row['floor']:.3f} | {goal} "
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
