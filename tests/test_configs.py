"""Everything that the documentation says composes, composes; and what cannot work is refused in one line."""

import itertools
import re

import pytest

from sparse_tx import UserError
from sparse_tx import config as schema
from sparse_tx.config import config_folder, training


def options(group):
    return sorted(p.stem for p in (config_folder() / group).glob("*.yaml"))


DATA, ATTENTION, MODELS, EXPERIMENTS = (options(g) for g in ("data", "attention", "model", "experiment"))


@pytest.mark.parametrize("data", DATA)
def test_every_data_composes_with_every_attention_and_model(compose, data):
    for attention, model in itertools.product(ATTENTION, MODELS):
        config = training(compose("train", f"data={data}", f"attention={attention}", f"model={model}"))
        assert (config.data.name, config.attention.name) == (data.partition("_")[0], attention.partition("_")[0])
        if attention != "full":
            assert config.attention.stride == config.data.stride


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_with_every_data_attention_and_model(compose, experiment):
    for choice in [
        *(f"data={d}" for d in DATA),
        *(f"attention={a}" for a in ATTENTION),
        *(f"model={m}" for m in MODELS),
    ]:
        config = training(compose("train", f"experiment={experiment}", choice, "data.mirror=false"))  # not for text
        group, _, option = choice.partition("=")
        assert getattr(config, group).name == (option if group == "model" else option.partition("_")[0])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_a_step_with_debug_fast(trained, experiment):
    run = trained(f"experiment={experiment}", "trainer.max_steps=1", "data.limit=1")
    assert run["steps"] == 1


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_file_says_its_command_result_hardware_and_sources(experiment):
    text = (config_folder() / "experiment" / f"{experiment}.yaml").read_text()
    for line in (f"# python train.py experiment={experiment}", "# Expected: ", "# Hardware: ", "# Sources: "):
        assert line in text


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [("cifar10_strided", "59.20M"), ("enwik8_fixed", "94.95M"), ("imagenet64_strided", "151.65M")],
)
def test_a_dry_run_reports_the_papers_parameters_without_data(compose, capsys, experiment, parameters):
    from train import train

    report = train(compose("train", f"experiment={experiment}", "dry_run=true", "data.source=missing.bin"))
    out = capsys.readouterr().out
    assert f"parameters: {parameters}" in out
    for word in ("FLOPs: ", "memory: ", "time: ", "backend: "):
        assert word in out
    assert report["flops_per_step"] > 0


def test_a_dry_run_lists_what_each_way_to_recompute_needs_on_a_gpu(compose, capsys):
    from train import train

    settings = ("experiment=imagenet64_strided", "dry_run=true")
    reports = [train(compose("train", *settings, f"model.recompute={r}")) for r in ("auto", "cheap", "block")]
    memory = [r["memory_bytes"] for r in reports]
    assert memory == sorted(memory, reverse=True)
    out = capsys.readouterr().out
    assert re.search(r"recompute: none \(auto\); of none .* activation .* cheap .* block [\d.]+ GiB", out)
    assert "recompute: block; of none" in out


def test_groups_combine_without_an_experiment(compose, capsys):
    from train import train

    report = train(compose("train", "data=cifar10", "attention=strided", "model=cifar10_15m", "dry_run=true"))
    assert (report["context"], report["attention"]) == (3072, "strided")
    assert "parameters: 14.91M" in capsys.readouterr().out


@pytest.mark.parametrize("attention", ["full", "fixed"])
def test_an_experiments_attention_can_be_exchanged(compose, attention):
    from train import train

    report = train(compose("train", "experiment=cifar10_strided", f"attention={attention}", "dry_run=true"))
    assert (report["context"], report["attention"]) == (3072, attention)


def test_the_flops_of_dense_attention_are_those_counted_by_hand():
    from sparse_tx.model import AttentionSpec, ModelSpec
    from sparse_tx.model.cost import cost_of

    cost = cost_of(ModelSpec("text", 8, 1, 4, 2, 4, 16, AttentionSpec("full")))
    products = 8 * (4 * (4 + 4 + 4) + 4 * 4 + 4 * 16 + 16 * 4 + 4 * 256)  # q, k, v; out; feed-forward; logits
    pairs = 2 * 36 * (2 + 2)  # heads x pairs x (Dqk + Dv)
    assert cost.flops == 3 * 2 * (products + pairs)


