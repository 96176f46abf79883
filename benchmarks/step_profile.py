"""Where the time of a training step goes, beside the least that each class of kernels could take."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from sparse_tx.model import ModelSpec
from sparse_tx.model.cost import cost_of
from sparse_tx.model.spec import VOCABULARY

BYTES_PER_SECOND = {"H200": 4.27e12, "H100": 3.0e12}  # device-to-device copy, measured
FLOPS_PER_SECOND = 673e12  # bf16 matrix product, H200
CLASSES = {  # by the first pattern that a kernel's name fits
    "attention": r"attention|flash|fmha|flex|sdpa|(window|column|chain|compact)_(for|back)ward",
    "products": r"gemm|nvjet|cutlass|xmma|splitK|cublas|triton_tem|contract_(product|backward)|hidden_gradient"
    r"|muon_(symmetric|update)",
    "optimizer, clipping, average": r"multi_tensor|adam|muon|lpnorm|foreach|^move$",
    "loss": r"log_softmax|softmax|nll|logsumexp|cross_entropy",
    "gelu": r"activation|sigmoid|gelu",
    "norm, residual, dropout": r"(add|layer)_?norm|add_shares|column_sums|dropout|triton_(per|red|poi)|query_key",
    "copies and fills": r"memcpy|memset|copy|fill|cat",
}


def profile(step: Callable[[], object], least: dict[str, float], ms: float) -> list[dict]:
    """ms of a step by class of kernel, with the least that it could take and the kernels. ms: of a step, by the clock;
    least: of `floors`."""
    steps = 2
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        torch.cuda.synchronize()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spent: dict[str, dict[str, tuple[float, int]]] = {name: {} for name in [*CLASSES, "other"]}
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CUDA or not event.self_device_time_total:
            continue
        if event.key.startswith("Optimizer."):  # a span over kernels that are counted themselves
            continue
        name = next((c for c, words in CLASSES.items() if re.search(words, event.key, re.IGNORECASE)), "other")
        spent[name][event.key] = event.self_device_time_total / 1e3 / steps, event.count // steps
    found = []
    for name, kernels in spent.items():
        spent_ms = sum(t for t, _ in kernels.values())
        top = sorted(kernels.items(), key=lambda item: -item[1][0])[:6]
        listed = [f"{key[:60]} {t:.2f} ({n})" for key, (t, n) in top]
        launches = sum(n for _, n in kernels.values())
        found.append({"class": name, "ms": spent_ms, "launches": launches, "floor": least.get(name), "kernels": listed})
    busy = sum(r["ms"] for r in found)
    found.append({"class": "gaps", "ms": ms - busy, "launches": 0, "floor": None, "kernels": []})
    return found


def floors(spec: ModelSpec, batch: int, parameters: int) -> dict[str, float]:
    """ms that a class takes at least: its products at the rate of a large product, or its bytes at that of a copy.

    Residual, norm and dropout: forward reads the stream and the branch and writes the stream and the normed input,
    twice a block; backward reads the gradients of both and the stream, and writes those of the stream and the branch.
    Float32 stream, 16-bit branches. GELU: one pass forward (read, write), one backward (read two, write one).
    Optimizer: norm 4 bytes a parameter, AdamW 28, the average 12.
    """
    tokens = batch * spec.context
    name = torch.cuda.get_device_name()
    rate = next((r for n, r in BYTES_PER_SECOND.items() if n in name), 3.0e12)
    cost = cost_of(spec)
    pairs = cost.pairs * spec.context * spec.layers * spec.heads
    attention = 3 * 2 * pairs * (spec.qk + spec.width) / spec.heads * batch
    products = cost.flops * batch - attention
    moved = spec.layers * tokens * 2 * (3 * (2 * spec.qk + 2 * spec.width))
    residual = spec.layers * tokens * spec.width * 2 * ((4 + 2 + 4 + 2) + (4 + 2 + 4 + 4 + 2))
    # Of each product, both ways: what goes in and what comes out, three times each.
    through = spec.layers * tokens * 2 * 3 * (6 * spec.width + 2 * spec.qk + 2 * spec.ff)
    gelu = spec.layers * tokens * spec.ff * 2 * 5
    return {
        "products": max(products / FLOPS_PER_SECOND, through / rate) * 1e3,
        "attention": max(attention * 7 / 6 / FLOPS_PER_SECOND, moved / rate) * 1e3,
        "norm, residual, dropout": residual / rate * 1e3,
        "gelu": gelu / rate * 1e3,
        "loss": tokens * VOCABULARY * 2 * 3 / rate * 1e3,
        "optimizer, clipping, average": 44 * parameters / rate * 1e3,
    }


def table(rows: list[dict]) -> str:
    total = sum(r["ms"] for r in rows)
    lines = ["", "| class | ms | share | launches | floor ms | kernels: ms (launches) |", "| --- " * 6 + "|"]
    for r in rows:
        floor = "" if r["floor"] is None or not r["ms"] else f"{r['floor']:.2f} ({r['floor'] / r['ms']:.0%})"
        lines.append(
            f"| {r['class']} | {r['ms']:.2f} | {r['ms'] / total:.1%} | {r['launches']} | {floor} "
            f"| {'; '.join(r['kernels'])} |"
        )
    return "\n".join([*lines, ""])
