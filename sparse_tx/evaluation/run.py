"""Scoring a checkpoint on a split: `evaluate`."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from sparse_tx.attention import backend_for
from sparse_tx.checkpoint import Checkpoint, read_checkpoint
from sparse_tx.config import EvaluateConfig
from sparse_tx.data import DataModule, DataSpec, EvaluationWindows, Prepared
from sparse_tx.errors import UserError
from sparse_tx.evaluation.bits import ByContext, Score
from sparse_tx.evaluation.counts import order_k_bits
from sparse_tx.evaluation.flac import flac_bits
from sparse_tx.evaluation.paper import compares, paper_bits
from sparse_tx.model import ModelSpec
from sparse_tx.model.fused import fuses
from sparse_tx.model.loss import position_nats

ORDERS = (0, 1, 2)
AT_ONCE = 1 << 16  # bytes that a GPU is given at a time at least: 24,576 of a model of 51M wait for the host's launches
COUNTED_AT_MOST = 1 << 28  # training bytes that count models are fitted on: longer sets take minutes


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a checkpoint on a split. Returns its numbers and what they were taken with."""
    checkpoint = read_checkpoint(config.checkpoint)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, checkpoint, device)
    data = checkpoint.config["data"]
    spec = data_spec(checkpoint, root=config.data.root, source=config.data.source, synthetic=config.debug == "fast")
    min_context = config.evaluation.min_context
    if min_context is None:
        min_context = checkpoint.config["evaluation"]["min_context"]
    limit = 2 if config.debug == "fast" else config.limit if config.limit is not None else data["limit"]
    given = config.batch_size or checkpoint.config["evaluation"]["batch_size"]
    datamodule = DataModule(
        spec,
        batch_size=windows_at_once(given, data["batch_size"], spec.context, device),
        seed=0,
        max_steps=1,
        workers=0,
        min_context=min_context,
        eval_limit=limit,
    )
    datamodule.prepare_data()
    windows = datamodule.evaluation_windows(config.split)
    model = checkpoint.model(config.weights, device)
    trained = checkpoint.config["trainer"]
    if fuses(trained.get("fused", "auto"), device):
        # As in training, so that the score of its end is found again; and of fewer trips to memory.
        narrow = trained.get("residual") == "bfloat16" and precision == "bf16-mixed"
        model.fuse_blocks(torch.bfloat16 if narrow else None)
    score, by_context, started = Score(), ByContext(), time.perf_counter()
    with torch.inference_mode(), _autocast(device, precision):
        for batch_of in datamodule.evaluation_loader(config.split):
            tokens, first = batch_of["tokens"].to(device), batch_of["first_scored"].to(device)
            nats = position_nats(model.hidden(tokens), model.norm, model.output, tokens)
            score.add_nats(nats, first)
            if spec.kind != "image":
                by_context.add_nats(nats, first)
    result = {
        "bits_per_dim": score.bits_per_dim,
        "nats": float(score.nats),
        "count": int(score.count),
        "split": config.split,
        "weights": config.weights,
        "data": data["name"],
        "data_version": datamodule.prepared.meta.get("version"),
        "context": spec.context,
        "min_context": min_context,
        "by_context": by_context.bits,
        "precision": precision,
        "backend": backends(checkpoint.spec, device, precision),
        "step": checkpoint.step,
        "seconds": time.perf_counter() - started,
    }
    for line in _report(result, datamodule.prepared, windows, checkpoint):
        print(line)
    return result


def windows_at_once(given: int | None, trained: int, context: int, device: torch.device) -> int:
    """Windows in an evaluation batch of one device: as given, else as in training, on a GPU AT_ONCE bytes at least."""
    if given is not None:
        return given
    return max(trained, AT_ONCE // context) if device.type == "cuda" else trained


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:1" as a device that is there. A GPU that is named becomes the current one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"device={name} is not known: use auto, cpu, cuda, or a number with it such as cuda:1"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: {torch.cuda.device_count()} GPUs are visible; use device=cpu or auto")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton launches, and graphs are captured
    return device


def data_spec(checkpoint: Checkpoint, *, root: str | None, source: str | None, synthetic: bool) -> DataSpec:
    """The data of a checkpoint, with another root or source if given."""
    fields = {f.name for f in dataclasses.fields(DataSpec)}
    kept = {k: v for k, v in checkpoint.config["data"].items() if k in fields}
    given = {k: v for k, v in (("root", root), ("source", source)) if v is not None}
    return DataSpec(**{**kept, **given, "synthetic": synthetic or kept["synthetic"]})


