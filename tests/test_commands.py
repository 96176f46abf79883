"""The scripts as a user runs them: what they print and how they exit."""

import csv
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(command, **changes):
    """A command line of the README, in the test's folder."""
    script, *arguments = shlex.split(command.partition("#")[0])[1:]
    program = [script] if script == "-m" else [str(ROOT / script)]
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, timeout=300, **changes
    )


def one_line_error(result):
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_the_demo_path_trains_evaluates_and_samples_by_the_commands_it_prints():
    result = run("python train.py debug=fast")
    assert result.returncode == 0, result.stderr
    assert "order 0" in result.stdout
    commands = dict(re.findall(r"^(evaluate|sample): (python .*)$", result.stdout, re.MULTILINE))
    evaluated, sampled = run(commands["evaluate"]), run(commands["sample"])
    assert evaluated.returncode == sampled.returncode == 0, evaluated.stderr + sampled.stderr
    assert re.search(r"^bits/byte: \d\.\d{4}$", evaluated.stdout, re.MULTILINE)
    files = re.findall(r"^wrote: (.*)$", sampled.stdout, re.MULTILINE)
    assert len(files) == 4
    assert all(Path(f).stat().st_size == 64 for f in files)


def test_a_sweep_finishes_its_other_members_and_exits_1():
    result = run("python train.py -m debug=fast attention.c=4,0,2 trainer.max_steps=2")
    assert result.returncode == 1
    assert "error: attention.c=0 does not fit attention.stride=16" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(list(Path("outputs").glob("stdlib-fixed-tiny/*/checkpoints/last.ckpt"))) == 2


def test_a_sweep_over_several_devices_is_refused_with_the_recipe():
    result = run("python train.py -m debug=fast trainer.devices=2 seed=1")
    assert "without -m" in one_line_error(result)


def test_two_processes_have_the_losses_of_one():
    shared = "python train.py debug=fast model.dropout=0.2 trainer.accelerator=cpu output="
    one, two = run(f"{shared}one"), run(f"{shared}two trainer=ddp trainer.devices=2")
    assert one.returncode == two.returncode == 0, two.stderr

    def numbers(output):
        (path,) = Path(output).glob("*/*/metrics.csv")
        with open(path) as file:
            return [float(r[c] or 0) for r in csv.DictReader(file) for c in ("train/bits_per_dim", "val/bits_per_dim")]

    assert numbers("two") == pytest.approx(numbers("one"), rel=1e-5)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python train.py data=enwik8 data.source=missing.txt", "missing.txt"),
        ("python train.py attention.stride=0", "attention.stride=0"),
        ("python train.py data=audio data.source=.", "holds no recordings: expected .wav, .flac, .ogg"),
        ("python train.py data=imagenet64 data.source=hf://datasets/a/b@main", "names no fixed revision"),
        ("python -m sparse_tx.data describe data=enwik8 data.source=missing.txt", "missing.txt is not there"),
        ("python evaluate.py checkpoint=missing.ckpt", "missing.ckpt does not exist"),
        ("python evaluate.py checkpoint=epoch=0-step=100.ckpt", """'checkpoint="epoch=0-step=100.ckpt"'"""),
        ("python sample.py", "checkpoint is missing"),
        ("python train.py experiment=cifar11", "experiment=cifar11 is not known: use one of audio_1m"),
        ("python train.py model.depth=3", "model.depth is not a key of this config"),
        ("python train.py model.widht=3", "did you mean model.width?"),
        ("python train.py logger=mlflow", "logger=mlflow is not known: use one of csv, tensorboard, wandb"),
    ],
)
def test_a_mistake_gives_one_line_and_leaves_nothing_behind(command, message):
    assert message in one_line_error(run(command))
    assert not Path("outputs").exists()


def test_a_checkpoint_that_cannot_be_written_gives_one_line():
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert "cannot be written: File too large" in one_line_error(
        run("python train.py debug=fast", preexec_fn=small_files)
    )


def test_a_sweep_over_an_unknown_experiment_finishes_the_known_one():
    result = run("python train.py -m debug=fast experiment=cifar10_strided,cifar11 trainer.max_steps=1")
    assert result.returncode == 1
    assert "error: experiment=cifar11 is not known: use one of audio_1m" in result.stderr
    assert len(list(Path("outputs").glob("cifar10_strided/*/checkpoints/last.ckpt"))) == 1
