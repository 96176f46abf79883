"""Where a run's numbers and media go, and that no logger can stop a run."""

import csv
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from sparse_tx.checkpoint import read_checkpoint
from sparse_tx.config import training
from sparse_tx.training import loggers as loggers_module
from sparse_tx.training import run as run_module
from sparse_tx.training import wandb_run
from sparse_tx.training.wandb_run import WandbRun

wandb = pytest.importorskip("wandb")
OFFLINE = ("logger=wandb", "logger.wandb.offline=true")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # a session of an earlier test would keep that test's environment


def folder_of(run):
    return Path(run["checkpoint"]).parent.parent


def records(folder):
    """Every record of the one offline run in a folder, by Weights & Biases' own protocol buffers.

    The file is LevelDB's log: 7 bytes, then blocks of 32 KiB of (checksum, length, type) and data; types 1 and 4 end a
    record.
    """
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service writes the end of the file some time after the end of the run
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            yield found
            record = b""


def history(folder):
    rows = [r.history.item for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def start_of(folder):
    return next(r.run for r in records(folder) if r.WhichOneof("record_type") == "run")


def test_csv_tensorboard_and_wandb_hold_the_same_numbers_by_step(trained):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = folder_of(trained("logger=[csv,tensorboard,wandb]", "logger.wandb.offline=true"))
    with open(folder / "metrics.csv") as file:
        written = list(csv.DictReader(file))
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for key in ("train/bits_per_dim", "train/bytes_per_second", "train/gradient_norm", "train/learning_rate"):
        by_csv = {int(r["step"]): float(r[key]) for r in written if r[key]}
        assert len(by_csv) == 6
        assert {e.step: e.value for e in events.Scalars(key)} == pytest.approx(by_csv)
        assert {r["trainer/global_step"]: r[key] for r in history(folder) if key in r} == pytest.approx(by_csv)
    scores = {r["trainer/global_step"]: r["val/bits_per_dim"] for r in history(folder) if "val/bits_per_dim" in r}
    by_csv = {int(r["step"]): float(r["val/bits_per_dim"]) for r in written if r["val/bits_per_dim"]}
    assert scores == pytest.approx(by_csv)


def test_wandb_has_the_config_as_plain_data_and_what_the_run_costs(trained):
    folder = folder_of(trained(*OFFLINE, "logger.wandb.tags=[paper]"))
    start = start_of(folder)
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert config["model"]["width"] == 64
    assert config["run"]["parameters"] > 0
    assert (start.run_group, start.display_name, list(start.tags)) == (folder.parent.name, folder.name, ["paper"])


def test_images_audio_and_text_land_in_the_offline_folder_with_the_step_as_x_axis(compose, tmp_path):
    config = training(compose("train", "debug=fast", *OFFLINE))
    (logger,) = loggers_module.make_loggers(config, tmp_path, facts={})
    logger.log_image("samples/images", [np.zeros((8, 8, 3), np.uint8)], step=40, caption=["t 1.0"])
    logger.log_audio("samples/audio", [np.zeros(600, np.float32)], step=40, sample_rate=[12000])
    logger.log_text("samples/text", columns=["text"], data=[["def "]], step=40)
    loggers_module.close_loggers([logger], failed=False)
    media = {p.suffix for p in tmp_path.glob("wandb/offline-run-*/files/media/**/*") if p.is_file()}
    assert media == {".png", ".wav", ".json"}
    logged = [r for r in history(tmp_path) if any(k.startswith("samples/") for k in r)]
    assert len(logged) == 3
    assert {r["trainer/global_step"] for r in logged} == {40}


def test_a_resumed_run_goes_on_as_the_same_run_at_wandb_and_another_config_does_not(trained):
    first = trained(*OFFLINE)
    path = folder_of(first) / "checkpoints" / "step-00000003.ckpt"
    same, other = trained(*OFFLINE, f"resume={path}"), trained(*OFFLINE, f"resume={path}", "optimizer.lr=1e-3")
    ids = [start_of(folder_of(run)).run_id for run in (first, same, other)]
    assert ids[0] == ids[1] != ids[2]
    assert read_checkpoint(same["checkpoint"]).contents["sparse_tx"]["wandb_run"] == ids[0]
    assert min(r["trainer/global_step"] for r in history(folder_of(same))) == 3


def test_a_checkpoint_becomes_an_artifact_on_request_alone(trained):
    kept, plain = trained(*OFFLINE, "logger.wandb.checkpoints=true"), trained(*OFFLINE)

    def artifacts(run):
        return [r.artifact for r in records(folder_of(run)) if r.WhichOneof("record_type") == "artifact"]

    (artifact,) = artifacts(kept)
    assert artifact.type == "model"
    assert json.loads(artifact.metadata)["val/bits_per_dim"] == kept["val/bits_per_dim"]
    assert artifacts(plain) == []


def test_a_server_that_cannot_be_reached_is_told_and_the_run_goes_on_offline(trained, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_run, "INIT_SECONDS", 1)
    run = trained("logger=wandb")
    assert "wandb: cannot be reached" in capfd.readouterr().err
    assert len([r for r in history(folder_of(run)) if "train/bits_per_dim" in r]) == 6


def test_a_logging_service_that_dies_is_told_once_and_the_run_goes_on(trained, monkeypatch, capfd):
    started = WandbRun.started

    def dying(*arguments, **settings):
        logger = started(*arguments, **settings)
        monkeypatch.setattr(logger.experiment, "log", lambda *_: (_ for _ in ()).throw(ConnectionResetError("lost")))
        return logger

    monkeypatch.setattr(WandbRun, "started", dying)
    lost = trained(*OFFLINE)
    assert lost["steps"] == 6
    assert capfd.readouterr().err.count("wandb: stopped logging (lost)") == 1
    monkeypatch.setattr(WandbRun, "started", started)
    following = trained(*OFFLINE)  # in the same process, as in a sweep
    assert len(history(folder_of(following))) > 0
    assert start_of(folder_of(following)).run_id != start_of(folder_of(lost)).run_id


def test_without_a_key_wandb_is_offline_and_a_key_of_its_host_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert not loggers_module._has_key()
    (tmp_path / "netrc").write_text("machine elsewhere.example.com login user password wandb\n")
    assert not loggers_module._has_key()
    (tmp_path / "netrc").write_text(f"machine wandb.example.com login user password {'0' * 40}\n")
    assert loggers_module._has_key()


def test_a_run_that_goes_on_in_its_own_folder_keeps_the_rows_it_has(compose, tmp_path):
    config = training(compose("train", "debug=fast", "trainer=cpu"))
    folder = tmp_path / "run"
    folder.mkdir()
    run_module.train(config, folder)
    whole = (folder / "metrics.csv").read_text()
    for name in ("last.ckpt", "best.ckpt", "step-00000006.ckpt"):
        (folder / "checkpoints" / name).unlink()
    run_module.train(config, folder)

    def bits(text):
        rows = [(r["step"], r["train/bits_per_dim"]) for r in csv.DictReader(text.splitlines())]
        return [row for row in rows if row[1]]

    assert bits((folder / "metrics.csv").read_text()) == bits(whole)
    assert len(bits(whole)) == 6
