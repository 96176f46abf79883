"""The program sparse-tx: its doctor, its completion, and all of it from an installed wheel in an empty folder."""

import dataclasses
import errno
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from running import run

from sparse_tx import cli, doctor
from sparse_tx.config import config_folder
from sparse_tx.shell import spelled

ROOT = Path(__file__).resolve().parent.parent


def marks(findings):
    return [finding.mark for finding in findings]


def test_a_healthy_machine_has_no_problem(capsys):
    assert doctor.doctor([]) == 0
    out = capsys.readouterr().out
    assert "no problems found" in out
    for word in (f"torch {torch.__version__.partition('+')[0]}", "runs: ", "data: ", "configs: ", "backend on "):
        assert word in out
    for kind in ("full", "strided", "fixed", "sliding"):
        assert f"self-test: {kind} attention on " in out


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_a_backend_that_computes_something_else_is_a_problem(monkeypatch, wrong, capsys):
    right = doctor.sparse_attention

    def broken(q, k, v, patterns, *, backend):
        out = right(q, k, v, patterns, backend=backend)
        if backend == "oracle":
            return out
        return out + 1e-3 if wrong == "output" else out + 1e-3 * (v - v.detach())

    monkeypatch.setattr(doctor, "sparse_attention", broken)
    assert doctor.doctor([]) == 1
    assert capsys.readouterr().out.count("problem  self-test") == 4


def test_a_backend_that_fails_is_a_problem_and_the_others_are_still_tried(monkeypatch):
    right = doctor.sparse_attention

    def broken(q, k, v, patterns, *, backend):
        if backend == "blocked":
            raise RuntimeError("no kernel image\nand more")
        return right(q, k, v, patterns, backend=backend)

    monkeypatch.setattr(doctor, "sparse_attention", broken)
    found = list(doctor._self_test())
    assert marks(found) == ["ok", "problem", "problem", "problem"]
    assert found[1].text.endswith("RuntimeError: no kernel image")


def test_a_full_disk_and_a_place_that_is_no_folder_are_problems(monkeypatch):
    assert marks(doctor._folders()) == ["ok", "ok"]
    Path("data").write_text("a file")
    monkeypatch.setenv("SPARSE_TX_DATA", "data/here")
    assert marks(doctor._folders()) == ["ok", "problem"]
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    assert marks(doctor._folders()) == ["problem", "problem"]


