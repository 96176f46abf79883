"""`sparse-tx COMMAND ...`: every command of the project from one program, in any folder."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from typing import Any

from sparse_tx import __version__

COMPOSED = {
    "train": "train a model: sparse-tx train experiment=cifar10_strided",
    "evaluate": "score a checkpoint in bits per dim: sparse-tx evaluate checkpoint=PATH split=test",
    "sample": "draw images, text or audio: sparse-tx sample checkpoint=PATH count=16",
    "export": "share a model: sparse-tx export checkpoint=PATH to=FOLDER",
}
PLAIN = {
    "doctor": "what is installed, which backend would run, and a self-test",
    "completion": "shell completion: sparse-tx completion bash|zsh",
}


def usage() -> str:
    width = max(map(len, COMPOSED | PLAIN))
    lines = [f"  {name:{width}}  {what}" for name, what in (COMPOSED | PLAIN).items()]
    return "\n".join(
        [
            f"sparse-tx {__version__}: the Sparse Transformer on images, text and audio as raw bytes",
            "",
            "usage: sparse-tx COMMAND [KEY=VALUE ...]",
            "",
            *lines,
            "",
            "All but the last two are composed by Hydra: `sparse-tx train --help` lists the groups and keys.",
        ]
    )


def main() -> None:
    """Runs the command that sys.argv names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name in COMPOSED:
        _composed(name)
    elif name == "doctor":
        from sparse_tx.doctor import doctor

        sys.exit(doctor(rest))
    elif name == "completion":
        from sparse_tx.completion import completion

        sys.exit(completion(rest))
    else:
        near = difflib.get_close_matches(name, COMPOSED | PLAIN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMPOSED | PLAIN)}"
        sys.exit(f"error: sparse-tx has no command {name}: {hint}")


def _composed(name: str) -> None:
    """A command of Hydra's, which reads sys.argv without the command's name."""
    from sparse_tx import command, entry

    function: Callable[[Any], Any] = getattr(entry, name)
    whole = list(sys.argv)

    def as_started(cfg: Any) -> Any:
        # Lightning starts the other processes of a run by this very command line, name and all.
        short, sys.argv[:] = list(sys.argv), whole
        try:
            return function(cfg)
        finally:
            sys.argv[:] = short

    sys.argv[1:] = whole[2:]
    try:
        command.main(as_started, name)
    finally:
        sys.argv[:] = whole
