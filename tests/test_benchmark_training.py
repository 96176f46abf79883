"""The training benchmark runs to its end without a GPU, and ours has the losses of the plain model."""

import json
import subprocess
import sys
from pathlib import Path

from test_benchmark_sampling import environment

ROOT = Path(__file__).resolve().parent.parent


def test_the_benchmark_runs_to_its_end_on_a_cpu(tmp_path):
    arguments = "--tiny --device cpu --experiments enwik8 --arms ours,dense,without --json rows.json --plot bars.png"
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "losses of 2 layers against float32" in result.stdout
    assert "ours ok" in result.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["arm"] for r in rows] == ["dense", "without", "ours"]
    assert all(r["bytes_per_second"] > 0 and "error" not in r for r in rows)
    assert (tmp_path / "bars.png").stat().st_size > 0