def test_commands_and_mistakes_are_told_in_a_few_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparse-tx"])
    cli.main()
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMPOSED | cli.PLAIN)
    for arguments, message in ((["trian"], "did you mean train?"), (["fly"], "use one of train, evaluate")):
        monkeypatch.setattr(sys, "argv", ["sparse-tx", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert message in str(stopped.value)


def test_a_full_disk_is_told_in_one_line(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "outputs/config.yaml")

    monkeypatch.setattr("sparse_tx.training.run.write_config", full)
    with pytest.raises(SystemExit, match=r"error: No space left on device: outputs/config\.yaml; make room"):
        run("python train.py debug=fast")


@pytest.mark.parametrize(
    ("started", "command"),
    [
        ("train.py", "python sample.py"),
        ("./train.py", "python sample.py"),
        ("/else where/train.py", "python '/else where/sample.py'"),
        ("/usr/bin/sparse-tx", "sparse-tx sample"),
        ("/site/sparse_tx/__main__.py", "python -m sparse_tx sample"),
        ("/usr/bin/pytest", "python sample.py"),
    ],
)
def test_the_next_command_is_spelled_as_this_one_was(monkeypatch, started, command):
    monkeypatch.setattr(sys, "argv", [started])
    assert spelled("sample") == command


def test_attention_is_imported_without_torchs_compiler():
    code = "import sys, sparse_tx.attention; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def completed():
    """completed(LINE) -> what bash offers there."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    from sparse_tx.completion import script

    def offers(line, before="", quick=True):
        asked = (
            f'{before}\nCOMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _sparse_tx; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        text = subprocess.run([bash, "-c", script() + asked], capture_output=True, text=True, check=True).stdout
        return text.split()

    return offers


def test_completion_offers_commands_groups_options_keys_and_files(completed):
    Path("runs").mkdir()
    assert completed("sparse-tx ") == [*cli.COMPOSED, *cli.PLAIN]
    assert completed("sparse-tx train exp") == ["experiment="]
    experiments = sorted(p.stem for p in (config_folder() / "experiment").glob("*.yaml"))
    assert completed("sparse-tx train seed=1 experiment=") == experiments
    assert completed("sparse-tx train -m model.la") == ["model.layers="]
    assert completed("sparse-tx train logger.wandb.pro") == ["logger.wandb.project="]
    assert completed("sparse-tx train dry_run=") == ["true", "false"]
    assert completed("sparse-tx evaluate checkpoint=ru") == ["runs"]
    assert completed("sparse-tx train experiment=cifar10_f", "COMP_WORDBREAKS=") == [
        "experiment=cifar10_fast",
        "experiment=cifar10_fixed",
        "experiment=cifar10_full",
    ]


def test_every_key_offered_is_a_key_of_the_command(completed, compose):
    from sparse_tx.command import SCHEMAS
    from sparse_tx.merge import explain_unknown

    for command, schema in SCHEMAS.items():
        offered = [word.removesuffix("=") for word in completed(f"sparse-tx {command} x=1 ")]
        groups = {p.name for p in config_folder().iterdir() if p.is_dir()}
        assert {f.name for f in dataclasses.fields(schema)} <= {key.partition(".")[0] for key in offered}
        assert all(key in groups or explain_unknown(key, schema) is None for key in offered)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was installed, without its dependencies: those of this Python are used."""
    place = tmp_path_factory.mktemp("installed")
    source = place / "source"
    wanted = ("pyproject.toml", "README.md", "LICENSE", "configs", "sparse_tx")
    source.mkdir()
    for name in wanted:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(place / "site"), str(source)], check=True, capture_output=True)
    return place / "site"


def test_the_wheel_alone_trains_scores_samples_and_exports_in_an_empty_folder(installed, tmp_path):
    assert sorted(p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")) == ["bin", "sparse_tx"]
    environment = os.environ | {"PYTHONPATH": str(installed), "SPARSE_TX_DATA": str(tmp_path / "data")}
    program = str(installed / "bin" / "sparse-tx")

    def run(*arguments):
        result = subprocess.run(
            [sys.executable, program, *arguments], capture_output=True, text=True, env=environment, timeout=300
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert str(installed / "sparse_tx" / "configs") in run("doctor")
    out = run("train", "debug=fast", "trainer=cpu", "trainer.max_steps=2")
    path = re.search(r"^checkpoint: (.*)$", out, re.MULTILINE)[1]
    assert f"evaluate: sparse-tx evaluate checkpoint={path} split=test" in out
    assert "wrote: shared" in run("export", f"checkpoint={path}", "to=shared", "debug=fast")
    assert "bits/byte: " in run("evaluate", "checkpoint=shared", "debug=fast")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outputs", "shared"]


def test_the_lock_holds_every_dependency_by_hash_within_its_bounds_and_no_address():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|^-", text, re.MULTILINE)
    entries = re.split(r"\n(?=[A-Za-z0-9])", text.partition("\n")[2])
    pins: dict[str, list] = {}
    for entry in entries[1:]:
        assert "--hash=sha256:" in entry, entry
        pin = Requirement(entry.partition("\\")[0])
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    shipped = [w for extra in ("wandb", "tensorboard", "plots", "hub") for w in project["optional-dependencies"][extra]]
    for wanted in map(Requirement, [*project["dependencies"], *shipped]):
        found = pins.get(canonicalize_name(wanted.name), [])
        assert found, f"{wanted} is not in requirements.lock: run tools/lock"
        for pin in found:
            (version,) = (s.version for s in pin.specifier)
            assert version in wanted.specifier, f"{pin} does not fit {wanted}: run tools/lock"
