"""What a run shows of itself while it goes on."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from sparse_tx.training.peak import peak_flops
from sparse_tx.training.progress import Bar, Entry, Progress
from sparse_tx.training.words import clock, gibibytes, readable

ENTRY = Entry(step=340, bits=3.5015, bytes_per_second=1.34e6, utilisation=0.312, learning_rate=4e-3, seconds_left=3723)


@pytest.mark.parametrize(
    ("name", "half", "teraflops"),
    [
        ("NVIDIA H200", True, 989),
        ("NVIDIA H100 80GB HBM3", True, 989),
        ("NVIDIA H100 PCIe", True, 756),
        ("NVIDIA GH200 480GB", True, 989),
        ("NVIDIA A100-SXM4-80GB", False, 19.5),
        ("Tesla V100-SXM2-16GB", True, 125),
        ("NVIDIA L4", True, 121),
        ("NVIDIA L40S", True, 362),
        ("NVIDIA GeForce RTX 4090", False, 82.6),
    ],
)
def test_peaks_are_those_of_the_datasheets_without_sparsity(name, half, teraflops):
    assert peak_flops(name, half=half) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA L400",
        "Radeon",
        "NVIDIA A1000",
    ],
)
def test_a_gpu_that_is_not_known_has_no_peak_rather_than_an_invented_one(name):
    assert peak_flops(name, half=True) is None


def test_utilisation_is_the_models_flops_over_the_peak():
    progress = Progress(None, every=1, max_steps=1, bytes_a_step=1000, flops_a_step=int(2e12), half=True)
    assert progress.utilisation(5000.0) is None
    progress.peak = 40e12
    assert progress.utilisation(5000.0) == pytest.approx(5 * 2 / 40)


def screen(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_shows_bits_speed_utilisation_and_time_left_within_the_terminal(width):
    console = screen(width)
    bar = Bar(2000, "bits/byte", console)
    bar.start(300)
    bar.step(340)
    bar.entry(ENTRY)
    bar.scored(340, 3.6036)
    bar.stop()
    last = console.file.getvalue().rsplit("training", 1)[1]
    for text in ("340/2000", "left 01:02:03", "train 3.5015 val 3.6036 bits/byte", "1.34M bytes/s"):
        assert text in last
    assert ("31.2% of peak" in last) == (width > 60)
    assert all(len(line) <= width for line in re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", last).splitlines()[1:])


def test_what_is_printed_while_the_bar_is_drawn_stays_whole(capsys):
    console = screen(80)
    bar = Bar(10, "bits/dim", console)
    bar.start(0)
    print("wrote: samples.png")
    bar.stop()
    assert "wrote: samples.png\n" in console.file.getvalue()


def test_scoring_the_last_weights_leaves_nothing_on_the_screen_but_shows_how_far_it_is():
    console = screen(80)
    bar = Bar(10, "bits/dim", console)
    bar.start(10, training=False)
    bar.scoring(3, 8)
    bar._live.refresh()
    assert "3/8" in console.file.getvalue()
    assert "10/10" not in console.file.getvalue()
    bar.stop()
    assert console.file.getvalue().endswith("\x1b[2K")


def test_a_run_without_a_terminal_prints_a_line_every_so_many_steps_and_no_control_codes(trained, capsys):
    trained("callbacks.log_every=2", "callbacks.validate_every=6")
    out = capsys.readouterr().out
    steps = re.findall(r"^step (\d)/6  train \d\.\d{4} bits/byte  \S+ bytes/s  lr \S+  left \d\d:\d\d:\d\d$", out, re.M)
    assert steps == ["2", "4", "6"]
    assert len(re.findall(r"^step 6/6  validation \d\.\d{4} bits/byte$", out, re.M)) == 1
    assert "\x1b" not in out
    assert "\r" not in out


def test_a_run_opens_with_what_it_costs_and_where_each_pattern_is(trained, capsys):
    trained("data=cifar10", "attention=strided", "model.layers=8", "trainer.max_steps=1", "data.limit=1")
    out = capsys.readouterr().out
    assert re.search(r"^parameters: \d\.\d\dM$", out, re.M)
    assert re.search(r"^FLOPs: \S+ a step$", out, re.M)
    assert re.search(r"^memory: \d+ MiB expected", out, re.M)
    assert re.search(r"^attention: strided interleaved: layers 1, 5 of 8: Column\(", out, re.M)
    assert re.search(r"^attention: strided interleaved: layers 2, 3, 4, 6, 7, 8 of 8: Window\(", out, re.M)
    assert re.search(r"^backend: blocked on cpu, 32-true$", out, re.M)


def test_a_run_counts_all_its_steps_wherever_entries_and_validations_fall(trained, capsys):
    trained("trainer.max_steps=11", "callbacks.log_every=4", "callbacks.validate_every=3")
    assert re.search(r"^trained: 11 steps in ", capsys.readouterr().out, re.M)


def test_a_run_ends_with_its_best_step(trained, capsys):
    run = trained()
    found = re.search(r"^validation: .* ema weights, step (\d)$", capsys.readouterr().out, re.M)
    assert int(found[1]) == run["best_step"]
    assert Path(run["checkpoint"]).name == ("last.ckpt" if run["best_step"] == 6 else "best.ckpt")


def test_numbers_are_short_and_times_are_clocks():
    assert [readable(n) for n in (999, 1234, 1234567, 6.6e18)] == ["999", "1.23k", "1.23M", "6.6E"]
    assert [clock(s) for s in (59.6, 3723, 90061)] == ["00:01:00", "01:02:03", "1d 01:01:01"]
    assert [gibibytes(n) for n in (14 * 2**20, 79.2 * 2**30)] == ["14 MiB", "79.2 GiB"]
