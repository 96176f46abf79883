"""Where a run puts its files, alone or as several processes, and what it leaves when it is cut off."""

import json
import signal
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from sparse_tx.checkpoint import read_checkpoint
from sparse_tx.training import callbacks
from sparse_tx.training.folders import new_run_folder


def test_processes_that_torchrun_starts_share_one_folder(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True)
    for key, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }.items():
        monkeypatch.setenv(key, value)
    folders = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        folders.append(new_run_folder("outputs", "demo"))
    assert len(set(folders)) == 1
    assert list(Path("outputs/demo").iterdir()) == [folders[0]]


def test_the_result_of_a_run_is_left_as_json(trained):
    run = trained()
    result = json.loads((Path(run["checkpoint"]).parent.parent / "result.json").read_text())
    assert result.pop("seconds") > 0
    assert result == run


def test_an_interrupted_run_says_how_it_goes_on_and_leaves_no_result(trained, monkeypatch, capsys):
    def interrupt(callback, trainer, *_):
        if trainer.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(callbacks.Divergence, "on_train_batch_end", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        trained()
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored: its process is about to end
    (path,) = Path("outputs").glob("*/*/checkpoints/last.ckpt")
    assert f"interrupted at step 4: resume={path} goes on from there, exactly" in capsys.readouterr().out
    assert read_checkpoint(path).step == 4
    assert not list(Path("outputs").glob("*/*/result.json"))
