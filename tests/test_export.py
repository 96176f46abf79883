"""An exported model is the model: the same logits and scores, read without running code, and nothing private in it."""

import json
import re
import struct
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError

from sparse_tx import UserError, load
from sparse_tx.entry import evaluate, export, sample, train


@pytest.fixture(scope="module")
def run(tmp_path_factory, compose):
    """A trained run on a text file in a folder whose name is nobody's business."""
    folder = tmp_path_factory.mktemp("private-folder")
    source = folder / "notes.txt"
    source.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 100)
    tiny = ("model.layers=2", "model.width=64", "model.heads=2", "model.qk=32", "model.ff=128", "data.context=64")
    settings = ("data=enwik8", f"data.source={source}", f"data.root={folder}/root", f"output={folder}/outputs", *tiny)
    steps = ("trainer.max_steps=3", "data.batch_size=2", "data.limit=4", "trainer=cpu", "trainer.compile=false")
    return folder, train(compose("train", *settings, "attention.stride=16", "attention.c=4", *steps))["checkpoint"]


@pytest.fixture
def exported(compose, run):
    return lambda *overrides: export(compose("export", f"checkpoint={run[1]}", "device=cpu", *overrides))


@pytest.mark.parametrize("weights", ["ema", "live"])
def test_an_exported_model_has_the_logits_of_its_checkpoint(exported, run, weights):
    folder = exported("to=shared", "split=null", "samples=0", f"weights={weights}")
    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = load(run[1], weights=weights)(tokens)
        assert torch.equal(load(folder, weights=weights)(tokens), expected)
        other = "live" if weights == "ema" else "ema"
        assert not torch.equal(load(run[1], weights=other)(tokens), expected)
    with pytest.raises(UserError, match=f"{weights} weights alone: use weights={weights}"):
        load(folder, weights=other)


def test_its_files_are_tensors_and_plain_data(exported, run):
    folder = exported("to=shared", "samples=0", "split=null")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    raw = (folder / "model.safetensors").read_bytes()  # by the format's own definition: length, JSON, numbers
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert set(header) == set(load(run[1]).state_dict())
    assert len(raw) == 8 + length + sum(4 * torch.Size(t["shape"]).numel() for t in header.values())


def test_it_is_scored_and_sampled_like_its_checkpoint(exported, compose, run):
    folder = exported("to=shared", "samples=2", "length=20")
    source = f"data.source={run[0] / 'notes.txt'}"
    numbers = [
        evaluate(compose("evaluate", f"checkpoint={c}", source, "split=validation", "device=cpu"))
        for c in (run[1], folder)
    ]
    assert numbers[0]["bits_per_dim"] == numbers[1]["bits_per_dim"]
    (kept,) = json.loads((folder / "config.json").read_text())["results"]
    assert (kept["bits_per_dim"], kept["count"]) == (numbers[0]["bits_per_dim"], numbers[0]["count"])
    card = (folder / "README.md").read_text()
    assert f"| validation | {kept['bits_per_dim']:.4f} | {kept['count']:,} |" in card
    draw = ("count=2", "length=20", "device=cpu")
    ours = sample(compose("sample", f"checkpoint={folder}", *draw))
    theirs = sample(compose("sample", f"checkpoint={run[1]}", *draw))
    in_card = sorted((folder / "samples").iterdir())
    assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs] == [p.read_bytes() for p in in_card]
    assert not any(folder in p.parents for p in ours)


def test_the_card_shows_images_and_the_python_in_it_runs(compose, trained, monkeypatch):
    other = ("model.qk_norm=true", "model.rotary=axes", "model.activation=relu2", "model.init=zero")
    checkpoint = trained("data=cifar10", "attention=strided", "trainer.max_steps=1", *other)["checkpoint"]
    folder = export(compose("export", f"checkpoint={checkpoint}", "to=up/cifar", "debug=fast", "device=cpu"))
    card = (folder / "README.md").read_text()
    assert "validation, of the synthetic twin" in card
    assert f"Other than in the paper: `{'`, `'.join(other)}`." in card
    assert "![samples](samples/grid.png)" in card
    assert (folder / "samples" / "grid.png").is_file()
    monkeypatch.chdir(folder.parent)
    names: dict = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    assert names["logits"].shape == (1, 100, 256)


def test_the_card_plays_sound_beside_its_spectrograms(compose, trained):
    checkpoint = trained("data=audio", "attention=strided", "trainer.max_steps=1")["checkpoint"]
    asked = (f"checkpoint={checkpoint}", "to=tones", "split=null", "samples=2", "length=20", "device=cpu")
    folder = export(compose("export", *asked))
    card = (folder / "README.md").read_text()
    names = re.findall(r"\((samples/.*?)\)|src=\"(samples/.*?)\"", card)
    assert names == [("samples/spectrograms.png", ""), ("", "samples/sample-0000.wav"), ("", "samples/sample-0001.wav")]
    assert {f"samples/{p.name}" for p in (folder / "samples").iterdir()} == {a or b for a, b in names}


