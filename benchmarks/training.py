"""Bytes per second of whole training steps against a plain compiled transformer, FlexAttention and no attention at all.

    python benchmarks/training.py                                   # all experiments and arms: many minutes, compiling
    python benchmarks/training.py --experiments cifar10 --arms ours,dense --batch 16,32
    python benchmarks/training.py --experiments cifar10 --arms ours --profile
    python benchmarks/training.py --context-sweep --arms ours
    python benchmarks/training.py --tiny --experiments cifar10      # in seconds on a CPU: that it runs, no numbers

A step is forward, backward, clipping, the optimizer and the average, with the experiment's dropout, on random bytes
that lie on the device; bf16 under autocast, weights in float32. What the arms are is said in arms.py. Before ours is
timed its losses over some steps are compared with a plain float32 model's.

Utilisation: FLOPs of the model (each product forward once and backward twice, of attention the pairs that the pattern
allows, nothing that is run again) over the peak by the datasheet. Memory: at most allocated, and reserved, with graphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hydra
import torch
from arms import ARMS, OURS, Trained, Work, expected_memory, flops, ours
from step_profile import floors, profile, table
from torch import Tensor

from sparse_tx.config import OptimizerConfig, config_folder, training
from sparse_tx.model import ModelSpec
from sparse_tx.model.cost import cost_of
from sparse_tx.model.spec import RECOMPUTE
from sparse_tx.training.peak import device_peak

SPAWNED = "SPARSE_TX_SPAWNED"  # when a process of --cold was started
WORKLOADS = {  # Hydra's overrides, batches
    "fast cifar10": (("experiment=cifar10_fast",), (8,)),
    "fast enwik8": (("experiment=enwik8_fast",), (1,)),
    "cifar10": (("experiment=cifar10_strided",), (16, 32)),
    "enwik8": (("experiment=enwik8_fixed",), (4, 8)),
    "imagenet64": (("experiment=imagenet64_strided",), (4, 8)),
    "audio_65k": (("experiment=audio_65k",), (1,)),
    "audio_1m": (("experiment=audio_1m", "model=imagenet64_152m"), (1,)),
}
TINY = ("debug=fast",)
SWEEP = tuple((1 << power, 1 << power // 2) for power in range(12, 21, 2))  # context, stride
SWEEP_TOKENS = 1 << 20
LONG = 10.0  # seconds: of a step this long one is enough; of a rival's that should take longer it has fewer windows


def compose(overrides: tuple[str, ...], tiny: bool) -> tuple[ModelSpec, OptimizerConfig]:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = training(hydra.compose("train", [*overrides, *(TINY if tiny else ())]))
    return config.model_spec(), config.optimizer


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    torch._dynamo.reset()  # or it gives up compiling after a few arms
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_a_step(trained: Trained, tokens: Tensor, steps: int) -> tuple[float, float]:
    """Median of three stretches of steps, after the first two of all; and of the first, with compiling."""
    device, spent = trained.device, []
    for count in (1, 1, *[max(1, steps // 3)] * 3):
        wait(device)
        began = time.perf_counter()
        for _ in range(count):
            trained(tokens)
        wait(device)
        spent.append((time.perf_counter() - began) / count)
        if len(spent) == 2 and spent[1] > LONG:
            break  # a step of this length says enough
    return statistics.median(spent[2:] or spent[1:]), spent[0]


def attempt(arm: str, work: Work, options: argparse.Namespace, device: torch.device) -> dict:
    """What a row says beyond its names. Raises what the arm does."""
    trained = ARMS[arm](work, device, options.dtype)
    tokens = work.tokens(device)
    seconds, first = seconds_a_step(trained, tokens, options.steps)
    peak = device_peak(device, half=options.dtype != torch.float32)
    row = {
        "recompute": "block" if arm.endswith("recomputed") else work.spec.recompute,
        "ms": seconds * 1e3,
        "bytes_per_second": work.batch * work.spec.context / seconds,
        "first_step_seconds": first,
        "utilisation": None if peak is None else flops(arm, work) / seconds / peak,
    }
    if device.type == "cuda":
        if arm in OURS:
            row["expected"] = expected_memory(arm, work)
        row |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        if options.profile:
            least = floors(work.spec, work.batch, sum(p.numel() for p in trained.parameters))
            row["profile"] = profile(lambda: trained(tokens), least, row["ms"])
    return row


def too_large(arm: str, way: str, work: Work, device: torch.device) -> bool:
    """Whether it is not worth a try: by a tenth, for what is expected is an estimate."""
    if device.type != "cuda":
        return False
    spec = dataclasses.replace(work.spec, recompute=way)
    return expected_memory(arm, dataclasses.replace(work, spec=spec)) > 1.1 * torch.cuda.mem_get_info(device)[1]


def out_of_memory(error: BaseException | None) -> bool:
    """Also where the capture that it broke off raised an error of its own."""
    return error is not None and (isinstance(error, torch.cuda.OutOfMemoryError) or out_of_memory(error.__context__))


def measure(arm: str, work: Work, options: argparse.Namespace, device: torch.device) -> dict:
    """One arm; ours with the first way to recompute that fits in memory."""
    ways = [w for w in RECOMPUTE if options.recompute in ("auto", w)] if arm in OURS else ["none"]
    cuda = device.type == "cuda"
    expected = flops(arm, work) / 400e12 * (4 / 3 if arm.endswith("recomputed") else 1)
    batch = work.batch
    while cuda and arm not in OURS and expected > LONG and batch > 1:
        batch, expected = batch // 2, expected / 2  # fewer windows say its rate as well
    work = dataclasses.replace(work, batch=batch)
    row: dict = {"experiment": work.name, "batch": batch, "context": work.spec.context, "arm": arm}
    if cuda and expected > 3 * LONG:
        return row | {"error": f"not run: about {expected:.0f} s a step"}
    for way in ways:
        if arm in OURS and way != ways[-1] and too_large(arm, way, work, device):
            said = "out of memory, by what it should take"
            continue
        free(device)
        try:
            spec = dataclasses.replace(work.spec, recompute=way)
            return row | attempt(arm, dataclasses.replace(work, spec=spec), options, device)
        except Exception as error:  # an arm that cannot run this is no reason to lose the others
            said = "out of memory" if out_of_memory(error) else (str(error).splitlines() or [repr(error)])[0][:160]
        if said != "out of memory":
            break
    return row | {"error": said}


def show(row: dict, rates: dict[str, float]) -> str:
    label = f"| {row['experiment']} | {row['batch']} x {row['context']:,} | {row['arm']} "
    if "error" in row:
        return f"{label}| {row['error']} | | | | | |"
    rate = row["bytes_per_second"]
    ratios = ", ".join(f"{rate / rates[r]:.2f}x {r}" for r in ("dense", "flex", "without") if r in rates)
    used = "" if row["utilisation"] is None else f"{row['utilisation']:.1%}"
    sizes = (row[key] / 2**30 for key in ("allocated", "reserved", "expected") if key in row)
    memory = ", ".join(f"{size:.1f}" for size in sizes)
    return (
        f"{label}| {row['ms']:.1f} | {rate / 1e3:,.1f}k | {used} | {memory} | {row['first_step_seconds']:.0f} "
        f"| {row['recompute']}{'; ' if ratios else ''}{ratios} |"
    )


HEADER = (
    "| experiment | batch | arm | ms a step | bytes/s | model FLOPs of peak | GiB allocated, reserved, expected "
    "| first step s | recompute; ratios |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def keep(rows: list[dict], options: argparse.Namespace) -> None:
    """Write what has been measured so far: a run that is broken off loses nothing."""
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.plot and any("error" not in row for row in rows):
        plot(rows, options.plot, options.context_sweep)


def compare(works: list[Work], options: argparse.Namespace, device: torch.device) -> list[dict]:
    rows = []
    if options.check:
        for work in {w.name: w for w in works}.values():
            print(verify(work, options, device), flush=True)
    print(HEADER)
    for work in works:
        rates: dict[str, float] = {}
        for arm in sorted(options.arms, key=lambda a: a in OURS):  # rivals first, so that ours has ratios
            row = measure(arm, work, options, device)
            print(show(row, rates if arm in OURS else {}), flush=True)
            if "profile" in row:
                print(table(row["profile"]), flush=True)
            if "error" not in row:
                rates[arm] = row["bytes_per_second"]
            rows.append(row)
            keep(rows, options)
    free(device)
    return rows


def verify(work: Work, options: argparse.Namespace, device: torch.device) -> str:
    """Losses of ours over some steps of training against those of the plain model in float32 with `blocked` attention.

    A shorter model, batch 2 and at most 16,384 bytes of sound or text: the plain one would not fit otherwise.
    """
    free(device)
    context = work.spec.context if work.spec.kind == "image" else min(work.spec.context, 1 << 14)
    spec = dataclasses.replace(work.spec, layers=min(4, work.spec.layers), context=context, recompute="none")
    small = dataclasses.replace(work, spec=spec, batch=2)
    plain = dataclasses.replace(spec, attention=dataclasses.replace(spec.attention, backend="blocked"))
    exact = ours(dataclasses.replace(small, spec=plain), device, torch.float32, False, "plain")
    arms = {}
    for arm in (a for a in options.arms if a in OURS):
        try:
            arms[arm] = ARMS[arm](small, device, options.dtype)
        except NotImplementedError as error:
            print(f"{arm}: {error}")
    worst = dict.fromkeys(arms, 0.0)
    last = 0.0
    tokens = small.tokens(device) // 8  # something to learn
    for _ in range(options.check):
        want = last = float(exact(tokens))
        for arm, trained in arms.items():
            worst[arm] = max(worst[arm], abs(float(trained(tokens)) - want) / want)
    limit = 1e-4 if options.dtype == torch.float32 else 0.02
    said = ", ".join(f"{a} {'ok' if e <= limit else 'WRONG'} {e:.1e}" for a, e in worst.items())
    return f"{work.name}: {options.check} losses of {spec.layers} layers against float32, to {last:.3f} nats: {said}"


def cold(names: list[str], options: argparse.Namespace) -> None:
    """Seconds from the start of a process to the end of its first step, caches of compiled kernels empty, then full."""
    print("\n| experiment | first step done after s, nothing compiled | again, with the caches of the first |")
    print("| --- | --- | --- |")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            said = []
            for _ in range(2):
                environment = {
                    **os.environ,
                    "TRITON_CACHE_DIR": f"{folder}/triton",
                    "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                    SPAWNED: str(time.time()),
                }
                command = [sys.executable, __file__, "--experiments", name, "--only-first"]
                command += ["--tiny"] * options.tiny + ["--device", options.device, "--recompute", options.recompute]
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                failed = (done.stderr.strip().splitlines() or ["failed"])[-1][:100]
                said.append(failed if done.returncode else done.stdout.strip().splitlines()[-1])
        print(f"| {name} | {said[0]} | {said[1]} |", flush=True)


def only_first(work: Work, options: argparse.Namespace, device: torch.device) -> None:
    way = RECOMPUTE[0] if options.recompute == "auto" else options.recompute
    work = dataclasses.replace(work, spec=dataclasses.replace(work.spec, recompute=way))
    trained = ARMS["ours"](work, device, options.dtype)
    trained(work.tokens(device))
    wait(device)
    print(f"{time.time() - float(os.environ[SPAWNED]):.1f}")


def sweep_works(options: argparse.Namespace) -> list[Work]:
    """The 152M model at each context, as many windows as make `SWEEP_TOKENS` bytes a step."""
    works = []
    for context, stride in SWEEP:
        sizes = (f"data.context={context}", f"data.stride={stride}")
        spec, optimizer = compose(("experiment=audio_1m", "model=imagenet64_152m", *sizes), False)
        if options.tiny:
            small = {"layers": 2, "width": 32, "heads": 2, "qk": 32, "ff": 64, "context": context >> 6}
            spec = dataclasses.replace(spec, **small)
        tokens = SWEEP_TOKENS >> (10 if options.tiny else 0)
        works.append(Work(f"{context // 1024}k", spec, optimizer, max(1, tokens // spec.context)))
    return works


def plot(rows: list[dict], path: Path, sweep: bool) -> None:
    """Bytes per second by context for a sweep, else by experiment, a bar an arm. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if "error" not in r]
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    if sweep:
        for arm in arms:
            of = [r for r in rows if r["arm"] == arm]
            axes.plot([r["context"] for r in of], [r["bytes_per_second"] / 1e3 for r in of], marker="o", label=arm)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context, bytes")
    else:
        names = list(dict.fromkeys((r["experiment"], r["batch"]) for r in rows))
        width = 0.8 / len(arms)
        for i, arm in enumerate(arms):
            of = {(r["experiment"], r["batch"]): r["bytes_per_second"] / 1e3 for r in rows if r["arm"] == arm}
            places = [k + (i - (len(arms) - 1) / 2) * width for k, n in enumerate(names) if n in of]
            axes.bar(places, [of[n] for n in names if n in of], width, label=arm)
        axes.set_xticks(range(len(names)), [f"{name}\nbatch {batch}" for name, batch in names])
    axes.set_ylabel("thousand bytes a second")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", default="", help="comma-separated beginnings of names; all if empty")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"comma-separated of: {', '.join(ARMS)}")
    parser.add_argument("--batch", default="", help="comma-separated windows a step; each experiment's own if empty")
    parser.add_argument("--steps", type=int, default=12, help="timed, after two")
    parser.add_argument("--recompute", default="auto", choices=["auto", *RECOMPUTE], help="auto: the first that fits")
    parser.add_argument("--set", default="", help="comma-separated overrides, such as attention.combine=merged")
    parser.add_argument("--check", type=int, default=8, help="steps compared with float32; 0: none")
    parser.add_argument("--profile", action="store_true", help="a table of where the time of each arm goes")
    parser.add_argument("--context-sweep", action="store_true", help="the 152M model from 4,096 to 1,048,576 bytes")
    parser.add_argument("--cold", action="store_true", help="also the seconds to the first step of a new process")
    parser.add_argument("--only-first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="the models of debug=fast: proves that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--plot", type=Path, help="draw bytes per second here")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu" and not options.tiny:
        sys.exit("the experiments need a GPU: --tiny runs the same code on a CPU")
    options.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options.arms = [a.strip() for a in options.arms.split(",") if a.strip()]
    if unknown := [a for a in options.arms if a not in ARMS]:
        sys.exit(f"--arms {unknown[0]}: use {', '.join(ARMS)}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    if options.tiny:
        options.steps, options.check = 3, 4
    names = [n for n in WORKLOADS if any(n.startswith(w) for w in options.experiments.split(","))]
    if options.context_sweep:
        works = sweep_works(options)
    else:
        works = []
        for name in names:
            overrides, own = WORKLOADS[name]
            more = tuple(o for o in options.set.split(",") if o)
            spec, optimizer = compose((*overrides, *more), options.tiny)
            batches = [int(b) for b in options.batch.split(",") if b] or ([2] if options.tiny else own)
            works += [Work(name, spec, optimizer, b) for b in batches]
    if options.only_first:
        return only_first(works[0], options, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, no number counts"
    print(f"{name}, torch {torch.__version__}, {options.dtype}".replace("torch.", ""))
    for work in {w.name: w for w in works}.values():
        parameters = cost_of(work.spec).parameters
        print(f"{work.name}: {parameters / 1e6:.2f}M parameters, dropout {work.spec.dropout}")
    compare(works, options, device)
    if options.cold:
        cold(names, options)


if __name__ == "__main__":
    main()
