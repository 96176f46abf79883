"""ImageNet64 from any form of source: the same bytes, the version never mistaken, nothing odd let in."""

import hashlib
import io
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sparse_tx import UserError
from sparse_tx.data import DataSpec, image_files, imagenet64, prepare
from sparse_tx.evaluation.paper import compares

SIDE = 4
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(256, size=(60, SIDE, SIDE, 3), dtype=np.uint8)


def spec(path, **change):
    return DataSpec(**({"name": "imagenet64", "kind": "image", "context": 3 * SIDE**2, "source": str(path)} | change))


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)  # red, then green, then blue


def write_pictures(folder, images, **named):
    """named: more pictures, by file name."""
    folder.mkdir(parents=True)
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{k}.png")  # 2 comes before 10
    for name, image in named.items():
        image.save(folder / f"{name}.png")


def write_npz(folder, train, valid, zipped):
    folder.mkdir()
    files = {}
    for name, part in {f"train_data_batch_{k + 1}": p for k, p in enumerate(np.array_split(train, 11))}.items():
        files[f"{name}.npz"] = part
    files["val_data.npz"] = valid
    for name, part in files.items():
        np.savez(folder / name, data=planes(part), labels=np.zeros(len(part)))
    if zipped:
        for archive, start in (("train_part1_npz.zip", "train"), ("val_npz.zip", "val")):
            with zipfile.ZipFile(folder / archive, "w", zipfile.ZIP_DEFLATED) as out:
                for name in files:
                    if name.startswith(start):
                        out.write(folder / name, f"deep/{name}")
        for name in files:
            (folder / name).unlink()


def write(form, folder, train, valid):
    if form == "pictures":
        write_pictures(folder / "train_64x64", train)
        write_pictures(folder / "valid_64x64", valid)
    elif form in ("npy", "npy planar"):
        folder.mkdir()
        for name, part in (("imagenet64-train", train), ("imagenet64-valid", valid)):
            np.save(folder / f"{name}.npy", part.transpose(0, 3, 1, 2) if form == "npy planar" else part)
    elif form == "parquet":
        folder.mkdir()
        for name, part in (("train", train), ("validation", valid)):
            rows = [{"bytes": png(x), "path": None} for x in part]
            for k, shard in enumerate((rows[:7], rows[7:])):
                pq.write_table(pa.table({"image": shard}), folder / f"{name}-0000{k}-of-00002.parquet")
    elif form == "parquet of pixels":
        folder.mkdir()
        kind = pa.list_(pa.list_(pa.list_(pa.uint8())))
        for name, part in (("train", train), ("validation", valid)):
            pq.write_table(pa.table({"image": pa.array(part.tolist(), type=kind)}), folder / f"{name}.parquet")
    else:
        write_npz(folder, train, valid, zipped=form == "npz in zip")
    return folder


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


FORMS = ("pictures", "npy", "npy planar", "parquet", "parquet of pixels", "npz", "npz in zip")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", ["oord", "box"])
def test_every_form_gives_the_same_bytes_and_the_papers_split(tmp_path, images, form, version):
    prepared = prepare(spec(write(form, tmp_path / "a", images[:50], images[50:]), version=version))
    flat = images.reshape(len(images), -1)
    assert np.array_equal(prepared.split("train"), flat[:48])  # 1 in 25 of few images
    assert np.array_equal(prepared.split("validation"), flat[48:50])
    assert np.array_equal(prepared.split("test"), flat[50:])
    assert prepared.meta["version"] == version
    assert sorted(p.name for p in prepared.folder.iterdir()) == ["meta.json", *(f"{s}.npy" for s in sorted(SPLITS))]


def test_bytes_go_row_by_row_with_r_g_b_together(tmp_path, images):
    image = images[0].copy()
    image[0, 0], image[0, 1], image[1, 0] = (1, 2, 3), (4, 5, 6), (7, 8, 9)
    for form in FORMS:
        source = write(form, tmp_path / form.replace(" ", "_"), images[:30], np.stack([image] * 9))
        row = prepare(spec(source, version="box")).split("test")[0]
        assert row[:6].tolist() == [1, 2, 3, 4, 5, 6]
        assert row[3 * SIDE : 3 * SIDE + 3].tolist() == [7, 8, 9]


def test_the_papers_split_of_the_published_sizes():
    """1,231,149 train, as in the released code; planned on rows alone."""
    train, valid = np.empty((1_281_149, 0), np.uint8), np.empty((49_999, 0), np.uint8)
    plan, rule = imagenet64._plan({"train": train, "validation": valid}, "oord", "it")
    assert [len(plan[split][1]) for split in SPLITS] == [1_231_149, 50_000, 49_999]
    assert plan["validation"][1][0] == 1_231_149
    assert "50000" in rule


