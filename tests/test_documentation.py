"""The documents are true: every command and every piece of Python in them runs, the reference is up to date."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import arguments_of, fast, hydra_of_its_own, run

from sparse_tx.entry import export, train

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(p for p in (ROOT / "docs").glob("*.md") if p.name != "config.md")])
# Lines of the documents that are not run here, by how they begin, and why.
NOT_RUN = {
    "pip install": "the network, and the environment is not a test's to change",
    "docker ": "Docker and a GPU host",
    "hf auth login": "an account on the hub",
    "python -m sparse_tx.export checkpoint=PATH to=hub": "an account on the hub; test_export.py makes one up",
    "python sample.py checkpoint=hub:USER/NAME": "the hub; test_export.py makes one up",
    "python train.py trainer=gpu": "a GPU",
}
# Written for real data and hours: what they become for a twin's 64 bytes and a few steps.
CHANGES = {
    r"evaluation\.min_context=12160": "evaluation.min_context=32",
    r"trainer\.max_steps=\d{3,}": "trainer.max_steps=6",
}


def blocks(document, *languages):
    """(language, title, text) of the fenced blocks of a document."""
    found = re.findall(r"^```(\w*)(?: title=\"(.*?)\")?\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, title, text) for language, title, text in found if language in languages]


def lines(document):
    """Command lines, without what follows a #."""
    text = "".join(text for _, _, text in blocks(document, "", "bash"))
    return [line for row in text.splitlines() if (line := re.sub(r"\s+#.*", "", row).strip())]


def not_run(line):
    return next((start for start in NOT_RUN if line.startswith(start)), None)


EXTENDING = ROOT / "docs" / "extending.md"
ASKED = re.compile(r'eval "\$\((.*)\)"')
# Each once, however it is spelled.
COMMANDS = list(
    {
        tuple(arguments_of(fast(ASKED.sub(r"\1", line)))): line
        for document in DOCUMENTS
        if document != EXTENDING
        for line in lines(document)
        if not not_run(line)
    }.values()
)


def test_what_is_not_run_is_still_in_the_documents():
    everything = [line for document in DOCUMENTS for line in lines(document)]
    assert {not_run(line) for line in everything} - {None} == set(NOT_RUN)
    assert len(COMMANDS) > 20


@pytest.fixture(scope="module")
def places(tmp_path_factory, compose):
    """What the documents' placeholders stand for: PATH, RESUMED, MODEL, FILE, FOLDER."""
    folder = tmp_path_factory.mktemp("places")
    tiny = ("debug=fast", "trainer=cpu", "trainer.max_steps=2", f"output={folder}/outputs")
    path = train(compose("train", *tiny))["checkpoint"]
    resumed = train(compose("train", "experiment=cifar10_strided", *tiny[:2], f"output={folder}/outputs"))["checkpoint"]
    model = export(compose("export", f"checkpoint={path}", f"to={folder}/model", "debug=fast", "device=cpu"))
    (folder / "start.txt").write_bytes(b"def ")
    notes = folder / "notes"
    notes.mkdir()
    for n in range(12):
        (notes / f"{n}.md").write_bytes(b"# A note\n\nOf some length, so that it can be read.\n" * 9)
    return {"PATH": path, "RESUMED": resumed, "MODEL": model, "FILE": folder / "start.txt", "FOLDER": notes}


def filled(command, places):
    command = command.replace("resume=PATH", "resume=RESUMED")
    for written, real in {**places, **CHANGES}.items():
        command = re.sub(rf"(?<![\w-]){written}(?![\w/])", str(real), command)
    return command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_documents_runs_with_debug_fast(command, places, capfd, monkeypatch):
    for package in ("tensorboard", "wandb"):
        if package in command:
            pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")  # also where a key is found
    asked = ASKED.fullmatch(command)
    command = fast(filled(asked[1] if asked else command, places))
    if "trainer=ddp" in command:  # it starts its other processes by its own command line
        words = command.replace("python ", f"{sys.executable} ").replace("train.py", str(ROOT / "train.py")).split()
        subprocess.run(words, check=True, capture_output=True, timeout=300)
    else:
        run(command)
    if asked:
        subprocess.run(["bash", "-n"], input=capfd.readouterr().out, text=True, check=True)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d != EXTENDING], ids=lambda d: d.name)
def test_the_python_of_the_documents_runs(document, places):
    names: dict = {}
    for _, _, code in blocks(document, "python"):
        code = re.sub(r'"(PATH|MODEL)"', lambda m: repr(str(places[m[1]])), code)
        with hydra_of_its_own():
            exec(code, names)
    if document.name == "README.md":
        assert names["logits"].shape == (1, 60, 256)
        assert names["out"].shape == (1, 3072, 2, 64)


def apply(diff, path):
    """Puts a block of changes into a file: its old lines must be there, once."""
    rows = diff.splitlines()
    old, new = ("\n".join(row[1:] for row in rows if row[:1] in (" ", mark)) for mark in "-+")
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} does not have these lines once:\n{old}"
    path.write_text(text.replace(old, new))


def test_the_page_on_extending_is_tried_as_written(places, tmp_path):
    project = tmp_path / "project"
    for name in ("sparse_tx", "configs"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    programs = []
    for language, title, text in blocks(EXTENDING, "python", "yaml", "diff"):
        if language == "diff":
            apply(text, project / title)
        elif title:
            (project / title).write_text(text)
        else:
            programs.append(text)
    trial = "import re, sys; sys.path.insert(0, sys.argv.pop(1)); from running import run\n"
    path = tmp_path / "trial.py"
    train_first = "run('python train.py attention=powers debug=fast trainer.max_steps=1 output=first')\n"
    find = "import pathlib; made = next(pathlib.Path('first').rglob('last.ckpt'))\n"
    commands = [fast(filled(c, {**places, "PATH": "MADE"})) for c in lines(EXTENDING) if "max_steps=5" not in c]
    real = [filled(c, places) for c in lines(EXTENDING) if "max_steps=5" in c]
    assert len(real) == 1
    calls = "".join(f"run({c!r}.replace('MADE', str(made)))\n" for c in [*commands, *real])
    path.write_text("\n".join([trial, *programs, train_first + find + calls]))
    result = subprocess.run(
        [sys.executable, str(path), str(ROOT / "tests")],
        capture_output=True, text=True, timeout=300, env={**__import__("os").environ, "PYTHONPATH": str(project)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "data: notes, context 256" in result.stdout


def test_the_reference_of_keys_is_up_to_date():
    from tools.config_reference import page

    assert page() == (ROOT / "docs" / "config.md").read_text(), "run: python tools/config_reference.py"


def test_links_and_pictures_of_the_documents_are_there():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "sparse_attention" in (tmp_path / "site" / "api" / "index.html").read_text()


def test_the_notebook_runs_cell_by_cell_and_holds_no_output(monkeypatch, capsys):
    import json

    pyplot = pytest.importorskip("matplotlib.pyplot")
    notebook = json.loads((ROOT / "notebooks" / "first_steps.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    monkeypatch.setenv("STEPS", "4")
    pyplot.switch_backend("agg")
    text = "\n".join("".join(cell["source"]) for cell in code).replace("data.limit=64", "data.limit=4")
    names: dict = {}
    with hydra_of_its_own():
        exec(compile(text, "first_steps.ipynb", "exec"), names)
    pyplot.close("all")
    assert names["score"]["bits_per_dim"] > 0
    assert "differs from the oracle by" in capsys.readouterr().out
