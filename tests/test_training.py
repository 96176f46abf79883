"""Training runs: exact resume, deadlines, averages, and that one batch can be learnt by heart."""

import csv
import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch

from sparse_tx import UserError, load
from sparse_tx.checkpoint import read_checkpoint
from sparse_tx.config import OptimizerConfig
from sparse_tx.model import AttentionSpec, ModelSpec, Transformer
from sparse_tx.training.ema import decay_at
from sparse_tx.training.module import TrainingModule
from sparse_tx.training.optimizer import build_optimizer, schedule, warmup_steps
from sparse_tx.training.saving import NotWritten, WholeFiles


def contents(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two checkpoints hold the same weights, averages and optimizer state, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def trained_state(path):
    state = contents(path)
    return {k: state[k] for k in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step")}


def losses(run):
    with open(Path(run["checkpoint"]).parent.parent / "metrics.csv") as file:
        rows = [r for r in csv.DictReader(file) if r["train/bits_per_dim"]]
    return {int(r["step"]): float(r["train/bits_per_dim"]) for r in rows}


def seconds(run):
    with open(Path(run["checkpoint"]).parent.parent / "metrics.csv") as file:
        return [float(r["train/seconds"]) for r in csv.DictReader(file) if r["train/seconds"]]


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer=adamw", "model.dropout=0.2", "data=cifar10", "attention=strided"),
        ("optimizer=muon", "data.batch_size=3"),
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(trained, settings):
    whole = trained(*settings, "callbacks.checkpoint_every=2", "callbacks.keep=3", "callbacks.validate_every=4")
    folder = Path(whole["checkpoint"]).parent
    for step in (2, 4):
        resumed = trained(*settings, f"resume={folder / f'step-0000000{step}.ckpt'}", "callbacks.validate_every=4")
        last = Path(resumed["checkpoint"]).parent / "last.ckpt"
        assert last.parent != folder
        assert same(trained_state(last), trained_state(folder / "last.ckpt"))
        assert resumed["val/bits_per_dim"] == whole["val/bits_per_dim"]
        assert losses(resumed) == {k: v for k, v in losses(whole).items() if k >= step}


def test_a_deadline_ends_with_a_checkpoint_and_auto_resume_goes_on_exactly(trained, capsys):
    settings = ("trainer.max_steps=300", "callbacks.validate_every=300", "callbacks.checkpoint_every=300")
    cut = trained(*settings, "trainer.max_time=00:00:00:01")
    assert 0 < cut["steps"] < 300
    resumed = trained(*settings, "resume=auto", "trainer.max_time=00:01:00:00")
    assert f"resume: {cut['checkpoint']}" in capsys.readouterr().out
    assert resumed["steps"] == 300
    assert seconds(cut)[-1] < seconds(resumed)[0] < seconds(resumed)[-1]  # of training, in all
    whole = trained(*settings)
    assert same(*(trained_state(Path(r["checkpoint"]).parent / "last.ckpt") for r in (resumed, whole)))


def test_a_run_cut_off_within_a_step_goes_on_with_the_losses_and_validations_of_a_whole_one(
    trained, monkeypatch, capsys
):
    settings = ("trainer.max_steps=10", "callbacks.validate_every=4")
    whole = trained(*settings)
    seen = re.findall(r"^step .* validation .*$", capsys.readouterr().out, re.M)

    def cut(module, batch, number):
        if module.global_step == 5:
            raise KeyboardInterrupt
        return step(module, batch, number)

    step = TrainingModule.training_step
    with monkeypatch.context() as patched:
        patched.setattr(TrainingModule, "training_step", cut)
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit):
            trained(*settings, "name=cut")
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored: its process is about to end
    capsys.readouterr()
    rest = trained(*settings, "name=cut", "resume=auto")
    assert re.findall(r"^step .* validation .*$", capsys.readouterr().out, re.M) == seen[1:]
    assert losses(rest) == {k: v for k, v in losses(whole).items() if k >= 5}


def test_auto_resume_passes_over_damaged_and_foreign_checkpoints(trained, capsys):
    trained("seed=2")
    first = Path(trained()["checkpoint"]).parent
    for name in ("best.ckpt", "last.ckpt", "step-00000006.ckpt"):
        (first / name).write_bytes((first / name).read_bytes()[:1000])
    capsys.readouterr()
    trained("resume=auto")
    assert f"resume: {first / 'step-00000003.ckpt'}" in capsys.readouterr().out


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before_it(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"a": torch.zeros(3)}, path)
    (tmp_path / ".last.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(NotWritten, match=r"last\.ckpt cannot be written: No space left on device"):
        WholeFiles().save_checkpoint({"a": torch.ones(300_000)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_is_no_fault_of_the_disk_is_raised_as_it_is(tmp_path, monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "save", lost)
    with pytest.raises(RuntimeError, match="CUDA error"):
        WholeFiles().save_checkpoint({}, tmp_path / "last.ckpt")


def test_a_run_without_room_for_its_checkpoints_ends_and_goes_on_exactly_once_there_is(trained, monkeypatch, capsys):
    settings = ("model.dropout=0.2", "callbacks.checkpoint_every=2")
    whole = trained(*settings, "output=whole")
    real = torch.save

    def full(contents, file):
        if contents["global_step"] == 4:
            raise OSError(28, "No space left on device")
        real(contents, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(NotWritten, match=r"step-00000004\.ckpt cannot be written: No space left on device"):
            trained(*settings, "output=cut")
    capsys.readouterr()
    resumed = trained(*settings, "output=cut", "resume=auto")
    assert "checkpoints/best.ckpt\n" in capsys.readouterr().out  # of the validation at step 3
    assert same(*(trained_state(Path(r["checkpoint"]).parent / "last.ckpt") for r in (resumed, whole)))


def test_auto_resume_without_a_checkpoint_starts_fresh_and_says_so(trained, capsys):
    trained("resume=auto")
    assert "starting fresh" in capsys.readouterr().out


def test_resuming_another_model_is_refused(trained):
    path = trained()["checkpoint"]
    with pytest.raises(UserError, match="width is 64 there and 32 here"):
        trained(f"resume={path}", "model.width=32")


def test_one_batch_is_learnt_by_heart(trained):
    run = trained(
        "debug=overfit", "data.synthetic=true", "data.context=32", "data.stride=8", "data.c=2", "data.batch_size=2",
        "data.limit=1", "trainer.max_steps=250", "callbacks.log_every=250", "optimizer.lr=1e-2", "model.width=32",
        "model.qk=32", "data.workers=0",
    )  # fmt: skip
    assert losses(run)[249] < 0.05


def test_dropout_and_the_rest_of_a_run_come_from_the_seed_alone(trained):
    first, second = (trained("model.dropout=0.3") for _ in range(2))
    other = trained("model.dropout=0.3", "seed=2")
    assert losses(first) == losses(second) != losses(other)


def test_average_follows_its_ramp():
    assert [decay_at(t, 0.999) for t in (0, 8, 10**6)] == [1 / 10, 9 / 18, 0.999]


def test_checkpoints_hold_the_average_of_the_weights_after_each_step(trained):
    run = trained("trainer.max_steps=3", "callbacks.checkpoint_every=1", "callbacks.keep=3")
    folder = Path(run["checkpoint"]).parent
    live = [read_checkpoint(folder / f"step-0000000{k}.ckpt").weights("live") for k in (1, 2, 3)]
    got = [read_checkpoint(folder / f"step-0000000{k}.ckpt").weights("ema") for k in (1, 2, 3)]
    for name in got[0]:
        for t in (1, 2):
            want = got[t - 1][name].lerp(live[t][name], 1 - decay_at(t, 0.999))
            torch.testing.assert_close(got[t][name], want)


def test_load_gives_the_averaged_or_the_live_weights_in_eval_mode(trained):
    path = trained()["checkpoint"]
    ema, live = load(path), load(path, weights="live")
    tokens = torch.randint(256, (2, 10))
    assert not ema.training
    assert ema(tokens).shape == (2, 10, 256)
    assert not torch.equal(ema(tokens), live(tokens))
    with pytest.raises(UserError, match="weights=best"):
        load(path, weights="best")


def test_schedule_warms_up_and_falls_to_zero():
    assert [schedule(t, 10, 110) for t in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert schedule(60, 10, 110) == pytest.approx(0.5)
    assert schedule(110, 10, 110) == 0
    held = [schedule(t, 10, 110, hold=0.6, decay="linear") for t in (0, 9, 10, 69, 70, 90, 110)]
    assert held == pytest.approx([0.1, 1, 1, 1, 1, 0.5, 0])
    assert schedule(90, 10, 110, hold=0.6) == pytest.approx(0.5)
    assert [schedule(t, 10, 110, hold=1.0) for t in (50, 109)] == [1, 1]
    assert warmup_steps(OptimizerConfig(), 1000) == 100
    assert warmup_steps(OptimizerConfig(), 360_000) == 5000
    assert warmup_steps(OptimizerConfig(warmup=7), 1000) == 7


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_falls_on_matrices_alone_and_every_parameter_has_one_group(name):
    spec = ModelSpec("text", 16, 2, 16, 2, 16, 32, AttentionSpec("full"))
    model = Transformer(spec)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-3), fused=False)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = Transformer(ModelSpec("text", 16, 1, 16, 2, 16, 32, AttentionSpec("full")))
    torch.nn.init.normal_(model.output.weight)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=1e-2), fused=False)
    model(torch.randint(256, (2, 16))).square().mean().backward()
    optimizer.step()
    by_muon = {n for n, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    matrices = ("attention.qkv", "attention.out", "ff.expand", "ff.contract")
    assert by_muon == {f"blocks.0.{m}.weight" for m in matrices}
    assert all("exp_avg" in optimizer.state[p] for n, p in model.named_parameters() if n not in by_muon)


def test_a_run_goes_on_with_another_way_to_recompute(trained):
    settings = ("optimizer=adamw", "model.dropout=0.2", "callbacks.checkpoint_every=2", "callbacks.keep=3")
    whole = trained(*settings, "model.recompute=none")
    first = Path(whole["checkpoint"]).parent / "step-00000004.ckpt"
    resumed = trained(*settings, "model.recompute=block", f"resume={first}")
    assert contents(resumed["checkpoint"])["sparse_tx"]["model"]["recompute"] == "block"
    assert same(*(trained_state(Path(r["checkpoint"]).parent / "last.ckpt") for r in (resumed, whole)))
    assert losses(resumed) == {k: v for k, v in losses(whole).items() if k >= 4}


def test_what_only_fused_blocks_can_run_again_is_refused_without_them(trained):
    with pytest.raises(
        UserError, match=r"model\.recompute=cheap is for fused blocks .* plain ones know none, attention"
    ):
        trained("model.recompute=cheap")


def test_fused_blocks_are_refused_where_no_kernel_runs(trained):
    with pytest.raises(UserError, match=r"trainer\.fused=true cannot run here: "):
        trained("trainer.fused=true")


def test_a_residual_stream_in_16_bits_is_refused_where_it_cannot_be(trained):
    with pytest.raises(
        UserError, match=r"trainer\.residual=bfloat16 goes with trainer\.precision=bf16-mixed, not with 32"
    ):
        trained("trainer.residual=bfloat16")
    with pytest.raises(UserError, match=r"trainer\.residual=bfloat16 needs fused blocks"):
        trained("trainer.residual=bfloat16", "trainer.precision=bf16-mixed")


def test_compiled_blocks_give_the_losses_of_plain_ones(trained):
    settings = ("trainer.max_steps=20", "data=cifar10", "attention=strided", "model.dropout=0.1")
    plain, compiled = (losses(trained(*settings, f"trainer.compile={c}")) for c in ("false", "true"))
    for step in range(20):
        assert compiled[step] == pytest.approx(plain[step], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_gives_the_losses_of_launch_by_launch(compose):
    from train import train

    def run(graph):
        settings = ("data=cifar10", "attention=strided", "model.dropout=0.1", "trainer.max_steps=20")
        return losses(train(compose("train", "debug=fast", "trainer=gpu", f"trainer.cuda_graph={graph}", *settings)))

    plain, captured = run("false"), run("true")
    assert captured == pytest.approx(plain, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_on_a_gpu_has_the_losses_of_a_plain_one(compose, optimizer):
    from train import train

    def run(*how):
        settings = ("data=cifar10", "attention=strided", f"optimizer={optimizer}", "model.dropout=0.1")
        settings += ("trainer.max_steps=20", "trainer.precision=32", *how)
        return losses(train(compose("train", "debug=fast", "trainer=gpu", *settings)))

    plain = run("trainer.fused=false", "trainer.cuda_graph=false", "trainer.compile=false", "attention.backend=blocked")
    assert run("trainer.compile=true") == pytest.approx(plain, rel=1e-3)


def test_a_captured_step_is_refused_without_a_gpu(trained):
    with pytest.raises(UserError, match="needs a GPU"):
        trained("trainer.cuda_graph=true")


def test_profiling_leaves_a_trace_of_three_steps(trained):
    folder = Path(trained("profile=true")["checkpoint"]).parent.parent
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sum(str(e.get("name", "")).startswith("ProfilerStep#") for e in events) == 3
    assert "aten::" in (folder / "trace.txt").read_text()


def test_a_run_leaves_its_config_its_numbers_and_its_checkpoints(trained):
    run = trained()
    folder = Path(run["checkpoint"]).parent.parent
    assert folder.parent == Path("outputs/stdlib-fixed-tiny")
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= names
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/")
    assert set("".join(names)) <= allowed
    assert run["steps"] == 6
    assert 0 < run["val/bits_per_dim"] < 8.5
    assert math.isfinite(run["val/bits_per_dim"])
