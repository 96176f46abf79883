"""Finds the configurations of the attention kernels' tables (sparse_tx/attention/kernels/configs.py) on this GPU.

    python benchmarks/tune_attention.py                                    # every kernel of every workload
    python benchmarks/tune_attention.py --workloads imagenet64 --kernels window_backward

Each launch of a workload is timed by itself, as CUDA graphs over inputs larger than the L2 cache, for each candidate of
its kernel; a candidate whose results differ from those of the table's choice is reported and left out. Compiling is
shared between processes. Printed: microseconds, then what the compiler made of it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from attention import WORKLOADS, Workload, median_ms
from triton.runtime.jit import JITFunction

from sparse_tx.attention.kernels import configs, launch, walks
from sparse_tx.attention.kernels.configs import Config, Walk, Warps
from sparse_tx.attention.kernels.plan import plan

KERNELS = (
    "window_forward", "column_forward", "attention_forward",
    "window_backward", "column_backward", "chain_backward", "compact_backward",
    "window_forward_by_warps", "column_forward_by_warps",
)  # fmt: skip
LAUNCHED = {
    name: module for module in (launch, walks) for name, x in vars(module).items() if isinstance(x, JITFunction)
}


def candidates(kernel: str) -> list[Walk | Config | Warps]:
    """What is worth trying, by kernel."""
    if kernel.endswith("by_warps"):
        early = (1, 2, 3) if kernel.startswith("window") else (1,)
        return [Warps(*c) for c in itertools.product((1, 2, 4, 8), (1, 2, 3, 4, 6, 8), early)]
    if kernel.startswith(("window", "column")):
        shapes = [(64, 4, (None, 168)), (64, 8, (None, 128))]
        if kernel.startswith("column"):
            shapes = [(64, 4, (None, 168)), (32, 4, (None, 128))]
        return [
            Walk(tile, warps, stages, programs, registers)
            for tile, warps, caps in shapes
            for stages, registers, programs in itertools.product((1, 2, 3), caps, (2, 4, 8))
        ]
    if kernel == "compact_backward":
        tiles = ((32, 64, 4), (64, 64, 4), (64, 64, 8), (64, 128, 8), (128, 64, 8))
        stages = (2, 3)
    elif kernel == "chain_backward":
        tiles, stages = ((64, 32, 4), (64, 64, 4), (64, 64, 8), (32, 32, 4), (128, 32, 8), (128, 64, 8)), (1, 2, 3)
    else:
        tiles, stages = ((64, 32, 4), (64, 64, 4), (128, 64, 8), (128, 128, 8), (64, 128, 4)), (2, 3)
    return [Config(*t, n, cap) for t in tiles for n in stages for cap in (None, 168 if t[2] == 4 else 128)]


class Recorder:
    """Stands for a kernel in the module that launches it and keeps what it is launched with."""

    def __init__(self, name: str, kernel: Any, found: list) -> None:
        self.name, self.kernel, self.found = name, kernel, found

    def __getitem__(self, grid):
        return lambda *args, **named: self.found.append((self.name, self.kernel, grid, args, named))


def record(work: Workload, tensors: dict[str, torch.Tensor]) -> list:
    """The launches of forward and backward, made with these tensors."""
    found: list = []
    real = {name: getattr(module, name) for name, module in LAUNCHED.items()}
    empty_like = torch.empty_like
    launch.forget_plans()
    try:
        for name, kernel in real.items():
            setattr(LAUNCHED[name], name, Recorder(name, kernel, found))
        t, numbers = tensors, plan(work.patterns)
        torch.empty_like = lambda x: t["delta"] if x is t["lse"] else empty_like(x)
        launch.forward(t["q"], t["k"], t["v"], t["out"], t["lse"], numbers, work.Dqk**-0.5)
        launch.backward(
            t["q"], t["k"], t["v"], t["out"], t["lse"], t["dout"], None, t["dq"], t["dk"], t["dv"], numbers,
            work.Dqk**-0.5,
        )  # fmt: skip
    finally:
        torch.empty_like = empty_like
        for name, kernel in real.items():
            setattr(LAUNCHED[name], name, kernel)
        launch.forget_plans()
    return found


def make(work: Workload) -> dict[str, torch.Tensor]:
    widths = {"q": work.Dqk, "k": work.Dqk, "v": work.Dv, "out": work.Dv, "dout": work.Dv}
    widths |= {"dq": work.Dqk, "dk": work.Dqk, "dv": work.Dv}
    t = {n: torch.randn(work.B, work.S, work.H, D, device="cuda", dtype=torch.bfloat16) for n, D in widths.items()}
    t["lse"] = torch.randn(work.B, work.H, work.S, device="cuda")
    t["delta"] = torch.randn(work.B, work.H, work.S, device="cuda")
    return t


def places(kernel: str, work: Workload) -> list[tuple]:
    """The keys under which the tables hold this kernel's configurations for a workload."""
    used: list[tuple] = []
    walked = kernel in ("window_forward", "column_forward", "window_backward", "column_backward")
    alone = kernel.endswith("by_warps")
    part, _, rest = kernel.partition("_")
    direction = "keys" if kernel == "compact_backward" else rest.partition("_")[0] if walked or alone else rest
    real = walks.walk, launch.config, walks.warps, walks.has_roles

    def walk(*key):
        used.extend([key] if walked and key[1].startswith(part) else [])
        return real[0](*key)

    def config(*key):
        used.extend([] if walked or alone else [key[:5]])
        return real[1](*key)

    def warps(chain, heads, *widths):
        used.extend([("forward", chain.part, *widths)] if alone and chain.part == part else [])
        return real[2](chain, heads, *widths)

    walks.walk, launch.config, walks.warps = walk, config, warps
    if not alone:
        walks.has_roles = lambda device: False
    try:
        record(work, make(work))
    finally:
        walks.walk, launch.config, walks.warps, walks.has_roles = real
    return [key for key in dict.fromkeys(used) if key[0] == direction]