def test_the_card_tells_what_was_mirrored():
    from sparse_tx.export.card import _data

    data = {"name": "audio", "kind": "audio", "source": None, "synthetic": False}
    assert _data(data | {"mirror": True}) == "audio, half of the windows inverted in sign"
    images = {"name": "cifar10", "kind": "image", "mirror": True}
    assert _data(data | images) == "cifar10, half of the images mirrored left to right"
    assert _data(data | {"mirror": False}) == _data(data) == "audio"


def test_a_text_sample_cannot_leave_its_place_in_the_card(tmp_path):
    from sparse_tx.export.card import _samples

    (tmp_path / "a.txt").write_bytes(b"```\n# Free\n````\x1b[31m\xff")
    lines = _samples([tmp_path / "a.txt"], tmp_path, "text")
    assert lines[2] == lines[4] == "`````"
    assert "\x1b" not in lines[3]


def test_no_folder_of_the_training_machine_is_in_it(exported, run):
    folder = exported("to=shared", "samples=1", "length=20")
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"private-folder" not in path.read_bytes(), path
    assert json.loads((folder / "config.json").read_text())["config"]["data"]["source"] == "notes.txt"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["to=taken"], "to=taken is there already"),
        (["to=hub"], "give to=hub and repo=USER/NAME together"),
        (["to=new", "repo=me/model"], "give to=hub and repo=USER/NAME together"),
        (["to=hub", "repo=me"], "repo=me is no name of a repository"),
        (["to=new", "samples=-1"], "samples=-1"),
        (["to=new", "length=65"], "length=65: this model has a context of 64 bytes"),
        (["to=new", "split=dev"], "split=dev"),
        (["to=new", "data.source=gone.txt"], "gone.txt is not there"),
        (["to=new", "device=cuda:9"], "device=cuda:9"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing(exported, overrides, message):
    Path("taken").mkdir()
    Path("taken/model").write_text("mine")
    with pytest.raises(UserError) as refused:
        exported(*overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [p.name for p in Path().iterdir()] == ["taken"]
    assert Path("taken/model").read_text() == "mine"


def test_an_exported_model_that_was_damaged_is_refused_in_one_line(exported, compose):
    folder = exported("to=shared", "samples=0", "split=null")
    with pytest.raises(UserError, match="only a run's own checkpoint can be resumed"):
        train(compose("train", "debug=fast", "trainer=cpu", f"resume={folder}"))
    whole, described = (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        load(folder)
    (folder / "model.safetensors").write_bytes(whole)
    for change in ({"library_name": "other"}, {"format": 99}, {"model": {}}, {"config": {}}):
        (folder / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(UserError):
            load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load(folder)


class FakeHub:
    """The calls that the project makes of the hub's client, on a folder of this machine."""

    def __init__(self, place, fails=()):
        self.place, self.fails, self.repos = place, fails, {}

    def HfApi(self):
        return self

    def _maybe_fail(self, name):
        if name in self.fails:
            raise self.fails[name]

    def whoami(self):
        self._maybe_fail("whoami")
        return {"name": "me"}

    def create_repo(self, repo, *, private, exist_ok):
        assert exist_ok
        self.repos[repo] = private
        return f"hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self._maybe_fail("upload_folder")
        target = self.place / repo_id
        target.mkdir(parents=True)
        for path in Path(folder_path).rglob("*"):
            if path.is_file():
                (target / path.relative_to(folder_path)).parent.mkdir(exist_ok=True)
                (target / path.relative_to(folder_path)).write_bytes(path.read_bytes())

    def snapshot_download(self, repo, *, revision, allow_patterns):
        assert set(allow_patterns) == {"config.json", "model.safetensors", "README.md"}
        if not (self.place / repo).is_dir():
            raise OSError(f"no repository {repo} at {revision}")
        return str(self.place / repo)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def install(**fails):
        fake = FakeHub(tmp_path / "the-hub", fails)
        for name in ("HfApi", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
        return fake

    return install


def test_a_model_goes_to_the_hub_private_and_comes_back(exported, hub, run):
    fake = hub()
    exported("to=hub", "repo=me/model", "split=null", "samples=1", "length=20")
    assert fake.repos == {"me/model": True}
    tokens = torch.zeros(1, 64, dtype=torch.long)
    with torch.inference_mode():
        assert torch.equal(load("hub:me/model")(tokens), load(run[1])(tokens))
    assert 'load("hub:me/model")' in (fake.place / "me" / "model" / "README.md").read_text()
    for name, message in (("hub:me/other@main", "no repository me/other at main"), ("hub:../x", "no name on the hub")):
        with pytest.raises(UserError, match=message):
            load(name)


def test_an_account_that_is_missing_is_told_before_any_work(exported, hub):
    hub(whoami=LocalTokenNotFoundError("no token"))
    with pytest.raises(UserError, match="run `hf auth login`, or set HF_TOKEN"):
        exported("to=hub", "repo=me/model")
    assert not Path("outputs").exists()


def test_an_upload_that_fails_leaves_the_export_here(exported, hub):
    hub(upload_folder=OSError("the network is down"))
    with pytest.raises(UserError, match=r"the network is down.*Nothing is lost"):
        exported("to=hub", "repo=me/model", "split=null", "samples=0")
    (folder,) = Path("outputs/exports").iterdir()
    assert load(folder)
