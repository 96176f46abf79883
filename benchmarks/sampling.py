"""Milliseconds a byte of sampling against a compiled decoder with a static key-value cache.

    python benchmarks/sampling.py                                     # all workloads: minutes, mostly compiling
    python benchmarks/sampling.py --workloads cifar10 --batches 1,16 --arms plain,fused
    python benchmarks/sampling.py --tiny                              # in seconds on a CPU: that it runs, no numbers

Ours is what `sample.py` runs: the cache of the patterns, a step as one CUDA graph. Its arms: "fused", our Triton
kernels, which sampling takes by itself; "plain", torch alone. The rival is what a careful user writes: the same weights
with dense attention over a static cache of all positions, each layer compiled, the whole step one CUDA graph, sampling
on the device. All draw in bf16 and never wait for the device. Steps are timed at positions spread over the context.
Before anything is timed, ours is compared with the forward pass, the rival with a dense one. Floor: weights, and the
keys that the patterns read, once a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_tx.config import config_folder, training
from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.model.decoder import Decoder, LayerWeights, cache_bytes, layer, split_heads
from sparse_tx.model.transformer import count_parameters
from sparse_tx.sampling.sampler import Sampler

BYTES_PER_SECOND = 4.27e12  # device-to-device copy, H200
MEMORY = 0.7  # of the free memory, for the cache of the largest batch
RATE = 12_000  # samples of a second of audio
WORKLOADS = {
    "cifar10 interleaved": ("experiment=cifar10_strided",),
    "cifar10 merged": ("experiment=cifar10_strided", "attention.combine=merged"),
    "enwik8 fixed": ("experiment=enwik8_fixed",),
    "imagenet64 interleaved": ("experiment=imagenet64_strided",),
    "audio 65k": ("experiment=audio_65k",),
}
TINY = ("debug=fast", "model.layers=4")
ARMS = ("rival", "plain", "fused")
Step = Callable[[int, int], None]  # draws positions start to end - 1


def specs(names: list[str], tiny: bool) -> dict[str, ModelSpec]:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        composed = {n: hydra.compose("train", [*WORKLOADS[n], *(TINY if tiny else ())]) for n in names}
    return {n: training(cfg).model_spec() for n, cfg in composed.items()}


def make_model(spec: ModelSpec, device: torch.device) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(spec)
    torch.nn.init.normal_(model.output.weight, std=0.1)  # else every logit is 0
    return model.to(device).eval()


class Dense:
    """The rival: dense attention over a static cache of all positions, in batches of one size."""

    def __init__(self, model: Transformer, batch: int, dtype: torch.dtype, compile: bool) -> None:
        spec, self.device = model.spec, model.output.weight.device
        self.model, self.spec, self.dtype = model, spec, dtype
        self.weights = [LayerWeights.of(block, dtype) for block in model.blocks]
        self.norm, self.output = model.norm, model.output.weight.detach().to(dtype)
        sizes = [(batch, spec.heads, spec.context, w // spec.heads) for w in (spec.qk, spec.width)]
        self.cache = [[torch.zeros(s, dtype=dtype, device=self.device) for s in sizes] for _ in self.weights]
        self.tokens = torch.zeros(batch, spec.context, dtype=torch.uint8, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.at = torch.arange(spec.context, device=self.device)
        self.layer = torch.compile(_dense_layer, dynamic=False, fullgraph=True) if compile else _dense_layer
        self._graph: torch.cuda.CUDAGraph | None = None

    def logits(self, previous: Tensor) -> Tensor:
        mask = (self.at <= self.position)[None, None, None]
        h = self.model.embedding.at(previous, self.position)
        for w, (k, v) in zip(self.weights, self.cache, strict=True):
            h = self.layer(h, w, k, v, self.position, mask, self.spec.heads, self.spec.qk)
        return torch.nn.functional.linear(self.norm(h).to(self.dtype), self.output).float()

    def step(self) -> None:
        previous = self.tokens.index_select(1, (self.position - 1).clamp(min=0))[:, 0]
        probabilities = self.logits(previous).softmax(-1)
        # The largest of p / exponential falls on a byte with its probability: no wait, as torch.multinomial has.
        drawn = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)
        self.tokens.index_copy_(1, self.position, drawn.to(torch.uint8))
        self.position += 1

    def advance(self, start: int, end: int) -> None:
        self.position.fill_(start)
        if self.device.type == "cuda" and self._graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.step()
            self.position.fill_(start)
        for _ in range(start, end):
            if self._graph is not None:
                self._graph.replay()
            else:
                self.step()


def _dense_layer(
    h: Tensor, w: LayerWeights, k: Tensor, v: Tensor, position: Tensor, mask: Tensor, heads: int, qk: int
) -> Tensor:
    def attend(qkv: Tensor) -> Tensor:
        query, key, value = split_heads(qkv, heads, qk)
        k.index_copy_(2, position, key[:, :, None])
        v.index_copy_(2, position, value[:, :, None])
        return scaled_dot_product_attention(query[:, :, None], k, v, attn_mask=mask).flatten(1)

    return layer(h, w, attend, position)


def make_arm(arm: str, model: Transformer, batch: int, dtype: torch.dtype, overlap: bool) -> Step:
    if arm == "rival":
        return Dense(model, batch, dtype, compile=model.output.weight.is_cuda).advance
    sampler = Sampler(model, model.spec.context, batch, dtype=dtype, fused=arm == "fused")
    kernels = sampler.decoder.kernels
    if kernels is not None:
        kernels.dependent &= overlap
    numbers = torch.arange(sampler.batch, device=sampler.device)
    return lambda start, end: sampler.advance(start, end, numbers)


def milliseconds(step: Step, context: int, device: torch.device, steps: int, places: int) -> float:
    """Of one byte: the mean over places spread evenly, each the median of three runs of `steps` bytes."""

    def run(start: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(start, start + steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps * 1e3

    starts = [(context - steps) * place // max(1, places - 1) for place in range(places)]
    run(starts[0])  # compiles, captures
    return statistics.mean(statistics.median(run(start) for _ in range(3)) for start in starts)


def floor(spec: ModelSpec, batch: int, dtype: torch.dtype, parameters: int) -> float:
    """ms a byte at the memory's rate: weights once, and of each sample the keys that its patterns see, on average."""
    n = spec.context
    counts = {p: p.count(n) / n for heads in spec.patterns() for p in dict.fromkeys(heads)}
    keys = sum(counts[p] for heads in spec.patterns() for p in heads)
    moved = parameters + batch * keys * (spec.qk + spec.width) / spec.heads
    return moved * dtype.itemsize / BYTES_PER_SECOND * 1e3


