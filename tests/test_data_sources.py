"""Preparing data: the same bytes from any form of a source, nothing half-made ever used, mistakes told in one line."""

import hashlib
import io
import json
import multiprocessing
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sparse_tx import UserError
from sparse_tx.data import DataSpec, prepare, stdlib
from sparse_tx.data.images import decode_rgb


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return generator.integers(256, size=(110, 32, 32, 3), dtype=np.uint8)


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def write_parquet(folder, train, test, column="img"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        pq.write_table(pa.table({column: [{"bytes": png(x), "path": None} for x in rows]}), folder / f"{name}.parquet")
    return folder


def write_batches(folder, train, test):
    folder.mkdir(parents=True, exist_ok=True)
    shares = dict(zip([f"data_batch_{k}" for k in range(1, 6)], np.array_split(train, 5), strict=True))
    for name, share in {**shares, "test_batch": test}.items():
        planes = share.transpose(0, 3, 1, 2).reshape(len(share), -1)  # red, then green, then blue
        (folder / name).write_bytes(pickle.dumps({b"data": planes, b"labels": [0] * len(share)}, protocol=2))
    return folder


def cifar(source, root="data", **change):
    return DataSpec(
        **({"name": "cifar10", "kind": "image", "context": 3072, "root": root, "source": str(source)} | change)
    )


def text(source, context=16, root="data"):
    return DataSpec(name="enwik8", kind="text", context=context, root=str(root), source=str(source))


def test_bytes_of_an_image_go_row_by_row_with_r_g_b_together(tmp_path, images):
    image = images[0].copy()
    image[0, 0], image[0, 1], image[1, 0] = (1, 2, 3), (4, 5, 6), (7, 8, 9)
    prepared = prepare(cifar(write_parquet(tmp_path / "a", [image, images[1]], [image])))
    assert prepared.split("test")[0][:6].tolist() == [1, 2, 3, 4, 5, 6]
    assert prepared.split("test")[0][96:99].tolist() == [7, 8, 9]


def test_the_same_splits_come_from_parquet_batches_and_their_archive_in_any_order(tmp_path, images):
    train, test = images[:100], images[100:]
    shuffled = train[np.random.default_rng(1).permutation(100)]
    batches = write_batches(tmp_path / "b" / "cifar-10-batches-py", shuffled, test)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(batches, "cifar-10-batches-py")
    sources = [write_parquet(tmp_path / "a", train, test), tmp_path / "b", tmp_path / "cifar-10-python.tar.gz"]
    first, *others = [prepare(cifar(s)) for s in sources]
    for split in ("train", "validation", "test"):
        assert all(np.array_equal(first.split(split), other.split(split)) for other in others)
    by_hash = sorted(hashlib.sha256(x.tobytes()).digest() for x in train)
    held_out = [hashlib.sha256(x.tobytes()).digest() for x in first.split("validation")]
    assert held_out == by_hash[: len(held_out)]  # the smallest hashes
    assert first.meta["counts"] == {"train": 96, "validation": 4, "test": 10}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (32, 32)), "is grey"),
        (Image.new("RGBA", (32, 32)), "with alpha"),
        (Image.new("RGB", (32, 31)), "32 x 31 pixels: 32 x 32 are needed"),
        (None, "cannot be decoded"),
    ],
)
def test_an_image_of_another_kind_is_refused_by_name(image, message):
    data = b"no image"
    if image is not None:
        out = io.BytesIO()
        image.save(out, "PNG")
        data = out.getvalue()
    with pytest.raises(UserError, match=message) as refused:
        decode_rgb(data, 32, "image 3 of train.parquet")
    assert "image 3 of train.parquet" in str(refused.value)


def test_a_picture_in_parquet_that_does_not_fit_is_refused_or_left_out(tmp_path, images, capsys):
    source = write_parquet(tmp_path / "a", [*images[:3], images[3, ..., 0], *images[4:30]], images[30:32])
    with pytest.raises(UserError, match=r"image 3 of .*train\.parquet is grey.*data\.unreadable=skip"):
        prepare(cifar(source))
    prepared = prepare(cifar(source, unreadable="skip"))
    assert prepared.meta["counts"] == {"train": 28, "validation": 1, "test": 2}
    assert prepared.meta["left_out"] == 1
    assert "image 3 of" in capsys.readouterr().err


