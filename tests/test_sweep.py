"""Sweeps: names, what is skipped, what goes on, what is recorded, and searches that can be interrupted."""

import csv
import json
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from sparse_tx import UserError
from sparse_tx.config import config_folder, sweeping, training
from sparse_tx.data.lock import taken
from sparse_tx.sweep import members, run
from sparse_tx.sweep.jobs import parameters
from sparse_tx.sweep.members import Outcome, config_hash, member_folder, member_name, run_member
from sparse_tx.sweep.search import Search, _distribution
from sparse_tx.sweep.space import grid, read_space
from sparse_tx.sweep.table import best, table
from sparse_tx.training import callbacks

ROOT = Path(__file__).resolve().parent.parent
FAST = ("debug=fast", "trainer=cpu", "trainer.max_steps=2", "data.limit=2")


def command(text):
    return [sys.executable, str(ROOT / "train.py"), *shlex.split(text)]


def space(*arguments, **params):
    return read_space(arguments, params, config_folder())


def rows_of(folder):
    (path,) = folder.glob("sweeps/*/table.csv")
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (("experiment=cifar10_strided", "seed=1"), "experiment-cifar10_strided.seed-1"),
        (("debug=fast", "seed=1", "logger=[csv,wandb]", "output=/tmp/x", "trainer.devices=1"), "seed-1"),
        (("optimizer.lr=1e-3", "attention.order=[column,window]"), "optimizer.lr-1e-3.attention.order-column-window"),
        (('data.source="a b=c.txt"',), "data.source-a-b-c.txt"),
        (("debug=fast",), "run"),
    ],
)
def test_a_member_is_named_by_its_overrides_in_characters_that_hydra_parses(overrides, name):
    assert member_name(overrides) == name
    assert re.fullmatch(r"[A-Za-z0-9._-]+", name)


def test_a_member_finds_its_folder_however_it_is_asked_for(compose):
    def config(*overrides):
        return training(compose("train", *overrides))

    first = member_folder(config("seed=2", "model.width=64"), ("seed=2", "model.width=64"))
    first.mkdir(parents=True)
    assert first.parent == Path("outputs/stdlib-fixed-tiny")
    again = config("model.width=64", "seed=2", "optimizer=muon", "logger=tensorboard")
    assert member_folder(again, ("model.width=64", "seed=2", "optimizer=muon")) == first
    assert config_hash(config("seed=3", "model.width=64")) != config_hash(again)


def test_lists_ranges_and_globs_make_the_grid_that_hydra_makes():
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = (
        "seed=range(1,4)",
        "data=cifar10",
        "optimizer.lr=1e-3,2e-3",
        "attention.order=[column,window],[window]",
        "+x='a b',c",
    )
    (wanted,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(given)), None)
    assert [list(m) for m in grid(space(*given))] == wanted
    experiments = {m[0] for m in grid(space("experiment=glob(enwik8_*)"))}
    assert experiments == {f"experiment=enwik8_{a}" for a in ("fast", "fixed", "full", "strided")}


def test_the_command_line_takes_the_place_of_a_sweeps_own_values():
    listed = {"seed": "1,2,3", "attention.c": 4}
    assert grid(space("seed=7", **listed)) == [("attention.c=4", "seed=7")]


