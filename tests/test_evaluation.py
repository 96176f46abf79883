"""Bits per dim: against distributions whose entropy is known, and over whole splits through evaluate.py."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_tx import UserError
from sparse_tx.evaluation.bits import ByContext, Score
from sparse_tx.evaluation.run import choose_device, windows_at_once


@pytest.fixture
def evaluate(compose):
    from evaluate import evaluate

    return lambda *overrides: evaluate(compose("evaluate", "device=cpu", *overrides))


def test_a_model_that_knows_the_distribution_scores_its_entropy():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    tokens = torch.multinomial(probabilities, 40_000, replacement=True).view(4, -1).to(torch.uint8)
    logits = torch.full((4, 10_000, 256), -torch.inf)
    logits[..., :4] = probabilities.log()
    score = Score()
    score.add(logits, tokens)
    share = [(tokens == k).double().mean().item() for k in range(4)]
    assert score.bits_per_dim == pytest.approx(sum(s * b for s, b in zip(share, (1, 2, 3, 3), strict=True)), abs=1e-6)
    assert score.bits_per_dim == pytest.approx(1.75, abs=0.02)


def test_equal_logits_are_eight_bits():
    score = Score()
    score.add(torch.zeros(2, 50, 256), torch.randint(256, (2, 50)))
    assert abs(score.bits_per_dim - 8) < 1e-5


def test_only_positions_from_the_first_scored_on_count_and_sums_add_over_batches():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 6, 256), torch.randint(256, (3, 6))
    nats = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].double()
    score = Score()
    score.add(logits[:2], tokens[:2], torch.tensor([0, 4]))
    score.add(logits[2:], tokens[2:], torch.tensor([6]))
    assert int(score.count) == 8
    assert float(score.nats) == pytest.approx(float(nats[0].sum() + nats[1, 4:].sum()))


@pytest.mark.parametrize(
    ("given", "device", "windows"), [(None, "cpu", 8), (None, "cuda", 21), (3, "cpu", 3), (3, "cuda", 3)]
)
def test_a_gpu_is_given_enough_windows_to_be_the_slower_of_the_two(given, device, windows):
    assert windows_at_once(given, 8, 3072, torch.device(device)) == windows
    assert windows_at_once(None, 8, 65536, torch.device(device)) == 8


def test_bits_by_context_are_those_of_the_positions_and_add_up():
    torch.manual_seed(0)
    nats, first = 1 + torch.rand(3, 100), torch.tensor([0, 20, 70])
    score, by_context = Score(), ByContext()
    for part in (slice(0, 2), slice(2, 3)):
        score.add_nats(nats[part], first[part])
        by_context.add_nats(nats[part], first[part])
    expected = {
        0: nats[0, :16].mean(),
        16: torch.cat([nats[0, 16:64], nats[1, 20:64]]).mean(),
        64: torch.cat([nats[:2, 64:].flatten(), nats[2, 70:]]).mean(),
    }
    assert by_context.bits == pytest.approx({k: float(v) / math.log(2) for k, v in expected.items()})
    assert sum(float(s.nats) for s in by_context.scores.values()) == pytest.approx(float(score.nats))
    late = ByContext()
    late.add_nats(nats[2:], first[2:])
    assert list(late.bits) == [64]


def test_an_untrained_model_scores_eight_bits_on_a_whole_split(trained, evaluate):
    path = trained("trainer.max_steps=1", "optimizer.lr=1e-30")["checkpoint"]
    for settings in ((), ("evaluation.min_context=40",), ("weights=live", "split=validation")):
        assert abs(evaluate(f"checkpoint={path}", "split=test", *settings)["bits_per_dim"] - 8) < 1e-5


@pytest.mark.parametrize("min_context", [0, 40])
def test_evaluate_scores_every_byte_of_a_split_as_the_protocol_says(trained, evaluate, min_context, tmp_path):
    source = tmp_path / "text.bin"
    source.write_bytes(np.random.default_rng(0).choice(np.frombuffer(b"abcd \n", np.uint8), 6000).tobytes())
    run = trained(
        "data=enwik8", "data.synthetic=false", f"data.source={source}", "data.limit=null", "trainer.max_steps=2"
    )  # fmt: skip
    result = evaluate(
        f"checkpoint={run['checkpoint']}", "split=test", f"evaluation.min_context={min_context}", "batch_size=3"
    )
    from sparse_tx import load

    model, test = load(run["checkpoint"]), np.fromfile(source, np.uint8)[5700:]
    nats, count = 0.0, 0
    step = 64 - min_context
    scored_to = min_context
    for start in range(0, 300, step):
        if min_context and start + 64 > 300:
            start = 300 - 64
        window = torch.from_numpy(test[start : start + 64].copy())[None].long()
        losses = torch.nn.functional.cross_entropy(model(window)[0], window[0], reduction="none")
        new = range(max(scored_to, start + (min_context if start == 0 else 0)), start + window.shape[1])
        nats += sum(losses[k - start].item() for k in new)
        count += len(new)
        scored_to = max(scored_to, start + window.shape[1])
    assert result["count"] == count == 300 - min_context
    assert result["nats"] == pytest.approx(nats, rel=1e-5)
    assert result["bits_per_dim"] == pytest.approx(nats / count / math.log(2), rel=1e-5)
    assert list(result["by_context"]) == ([16] if min_context else [0, 16])


def test_training_and_evaluation_report_the_same_number(trained, evaluate, capsys):
    run = trained()
    result = evaluate(f"checkpoint={run['checkpoint']}", "split=validation")
    assert result["bits_per_dim"] == pytest.approx(run["val/bits_per_dim"], rel=1e-6)
    assert (result["split"], result["weights"]) == ("validation", "ema")
    out = capsys.readouterr().out
    assert f"bits/byte: {result['bits_per_dim']:.4f}" in out
    assert "order 0" in out
    assert "order 2" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "cannot be read"),
        (b"not a checkpoint", "cannot be read"),
        ("foreign", "not written by this project"),
        ("truncated", "cannot be read"),
    ],
)
def test_a_bad_checkpoint_gives_one_line(trained, evaluate, tmp_path, content, message):
    path = tmp_path / "model.ckpt"
    if content == "foreign":
        torch.save({"state_dict": {"w": torch.zeros(2)}}, path)
    elif content == "truncated":
        data = Path(trained()["checkpoint"]).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        evaluate(f"checkpoint={path}")
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_that_would_run_code_is_refused(evaluate, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "made_by_code"), "w"))

    torch.save({"sparse_tx": Code()}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="cannot be read"):
        evaluate(f"checkpoint={tmp_path / 'bad.ckpt'}")
    assert not (tmp_path / "made_by_code").exists()


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert choose_device(name) == torch.device(name)
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="device=cuda:2: 2 GPUs are visible"):
        choose_device("cuda:2")
