"""Long work tells how far it is: a bar on a terminal, lines elsewhere, nothing if it is short."""

import io

import pytest

from sparse_tx.data import progress


@pytest.fixture
def clock(monkeypatch):
    """clock(T, ...): the times that are read, in order."""

    def set_to(*times):
        left = iter(times)
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(left))

    return set_to


def test_lines_have_the_speed_and_the_time_left(clock, capsys):
    clock(0.0, 1.0, 10.0, 15.0, 20.0, 30.0)
    with progress.Progress("drawing", 3000, "bytes") as told:
        for _ in range(4):
            told.add(500)
    assert capsys.readouterr().err.splitlines() == [
        "drawing: 1,000 of 3,000 bytes, 100 bytes/s, 20 s left",
        "drawing: 2,000 of 3,000 bytes, 100 bytes/s, 10 s left",
        "drawing: 2,000 of 3,000 bytes, 67 bytes/s, 15 s left",
    ]


def test_what_was_there_before_is_no_speed_and_an_unknown_total_has_no_end(clock, capsys):
    clock(0.0, 4.0, 8.0)
    with progress.Progress("downloading", 100_000_000, "MB", 1e6, done=90_000_000) as told:
        told.add(8_000_000)
    clock(0.0, 4.0, 4.0)
    with progress.Progress("decoding", None, "images") as told:
        told.add(1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "downloading: 98 of 100 MB, 2.0 MB/s, 1 s left"
    assert lines[2:] == ["decoding: 1,000 images, 250 images/s"] * 2


def test_short_work_says_nothing(clock, capsys):
    clock(0.0, 1.0, 1.9)
    with progress.Progress("drawing", 20, "bytes") as told:
        told.add(10)
        told.add(10)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_has_speed_and_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    with progress.Progress("drawing", 2000, "bytes") as told:
        told.add(500)
        told._bar.refresh()
        seen = progress.sys.stderr.getvalue()
    assert "500 of 2,000 bytes" in seen
    assert "bytes/s" in seen
    assert "s left" in seen