@pytest.mark.parametrize("name", sorted(p.stem for p in (config_folder() / "sweep").glob("*.yaml")))
def test_every_sweep_config_makes_members_that_compose(compose, name):
    config, _, _ = sweeping(compose("train", f"sweep={name}"))
    space_of = read_space([f"sweep={name}"], config.params, config_folder())
    if config.trials is None:
        for overrides in grid(space_of):
            training(members.compose("train", overrides))
    else:
        assert any(not axis.values for axis in space_of)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimizer.lr=interval(1,2)",), "has no end of values: add sweep.trials"),
        (("optimizer.lr=tag(log,interval(0,1))", "sweep.trials=2"), "a logarithmic interval starts above 0"),
        (("seed=1", "sweep.trials=2"), "nothing is"),
        (("sweep.trials=0", "seed=1,2"), "sweep.trials=0"),
        (("sweep.launcher=cloud", "seed=1,2"), "sweep.launcher=cloud is not known: use one of here, local, slurm"),
        (("hydra/launcher=joblib", "seed=1,2"), "means nothing in a sweep"),
        (("experiment=glob(imagenet32*)",), "names no option of experiment"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_its_first_member(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run.sweep(lambda cfg: None, "train", arguments)
    assert not Path("outputs").exists()


def test_a_sweep_started_again_skips_what_is_finished_tries_what_failed_and_keeps_the_table(capfd):
    overrides = (*FAST, "attention.c=4,0")
    assert run.sweep(None, "train", overrides) == [" ".join([*FAST, "attention.c=0"])]
    before = {p: p.stat().st_mtime_ns for p in Path("outputs").rglob("*.ckpt")}
    capfd.readouterr()
    assert len(run.sweep(None, "train", overrides)) == 1
    out = capfd.readouterr().out
    assert "run 1: finished earlier" in out
    assert "trained:" not in out
    assert {p: p.stat().st_mtime_ns for p in Path("outputs").rglob("*.ckpt")} == before
    found = rows_of(Path("outputs"))
    assert [r["status"] for r in found] == ["finished earlier", "failed"]
    assert "attention.c=0 does not fit" in found[1]["error"]


def test_a_member_that_fails_with_its_data_is_recorded_in_its_folder_and_mended_by_the_next_start(tmp_path):
    text = tmp_path / "text.bin"
    overrides = (*FAST, "data=enwik8", f"data.source={text}", "data.synthetic=false")
    failed = run_member(overrides)
    assert failed.failed
    record = json.loads((Path(failed.folder) / "failure.json").read_text())
    assert str(text) in record["error"]
    text.write_bytes(bytes(range(256)) * 40)
    mended = run_member(overrides)
    assert (mended.status, mended.folder) == ("finished", failed.folder)
    assert not (Path(failed.folder) / "failure.json").exists()


def test_a_run_that_diverges_ends_early_and_is_told_apart(compose):
    outcome = run_member((*FAST, "trainer.max_steps=400", "optimizer=adamw", "optimizer.lr=1e30", "optimizer.warmup=0"))
    assert outcome.status == "diverged"
    assert "the run diverged" in outcome.error
    with open(Path(outcome.folder) / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) < 20


def test_a_member_that_another_process_runs_is_left_to_it(compose):
    overrides = (*FAST, "seed=5")
    folder = member_folder(training(compose("train", *overrides)), overrides)
    folder.mkdir(parents=True)
    with taken(folder / "lock") as mine:
        assert mine
        left = run_member(overrides)
        assert left.status == members.seen_again(left).status == "running elsewhere"
    done = run_member(overrides)
    assert done.status == "finished"
    again = members.seen_again(left)
    assert (again.status, again.bits, again.folder) == ("finished earlier", done.bits, done.folder)


def test_a_sweep_cut_off_goes_on_in_the_middle_of_its_member_and_ends_with_the_same_numbers(monkeypatch, capfd):
    given = (*FAST, "seed=1,2", "trainer.max_steps=8", "callbacks.checkpoint_every=3", "callbacks.validate_every=8")
    run.sweep(None, "train", (*given, "output=whole"))

    def cut(callback, trainer, module, *_):
        if module.config.seed == 2 and trainer.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Divergence, "on_train_batch_end", cut)
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit):
            run.sweep(None, "train", (*given, "output=cut"))
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored: its process is about to end
    (left,) = Path("cut").glob("*/*seed-2*/checkpoints/last.ckpt")
    left.unlink()  # what a kill would not have left
    assert "interrupted after 1 of 2" in capfd.readouterr().out
    assert len(list(Path("cut").glob("*/*/result.json"))) == 1

    assert run.sweep(None, "train", (*given, "output=cut")) == []
    out = capfd.readouterr().out
    assert "run 1: finished earlier" in out
    assert re.search(r"^resume: cut/\S*seed-2\S*/step-00000003.ckpt$", out, re.MULTILINE)
    one, two = (rows_of(Path(output)) for output in ("whole", "cut"))
    assert [r["bits_per_dim"] for r in one] == [r["bits_per_dim"] for r in two]


BOWL = ("optimizer.lr=tag(log,interval(1e-5,1))", "seed=1")


def outcome_of(overrides):
    """A bowl over the logarithm of the rate, lowest at 1e-2."""
    import math

    rate = float(dict(o.split("=") for o in overrides)["optimizer.lr"])
    return Outcome("finished", (math.log10(rate) + 2) ** 2)


def searched(folder, trials, stop=None, search_over=BOWL):
    pytest.importorskip("optuna")
    folder.mkdir(exist_ok=True)
    search = Search(space(*search_over), folder, trials=trials, sampler="tpe", seed=3)
    asked = []
    for number, overrides in search:
        asked.append(overrides)
        if stop is not None and number == stop:
            return asked  # begun and never told, as by a kill
        search.tell(number, outcome_of(overrides))
    return asked


def test_an_interrupted_search_asks_for_what_an_uninterrupted_one_would(tmp_path):
    whole = searched(tmp_path / "whole", 14)
    first = searched(tmp_path / "cut", 14, stop=6)
    rest = searched(tmp_path / "cut", 14)
    assert first[:6] + rest == whole
    assert first[-1] == rest[0]
    assert len(set(whole)) == 14


