"""What a run says of itself: before it starts, in a dry run, and at its end."""

from __future__ import annotations

import os
from typing import Any

import torch

from sparse_tx.attention import Pattern
from sparse_tx.config import TrainConfig
from sparse_tx.data import DataModule
from sparse_tx.evaluation.run import backends, reference_lines, unit_of
from sparse_tx.model import ModelSpec
from sparse_tx.model.cost import Cost
from sparse_tx.shell import spelled
from sparse_tx.training.folders import override
from sparse_tx.training.memory import Memory
from sparse_tx.training.peak import device_peak, peak_flops
from sparse_tx.training.progress import Progress
from sparse_tx.training.words import clock, gibibytes, readable

UTILISATION = 0.2  # assumed where nothing has been measured


def say(text: str) -> None:
    """A line, once for all the processes of a run."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, flush=True)


def describe(
    config: TrainConfig,
    spec: ModelSpec,
    cost: Cost,
    memory: dict[str, Memory],
    device: torch.device,
    precision: str,
    place: str,
) -> None:
    """What will be trained, on what, by which backend, and what a step takes."""
    model, data, trainer, optimizer = config.model, config.data, config.trainer, config.optimizer
    say(f"parameters: {cost.parameters / 1e6:.2f}M")
    say(
        f"model: {model.name}: {model.layers} layers, width {model.width}, {model.heads} heads, qk {model.qk}, "
        f"ff {model.ff}, dropout {model.dropout}"
    )
    twin = " (synthetic twin)" if data.synthetic else ""
    say(
        f"data: {data.name}{twin}, context {data.context}, {data.batch_size} windows of it a step "
        f"({readable(data.batch_size * data.context)} bytes)"
    )
    for line in _patterns(config.attention.name, config.attention.combine, spec.patterns()):
        say(line)
    say(
        f"training: {trainer.max_steps} steps of {optimizer.name}, lr {optimizer.lr:g}"
        + ("" if trainer.max_time is None else f", {trainer.max_time} at most")
    )
    say(f"FLOPs: {readable(batch_flops(config, cost))} a step")
    taken = memory[spec.recompute]
    say(
        f"memory: {gibibytes(taken.total)} expected on {place} (weights, gradients, optimizer, EMA "
        f"{gibibytes(taken.state)}; activations {gibibytes(taken.kept)}; one block's backward pass "
        f"{gibibytes(taken.working)})"
    )
    others = ", ".join(f"{again} {gibibytes(m.total)}" for again, m in memory.items())
    say(f"recompute: {spec.recompute}{' (auto)' if model.recompute == 'auto' else ''}; of {others}")
    on = device.type
    if device.type == "cuda":
        on += f" ({torch.cuda.get_device_name(device)})"
        if device_peak(device, half=precision != "32-true") is None:
            on += ", whose peak FLOP/s is not known: no utilisation is shown"
    say(f"backend: {backends(spec, device, precision)} on {on}, {precision}")


def batch_a_device(config: TrainConfig) -> int:
    """Windows a step on one device."""
    devices = config.trainer.devices
    return -(-config.data.batch_size // (int(devices) if devices.isdigit() else max(1, torch.cuda.device_count())))


def batch_flops(config: TrainConfig, cost: Cost) -> int:
    """Of a step, over all devices."""
    return config.data.batch_size * cost.flops


def _patterns(name: str, combine: str, layers: list[tuple[Pattern, ...]]) -> list[str]:
    """A line for each kind of layer, with the layers (from 1) that are of it."""
    kinds: dict[tuple[Pattern, ...], list[int]] = {}
    for number, heads in enumerate(layers, 1):
        kinds.setdefault(tuple(dict.fromkeys(heads)), []).append(number)
    lines = []
    for heads, numbers in kinds.items():
        what = str(heads[0]) if len(heads) == 1 else f"{len(heads)} kinds of heads, {heads[0]} to {heads[-1]}"
        lines.append(f"attention: {name} {combine}: layers {_numbers(numbers)} of {len(layers)}: {what}")
    return lines


def _numbers(numbers: list[int]) -> str:
    """[1, 5, 9, 13] -> "1, 5, ..., 13"; [1, 2, 3] -> "1 to 3"."""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    if len(numbers) > 6:
        return f"{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]} ({len(numbers)})"
    return ", ".join(map(str, numbers))


def expect(config: TrainConfig, cost: Cost, memory: Memory) -> dict[str, Any]:
    """What a dry run reports beyond `describe`: nothing is loaded, trained or written."""
    steps, step_flops = config.trainer.max_steps, batch_flops(config, cost)
    peak = peak_flops("NVIDIA H200", half=True)
    assert peak is not None
    seconds = step_flops * steps / (peak * UTILISATION)
    say(f"keys a query: {cost.pairs:.1f} of {config.data.context} (mean over layers and heads)")
    say(f"in all: {readable(step_flops * steps)} FLOPs, {readable(steps * _bytes(config))} bytes")
    say(f"time: {clock(seconds)} on one H200 at {UTILISATION:.0%} of its bf16 peak (assumed, not measured)")
    return {
        "parameters": cost.parameters,
        "flops_per_step": step_flops,
        "memory_bytes": memory.total,
        "seconds": seconds,
        "context": config.data.context,
        "attention": config.attention.name,
    }


def _bytes(config: TrainConfig) -> int:
    return config.data.batch_size * config.data.context


def conclude(config: TrainConfig, datamodule: DataModule, metrics: dict[str, Any], progress: Progress) -> None:
    """The numbers that a run ends with, and the commands that go on from it."""
    unit = unit_of(config.data.kind)
    windows = datamodule.evaluation_windows("validation")
    rate = progress.bytes_per_second
    used = progress.utilisation(rate)
    now = "" if progress.steps == metrics["steps"] else f", {progress.steps} of them now,"
    print(
        f"trained: {metrics['steps']} steps{now} in {clock(progress.seconds)}, {readable(rate)} bytes/s"
        + ("" if used is None else f", {used:.1%} of peak")
    )
    if torch.cuda.is_available():
        print(f"memory: {gibibytes(torch.cuda.max_memory_allocated())} at most")
    print(f"validation: {windows.scored} bytes in {len(windows)} windows, ema weights, step {metrics['best_step']}")
    for line in reference_lines(datamodule.prepared, windows, "validation", config.plain()):
        print(line)
    print(f"{unit}: {metrics['val/bits_per_dim']:.4f}")
    print(f"checkpoint: {metrics['checkpoint']}")
    print(f"evaluate: {spelled('evaluate')} {override('checkpoint', metrics['checkpoint'])} split=test")
    print(f"sample: {spelled('sample')} {override('checkpoint', metrics['checkpoint'])} count=4", flush=True)
