"""The kernels' tests in Triton's interpreter, which must be chosen before triton is imported: a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


HALF = "any_shape or slots or packed or opcheck or compiled or walks"


@pytest.mark.parametrize(("file", "part"), [("kernels", HALF), ("kernels", f"not ({HALF})"), ("decode_kernels", "")])
def test_kernels_pass_in_the_interpreter(file, part):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-k", part, str(here / f"test_{file}.py")]
    done = subprocess.run(
        command, cwd=here.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