def with_candidate(key: tuple, candidate: Walk | Config | Warps | None):
    """Sets the table's entry, and takes away what comes before it; returns what undoes it."""
    tables = configs.WALKS, configs.TUNED, configs.WARPS
    before, roles = [dict(table) for table in tables], walks.has_roles
    if isinstance(candidate, Warps):
        configs.WARPS[key] = candidate
    elif candidate is not None:
        walks.has_roles = lambda device: False
    if isinstance(candidate, Walk):
        configs.WALKS[key] = candidate
    elif isinstance(candidate, Config):
        configs.WALKS.pop(key[:4], None)
        configs.TUNED[key] = candidate

    def undo() -> None:
        walks.has_roles = roles
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)

    return undo


def launch_of(kernel: str, key: tuple, launches: list) -> list:
    """The one launch that the key's configuration decides."""
    return [
        x
        for x in launches
        if x[0] == kernel and ("STRIDED" not in x[4] or x[4]["STRIDED"] == key[1].startswith("column"))
    ][:1]


def compile_one(task: tuple) -> None:
    name, kernel, key, candidate = task
    work = WORKLOADS[name]
    undo = with_candidate(key, candidate)
    try:
        for _, function, grid, args, named in launch_of(kernel, key, record(work, make(work))):
            function.warmup(*args, grid=grid, **named)
    except Exception:  # does not compile: found again, and said, where it is timed
        pass
    finally:
        undo()


def compare(name: str, kernel: str, key: tuple, options: list, top: int) -> None:
    work = WORKLOADS[name]
    size = 2 * work.B * work.S * work.H * (2 * work.Dqk + 2 * work.Dv)
    sets = [make(work) for _ in range(max(2, int(120e6 / size) + 1))]
    written = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}[kernel.split("_")[1]]

    def all_of(candidate: Walk | Config | Warps | None, t: dict) -> list:
        undo = with_candidate(key, candidate)
        try:
            return record(work, t)
        finally:
            undo()

    def run(launches: list) -> None:
        for _, function, grid, args, named in launches:
            function[grid](*args, **named)

    for t in sets[1:] + sets[:1]:  # the table's choice: also gives lse, delta and what a merge begins with
        run(all_of(None, t))
    first = sets[0]
    want = {n: first[n].float().clone() for n in written}
    results = []
    for candidate in options:
        try:
            run(all_of(candidate, first))
            errors = [float((first[n].float() - w).norm() / w.norm()) for n, w in want.items()]
            own = [launch_of(kernel, key, all_of(candidate, t)) for t in sets]
            if not own[0]:
                continue
            _, function, grid, args, named = own[0][0]
            made = function[grid](*args, **named)
            us = 1e3 * median_ms([lambda o=o: run(o) for o in own], replays=3)
        except Exception as error:
            results.append((float("inf"), candidate, (str(error).splitlines() or [repr(error)])[0][:80]))
            continue
        note = f"regs {made.n_regs} spills {made.n_spills} shared {made.metadata.shared // 1024}K programs {grid[0]}"
        results.append((us, candidate, note if max(errors) < 2e-2 else f"WRONG {errors}"))
    print(f"\n{name}: {kernel} {key}", flush=True)
    good = sorted((r for r in results if "WRONG" not in r[2]), key=lambda r: r[0])
    for us, candidate, note in good[:top]:
        print(f"  {us:7.1f}  {type(candidate).__name__}{tuple(candidate)}  {note}", flush=True)
    wrong = [r for r in results if "WRONG" in r[2]]
    if wrong:
        print(f"  {len(wrong)} WRONG: {[(tuple(c), n) for _, c, n in wrong][:3]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="", help="comma-separated beginnings of names; all if empty")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--top", type=int, default=6, help="candidates printed")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args()
    jobs = []
    for name, work in WORKLOADS.items():
        if any(name.startswith(w) for w in options.workloads.split(",")):
            for kernel in options.kernels.split(","):
                jobs += [(name, kernel, key, candidates(kernel)) for key in places(kernel, work)]
    tasks = {}
    for name, kernel, key, found in jobs:
        for c in found:
            once = c._replace(programs=0) if isinstance(c, (Walk, Warps)) else c
            tasks.setdefault((name, kernel, key, once), (name, kernel, key, c))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        list(pool.map(compile_one, tasks.values()))
    print(f"{len(tasks)} kernels compiled", flush=True)
    for job in jobs:
        compare(*job, options.top)


if __name__ == "__main__":
    main()
