"""What an eager call of attention costs the host, not the GPU: where a small layer waits for the launches.

    python benchmarks/host.py
    TRITON_INTERPRET=1 python benchmarks/host.py --tiny         # on a CPU: that it runs, no numbers

Microseconds of one call with nothing waited for: a forward pass without gradients, forward and backward of separate
tensors and of one projection ("packed"). "One thread" runs the backward pass in the caller's thread, where torch's
engine otherwise hands each node to a thread of the GPU, which shares Python's lock with the caller. Beside them what
torch itself takes for its flash attention, and for a function of three inputs written in Python that computes nothing.
Under CUDA graphs, which training takes by itself, a call costs nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparse_tx.attention import Block, Column, Summary, Window, packed_attention, sparse_attention

HEADS = {  # patterns of 2 heads of small layers, whose kernels the host may not keep up with
    "window and column": (Window(24) | Column(24),) * 2,
    "block and summary": (Block(128) | Summary(128, 32), Block(128) | Summary(128, 32, 1)),
    "window": (Window(24),) * 2,
    "column": (Column(24),) * 2,
}
COLUMNS = ("forward", "both", "packed: both", "one thread: both")


class _Nothing(torch.autograd.Function):
    """Of three inputs; computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return q.detach()

    @staticmethod
    def backward(ctx, dout):
        _, k, v = ctx.saved_tensors
        return dout, torch.empty_like(k), torch.empty_like(v)


def host_us(call: Callable[[], object], calls: int, repeats: int) -> float:
    """Median microseconds of one call: few enough in a row that none waits for room in the GPU's queue."""
    times = []
    for _ in range(repeats + 1):  # the first compiles
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls * 1e6)
    return statistics.median(times[1:])


def row(
    name: str, attention: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor, runs: tuple[int, int],
    packed: tuple[Callable[[Tensor], Tensor], Tensor] | None = None,
) -> dict:  # fmt: skip
    """A line of the table. packed: the same attention of one projection, and that. runs: of `host_us`."""

    def forward():
        with torch.no_grad():
            attention(*inputs)

    def both():
        torch.autograd.grad(attention(*inputs), inputs, dout)

    numbers: list[float | None] = [host_us(forward, *runs), host_us(both, *runs), None]
    if packed is not None:
        of_one, qkv = packed
        numbers[2] = host_us(lambda: torch.autograd.grad(of_one(qkv), qkv, dout), *runs)
    with torch.autograd.set_multithreading_enabled(False):
        numbers.append(host_us(both, *runs))
    return {"heads of": name, **dict(zip(COLUMNS, numbers, strict=True))}


def rows(S: int, runs: tuple[int, int]) -> list[dict]:
    """Of each kind of heads and of torch's own. S: positions."""
    # The interpreter multiplies bfloat16 wrongly.
    where = {"device": "cuda", "dtype": torch.bfloat16} if torch.cuda.is_available() else {"dtype": torch.float32}
    q, k, v, dout = torch.randn(4, 1, S, 2, 64, **where).unbind()
    qkv = torch.cat([t.flatten(2) for t in (q, k, v)], -1).requires_grad_()
    inputs = [t.requires_grad_() for t in (q, k, v)]
    found = []
    for name, patterns in HEADS.items():
        separate = partial(sparse_attention, pattern=patterns, backend="triton")
        of_one = partial(packed_attention, heads=2, qk=128, pattern=patterns, backend="triton")
        assert torch.equal(separate(*inputs), of_one(qkv))
        found.append(row(name, separate, inputs, dout, runs, (of_one, qkv)))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found.append(row("torch: flash attention", _flash, inputs, dout, runs))
    found.append(row("torch: an empty function", _Nothing.apply, inputs, dout, runs))
    return found


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few positions and calls: proves that it runs")
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, us of the host\n")
    found = rows(*((32, (1, 1)) if options.tiny else (768, (20, 25))))
    print("| heads of | " + " | ".join(COLUMNS) + " |\n" + "| --- " * (1 + len(COLUMNS)) + "|")
    for line in found:
        numbers = ("" if line[c] is None else f"{line[c]:.0f}" for c in COLUMNS)
        print(f"| {line['heads of']} | " + " | ".join(numbers) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
