"""Command lines of the documents in this process: starting Python for each would take most of the time."""

from __future__ import annotations

import contextlib
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def hydra_of_its_own() -> Iterator[None]:
    """Hydra's one global state as in a new process, and given back."""
    kept = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = kept


def arguments_of(command: str) -> list[str]:
    """What the program sparse-tx is given for `python train.py ...` and the like; a script's path for others."""
    program, *arguments = shlex.split(command)
    if program == "python":
        if arguments[:2] == ["-m", "sparse_tx"]:
            return arguments[2:]
        if arguments[:2] == ["-m", "sparse_tx.export"]:
            return ["export", *arguments[2:]]
        if arguments[0] in ("train.py", "evaluate.py", "sample.py"):
            return [arguments[0].removesuffix(".py"), *arguments[1:]]
        return arguments
    assert program == "sparse-tx", f"{command}: not a command of this project"
    return arguments


def run(command: str) -> None:
    """`python train.py ...`, `python -m sparse_tx ...` or `sparse-tx ...`. Raises SystemExit if it fails."""
    from sparse_tx import cli

    arguments = arguments_of(command)
    if arguments[0].endswith(".py"):
        return _script(ROOT / arguments[0], arguments[1:])
    if arguments[:2] == ["-m", "sparse_tx.data"]:
        return _script(ROOT / "sparse_tx" / "data", arguments[2:])
    given, sys.argv = sys.argv, ["sparse-tx", *arguments]
    try:
        with hydra_of_its_own():
            cli.main()
    except SystemExit as stopped:
        if stopped.code:
            raise
    finally:
        sys.argv = given


def _script(path: Path, arguments: list[str]) -> None:
    given, sys.argv = sys.argv, [str(path), *arguments]
    sys.path.insert(0, str(path.parent))  # as Python does: a benchmark imports what lies beside it
    try:
        with hydra_of_its_own():
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stopped:
        if stopped.code:
            raise
    finally:
        sys.argv = given
        sys.path.remove(str(path.parent))


def fast(command: str) -> str:
    """The command with debug=fast, or with what that sets where another option of the group is named."""
    if "debug=fast" in command or not any(f" {word} " in f" {command} " for word in COMPOSED):
        return command
    if "debug=" not in command:
        return f"{command} debug=fast"
    text = yaml.safe_load((ROOT / "configs" / "debug" / "fast.yaml").read_text())
    pairs = {f"{g}.{k}": v for g, keys in text.items() if isinstance(keys, dict) for k, v in keys.items()}
    words = [f"{k}={'null' if v is None else str(v).lower() if isinstance(v, bool) else v}" for k, v in pairs.items()]
    return " ".join([command, *map(shlex.quote, words)])


COMPOSED = (
    "train.py",
    "evaluate.py",
    "sample.py",
    "sparse_tx.export",
    "sparse_tx.data",
    "train",
    "evaluate",
    "sample",
    "export",
)

if __name__ == "__main__":  # several commands in one process of their own: python running.py COMMAND COMMAND ...
    for line in sys.argv[1:]:
        run(line)
