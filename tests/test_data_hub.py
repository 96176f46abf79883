"""Datasets of the hub: one fixed revision, streamed by `datasets`, the same bytes as from a folder."""

import io
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from sparse_tx import UserError
from sparse_tx.data import DataSpec, prepare
from sparse_tx.data.hub import hub_set

datasets = pytest.importorskip("datasets")
REVISION = "0123456789abcdef0123456789abcdef01234567"
SOURCE = f"hf://datasets/someone/something@{REVISION}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands in for the repository: `datasets` opens it in the hub's place."""
    folder = tmp_path / "repository"
    folder.mkdir()
    load = datasets.load_dataset

    def local(repository, configuration, *, revision, streaming):
        assert (repository, configuration, revision, streaming) == ("someone/something", None, REVISION, True)
        return load(str(folder), streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return folder


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": "a.png"}


def wav(sound):
    out = io.BytesIO()
    soundfile.write(out, sound, 24_000, format="WAV")
    return {"bytes": out.getvalue(), "path": "a.wav"}


def spec(source, name="imagenet64", kind="image", context=48, **change):
    return DataSpec(name=name, kind=kind, context=context, source=str(source), **change)


def test_images_of_the_hub_are_those_of_its_files(hub):
    images = np.random.default_rng(0).integers(256, size=(60, 4, 4, 3), dtype=np.uint8)
    for split, part in (("train", images[:50]), ("validation", images[50:])):
        pq.write_table(pa.table({"image": [png(x) for x in part]}), hub / f"{split}.parquet")
    streamed, read = prepare(spec(SOURCE, version="box")), prepare(spec(hub, version="box"))
    for split in ("train", "validation", "test"):
        assert np.array_equal(streamed.split(split), read.split(split))
    assert streamed.meta["source"] == SOURCE
    assert REVISION in str(streamed.meta["made_from"])


def test_recordings_of_the_hub_are_read_without_being_decoded_by_it(hub, tmp_path):
    rng = np.random.default_rng(0)
    sounds = [rng.uniform(-0.5, 0.5, 2_000 + 10 * k) for k in range(5)]
    pq.write_table(pa.table({"audio": [wav(x) for x in sounds]}), hub / "train-00000.parquet")
    prepared = prepare(spec(SOURCE, "audio", "audio", 64))
    names = sorted(r["name"] for split in prepared.meta["recordings"].values() for r in split)
    assert names == [f"train/{k:08d}" for k in range(5)]
    assert sum(prepared.meta["counts"].values()) == pytest.approx(sum(map(len, sounds)) / 2, abs=5)


def test_without_downloads_nothing_is_streamed(hub):
    for what in (spec(SOURCE), spec(SOURCE, "audio", "audio", 64)):
        with pytest.raises(UserError, match="downloads are off"):
            prepare(what, download=False)


def test_a_repository_that_cannot_be_opened_ends_with_what_to_do(monkeypatch):
    class OfAnHttpClient(Exception):
        pass

    def gone(*_, **__):
        raise OfAnHttpClient("cannot reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(UserError, match=r"cannot be opened: cannot reach the hub\. .*data\.source=FOLDER"):
        prepare(spec(SOURCE))


@pytest.mark.parametrize(
    ("library", "what", "remedy"),
    [
        ("datasets", {}, r"needs the datasets library: pip install 'sparse-tx\[hub\]'"),
        ("soundfile", {"name": "audio", "kind": "audio", "context": 64}, "pip install soundfile soxr"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    hub, monkeypatch, tmp_path, library, what, remedy
):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=remedy):
        prepare(spec(tmp_path if what else SOURCE, **what))


def test_a_source_of_the_hub_must_name_a_fixed_revision():
    assert hub_set("/a/folder") is None
    assert str(hub_set(SOURCE)) == SOURCE
    assert hub_set(f"{SOURCE}:small").configuration == "small"
    for source in ("hf://datasets/a/b", "hf://datasets/a/b@main"):
        with pytest.raises(UserError, match=r"names no fixed revision.*commits/main"):
            hub_set(source)
    with pytest.raises(UserError, match="is not of the form"):
        hub_set("hf://models/a")