def unit_of(kind: str) -> str:
    return "bits/dim" if kind == "image" else "bits/byte"


def backends(spec: ModelSpec, device: torch.device, precision: str) -> str:
    """Which backends the layers run on."""
    if spec.attention.backend != "auto":
        return spec.attention.backend
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)
    q, v = (torch.empty(1, 1, spec.heads, w // spec.heads, dtype=dtype, device=device) for w in (spec.qk, spec.width))
    return "/".join(sorted({backend_for(q, q, v, layer) for layer in dict.fromkeys(spec.patterns())}))


def count_models(prepared: Prepared, windows: EvaluationWindows, split: str) -> dict[int, float]:
    """Bits per byte of order-k count models on the very bytes that the windows score; empty where they do not apply."""
    train = prepared.split("train")
    if prepared.spec.kind == "image" or len(train) > COUNTED_AT_MOST:
        return {}
    scored = _scored(prepared, windows, split)
    return {k: order_k_bits(train, scored, k) for k in ORDERS}


def _scored(prepared: Prepared, windows: EvaluationWindows, split: str) -> np.ndarray:
    held_out = prepared.split(split)
    return np.concatenate([held_out[w.start + w.first_scored : w.start + w.length] for w in windows])


def _report(
    result: dict[str, Any], prepared: Prepared, windows: EvaluationWindows, checkpoint: Checkpoint
) -> list[str]:
    unit = unit_of(prepared.spec.kind)
    lines = [
        f"data: {prepared.title}, {result['split']} split",
        f"scored: {result['count']} bytes in {len(windows)} windows, {result['seconds']:.1f} s",
        f"context: {result['context']}, at least {result['min_context']} bytes before a scored one",
        f"weights: {result['weights']} at step {result['step']}, {result['precision']}, backend {result['backend']}",
    ]
    if checkpoint.trained_on not in (None, prepared.title):
        lines.append(f"trained on: {checkpoint.trained_on}")
    lines += reference_lines(prepared, windows, result["split"], checkpoint.config)
    if result["by_context"]:
        known = ", ".join(f"{first}+ {bits:.3f}" for first, bits in result["by_context"].items())
        lines.append(f"{unit} by how many bytes of the window come before: {known}")
    lines += [f"nats: {result['nats']:.2f}", f"{unit}: {result['bits_per_dim']:.4f}"]
    return lines


def reference_lines(prepared: Prepared, windows: EvaluationWindows, split: str, config: dict[str, Any]) -> list[str]:
    """What stands beside our number: count models on the same bytes, the paper's result. config: of the training."""
    lines = []
    counts = count_models(prepared, windows, split)
    if counts:
        numbers = ", ".join(f"order {k} {bits:.2f}" for k, bits in counts.items())
        lines.append(f"count models on the same bytes: {numbers} {unit_of(prepared.spec.kind)}")
    if prepared.spec.kind == "audio":
        bits = flac_bits(_scored(prepared, windows, split))
        lines.append(f"FLAC on the same bytes: {bits:.2f} {unit_of('audio')}")
    mirrored = ", without mirrored images" if config["data"].get("mirror") else ""
    paper = paper_bits(prepared.spec.name, config["attention"]["name"])
    if paper is not None and not prepared.spec.synthetic:
        unit = unit_of(prepared.spec.kind)
        lines.append(f"paper (Child et al. 2019): {paper:.2f} {unit} after full training{compares(prepared)}{mirrored}")
    return lines


def choose_precision(precision: str, checkpoint: Checkpoint, device: torch.device) -> str:
    """ "auto" as training had it, as far as the device can."""
    if precision == "16-mixed" and device.type != "cuda":
        raise UserError("precision=16-mixed needs a GPU: use 32 or bf16-mixed, or leave it out")
    if precision == "auto":
        precision = checkpoint.config["trainer"]["precision"]
    if precision == "auto":
        precision = "bf16-mixed" if device.type == "cuda" else "32"
    if precision == "16-mixed" and device.type != "cuda":
        precision = "32"
    return precision


def _autocast(device: torch.device, precision: str):
    if precision == "32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16-mixed" else torch.float16)
