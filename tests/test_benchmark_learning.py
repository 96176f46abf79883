"""The curves of runs are read off their folders, and compared where they can be."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import learning  # noqa: E402


def a_run(folder, seconds_a_step, bits, steps=100, first=5.0, kind="image"):
    """As train.py leaves it: an entry each 10 steps, a validation each 20 and one at the end; `first` s to compile."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"kind": kind, "batch_size": 4, "context": 3072}}))
    rows = []
    for step in range(10, steps + 1, 10):
        seconds = first + seconds_a_step * step
        rows.append({"step": step - 1, "train/seconds": seconds, "train/bits_per_dim": bits(step) - 0.1})
        rows[-1]["train/bytes_per_second"] = 4 * 3072 / seconds_a_step
        if step % 20 == 0:
            rows.append({"step": step - 1, "val/bits_per_dim": bits(step)})
    rows.append({"step": steps, "val/bits_per_dim": bits(steps)})
    with open(folder / "metrics.csv", "w") as file:
        writer = csv.DictWriter(file, sorted({k for r in rows for k in r}))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "result.json").write_text(json.dumps({"steps": steps}))
    return folder


def test_time_is_that_of_training_without_what_the_first_steps_take_longer(tmp_path):
    curve = learning.read(f"ours={a_run(tmp_path / 'a', 0.5, lambda s: 8 - s / 50)}")
    assert curve.steps.tolist() == [20, 40, 60, 80, 100]
    assert curve.seconds.tolist() == pytest.approx([10, 20, 30, 40, 50])
    assert curve.bits.tolist() == pytest.approx([7.6, 7.2, 6.8, 6.4, 6.0])
    assert (curve.name, curve.unit, curve.bytes_a_step) == ("ours", "bits/dim", 12288)
    assert curve.at("seconds", 25) == pytest.approx(7.0)
    assert curve.at("steps", 10) is None


def test_runs_are_compared_at_equal_minutes_and_steps_and_seeds_have_a_spread(tmp_path):
    runs = [
        f"fast={a_run(tmp_path / 'a', 0.5, lambda s: 8 - s / 50)}",
        f"fast={a_run(tmp_path / 'b', 0.5, lambda s: 7.9 - s / 50)}",
        f"slow={a_run(tmp_path / 'c', 1.0, lambda s: 8 - s / 50)}",
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "learning.py"), *runs, "--plot", "c.png", "--json", "c.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| 0.83 | 5.9500 +- 0.0500 | 7.0000 |" in done.stdout  # after 50 s
    assert "| 100 | 5.9500 +- 0.0500 | 6.0000 |" in done.stdout
    assert len(json.loads((tmp_path / "c.json").read_text())) == 3
    assert (tmp_path / "c.png").stat().st_size > 0


def test_the_estimate_finds_a_law_that_the_runs_follow():
    minutes = np.array([2.0, 5.0, 10.0, 20.0])
    a, b, c = learning.fit(minutes, 2.5 + 0.9 * minutes**-0.4)
    assert (a, b, c) == pytest.approx((2.5, 0.9, 0.4), rel=0.02)


def test_what_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(SystemExit, match=r"nothing is no run of train.py with logger=csv"):
        learning.read(str(tmp_path / "nothing"))
    short = a_run(tmp_path / "short", 1.0, lambda s: 8.0, steps=10)
    with pytest.raises(SystemExit, match="1 entries and 1 validations: 3 and 2 are needed"):
        learning.read(str(short))
    runs = [learning.read(str(a_run(tmp_path / n, 1.0, lambda s: 8.0))) for n in ("d", "e")]
    with pytest.raises(SystemExit, match="runs of three lengths or more: these have 1"):
        learning.estimate(runs, 2.8)
