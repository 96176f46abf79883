"""The order of training and the windows of evaluation: each byte in its place, for any number of ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tx import UserError
from sparse_tx.data import DataModule, DataSpec, EvaluationWindows, StepSampler, TrainingOrder
from sparse_tx.data.mu_law import expand_mu_law


def test_an_epoch_of_images_is_a_permutation_of_its_own():
    order = TrainingOrder(50, "image", 12, seed=1)
    epochs = [[order.window(50 * e + k) for k in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [TrainingOrder(50, "image", 12, seed=2).window(k) for k in range(50)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 5))
def test_an_epoch_of_text_is_windows_side_by_side_from_one_offset(context, more, seed):
    length = context + more
    order = TrainingOrder(length, "text", context, seed)
    entry = 0
    for epoch in range(4):
        (count,) = order.sizes(np.array([epoch]))
        (offset,) = order.offsets(np.array([epoch]))
        starts = [order.window(entry + k) for k in range(count)]
        assert sorted(starts) == list(range(offset, length - context + 1, context))
        assert 0 <= offset < context
        entry += count


def test_offsets_and_orders_differ_from_epoch_to_epoch():
    order = TrainingOrder(10_000, "text", 100, seed=3)
    assert len(set(order.offsets(np.arange(50)).tolist())) > 30


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000), st.sampled_from(["image", "text"]))
def test_any_entry_can_be_asked_for_directly(entry, kind):
    walked = TrainingOrder(103, kind, 7, seed=5)
    for k in range(0, entry, 11):
        walked.window(k)
    assert walked.window(entry) == TrainingOrder(103, kind, 7, seed=5).window(entry)


def test_a_place_ten_million_entries_ahead_is_found():
    far, passed = (TrainingOrder(1000, "text", 64, seed=9) for _ in range(2))
    passed.window(10_000_000 - 17)
    assert [far.window(10_000_000 + k) for k in range(40)] == [passed.window(10_000_000 + k) for k in range(40)]


def test_the_order_of_a_seed_stays_for_ever():
    """A change here would let every older checkpoint resume on other bytes."""
    text, image = TrainingOrder(1000, "text", 64, 1), TrainingOrder(20, "image", 12, 1)
    audio = TrainingOrder(1000, "audio", 64, 1)
    assert [text.window(k) for k in (0, 1, 2, 100)] == [188, 60, 124, 500]
    assert [image.window(k) for k in (0, 1, 2, 100)] == [2, 19, 0, 3]
    assert [image.mirrored(k) for k in (0, 1, 2, 100)] == [False, True, False, False]
    assert [audio.mirrored(k) for k in (0, 1, 2, 100)] == [False, True, True, True]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", ["text", "image", "audio"])
def test_ranks_together_see_the_batch_of_one(kind, world):
    def sampler(rank, world):
        return StepSampler(TrainingOrder(103, kind, 7, 5), batch_size=8, rank=rank, world=world, steps=9)

    shares = [list(sampler(rank, world)) for rank in range(world)]
    for step, whole in enumerate(sampler(0, 1)):
        together = [item for share in shares for item in share[step]]
        assert sorted(together, key=lambda item: item[1]) == whole
        assert [place.row for place in whole] == list(range(8))


def test_a_sampler_that_starts_later_goes_on_where_another_would_be():
    def sampler(start):
        return StepSampler(TrainingOrder(103, "text", 7, 5), batch_size=4, start_step=start, steps=40)

    assert list(sampler(0))[17:] == list(sampler(17))


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"data.batch_size=6 cannot be shared by 4 ranks: use a multiple, such as 8"):
        StepSampler(TrainingOrder(9, "image", 12, 1), batch_size=6, world=4, steps=1)


def test_too_little_to_train_on_is_refused():
    with pytest.raises(UserError, match="6 training bytes: 7 are needed"):
        TrainingOrder(6, "text", 7, 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(1, 20), st.data())
def test_every_byte_is_scored_once_with_its_context(length, context, data):
    m = data.draw(st.integers(0, min(context, length) - 1))
    windows = EvaluationWindows(length, context, m)
    scored = [w.start + k for w in windows for k in range(w.first_scored, w.length)]
    assert sorted(scored) == list(range(m, length))
    assert windows.scored == length - m
    for w in windows:
        assert w.first_scored >= m
        assert w.length == context or m == 0 or length < context
        assert w.start + w.length <= length


def test_the_last_window_is_shifted_back_to_end_with_the_split():
    assert [tuple(w) for w in EvaluationWindows(25, 10, 4)] == [(0, 10, 4), (6, 10, 4), (12, 10, 4), (15, 10, 7)]
    assert [tuple(w) for w in EvaluationWindows(25, 10)] == [(0, 10, 0), (10, 10, 0), (20, 5, 0)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_windows_without_padding_or_repeats(world):
    windows = EvaluationWindows(95, 10)
    shares = [w for rank in range(world) for w in windows.shard(rank, world)]
    assert sorted(shares) == list(windows)


def test_a_limit_spreads_the_windows_over_the_split():
    starts = [w.start for w in EvaluationWindows(1000, 10, limit=4)]
    assert starts == [0, 250, 500, 750]
    assert len(EvaluationWindows(30, 10, limit=9)) == 3


def spec(**change):
    return DataSpec(**({"name": "stdlib", "kind": "text", "context": 16, "synthetic": True} | change))


@pytest.mark.parametrize(
    "change", [{}, {"name": "cifar10", "kind": "image", "context": 48}, {"name": "audio", "kind": "audio"}]
)
def test_batches_hold_the_bytes_that_the_order_names(change):
    data = DataModule(spec(**change), batch_size=3, seed=4, max_steps=5)
    train = data.prepared.split("train")
    order = TrainingOrder(train, data.spec.kind, data.spec.context, 4)
    for step, batch in enumerate(data.train_dataloader()):
        assert batch["rows"].tolist() == [0, 1, 2]
        for row in range(3):
            start = order.window(3 * step + row)
            want = train[start] if data.spec.kind == "image" else train[start : start + 16]
            assert batch["tokens"][row].tolist() == want.tolist()
    assert step == 4


def test_half_of_the_images_are_mirrored_others_at_each_epoch_and_none_in_evaluation():
    images = spec(name="cifar10", kind="image", context=48)
    plain, mirrored = (DataModule(images, batch_size=4, seed=4, max_steps=600, mirror=m) for m in (False, True))
    counts: dict[bytes, list[bool]] = {}
    for one, other in zip(plain.train_dataloader(), mirrored.train_dataloader(), strict=True):
        for a, b in zip(one["tokens"].view(-1, 4, 4, 3), other["tokens"].view(-1, 4, 4, 3), strict=True):
            assert torch.equal(b, a) or torch.equal(b, a.flip(1))
            counts.setdefault(a.numpy().tobytes(), []).append(not torch.equal(a, b))
    seen = [m for several in counts.values() for m in several]
    assert 0.45 < sum(seen) / len(seen) < 0.55
    assert all(len(set(several)) == 2 for several in counts.values() if len(several) > 12)
    for one, other in zip(plain.val_dataloader(), mirrored.val_dataloader(), strict=True):
        assert torch.equal(one["tokens"], other["tokens"])


def test_half_of_the_windows_of_audio_are_inverted_in_each_epoch_and_none_in_evaluation():
    audio = spec(name="audio", kind="audio")
    plain, mirrored = (DataModule(audio, batch_size=4, seed=4, max_steps=600, mirror=m) for m in (False, True))
    inverted = []
    for one, other in zip(plain.train_dataloader(), mirrored.train_dataloader(), strict=True):
        for a, b in zip(*(expand_mu_law(batch["tokens"].numpy()) for batch in (one, other)), strict=True):
            assert np.array_equal(b, a) or np.array_equal(b, -a)
            inverted.append(not np.array_equal(a, b))
    sizes = TrainingOrder(plain.prepared.split("train"), "audio", 16, 4).sizes(np.arange(51))
    epochs = [inverted[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert all(0.2 < np.mean(epoch) < 0.8 for epoch in epochs)
    assert 0.47 < np.mean(inverted) < 0.53
    for split in ("train", "validation", "test"):
        loaders = (data.evaluation_loader(split) for data in (plain, mirrored))
        for one, other in zip(*loaders, strict=True):
            assert torch.equal(one["tokens"], other["tokens"])


def test_an_epoch_of_one_window_is_heard_both_ways_from_every_offset():
    """Of 16 samples and 7 more, entry and epoch are one number: sign and offset come from the same random word."""
    order = TrainingOrder(23, "audio", 16, 4)
    assert len({(order.window(k), order.mirrored(k)) for k in range(200)}) == 2 * 8


@pytest.mark.parametrize(
    "change", [{"name": "cifar10", "kind": "image", "context": 48}, {"name": "audio", "kind": "audio"}]
)
def test_the_same_windows_are_mirrored_after_a_restart_and_for_any_number_of_ranks(change):
    data = DataModule(spec(**change), batch_size=8, seed=4, max_steps=40, mirror=True)

    def batches(step=0, rank=0, world=1):
        data.trainer = SimpleNamespace(
            global_step=step,
            global_rank=rank,
            world_size=world,
            accumulate_grad_batches=1,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        return list(data.train_dataloader())

    whole = batches()
    for one, other in zip(whole[17:], batches(step=17), strict=True):
        assert torch.equal(one["tokens"], other["tokens"])
    for one, *shares in zip(whole, *(batches(rank=rank, world=4) for rank in range(4)), strict=True):
        rows = torch.cat([share["rows"] for share in shares]).argsort()
        assert torch.equal(one["tokens"], torch.cat([share["tokens"] for share in shares])[rows])


def test_text_has_no_mirror():
    with pytest.raises(UserError, match=r"images and audio: data=stdlib has text: use data.mirror=false"):
        DataModule(spec(), batch_size=4, seed=4, max_steps=6, mirror=True)


def test_evaluation_batches_cover_the_split_and_never_mix_lengths():
    data = DataModule(spec(), batch_size=4, seed=1, max_steps=1, min_context=3)
    split = data.prepared.split("validation")
    seen = []
    for batch in data.evaluation_loader("validation"):
        for tokens, first in zip(batch["tokens"], batch["first_scored"], strict=True):
            seen += tokens[first:].tolist()
    assert seen == split[3:].tolist()


def test_workers_give_the_same_batches():
    def batches(workers):
        data = DataModule(spec(), batch_size=2, seed=4, max_steps=6, workers=workers)
        return [b["tokens"].tolist() for b in data.train_dataloader()]

    assert batches(0) == batches(2)


def test_overfitting_gives_the_first_batch_at_every_step():
    data = DataModule(spec(), batch_size=2, seed=4, max_steps=3, overfit=True)
    first, *others = [b["tokens"].tolist() for b in data.train_dataloader()]
    assert others == [first, first]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "mnist"}, "data=mnist is not known"),
        ({"kind": "image"}, "data.kind=image does not fit data=stdlib"),
        ({"context": 0}, "data.context=0"),
        ({"name": "cifar10", "kind": "image", "context": 50}, "nearest are 48"),
        ({"name": "cifar10", "kind": "image", "context": 48, "synthetic": False}, "use data.context=3072"),
        ({"unreadable": "drop"}, "data.unreadable=drop"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        spec(**change)