@pytest.mark.parametrize(
    ("form", "counts", "told", "found"),
    [
        ("npy", (1_281_149, 49_999), None, "oord"),
        ("pictures", (100, 49_999), None, "oord"),
        ("npz", (1_281_167, 50_000), None, "box"),
        ("parquet", (1_281_167, 50_000), None, "other"),  # any shrinking of ImageNet has these counts
        ("parquet", (1_281_167, 50_000), "box", "box"),
        ("parquet", (100, 10), None, "other"),
        ("parquet", (100, 10), "oord", "oord"),
        ("parquet", (1_281_149, 49_999), "box", None),
        ("npz", (1_281_167, 50_000), "oord", None),
        ("hub", (1_281_167, 50_000), "oord", None),
    ],
)
def test_the_version_is_what_counts_and_form_tell_and_a_contradiction_is_refused(form, counts, told, found):
    def version():
        return imagenet64._version(
            spec("x", version=told), form, dict(zip(("train", "validation"), counts, strict=True))
        )

    if found is None:
        with pytest.raises(UserError, match=rf"data\.version={told} does not fit data\.source=x"):
            version()
    else:
        assert version() == found


def test_the_version_stands_in_meta_title_and_beside_the_papers_number(tmp_path, images):
    source = write("npy", tmp_path / "a", images[:50], images[50:])
    own, oord, box = (prepare(spec(source, version=v)) for v in (None, "oord", "box"))
    assert len({p.folder for p in (own, oord, box)}) == 3
    assert [p.meta["version"] for p in (own, oord, box)] == ["other", "oord", "box"]
    assert "van den Oord et al. 2016, the paper's" in oord.title
    assert "Chrabaszcz et al. 2017, not the paper's" in box.title
    assert "does not compare" in compares(box)
    assert "does not compare" in compares(own)
    assert "does not compare" not in compares(oord)


def test_training_and_evaluation_name_the_version_and_what_was_trained_on(tmp_path, images, compose, capsys):
    from evaluate import evaluate
    from train import train

    first = write("npy", tmp_path / "a", images[:50], images[50:])
    second = write("parquet", tmp_path / "b", images[5:50], images[50:])
    small = ("model.layers=1", "model.width=16", "model.heads=2", "model.qk=16", "model.ff=16", "trainer.max_steps=1")
    data = ("data=imagenet64", f"data.source={first}", "data.version=box", "data.context=48", "data.batch_size=2")
    run = train(compose("train", *data, *small, "attention=strided", "attention.stride=12", "trainer=cpu"))
    trained = capsys.readouterr().out
    assert "prepared: imagenet64 (version box: box-resized, Chrabaszcz et al. 2017, not the paper's) from" in trained
    assert "48 train, 2 validation, 10 test" in trained
    assert "paper (Child et al. 2019): 3.44 bits/dim after full training, on van den Oord's" in trained
    checkpoint = (f"checkpoint={run['checkpoint']}", "split=test", "device=cpu")
    result = evaluate(compose("evaluate", *checkpoint))
    same = capsys.readouterr().out
    assert result["data_version"] == "box"
    assert "data: imagenet64 (version box" in same
    assert "trained on" not in same
    evaluate(compose("evaluate", *checkpoint, f"data.source={second}"))
    assert (
        f"trained on: imagenet64 (version box: box-resized, Chrabaszcz et al. 2017, not the paper's) from {first}"
        in (capsys.readouterr().out)
    )


def test_images_of_ones_own_in_one_folder_are_held_out_by_hash(tmp_path, images):
    write_pictures(tmp_path / "a" / "cats", images[:40])
    write_pictures(tmp_path / "a" / "dogs", images[40:])
    prepared = prepare(spec(tmp_path / "a"))
    hashes = sorted(hashlib.sha256(x.tobytes()).digest() for x in images)
    held_out = [{hashlib.sha256(x.tobytes()).digest() for x in prepared.split(s)} for s in ("test", "validation")]
    assert held_out == [set(hashes[:3]), set(hashes[3:6])]
    assert prepared.meta["counts"] == {"train": 54, "validation": 3, "test": 3}


def test_splits_that_the_source_has_are_kept(tmp_path, images):
    for name, part in (("train", images[:40]), ("val", images[40:45]), ("test", images[45:])):
        write_pictures(tmp_path / "a" / name, part)
    prepared = prepare(spec(tmp_path / "a"))
    assert [len(prepared.split(s)) for s in SPLITS] == [40, 5, 15]
    assert prepared.meta["split_rule"] == "as the source has them"


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("L", (SIDE, SIDE)), "is grey (mode L): RGB is needed"),
        (Image.new("RGB", (SIDE, SIDE + 1)), "is 4 x 5 pixels: 4 x 4 are needed"),
        (Image.new("P", (SIDE, SIDE)), "is of a palette (mode P): RGB is needed"),
    ],
)
def test_a_picture_that_does_not_fit_is_refused_by_name_or_left_out(tmp_path, images, picture, message, capsys):
    write_pictures(tmp_path / "a", images[:50], odd=picture)
    with pytest.raises(UserError) as refused:
        prepare(spec(tmp_path / "a"))
    assert f"odd.png {message}; data.unreadable=skip goes on without" in str(refused.value)
    assert not list((tmp_path / "data" / "prepared").glob("*/meta.json"))
    prepared = prepare(spec(tmp_path / "a", unreadable="skip"))
    assert sum(prepared.meta["counts"].values()) == 50
    assert prepared.meta["left_out"] == 1
    assert f"odd.png {message}" in capsys.readouterr().err