def test_a_search_comes_closer_than_its_random_start(tmp_path):
    scores = [outcome_of(overrides).bits for overrides in searched(tmp_path / "search", 30)]
    assert min(scores[10:]) < min(scores[:10])


def test_a_search_may_be_made_longer_and_knows_its_earlier_trials(tmp_path):
    short = searched(tmp_path / "search", 3)
    longer = searched(tmp_path / "search", 5)
    assert len(short) == 3
    assert len(longer) == 2
    known = Search(space(*BOWL), tmp_path / "search", trials=5, sampler="tpe", seed=3).known()
    assert [o for _, o, _ in known] == short + longer


@pytest.mark.parametrize(
    ("argument", "kind", "low", "high", "step", "log"),
    [
        ("attention.c=range(4,17,4)", "IntDistribution", 4, 16, 4, False),
        ("model.layers=int(interval(2,8))", "IntDistribution", 2, 8, 1, False),
        ("optimizer.lr=tag(log,interval(1e-4,1e-2))", "FloatDistribution", 1e-4, 1e-2, None, True),
        ("model.dropout=range(0.1,0.35,0.1)", "FloatDistribution", 0.1, 0.3, 0.1, False),
    ],
)
def test_intervals_and_ranges_are_searched_as_numbers(argument, kind, low, high, step, log):
    pytest.importorskip("optuna")
    (axis,) = space(argument)
    found = _distribution(axis)
    assert (type(found).__name__, found.step, found.log) == (kind, pytest.approx(step), log)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_trials_that_fail_or_diverge_do_not_end_a_search(tmp_path):
    pytest.importorskip("optuna")
    search = Search(space("seed=1,2,3,4"), tmp_path, trials=4, sampler="random", seed=1)
    outcomes = iter(
        [Outcome("failed"), Outcome("diverged"), Outcome("finished", float("nan")), Outcome("finished", 3.0)]
    )
    for number, _ in search:
        search.tell(number, next(outcomes))
    assert [t.state.name for t in search.study.trials] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert search.study.best_value == 3.0


def test_members_run_as_jobs_of_submitit(monkeypatch):
    submitit = pytest.importorskip("submitit")
    in_this_process = partial(submitit.AutoExecutor, cluster="debug")
    monkeypatch.setattr(submitit, "AutoExecutor", lambda folder, cluster: in_this_process(folder))
    assert run.sweep(None, "train", (*FAST, "seed=1,2", "sweep.launcher=local", "sweep.parallel=2")) == []
    assert [r["status"] for r in rows_of(Path("outputs"))] == ["finished", "finished"]


def test_a_job_of_slurm_asks_for_what_the_config_says(compose, tmp_path):
    submitit = pytest.importorskip("submitit")
    config, _, _ = sweeping(compose("train", "sweep.launcher=slurm", "sweep.slurm.partition=gpu", "sweep.slurm.gpus=1"))
    from submitit.slurm import slurm

    asked = parameters(config)
    assert (asked["slurm_partition"], asked["gpus_per_node"], asked["timeout_min"]) == ("gpu", 1, 1440)
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="debug")
    executor.update_parameters(**{k: v for k, v in asked.items() if not k.startswith("slurm_")})
    own = {k.removeprefix("slurm_") for k in asked if k.startswith("slurm_")}
    assert own <= slurm.SlurmExecutor._valid_parameters()


def test_the_table_marks_the_best_and_shows_what_varies():
    varied = space("data=cifar10", "seed=1,2")
    found = [(m, Outcome("finished", bits)) for m, bits in zip(grid(varied), (3.5, 3.25), strict=True)]
    lines = table(varied, [*found, (("data=cifar10", "seed=3"), Outcome("failed"))])
    assert lines[0].split() == ["seed", "bits/dim", "time", "status"]
    assert [line.split()[1] for line in lines[1:]] == ["3.5000", "3.2500*", "-"]
    assert best(found) == found[1]


def test_a_sweeps_values_without_m_are_refused():
    result = subprocess.run(command("sweep=lr"), capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: sweep= varies optimizer.lr: add -m to the command\n"


def test_evaluate_and_sample_sweep_too_and_one_that_fails_does_not_end_it(capfd):
    seen = []

    def evaluate(cfg):
        seen.append(cfg.checkpoint)
        if cfg.checkpoint == "b":
            raise UserError("b is damaged")

    assert run.sweep(evaluate, "evaluate", ["checkpoint=a,b,c", "split=test"]) == ["checkpoint=b split=test"]
    assert seen == ["a", "b", "c"]
    assert "error: b is damaged" in capfd.readouterr().err
