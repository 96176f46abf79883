"""Composing configs as the scripts do, in a folder of the test's own."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, and its subprocesses: more of them wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import hydra
import pytest

from sparse_tx.config import config_folder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py, evaluate.py and sample.py are scripts, not part of the package


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSE_TX_RUN_FOLDER", raising=False)
    monkeypatch.setenv("SPARSE_TX_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def compose():
    """compose("train", "experiment=cifar10_strided", ...) -> DictConfig."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield lambda name, *overrides: hydra.compose(name, list(overrides))


@pytest.fixture
def trained(compose):
    """trained("data=cifar10", ...) -> what train.py returns for debug=fast and these overrides."""
    from train import train

    return lambda *overrides: train(compose("train", "debug=fast", "trainer=cpu", *overrides))