def test_broken_sources_are_refused_in_one_line(tmp_path, images):
    whole = write("npz in zip", tmp_path / "zip", images[:30], images[30:])
    npy = write("npy", tmp_path / "npy", images[:30], images[30:])
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.zip").write_bytes((whole / "train_part1_npz.zip").read_bytes()[:-500])
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "train.npy").write_bytes((npy / "imagenet64-train.npy").read_bytes()[:-5])
    (tmp_path / "objects").mkdir()
    np.save(tmp_path / "objects" / "train.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "shape").mkdir()
    np.save(tmp_path / "shape" / "train.npy", images.astype(np.float32))
    write("parquet", tmp_path / "shards", images[:30], images[30:])
    (tmp_path / "shards" / "train-00001-of-00002.parquet").unlink()
    write("npy", tmp_path / "mixed", images[:30], images[30:])
    (tmp_path / "mixed" / "a.png").write_bytes(png(images[0]))
    write_pictures(tmp_path / "beside" / "train", images[:5])
    (tmp_path / "beside" / "stray.png").write_bytes(png(images[0]))
    write_pictures(tmp_path / "only" / "test", images[:5])
    write_pictures(tmp_path / "few", images[:2])
    (tmp_path / "images.tar").write_bytes(b"no form that is read")
    for name, message in {
        "nowhere": "is not there",
        "empty": "holds no images: expected",
        "images.tar": "holds no images: expected",
        "cut": "is not a whole zip file",
        "short": "is not a whole .npy file",
        "objects": "is not a whole .npy file: .*Python objects",
        "shape": r"has shape \(60, 4, 4, 3\) of float32",
        "shards": "holds 1 of 2 files",
        "mixed": "holds images as npy and as pictures",
        "beside": "images of train and others beside them, such as .*stray.png",
        "only": "no images for training, only test",
        "few": "has 2 training images that can be used: at least 3",
    }.items():
        with pytest.raises(UserError, match=message) as refused:
            prepare(spec(tmp_path / name))
        assert "\n" not in str(refused.value)
    assert not list((tmp_path / "data" / "prepared").glob("*/*"))


def test_a_disk_that_fills_while_decoding_leaves_no_half_made_cache(tmp_path, images, monkeypatch):
    write_pictures(tmp_path / "a", images)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(imagenet64, "_decoded", full)
        with pytest.raises(UserError, match=r"cannot prepare imagenet64 in data\.root=data: .*No space left"):
            prepare(spec(tmp_path / "a"))
    assert not list((tmp_path / "data" / "prepared").glob("*/*"))
    assert len(prepare(spec(tmp_path / "a")).split("train")) == 54


@pytest.mark.parametrize(
    ("version", "remedy"), [("oord", "academictorrents"), ("box", "Log in at https://image-net.org")]
)
def test_what_no_source_serves_ends_with_how_to_get_it(monkeypatch, version, remedy):
    dead = [f"http://127.0.0.1:9/{url.rpartition('/')[2]}" for url in imagenet64.FILES[version]]
    monkeypatch.setattr(imagenet64, "FILES", {version: dead})
    with pytest.raises(
        UserError, match=rf"could not download ImageNet64 \(version {version}.*{remedy}.*data\.source=FOLDER"
    ):
        prepare(spec("", source=None, version=version, context=12288))


def test_a_version_is_for_imagenet64_alone():
    with pytest.raises(UserError, match=r"data\.version=small does not fit data=imagenet64"):
        spec("x", version="small")
    with pytest.raises(UserError, match=r"data\.version=oord does not fit data=cifar10"):
        DataSpec(name="cifar10", kind="image", context=3072, version="oord")


def test_names_are_sorted_as_numbers_are_read():
    names = ["later_1", "batch_10_b", "batch_10", "batch_2", "batch_1"]
    assert sorted(names, key=image_files._natural) == ["batch_1", "batch_2", "batch_10", "batch_10_b", "later_1"]


def test_a_download_of_other_counts_is_not_taken_for_the_set():
    with pytest.raises(UserError, match=r"has 1281149 training and 50000 held-out images, not \(1281149, 49999\)"):
        imagenet64._version(spec("", source=None, context=12288), "npy", {"train": 1_281_149, "validation": 50_000})
    whole = dict(zip(("train", "validation"), imagenet64.COUNTS["box"], strict=True))
    assert imagenet64._version(spec("", source=None, version="box", context=12288), "npz", whole) == "box"