def verify(model: Transformer, dtype: torch.dtype, arms: list[str], most: int) -> str:
    """Error of cached logits over that of the forward pass in the same dtype, against float64: at most 2."""
    spec = dataclasses.replace(model.spec, layers=min(4, model.spec.layers))
    device = model.output.weight.device
    small = make_model(spec, device)
    dense = make_model(dataclasses.replace(spec, attention=AttentionSpec("full")), device)
    dense.embedding = small.embedding
    for theirs, own in zip(dense.blocks, small.blocks, strict=True):
        theirs.load_state_dict(own.state_dict())
    dense.output.load_state_dict(small.output.state_dict())
    tokens = torch.randint(256, (2, min(most, spec.context)), device=device)
    stepped = {}
    for arm in arms:
        if arm == "rival":
            plain = Dense(dense, 2, dtype, compile=False)
        else:
            decoder = Decoder(small, 2, dtype=dtype, fused=arm == "fused")
        logits = []
        for i in range(tokens.shape[1]):
            previous, at = tokens[:, max(i - 1, 0)], torch.tensor([i], device=device)
            if arm == "rival":
                plain.position.copy_(at)
                logits.append(plain.logits(previous))
            else:
                logits.append(decoder.step(previous, at, i))
        stepped[arm] = torch.stack(logits, 1)
    said = []
    for whole, own in ((dense, False), (small, True)):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            low = whole(tokens)
        exact = whole.double()(tokens)
        whole.float()
        allowed = 2 * float((low - exact).abs().max()) + 1e-5
        for arm, logits in stepped.items():
            if (arm != "rival") == own:
                error = float((logits - exact).abs().max())
                said.append(f"{arm} {'ok' if error <= allowed else 'WRONG'} {error / allowed * 2:.2f}")
    return ", ".join(said)


