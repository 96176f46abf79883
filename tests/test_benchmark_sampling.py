"""The sampling benchmark runs to its end without a GPU, and both of its arms give the logits of their forward pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_benchmark_runs_to_its_end_on_a_cpu(tmp_path):
    arguments = "--tiny --device cpu --workloads enwik8 --batches 3,best --json rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "sampling.py"), *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert result.returncode == 0, result.stderr
    assert "plain ok" in result.stdout
    assert "rival ok" in result.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(r["batch"], r["arm"]) for r in rows} == {(b, a) for b in (3, 8) for a in ("rival", "ours, plain")}
    assert all(0 < r["floor"] < r["ms"] for r in rows)


def environment():
    """A script in a folder of its own finds the package only where it is installed, or named here."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