def test_broken_sources_of_images_are_refused(tmp_path, images):
    whole = write_parquet(tmp_path / "a", images[:4], images[4:5])
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "train.parquet").write_bytes((whole / "train.parquet").read_bytes()[:2000])
    missing = write_batches(tmp_path / "b", images[:10], images[:1])
    (missing / "data_batch_3").unlink()
    evil = write_batches(tmp_path / "c", images[:10], images[:1])
    (evil / "test_batch").write_bytes(b"cos\nsystem\n(S'touch made_by_code'\ntR.")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (cut, "is not a whole parquet file"),
        (missing, "lacks data_batch_3"),
        (evil, "is not a CIFAR-10 batch file"),
        (tmp_path / "empty", "holds no CIFAR-10"),
        (tmp_path / "nowhere", "is not there"),
        (
            write_parquet(tmp_path / "d", images[:4], images[4:5], column="pixels"),
            "no column img, image, jpg or png, but pixels",
        ),
    ):
        with pytest.raises(UserError, match=message):
            prepare(cifar(source))
    assert not (tmp_path / "made_by_code").exists()
    assert not list((tmp_path / "data").glob("prepared/*/meta.json"))


def test_any_file_is_text_split_90_5_5_in_order(tmp_path):
    data = bytes(range(256)) * 10
    (tmp_path / "file.bin").write_bytes(data)
    prepared = prepare(text(tmp_path / "file.bin"))
    assert b"".join(prepared.split(s).tobytes() for s in ("train", "validation", "test")) == data
    assert [len(prepared.split(s)) for s in ("train", "validation", "test")] == [2304, 128, 128]
    assert not prepared.meta["is_enwik8"]
    assert prepared.meta["sha256"]["source"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("length", [0, 5, 17])
def test_a_text_too_short_is_refused_with_the_length_that_works(tmp_path, length):
    (tmp_path / "short.txt").write_bytes(b"x" * length)
    with pytest.raises(UserError, match=f"has {length} bytes: too short for data.context=16, which needs at least 20"):
        prepare(text(tmp_path / "short.txt"))
    (tmp_path / "short.txt").write_bytes(b"x" * 20)
    assert len(prepare(text(tmp_path / "short.txt")).split("train")) == 18


def test_an_edited_source_never_meets_the_old_cache(tmp_path):
    source = tmp_path / "file.txt"
    source.write_bytes(b"a" * 100)
    first = prepare(text(source)).split("train")[0]
    source.write_bytes(b"b" * 101)
    assert (first, prepare(text(source)).split("train")[0]) == (ord("a"), ord("b"))


def test_a_second_call_reads_what_the_first_made(tmp_path):
    source = tmp_path / "file.txt"
    source.write_bytes(b"abc" * 100)
    made = prepare(text(source)).folder
    before = {p: p.stat().st_mtime_ns for p in made.iterdir()}
    assert prepare(text(source)).folder == made
    assert before == {p: p.stat().st_mtime_ns for p in made.iterdir()}


@pytest.mark.parametrize("damage", ["no meta", "cut array", "cut meta"])
def test_what_was_half_made_or_damaged_is_made_again(tmp_path, damage):
    source = tmp_path / "file.txt"
    source.write_bytes(b"abcdefgh" * 100)
    folder = prepare(text(source)).folder
    if damage == "no meta":
        (folder / "meta.json").unlink()
    elif damage == "cut array":
        (folder / "train.npy").write_bytes((folder / "train.npy").read_bytes()[:-1])
    else:
        (folder / "meta.json").write_text((folder / "meta.json").read_text()[:40])
    again = prepare(text(source))
    assert again.split("train").tobytes() == (b"abcdefgh" * 100)[:720]
    assert json.loads((folder / "meta.json").read_text())["counts"]["train"] == 720


def test_an_interrupted_preparation_leaves_nothing_that_is_used(tmp_path, monkeypatch):
    from sparse_tx.data.store import Writer

    source = tmp_path / "file.txt"
    source.write_bytes(b"abc" * 100)
    save = Writer.save

    def stop(self, split, *rest):
        if split == "test":
            raise KeyboardInterrupt
        save(self, split, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(text(source))
    assert not list((tmp_path / "data" / "prepared").glob("*/meta.json"))
    assert len(prepare(text(source)).split("test")) == 15


def _prepare_in_a_process(source, root, results):
    results.put(prepare(text(source, root=root)).split("train").tobytes())


def test_two_processes_preparing_at_once_do_not_collide(tmp_path):
    source = tmp_path / "file.txt"
    source.write_bytes(np.random.default_rng(0).bytes(3_000_000))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [context.Process(target=_prepare_in_a_process, args=(source, tmp_path / "d", results)) for _ in range(2)]
    for process in both:
        process.start()
    got = [results.get(timeout=120) for _ in both]
    for process in both:
        process.join()
    assert got[0] == got[1] == source.read_bytes()[:2_700_000]
    assert len(list((tmp_path / "d" / "prepared").glob("enwik8-*/meta.json"))) == 1


def test_a_full_disk_is_an_error_that_keeps_the_good_data(tmp_path, monkeypatch):
    from sparse_tx.data.store import Writer

    good = tmp_path / "good.txt"
    good.write_bytes(b"abc" * 100)
    kept = prepare(text(good))

    def full(self, *rest):
        raise OSError(28, "No space left on device")

    (tmp_path / "more.txt").write_bytes(b"abc" * 100)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "save", full)
        with pytest.raises(UserError, match="No space left"):
            prepare(text(tmp_path / "more.txt"))
    assert len(kept.split("train")) == len(prepare(text(good)).split("train")) == 270


def test_the_standard_library_is_split_by_whole_files(tmp_path):
    library = tmp_path / "lib"
    for k in range(60):
        (library / f"package{k % 5}" / "test").mkdir(parents=True, exist_ok=True)
        (library / f"package{k % 5}" / f"module{k}.py").write_text(f"# module {k}\n" * 20)
        (library / f"package{k % 5}" / "test" / f"test{k}.py").write_text("# a test\n")
    spec = DataSpec(name="stdlib", kind="text", context=16, source=str(library))
    prepared = prepare(spec)
    found = {s: set(prepared.split(s).tobytes().decode().splitlines()) for s in ("train", "validation", "test")}
    assert set.union(*found.values()) == {f"# module {k}" for k in range(60)}
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert prepare(spec).folder == prepared.folder


def test_the_running_pythons_library_is_there_without_its_tests():
    files = stdlib.library_files(stdlib.library_folder(DataSpec(name="stdlib", kind="text", context=16)))
    assert "argparse.py" in files
    assert files == sorted(files)
    assert not any("/test/" in f"/{f}" or "site-packages" in f for f in files)


def test_a_python_without_its_source_is_told_what_to_do(tmp_path):
    (tmp_path / "lib").mkdir()
    with pytest.raises(UserError, match=r"data\.source=FOLDER"):
        prepare(DataSpec(name="stdlib", kind="text", context=16, source=str(tmp_path / "lib")))


def test_a_zip_with_enwik8_is_read_and_a_broken_one_refused(tmp_path):
    data = b"wiki text " * 500
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", data)
    assert prepare(text(tmp_path / "enwik8.zip")).split("train").tobytes() == data[:4500]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "enwik8.zip").write_bytes((tmp_path / "enwik8.zip").read_bytes()[:60])
    with pytest.raises(UserError, match="is no zip file"):
        prepare(text(tmp_path / "cut"))


