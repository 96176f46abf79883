"""How commands are spelled for the user who started this one."""

import shlex
import sys
from pathlib import Path

SCRIPTS = ("train", "evaluate", "sample")


def spelled(command: str) -> str:
    """`python evaluate.py`, by the path of the script that was started, or `sparse-tx evaluate` where the installed
    program was."""
    started = Path(sys.argv[0])
    if started.stem == "sparse-tx":
        return f"sparse-tx {command}"
    if started.parent.name == "sparse_tx" or command not in SCRIPTS:
        return f"python -m sparse_tx {command}"
    script = f"{command}.py"
    if started.suffix == ".py" and started.stem in SCRIPTS:
        script = str(started.with_name(script))
    return f"python {shlex.quote(script)}"
