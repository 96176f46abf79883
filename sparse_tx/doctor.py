"""`sparse-tx doctor`: what is installed, which backend would run, whether it computes what it should."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement

from sparse_tx import __version__
from sparse_tx.attention import Pattern, backend_for, sparse_attention
from sparse_tx.attention.heads import KINDS, layer_patterns
from sparse_tx.config import config_folder
from sparse_tx.errors import UserError

NEEDED = ("torch", "triton", "lightning", "hydra-core", "numpy", "safetensors")
NOT_FOR_USE = ("dev", "docs")  # extras for work on the project itself
ROOM = 2 << 30  # bytes that a first run takes at most: CIFAR-10 with its download, some checkpoints


Patterns = tuple[Pattern, ...]  # one a head


@dataclass(frozen=True)
class Finding:
    """One line. `problem` findings say what to do about it, and make the exit code 1."""

    mark: str  # "info", "ok", "note" or "problem"
    text: str


def doctor(arguments: list[str]) -> int:
    """Prints the findings as they are made. Returns the exit code: 1 if anything stands in the way of training."""
    if arguments:
        print(f"error: doctor takes no arguments, not {' '.join(arguments)}", file=sys.stderr)
        return 2
    problems = 0
    for finding in findings():
        problems += finding.mark == "problem"
        label = "" if finding.mark == "info" else finding.mark
        print(f"{label:7}  {finding.text}", flush=True)
    print(f"{'':7}  {problems or 'no'} problem{'' if problems == 1 else 's'} found")
    return 1 if problems else 0


def findings() -> Iterator[Finding]:
    yield from _versions()
    yield from _gpus()
    yield from _folders()
    try:
        yield Finding("ok", f"configs: {config_folder()}")
    except UserError as error:
        yield Finding("problem", f"{error}: install sparse-tx again")
    yield from _self_test()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("info", f"sparse-tx {__version__}, Python {platform.python_version()}, {system}")
    found = {package: _version(package) for package in NEEDED}
    yield Finding("info", ", ".join(f"{p} {v or 'not installed'}" for p, v in found.items()))
    optional = _optional()
    have = ", ".join(f"{p} {v}" for p, _, v in optional if v) or "none"
    missing = ",".join(dict.fromkeys(extra for _, extra, v in optional if not v))
    yield Finding("info", f"optional: {have}" + (f"; more: pip install 'sparse-tx[{missing}]'" if missing else ""))


def _optional() -> list[tuple[str, str, str | None]]:
    """Package, extra that brings it, installed version or None, as this project's own metadata say."""
    try:
        requirements = map(Requirement, importlib.metadata.requires("sparse-tx") or ())
    except importlib.metadata.PackageNotFoundError:
        return []
    extras = {r.name: found[1] for r in requirements if (found := re.search(r'extra == "(\w+)"', str(r.marker)))}
    return [
        (package, extra, _version(package))
        for package, extra in extras.items()
        if extra not in NOT_FOR_USE and package != "sparse-tx"
    ]


def _gpus() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        memory = f"{of.total_memory / 2**30:.0f} GiB"
        yield Finding("ok", f"GPU {index}: {of.name}, {memory}, compute capability {of.major}.{of.minor}")
    if torch.cuda.is_available():
        if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name):
            yield Finding("problem", "no C compiler: Triton builds its launchers with one; install gcc")
    elif Path("/dev/nvidiactl").exists():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        yield Finding(
            "problem",
            f"there is an NVIDIA GPU, but torch (built for {built}) cannot use it: install a torch for this driver's "
            "CUDA version, or a newer driver",
        )
    else:
        yield Finding("note", "no GPU: models train and sample on the CPU, in plain torch")
    device, dtype = _device_and_dtype()
    chosen = {kind: _backend(_inputs(kind, 64, device, dtype), _patterns(kind)) for kind in KINDS}
    text = ", ".join(f"{kind} {backend}" for kind, backend in chosen.items())
    slow = device.type == "cuda" and set(chosen.values()) - {"triton", "sdpa"}
    why = "; the fused kernels need triton and compute capability 8.0 or newer" if slow else ""
    yield Finding("problem" if slow else "info", f"backend on {device.type}, {str(dtype)[6:]}: {text}{why}")


def _folders() -> Iterator[Finding]:
    for what, name in (("runs", "outputs"), ("data", os.environ.get("SPARSE_TX_DATA", "data"))):
        folder = Path(name).expanduser().absolute()
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(there).free
        text = f"{what}: {folder}, {free / 2**30:.1f} GiB free"
        if not os.access(there, os.W_OK) or not there.is_dir():
            yield Finding("problem", f"{text}, cannot be written: start in another folder, or set {_elsewhere(what)}")
        elif free < ROOM:
            yield Finding("problem", f"{text}: make room for {ROOM >> 30} GiB, or set {_elsewhere(what)}")
        else:
            yield Finding("ok", text)


def _elsewhere(what: str) -> str:
    return "output=FOLDER" if what == "runs" else "data.root=FOLDER"


def _device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """Those of trainer=auto."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def _patterns(kind: str) -> Patterns:
    """Of two merged heads, small: a stride that divides no length tried here."""
    (layer,) = layer_patterns(kind, layers=1, heads=2, stride=24, c=6, reach=3, global_tokens=4)
    return layer


def _backend(inputs: list[torch.Tensor], patterns: Patterns) -> str:
    q, k, v, _ = inputs
    return backend_for(q, k, v, patterns)


def _inputs(kind: str, n: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    q, k, v, dout = (torch.randn(1, n, 2, 32, generator=generator) for _ in range(4))
    return [t.to(device, dtype) for t in (q, k, v, dout)]


def _self_test() -> Iterator[Finding]:
    """Outputs and gradients of every kind of attention against the float64 oracle, in the dtype that training uses."""
    device, dtype = _device_and_dtype()
    for kind in KINDS:
        inputs, patterns = _inputs(kind, 200, device, dtype), _patterns(kind)
        backend = _backend(inputs, patterns)
        what = f"self-test: {kind} attention on {backend}, forward and backward"
        try:
            got = _results(inputs, patterns, backend)
        except Exception as failed:  # whatever a broken driver, compiler or kernel raises is the finding
            reason = (str(failed).strip().splitlines() or [""])[0]
            yield Finding("problem", f"{what}: {type(failed).__name__}: {reason}")
            continue
        rounded = _results(inputs, patterns, "oracle")
        exact = _results([t.double() for t in inputs], patterns, "oracle")
        # What rounding the dense reference itself loses bounds what a sound backend may lose.
        error, allowed = _worst(got, exact), 2 * _worst(rounded, exact) + 1e-5
        if error <= allowed:
            yield Finding("ok", f"{what}: off by {error:.1e}")
        else:
            yield Finding(
                "problem", f"{what}: off by {error:.1e}, more than {allowed:.1e}: use attention.backend=blocked"
            )


def _results(inputs: list[torch.Tensor], patterns: Patterns, backend: str) -> list[torch.Tensor]:
    q, k, v = (t.detach().clone().requires_grad_() for t in inputs[:3])
    out = sparse_attention(q, k, v, patterns, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def _worst(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    worst = max(float((g.double() - e).abs().max()) for g, e in zip(got, exact, strict=True))
    return worst if all(bool(g.isfinite().all()) for g in got) else float("inf")
