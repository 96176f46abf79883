"""The model card: what the model is, what it scored, what it draws, how to use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sparse_tx.data.spec import MIRRORED
from sparse_tx.evaluation.paper import paper_bits
from sparse_tx.evaluation.run import unit_of
from sparse_tx.model import ModelSpec
from sparse_tx.model.cost import cost_of

TASKS = {"image": "unconditional-image-generation", "text": "text-generation"}  # the hub's names; it has none for audio
SHOWN = 1200  # characters of a text sample


def model_card(described: dict[str, Any], samples: list[Path], folder: Path, name: str) -> str:
    """README.md in Markdown with the hub's front matter. described: what config.json holds; samples: inside folder, the
    picture of all images or of all sound before them."""
    spec, config = ModelSpec.of(described["model"]), described["config"]
    kind, data = spec.kind, config["data"]
    front = ["---", "library_name: sparse-tx"]
    if kind in TASKS:
        front.append(f"pipeline_tag: {TASKS[kind]}")
    front += ["tags:", "- sparse-transformer", f"- {kind}", "---", ""]
    parts = [
        *front,
        f"# {config['name']}",
        "",
        f"A Sparse Transformer ([Child et al. 2019](https://arxiv.org/abs/1904.10509)) on {kind} as raw bytes, trained "
        f"with sparse-tx {described['version']} on {_data(data)}, {described['step']:,} steps; "
        f"{'averaged' if described['weights'] == 'ema' else 'live'} weights.",
        "",
        *_shape(spec),
        "",
        *_results(described["results"], config, kind),
        "",
        *_samples(samples, folder, kind),
        "## Use",
        "",
        "```python",
        "import torch",
        "from sparse_tx import load",
        "",
        f'model = load("{name}")  # eval mode, on the CPU; device="cuda" for a GPU',
        f"logits = model(torch.randint(256, (1, {min(100, spec.context)})))  # logits at i predict byte i",
        "```",
        "",
        "```",
        f"sparse-tx evaluate checkpoint={name} split=test",
        f"sparse-tx sample checkpoint={name} count=4",
        "```",
        "",
        "`config.json` holds the training config, `model.safetensors` the weights. No code is loaded from either.",
    ]
    return "\n".join(parts) + "\n"


def _data(data: dict[str, Any]) -> str:
    if data["synthetic"]:
        return f"a synthetic twin of {data['name']} (a trial, not a result)"
    name = data["name"] if data["source"] is None else f"{data['name']} from {data['source']}"
    return f"{name}, {MIRRORED[data['kind']]}" if data.get("mirror") else name


def _shape(spec: ModelSpec) -> list[str]:
    a = spec.attention
    numbers = {"stride": a.stride, "c": a.c, "reach": a.reach, "global tokens": a.global_tokens}
    given = ", ".join(f"{name} {value}" for name, value in numbers.items() if value is not None)
    parameters = cost_of(spec).parameters
    own = ("qk_norm", "rotary", "activation", "init")  # as in the paper by default
    others = [f"`model.{k}={str(v).lower()}`" for k in own if (v := getattr(spec, k)) != getattr(ModelSpec, k)]
    return [
        "| parameters | context | layers | width | heads | attention |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {parameters / 1e6:.2f}M | {spec.context:,} bytes | {spec.layers} | {spec.width} | {spec.heads} "
        f"| {a.name}{f' ({given})' if given else ''}{'' if a.name == 'full' else ', ' + a.combine} |",
        *(["", f"Other than in the paper: {', '.join(others)}."] if others else []),
    ]


def _results(results: list[dict[str, Any]], config: dict[str, Any], kind: str) -> list[str]:
    if not results:
        return ["Not scored when it was exported."]
    unit = unit_of(kind)
    lines = ["## Results", "", f"| split | {unit} | bytes scored | min. context | precision | backend |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for r in results:
        where = f"{r['split']}{', of the synthetic twin' if r['synthetic'] else ''}"
        lines.append(
            f"| {where} | {r['bits_per_dim']:.4f} | {r['count']:,} | {r['min_context']} | {r['precision']} "
            f"| {r['backend']} |"
        )
    paper = paper_bits(config["data"]["name"], config["attention"]["name"])
    if paper is not None and not any(r["synthetic"] for r in results):
        lines += ["", f"The paper has {paper:.2f} {unit} after full training on the official data."]
    return lines


def _samples(samples: list[Path], folder: Path, kind: str) -> list[str]:
    if not samples:
        return []
    names = [path.relative_to(folder).as_posix() for path in samples]
    lines = ["## Samples", ""]
    if kind == "image":
        lines.append(f"![samples]({names[0]})")
    elif kind == "audio":
        lines += [f"![spectrograms]({names[0]})", ""]
        lines += [f'<audio controls src="{name}"></audio>' for name in names[1:]]
    else:
        text = samples[0].read_bytes().decode("utf-8", "replace")[:SHOWN]
        text = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        lines += [fence, text, fence]
    return [*lines, ""]
