"""The memory that a step is expected to take is what it takes, and what is run again is chosen by it."""

import dataclasses
import gc

import pytest
import torch

from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.model.fused import WIDEST
from sparse_tx.model.spec import RECOMPUTE
from sparse_tx.training.memory import INNER, PLAIN, by_policy, choose, memory_of
from sparse_tx.training.optimizer import build_optimizer
from sparse_tx.training.step import StepLoss
from sparse_tx.training.update import Clipping

GIB = 1 << 30


def sized(context=512, layers=4, width=64, attention=None):
    return ModelSpec("text", context, layers, width, 2, width, 4 * width, attention or AttentionSpec("full"))


def kept_bytes(spec, batch):
    """Bytes of the distinct memory that autograd keeps from the forward pass, without weights and the loss's own."""
    torch.manual_seed(0)
    model = Transformer(spec).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    tokens = torch.randint(256, (batch, spec.context))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h = model.hidden(tokens)
    assert h.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("again", PLAIN)
@pytest.mark.parametrize("change", [{}, {"qk_norm": True, "rotary": "axes"}, {"activation": "relu2"}], ids=str)
def test_what_plain_blocks_keep_is_what_is_expected(again, change):
    spec = dataclasses.replace(sized().recomputing(again), **change)
    expected = memory_of(spec, 2, half=False, blocks="plain").kept - 2 * 2 * spec.context * spec.width * 4
    assert kept_bytes(spec, 2) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("blocks", INNER)
def test_running_more_again_takes_less(blocks):
    policies = by_policy(sized(width=2 * WIDEST), 4, half=True, blocks=blocks, optimizer="adamw")
    kept = {again: m.kept for again, m in policies.items()}
    pairs = [("none", "activation"), ("activation", "feedforward"), ("none", "attention"), ("attention", "block")]
    pairs += [("feedforward", "cheap"), ("attention", "cheap"), ("cheap", "block")]
    assert all(kept[more] < kept[less] for less, more in pairs if {less, more} <= kept.keys())
    assert list(policies) == [p for p in RECOMPUTE if p in policies]


def test_fused_blocks_of_narrow_models_keep_no_activation():
    narrow = by_policy(sized(width=WIDEST), 4, half=True, blocks="fused", optimizer="adamw")
    assert narrow["activation"] == narrow["none"]


def test_the_fastest_that_fits_is_taken_and_else_the_smallest():
    policies = by_policy(sized(context=12288, layers=48, width=512), 4, half=True, blocks="fused", optimizer="adamw")
    assert choose(policies, 1000 * GIB) == "none"
    assert choose(policies, 0) == "block"
    for again in RECOMPUTE:
        enough = int(policies[again].total / 0.9)
        earlier = RECOMPUTE[: RECOMPUTE.index(again)]
        assert choose(policies, enough) == next((e for e in earlier if policies[e].total <= 0.92 * enough), again)


def test_a_step_of_the_largest_context_fits_an_h200_only_when_blocks_are_run_again():
    spec = ModelSpec(
        "audio", 1 << 20, 48, 512, 16, 512, 2048, AttentionSpec("strided", stride=1024, combine="interleaved")
    )
    policies = by_policy(spec, 1, half=True, blocks="fused", optimizer="adamw")
    assert choose(policies, 140 * GIB) == "block"
    # h alone: 48 x 2^20 x 512 float32 are 96 GiB.
    assert 96 * GIB < policies["block"].total < 140 * GIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("blocks", "again"), [("compiled", "none"), *(("fused", again) for again in RECOMPUTE)])
def test_a_step_takes_the_memory_expected(blocks, again):
    spec = sized(4096, 12, 512, AttentionSpec("strided", stride=64, combine="interleaved"))
    spec = dataclasses.replace(spec, heads=8, recompute=again)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = Transformer(spec).cuda().train()
    model.fuse_blocks() if blocks == "fused" else model.compile_blocks()
    loss, parameters = StepLoss(model, 1), list(model.parameters())
    optimizer = build_optimizer(model, _adamw(), fused=True)
    clipping = Clipping(parameters, 1.0)
    average = [p.detach().clone() for p in parameters]
    tokens, rows = torch.randint(256, (8, 4096), device="cuda"), torch.arange(8, device="cuda")
    for i in range(2):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            value = loss(tokens, torch.full((), i, device="cuda"), rows)
        value.backward()
        clipping(optimizer)
        optimizer.step()
    taken = torch.cuda.max_memory_allocated() - before
    assert len(average) == len(parameters)
    expected = memory_of(spec, 8, half=True, blocks=blocks).total
    assert 0.8 * expected <= taken <= 1.05 * expected  # what is said to fit must fit


def _adamw():
    from sparse_tx.config import OptimizerConfig

    return OptimizerConfig(name="adamw", lr=1e-3)