def test_a_zip_or_archive_with_flipped_bits_is_refused(tmp_path, images):
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", np.random.default_rng(0).integers(97, 123, 50_000, dtype=np.uint8).tobytes())
    batches = write_batches(tmp_path / "b", images[:10], images[:1])
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(batches, "cifar-10-batches-py")
    for path, spec, message in (
        (tmp_path / "enwik8.zip", text, "is a broken zip file"),
        (tmp_path / "cifar-10-python.tar.gz", cifar, "is not a (whole archive|CIFAR-10 batch file)"),
    ):
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        data[middle] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            prepare(spec(path))
        assert path.exists()  # the user's own file is never removed


def test_a_source_that_may_not_be_read_is_one_clear_line(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied", "secret.txt")

    (tmp_path / "secret.txt").write_bytes(b"x" * 100)
    monkeypatch.setattr("sparse_tx.data.enwik8.file_identity", forbidden)
    with pytest.raises(UserError, match=r"cannot read the source of data=enwik8.*Permission denied.*secret.txt"):
        prepare(text(tmp_path / "secret.txt"))


def test_a_training_file_alone_has_no_test_split_rather_than_a_made_up_one(tmp_path, images):
    whole = write_parquet(tmp_path / "a", images[:50], images[50:60])
    prepared = prepare(cifar(whole / "train.parquet"))
    assert prepared.meta["counts"] == {"train": 48, "validation": 2, "test": 0}
    with pytest.raises(UserError, match="has no test split"):
        prepared.split("test")
