"""The benchmark of the host's time runs to its end in Triton's interpreter, and times what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_benchmark_sampling import environment

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


def test_the_benchmark_runs_to_its_end_in_the_interpreter(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "host.py"), "--tiny", "--json", "rows.json"]
    env = {**environment(), "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 6
    for row in rows:
        ours = not row["heads of"].startswith("torch: ")
        assert min(row["forward"], row["both"], row["one thread: both"]) > 0
        assert not ours or row["both"] > row["forward"]
        assert (row["packed: both"] is not None) == ours
