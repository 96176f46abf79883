"""How commands are spelled for the user who started this one."""

import sys
from pathlib import Path


def spelled(command: str) -> str:
    """`python evaluate.py` in a checkout, `sparse-tx evaluate` where the installed program was started."""
    started = Path(sys.argv[0])
    if started.stem == "sparse-tx":
        return f"sparse-tx {command}"
    if started.parent.name == "sparse_tx" or command not in ("train", "evaluate", "sample"):
        return f"python -m sparse_tx {command}"
    return f"python {command}.py"
