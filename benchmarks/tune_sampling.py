"""Times sampling under other sizes of the decoding kernels: what the rules of `decode_kernels/configs.py` were set by.

    python benchmarks/tune_sampling.py --batches 1,4
    python benchmarks/tune_sampling.py --batches 128,1024 --workload "cifar10 merged"

One table a batch, milliseconds a byte as benchmarks/sampling.py has them, the best last. A size that does not fit the
model or the GPU is left out.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from sampling import WORKLOADS, make_arm, make_model, milliseconds, specs
from triton.runtime.errors import OutOfResources

from sparse_tx.model.decode_kernels import configs

Change = dict[str, Callable[..., Any]]  # functions of `configs` by name


def changes(rows: int) -> Iterator[tuple[str, Change]]:
    yield "the rules", {}
    for overlap in (True, False):
        yield f"overlap: {overlap}", {"overlaps": lambda *_, c=overlap: c}
    for keys, warps, stages in itertools.product((16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3)):
        if 8 <= keys // warps <= 32:
            chosen = lambda *_, c=(keys, warps, stages): c  # noqa: E731
            yield f"attend: {keys} keys, {warps} warps, {stages} stages", {"attend": chosen}
    if rows <= configs.VECTOR_ROWS:
        for numbers, warps in itertools.product((1024, 2048, 4096, 8192), (2, 4, 8)):
            chosen = lambda K, n=numbers, w=warps: (max(1, n // triton.next_power_of_2(K)), w)  # noqa: E731
            yield f"vector: {numbers} weights, {warps} warps", {"vector": chosen}
        two = {"joins": lambda *_: True, "joins_feedforward": lambda *_: False}
        yield "four launches a layer", two
        three = {"joins": lambda *_: True, "joins_feedforward": lambda *_: True}
        yield "three launches a layer", three
        for outputs, warps in itertools.product((16, 32, 64, 128), (4, 8)):
            chosen = lambda *a, n=outputs, w=warps: (_attend_out(*a)[0], n, w)  # noqa: E731
            yield f"three, attention with {outputs} outputs, {warps} warps", {**three, "attend_out": chosen}
        for units, warps in itertools.product((16, 32, 64), (4, 8)):
            chosen = lambda *_, c=(units, warps): c  # noqa: E731
            yield f"three, {units} hidden units, {warps} warps", {**three, "feedforward": chosen}
        return
    whole = {"shares": lambda *_: 0}
    for m, (inputs, stages) in itertools.product((16, 32), ((64, 4), (64, 6), (128, 2), (128, 3))):
        chosen = lambda *a, t=configs.Between(m, inputs, stages): t if _between(10**6, *a[1:]) else None  # noqa: B008, E731
        yield f"between: {m} rows, {stages} tiles of {inputs} inputs", {**whole, "between": chosen}
    if rows <= 512:
        cut = lambda _, width, ff, itemsize: _shares(configs.VECTOR_ROWS + 1, width, ff, itemsize)  # noqa: E731
        yield "three launches a layer: shares", {"SHARED_ROWS": 512, "shares": cut}
    apart = {"between": lambda *_: None, "shares": lambda *_: 0}
    yield "five launches a layer", apart
    for m, n, warps in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8)):
        chosen = lambda *a, t=(m, n), w=warps: _tile(*a, t)._replace(warps=w)  # noqa: E731
        yield f"linear: {m} rows, {n} outputs, {warps} warps", {**apart, "tile": chosen}
    for stages in (2, 3, 4):
        chosen = lambda *a, s=stages: _rule(*a)._replace(stages=s)  # noqa: E731
        yield f"linear: {stages} stages", {**apart, "tile": chosen}


_rule, _attend_out, _between, _shares = configs.tile, configs.attend_out, configs.between, configs.shares


def _tile(rows: int, outputs: int, inputs: int, norm: bool, itemsize: int, gpu: configs.Gpu, tile: tuple) -> Any:
    known = configs._TILES
    configs._TILES = (tile,)
    try:
        return _rule(rows, outputs, inputs, norm, itemsize, gpu)
    finally:
        configs._TILES = known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="cifar10 interleaved", choices=WORKLOADS)
    parser.add_argument("--batches", default="1", help="comma-separated")
    parser.add_argument("--steps", type=int, default=64, help="bytes drawn in a run")
    parser.add_argument("--places", type=int, default=3, help="positions at which runs begin")
    options = parser.parse_args()
    device = torch.device("cuda")
    spec = specs([options.workload], False)[options.workload]
    with torch.inference_mode():
        model = make_model(spec, device)
        for rows in map(int, options.batches.split(",")):
            found = []
            for name, change in changes(rows):
                kept = {key: getattr(configs, key) for key in change}
                try:
                    for key, function in change.items():
                        setattr(configs, key, function)
                    step = make_arm("fused", model, rows, torch.bfloat16, True)
                    found.append((milliseconds(step, spec.context, device, options.steps, options.places), name))
                except OutOfResources:
                    continue
                finally:
                    step = None
                    for key, function in kept.items():
                        setattr(configs, key, function)
            print(f"\n{options.workload}, {rows} rows, {torch.cuda.get_device_name(device)}")
            for ms, name in sorted(found, reverse=True):
                print(f"{ms:8.3f} ms  {name}", flush=True)


if __name__ == "__main__":
    main()
