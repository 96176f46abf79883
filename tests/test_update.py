"""From gradients to weights: clipping inside the optimizer, steps left out on the device, and the average."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from sparse_tx import UserError
from sparse_tx.config import OptimizerConfig
from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.training import update
from sparse_tx.training.module import TrainingModule
from sparse_tx.training.optimizer import build_optimizer, takes_scale
from sparse_tx.training.step import Gradients, StepLoss
from sparse_tx.training.update import Clipping, move_average

SPEC = ModelSpec("text", 16, 2, 16, 2, 16, 32, AttentionSpec("full"))


def model():
    torch.manual_seed(0)
    return Transformer(SPEC)


def gradients(parameters, steps=6, bad=()):
    """By step and parameter; large and small ones in turn, so that some steps are clipped."""
    torch.manual_seed(1)
    found = [[torch.randn_like(p) * (1.0, 1e-3)[i % 2] for p in parameters] for i in range(steps)]
    for i in bad:
        found[i][3].view(-1)[1] = (float("nan"), float("inf"))[i % 2]
    return found


def stepped(name, *, fused, grads):
    """Weights, average and optimizer state after these gradients, by the project's own step."""
    m = model()
    parameters = list(m.parameters())
    optimizer = build_optimizer(m, OptimizerConfig(name=name, lr=1e-2), fused=fused)
    clipping = Clipping(parameters, 1.0)
    average = [p.detach().clone() for p in parameters]
    for given in grads:
        for p, g in zip(parameters, given, strict=True):
            p.grad = g.clone()
        clipping(optimizer)
        optimizer.step()
        move_average(average, [p.detach() for p in parameters], 0.1, clipping.skip)
    state = [v for p in parameters for _, v in sorted(optimizer.state[p].items())]
    return [p.detach() for p in parameters], average, state, clipping


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_torchs_clipping_and_its_adamw(fused):
    reference = model()
    parameters = list(reference.parameters())
    decays = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": p, "weight_decay": d} for p, d in zip(decays, (0.01, 0.0), strict=True)]
    optimizer = AdamW(groups, lr=1e-2)
    for given in gradients(parameters):
        for p, g in zip(parameters, given, strict=True):
            p.grad = g.clone()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    got, *_ = stepped("adamw", fused=fused, grads=gradients(parameters))
    for a, b in zip(got, parameters, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def test_muon_in_batches_is_torchs_of_each_matrix_and_of_queries_keys_and_values():
    grads = gradients(list(model().parameters()))
    named = dict(model().named_parameters())
    got = dict(zip(named, stepped("muon", fused=False, grads=grads)[0], strict=True))
    for name, p in named.items():
        if not name.startswith("blocks.") or p.dim() < 2:
            continue
        C = p.shape[1]
        qk = (p.shape[0] - C) // 2
        rows = [qk, qk, C] if "qkv" in name else [p.shape[0]]
        parts = [nn.Parameter(part.detach().clone()) for part in p.split(rows)]
        reference = Muon(parts, lr=1e-2, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for given in grads:
            norm = nn.utils.get_total_norm(given)
            scale = 1 / max(1.0, float(norm) + 1e-6)
            for part, g in zip(parts, given[list(named).index(name)].split(rows), strict=True):
                part.grad = g * scale
            reference.step()
        want = torch.cat([part.detach() for part in parts])
        # Its products are of bfloat16, and those of a batch may be summed in another order.
        assert (got[name] - want).abs().max() <= 0.01 * (want - p.detach()).abs().max(), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_are_not_finite_change_nothing_at_all(name, fused):
    parameters = list(model().parameters())
    grads = gradients(parameters, bad=(2, 3))
    *got, clipping = stepped(name, fused=fused, grads=grads)
    *want, _ = stepped(name, fused=fused, grads=[g for i, g in enumerate(grads) if i not in (2, 3)])
    for part, wanted in zip(got, want, strict=True):
        assert len(part) == len(wanted)
        assert all(map(torch.equal, part, wanted))
    assert (int(clipping.skipped), int(clipping.in_a_row)) == (2, 0)


def test_on_a_device_without_kernels_the_average_moves_by_the_share_or_not_at_all(monkeypatch):
    monkeypatch.setattr(update, "no_kernels", lambda device: f"none on {device}")
    torch.manual_seed(0)
    average, weights = ([torch.randn(s, dtype=torch.float64) for s in (3, 70_000, 5, 1)] for _ in range(2))

    class OnDevice:  # what a tensor on a GPU is to `move_average`
        def __init__(self, value):
            self.value, self.device = value, torch.device("cuda")

        def __rsub__(self, other):
            return torch.tensor(other - self.value, dtype=torch.float64)

    for skip, share in ((1.0, 0.0), (0.0, 0.25)):
        got = copy.deepcopy(average)
        move_average(got, weights, 0.25, OnDevice(skip))
        for a, b, w in zip(got, average, weights, strict=True):
            torch.testing.assert_close(a, b.lerp(w, share))


def test_only_optimizers_that_know_it_are_given_the_scale():
    config = OptimizerConfig(name="muon", lr=1e-2)
    assert takes_scale(build_optimizer(model(), config, fused=True))
    assert not takes_scale(build_optimizer(model(), config, fused=False))
    assert not takes_scale(build_optimizer(model(), OptimizerConfig(name="adamw", lr=1e-2), fused=False))


@pytest.fixture
def spoiled(trained, monkeypatch):
    """spoiled(steps, bad): a run some of whose gradients are not finite."""

    def run(steps, bad):
        class Spoiled(Clipping):
            calls = 0

            def __call__(self, optimizer):
                if Spoiled.calls in bad:
                    self.parameters[4].grad.view(-1)[0] = float("nan")
                Spoiled.calls += 1
                return super().__call__(optimizer)

        monkeypatch.setattr("sparse_tx.training.module.Clipping", Spoiled)
        return trained("optimizer=adamw", f"trainer.max_steps={steps}")

    return run


def test_a_run_with_a_step_that_is_not_finite_goes_on_and_says_how_many(spoiled):
    run = spoiled(6, (2,))
    assert run["steps"] == 6
    rows = (Path(run["checkpoint"]).parent.parent / "metrics.csv").read_text()
    assert "train/skipped" in rows
    state = torch.load(Path(run["checkpoint"]).parent / "last.ckpt", weights_only=True)
    assert all(t.isfinite().all() for t in state["ema"].values())
    (counts,) = {int(s["step"]) for s in state["optimizer_states"][0]["state"].values() if "step" in s}
    assert counts == 5


def test_a_run_that_only_leaves_steps_out_ends_with_what_to_do(spoiled, monkeypatch):
    monkeypatch.setattr("sparse_tx.training.callbacks.SKIPPED_AT_MOST", 4)
    with pytest.raises(UserError, match=r"the last 4 steps, which were left out"):
        spoiled(30, range(2, 30))


def test_a_step_that_takes_its_own_gradients_gives_the_bits_of_lightnings(trained, monkeypatch):
    settings = ("optimizer=adamw", "model.dropout=0.2")
    plain = trained(*settings)
    build = TrainingModule.__init__
    monkeypatch.setattr(TrainingModule, "__init__", lambda self, config, *a, **k: build(self, config, capture="true"))
    own = trained(*settings)
    first, second = (torch.load(Path(r["checkpoint"]).parent / "last.ckpt", weights_only=True) for r in (plain, own))
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for part in ("state_dict", "ema"):
        assert all(torch.equal(first[part][k], second[part][k]) for k in first[part])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_captured_steps_are_those_of_launch_by_launch_also_after_a_batch_of_another_size(name):
    def run(captures):
        m = model().cuda()
        parameters = list(m.parameters())
        optimizer = build_optimizer(m, OptimizerConfig(name=name, lr=1e-2), fused=True)
        gradients, clipping = Gradients(StepLoss(m, 1), parameters), Clipping(parameters, 1.0)
        gradients.captures = captures
        losses = []
        for i in range(8):
            torch.manual_seed(i)
            B = 2 if i == 5 else 4
            tokens = torch.randint(256, (B, 16), device="cuda", dtype=torch.uint8)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                losses.append(gradients(tokens, i, torch.arange(B, device="cuda")))
            clipping(optimizer)
            optimizer.step()
        return [*torch.stack(losses).tolist(), *(float(p.detach().double().sum()) for p in parameters)]

    assert run(True) == run(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_no_part_of_a_step_waits_for_the_device(name):
    m = model().cuda()
    parameters = list(m.parameters())
    optimizer = build_optimizer(m, OptimizerConfig(name=name, lr=1e-2), fused=True)
    gradients, clipping = Gradients(StepLoss(m, 1), parameters), Clipping(parameters, 1.0)
    average = [p.detach().clone() for p in parameters]
    tokens, rows = torch.randint(256, (4, 16), device="cuda", dtype=torch.uint8), torch.arange(4, device="cuda")

    def step(i):
        gradients(tokens, i, rows)
        clipping(optimizer)
        optimizer.step()
        move_average(average, [p.detach() for p in parameters], 0.1, clipping.skip)

    for i in range(3):
        step(i)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3, 6):
            step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
