"""Every launch of a decoding step compiles for each GPU generation and fits its shared memory; no GPU needed."""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")

from test_kernels_compile import SHARED_KIB, Recorder, compiled

from sparse_tx.attention.decode import Store
from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.model.decoder import LayerWeights

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def stores_of(spec, rows, dtype):
    widths = spec.qk // spec.heads, spec.width // spec.heads
    return [Store(p, spec.context, rows, *widths, dtype, "meta") for p in spec.patterns()]


def decoding_launches(monkeypatch, spec, rows, dtype, capability):
    """Of a step and a draw, each kind once."""
    from sparse_tx.model.decode_kernels import configs, steps

    found = []
    for name in ("attend_step", "attend_out_step", "combine_step", "linear_step", "vector_step", "feedforward_step"):
        monkeypatch.setattr(steps, name, Recorder(getattr(steps, name), found))
    for name in ("embed_step", "draw_step"):
        monkeypatch.setattr(steps, name, Recorder(getattr(steps, name), found))
    monkeypatch.setattr(steps, "_H100", configs.Gpu(108, SHARED_KIB[capability] * 1024))
    with torch.device("meta"):
        model = Transformer(spec)
        position, previous = torch.empty(1, dtype=torch.long), torch.empty(rows, dtype=torch.long)
        tokens, nats = torch.empty(rows, spec.context, dtype=torch.uint8), torch.empty(rows, spec.context)
        uniforms = torch.empty(64, rows, dtype=torch.float64)
    stores = stores_of(spec, rows, dtype)
    weights = [LayerWeights.of(block, dtype) for block in model.blocks]
    for joined, joined_ff in ((False, False), (True, False), (True, True)):
        output = model.output.weight.to(dtype)
        kernels = steps.FusedSteps(model, weights, output, stores, spec.context, rows, None, joined, joined_ff)
        kernels.dependent = capability >= 90
        kernels(previous, position)
        kernels.draw(position, uniforms, tokens, nats, previous, 0.7)
    monkeypatch.undo()
    return list({(kernel.__name__, str(named)): (kernel, args, named) for kernel, args, named in found}.values())


def ones_as_constants(kernel, args, named):
    """As a launch has it: a number that is 1 is known when the kernel is compiled."""
    given = dict(zip([n for n in kernel.arg_names if n not in named], args, strict=True))
    ones = {n: 1 for n, x in given.items() if type(x) is int and x == 1 and n not in ("row_of_reads", "row_of_places")}
    return [x for n, x in given.items() if n not in ones], named | ones


def decoded(attention, kind="image", context=3072, width=256, heads=2, qk=128, ff=512):
    return ModelSpec(kind, context, 2, width, heads, qk, ff, attention)


CIFAR = decoded(AttentionSpec("strided", stride=96))
ENWIK8 = decoded(AttentionSpec("fixed", stride=128, c=32), "text", 12288, 512, 8, 512, 2048)
IMAGENET = decoded(AttentionSpec("strided", stride=128, combine="interleaved"), "image", 12288, 512, 16, 512, 2048)
ODD = decoded(AttentionSpec("strided", stride=8, combine="split"), "text", 100, 96, 2, 24, 80)
OTHER = dataclasses.replace(CIFAR, qk_norm=True, rotary="axes", activation="relu2")
DECODING = {
    "CIFAR-10, 1 row": (CIFAR, 1, torch.bfloat16),
    "CIFAR-10, 1,024 rows": (CIFAR, 1024, torch.bfloat16),
    "enwik8, 1 row": (ENWIK8, 1, torch.bfloat16),
    "enwik8, 16 rows": (ENWIK8, 16, torch.float16),
    "ImageNet64, 4,096 rows": (IMAGENET, 4096, torch.bfloat16),
    "odd widths, 3 rows": (ODD, 3, torch.float16),
    "odd widths": (ODD, 5, torch.float16),
    "float32": (CIFAR, 100, torch.float32),
    "float32, 2 rows": (CIFAR, 2, torch.float32),
    "other than the paper's, 1 row": (OTHER, 1, torch.bfloat16),
    "other than the paper's, 40 rows": (dataclasses.replace(OTHER, rotary="position"), 40, torch.float16),
}


# The older ones on what asks most of them: the kernels are the same but for their waits.
DECODING_WHERE = [(c, 90) for c in DECODING] + [
    (c, capability)
    for c in ("ImageNet64, 4,096 rows", "enwik8, 1 row", "CIFAR-10, 1 row", "float32")
    for capability in (80, 86, 89)
]


@pytest.mark.parametrize(("case", "capability"), DECODING_WHERE)
def test_every_launch_of_a_decoding_step_compiles_and_fits(monkeypatch, case, capability):
    found = decoding_launches(monkeypatch, *DECODING[case], capability)
    assert {"draw_step"} < {kernel.__name__ for kernel, _, _ in found}
    for kernel, args, named in found:
        binary = compiled(kernel, *ones_as_constants(kernel, args, named), capability)
        assert binary.metadata.shared <= SHARED_KIB[capability] * 1024, (kernel.__name__, named)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "ff", "rows"), [(256, 512, 300), (256, 1024, 3000), (200, 264, 300)])
def test_what_lies_between_two_attentions_compiles_as_one_launch_and_as_two_and_fits_shared_memory(
    monkeypatch, width, ff, rows, dtype
):
    from sparse_tx.model.decode_kernels import configs, hopper, shares, steps

    found = []
    monkeypatch.setattr(hopper, "between_by_roles", Recorder(hopper.between_by_roles, found))
    for name in ("feedforward_share", "project_shares"):
        monkeypatch.setattr(shares, name, Recorder(getattr(shares, name), found))
    with torch.device("meta"):
        model = Transformer(decoded(AttentionSpec("full"), width=width, ff=ff, qk=64))
    weights = [LayerWeights.of(block, dtype) for block in model.blocks]
    kernels = steps.FusedSteps(
        model, weights, model.output.weight.to(dtype), stores_of(model.spec, rows, dtype), 36, rows
    )
    chosen = configs.between(rows, width, ff, 2, configs.Gpu(132, SHARED_KIB[90] * 1024))
    kernels.between = chosen
    for kernels.dependent in (False, True):
        for layer in range(2):  # the last is followed by the logits
            kernels._between(layer)
    kernels.cut = -(-ff // configs.SHARE_UNITS)
    kernels.cut_shares = torch.empty(kernels.cut, rows, width, device="meta")
    for kernels.dependent in (False, True):
        for layer in range(2):
            kernels._between(layer)
    monkeypatch.undo()
    assert len(found) == 4 + 2 * 4
    for kernel, args, named in found:
        binary = compiled(kernel, args, named, 90)
        assert binary.metadata.shared <= SHARED_KIB[90] * 1024
        assert "wgmma.mma_async" in binary.asm["ptx"]
        waits = 2 if kernel.__name__ == "between_by_roles" else 1  # each role that reads what the kernel ahead wrote
        assert binary.asm["ptx"].count("griddepcontrol.wait") == waits * named["DEPENDENT"]