def largest_batch(sample_bytes: int, device: torch.device, tiny: bool) -> int:
    """The largest power of two whose caches fit."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 28
    fits = max(1, int(MEMORY * free) // sample_bytes)
    return min(1 << (fits.bit_length() - 1), 8 if tiny else 4096)


def measure(name: str, spec: ModelSpec, options: argparse.Namespace, device: torch.device) -> list[dict]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    arms = [arm for arm in ARMS if arm in options.arms and (device.type == "cuda" or arm in ("rival", "plain"))]
    model = make_model(spec, device)
    parameters = count_parameters(model) - count_parameters(model.embedding)  # of which a step reads a few rows
    checked = verify(model, dtype, arms, options.check)
    kept = cache_bytes(spec, spec.context, dtype)
    dense = spec.layers * spec.context * (spec.qk + spec.width) * dtype.itemsize
    print(f"\n{name}: {checked}; a sample's keys and values {kept / 2**20:.1f} MiB, {kept / dense:.1%} of the rival's")
    print("| batch | arm | ms a byte | floor (share) | bytes/s | a second | over the rival |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for batch in options.batches:
        rates: dict[str, float] = {}
        for arm in arms:
            shown = arm if arm == "rival" else f"ours, {arm}"
            most = largest_batch(dense if arm == "rival" else kept, device, options.tiny)
            B, step = most if batch == "best" else int(batch), None
            try:
                step = make_arm(arm, model, B, dtype, options.overlap)
                ms = milliseconds(step, spec.context, device, options.steps, options.places)
            except torch.cuda.OutOfMemoryError:
                print(f"| {B} | {shown} | out of memory | | | | |", flush=True)
                continue
            finally:
                step = None
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            least = floor(spec, B, dtype, parameters)
            rates[arm] = rate = B * 1e3 / ms
            ratio = f"{rate / rates['rival']:.2f}x" if "rival" in rates else ""
            print(
                f"| {B} | {shown} | {ms:.3f} | {least:.4f} ({least / ms:.1%}) | {rate:,.0f} | {pace(spec, rate)} "
                f"| {ratio} |",
                flush=True,
            )
            rows.append({"workload": name, "batch": B, "arm": shown, "ms": ms, "floor": least, "check": checked})
    return rows


def pace(spec: ModelSpec, rate: float) -> str:
    if spec.kind == "audio":
        return f"{rate / RATE:.4f} s of sound"
    return f"{rate / spec.context:.3f} {'images' if spec.kind == 'image' else 'contexts'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="", help="comma-separated beginnings of names; all if empty")
    parser.add_argument("--batches", help="comma-separated; best: the largest power of two that fits in memory")
    parser.add_argument("--steps", type=int, default=64, help="bytes drawn in a run")
    parser.add_argument("--places", type=int, default=5, help="positions at which runs begin")
    parser.add_argument("--check", type=int, default=300, help="positions compared with the forward pass")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated, of %(default)s")
    parser.add_argument(
        "--no-overlap", dest="overlap", action="store_false", help="let no fused kernel begin while the one before ends"
    )
    parser.add_argument("--tiny", action="store_true", help="the models of debug=fast: proves that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args()
    options.batches = (options.batches or ("1,3,best" if options.tiny else "1,16,128,best")).split(",")
    options.arms = options.arms.split(",")
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"--arms: {', '.join(sorted(unknown))} not known")
    if options.tiny:
        options.steps, options.places, options.check = 4, 2, 40
    device = torch.device(options.device)
    if device.type == "cpu" and not options.tiny:
        sys.exit("the workloads need a GPU: --tiny runs the same code on a CPU")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, no number counts"
    print(f"{name}, torch {torch.__version__}, {'bf16' if device.type == 'cuda' else 'float32'}")
    names = [n for n in WORKLOADS if any(n.startswith(w) for w in options.workloads.split(","))]
    rows = []
    with torch.inference_mode():
        for workload, spec in specs(names, options.tiny).items():
            rows += measure(workload, spec, options, device)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