def test_steps_of_the_papers_epochs():
    def steps(name):
        found = re.search(r"max_steps: ([\d_]+)", (config_folder() / "experiment" / f"{name}.yaml").read_text())
        return int(found[1])

    assert steps("cifar10_strided") == 120 * 48_000 // 16
    assert steps("enwik8_fixed") == 80 * 90_000_000 // (4 * 12_288)
    assert steps("imagenet64_strided") == 70 * 1_231_149 // 8 + 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+model.widht=3"], "model.widht is not a key of this config: did you mean model.width?"),
        (["+model.colour=3"], "known there: model.activation, model.dropout, model.ff, model.heads"),
        (["model.width=wide"], "model.width: Value 'wide' of type 'str' could not be converted to Integer"),
        (["attention=strided", "attention.stride=0"], "attention.stride=0"),
        (["attention.c=0"], "attention.c=0 does not fit attention.stride=32"),
        (["attention.c=48"], "a summary has at most stride columns; use 1 to 32"),
        (["model.heads=3"], "model.heads=3 does not divide model.width=128"),
        (["attention.combine=mixed"], "use one of interleaved, merged, split"),
        (["attention.order=[rows]", "attention.combine=interleaved"], "fixed attention has block, summary"),
        (["attention.backend=fast"], "attention.backend='fast'"),
        (["data=cifar10", "data.context=3000"], "data.context=3000"),
        (["data.batch_size=0"], "data.batch_size=0: it must be at least 1"),
        (["trainer.max_steps=0"], "trainer.max_steps=0"),
        (["trainer.max_time=20min"], "trainer.max_time=20min: give days"),
        (["trainer.precision=8"], "trainer.precision=8 is not known"),
        (["trainer.devices=none"], "trainer.devices=none"),
        (["trainer.compile=perhaps"], "trainer.compile=perhaps"),
        (["optimizer.lr=0"], "optimizer.lr=0.0: it must be above 0"),
        (["evaluation.min_context=512"], "evaluation.min_context=512"),
        (["name=a/b"], "name='a/b'"),
        (["data.mirror=true"], "data.mirror=true is for images and audio: data=stdlib has text: use data.mirror=false"),
        (["model.dropout=1"], "model.dropout=1.0"),
        (["model.recompute=all"], "use one of auto, none, activation, feedforward, attention, cheap, block"),
        (["trainer.ema_decay=1"], "trainer.ema_decay=1.0"),
        (["profile=true", "trainer.max_steps=4"], "profile=true traces steps 3 to 5: trainer.max_steps=4"),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_one_line(compose, overrides, message):
    with pytest.raises(UserError) as refused:
        training(compose("train", *overrides))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("check", "overrides", "message"),
    [
        (schema.evaluating, [], "checkpoint is missing: add checkpoint=..."),
        (
            schema.evaluating,
            ["checkpoint=x", "split=dev"],
            "split=dev is not known: use one of train, validation, test",
        ),
        (schema.evaluating, ["checkpoint=x", "weights=best"], "weights=best"),
        (schema.sampling, ["checkpoint=x", "temperature=-1"], "temperature=-1.0"),
        (schema.sampling, ["checkpoint=x", "top_p=1.5"], "top_p=1.5"),
        (schema.sampling, ["checkpoint=x", "top_k=0"], "top_k=0"),
        (schema.sampling, ["checkpoint=x", "count=0"], "count=0"),
        (schema.sampling, ["checkpoint=x", "device=tpu"], "device=tpu"),
    ],
)
def test_evaluate_and_sample_refuse_what_cannot_work(compose, check, overrides, message):
    name = "evaluate" if check is schema.evaluating else "sample"
    with pytest.raises(UserError, match=re.escape(message)):
        check(compose(name, *overrides))


def test_all_options_of_a_group_have_the_same_keys(compose):
    for group in ("data", "attention", "model", "optimizer", "trainer"):
        keys = {o: tuple(sorted(compose("train", f"{group}={o}")[group])) for o in options(group)}
        assert len(set(keys.values())) == 1, keys


def test_several_loggers_at_once(compose):
    config = training(compose("train", "logger=[csv,wandb,tensorboard]"))
    assert None not in (config.logger.csv, config.logger.wandb, config.logger.tensorboard)
    assert training(compose("train", "logger=wandb")).logger.csv is None
