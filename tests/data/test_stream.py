"""The training stream: order, shares, resume, replacement of bad samples, collation."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from opencloc.data import stream as loader
from opencloc.data.batch import Batch
from opencloc.data.sample import Sample
from opencloc.data.stream import (
    BLOCK,
    MIN_DRAWN,
    TrainingExamples,
    _Rows,
    check_skipped,
    choose_caption,
    choose_regions,
    training_batches,
)
from opencloc.data.tars.shards import Shards
from opencloc.errors import BadSample
from opencloc.model.processor import ClocProcessor


class Numbered:
    """A source whose sample i says i; numbers in `bad` cannot be used."""

    def __init__(self, size: int | None, num_regions: int = 3, bad: frozenset[int] = frozenset()) -> None:
        self.size, self.num_regions, self.bad = size, num_regions, bad

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSample("broken image", f"sample {index}")
        boxes = np.array([[0.1 * r, 0.0, 0.1 * r + 0.1, 0.5] for r in range(self.num_regions)], dtype=np.float32)
        return Sample(
            key=str(index),
            image=Image.new("RGB", (40, 20), (index % 256, 0, 0)),
            captions=(f"caption {index}", f"another {index}"),
            boxes=boxes.reshape(-1, 4),
            texts=tuple(f"thing {r}" for r in range(self.num_regions)),
        )


class NumberedTars(Numbered, Shards):
    """The same as tars of some samples each."""

    def __init__(self, counts: Sequence[int], num_regions: int = 3, bad: frozenset[int] = frozenset()) -> None:
        super().__init__(sum(counts), num_regions, bad)
        self.counts = np.array(counts)
        self.urls = [f"{tar}.tar" for tar in range(len(counts))]
        self.asked: list[int] = []

    size = None  # type: ignore[assignment]  # an attribute here, a property there

    def prefetch(self, shards: Sequence[int]) -> None:
        self.asked += shards


def examples(
    *sources: Numbered,
    weights: tuple[float, ...] = (),
    num_regions: int = 2,
    seed: int = 0,
    lanes: int = 4,
    keep_patches: tuple[int, int] | None = (3, 8),
) -> TrainingExamples:
    return TrainingExamples(
        sources,
        weights,
        num_regions=num_regions,
        image_size=16,
        seed=seed,
        lanes=lanes,
        keep_patches=keep_patches,
    )


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> ClocProcessor:
    return ClocProcessor(tokenizer, image_size=16, max_text_length=16)


@given(size=st.integers(1, 60), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_sample_comes_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    stream = examples(Numbered(size), seed=seed)
    numbers = [stream.locate(p)[1] for p in range(epoch * size, (epoch + 1) * size)]
    assert sorted(numbers) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        tuple(examples(Numbered(50), seed=seed).locate(epoch * 50 + p)[1] for p in range(50))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_sources_are_drawn_in_exactly_their_shares() -> None:
    stream = examples(Numbered(None), Numbered(7), weights=(3.0, 1.0), lanes=2)
    drawn = [stream.locate(p) for p in range(2 * BLOCK)]
    assert Counter(which for which, _ in drawn) == {0: 1500, 1: 500}
    assert sorted(n for which, n in drawn if which == 0) == list(range(1500))
    small = Counter(n for which, n in drawn if which == 1)
    assert set(small) == set(range(7))
    assert max(small.values()) - min(small.values()) <= 1


@given(
    batch_size=st.integers(1, 24),
    world_size=st.integers(1, 6),
    lanes=st.integers(1, 6),
    part=st.sampled_from([1, 3, 128]),
)
def test_every_position_is_one_row_of_one_rank(batch_size: int, world_size: int, lanes: int, part: int) -> None:
    batch_size *= world_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "PART_ROWS", part)
        ranks = [_Rows(batch_size, lanes, 2, 5, rank, world_size) for rank in range(world_size)]
        whole = [p for rows in _Rows(batch_size, lanes, 2, 5, 0, 1) for p in rows]
    parts = [list(rows) for rows in ranks]
    assert [len(rows) for rows in ranks] == [len(made) for made in parts]
    for k in range(3):
        batch = whole[k * batch_size : (k + 1) * batch_size]
        assert sorted(batch) == list(range((k + 2) * batch_size, (k + 3) * batch_size))
        per_rank = [len(made) // 3 for made in parts]
        assert batch == [
            p for made, n in zip(parts, per_rank, strict=True) for rows in made[k * n : (k + 1) * n] for p in rows
        ]


def test_ranks_read_different_tars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SHUFFLE", 40)
    stream = examples(NumberedTars([20] * 16), lanes=4)
    tars = [{stream.locate(p)[1] // 20 for rows in _Rows(16, 4, 0, 20, rank, 4) for p in rows} for rank in range(4)]
    assert [len(one) for one in tars] == [4] * 4
    assert len(set().union(*tars)) == 16


def test_two_sources_of_tars_keep_their_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SHUFFLE", 40)
    stream = examples(NumberedTars([20] * 16), NumberedTars([10] * 32), weights=(2.0, 1.0), lanes=4)
    for lane in range(4):
        found = [stream.locate(p) for p in range(lane, 400, 4)]
        for which, per_tar in ((0, 20), (1, 10)):
            own = {number // per_tar for source, number in found if source == which}
            assert len(own) <= 5


def test_the_next_window_is_asked_for_when_one_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SHUFFLE", 20)
    source = NumberedTars([5] * 12)
    stream = examples(source, lanes=2)
    for position in range(60):
        tar = stream.locate(position)[1] // 5
        assert position < 20 or tar in source.asked  # the first windows come without notice
    assert len(source.asked) <= 16  # each of the 10 others once, or twice where windows or lanes meet in it


def test_a_share_too_small_to_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="never drawn"):
        examples(Numbered(5), Numbered(5), weights=(1.0, 1e-6))
    with pytest.raises(ValueError, match="holds no samples"):
        examples(Numbered(0))


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(value, getattr(b, name)) for name, value in vars(a).items() if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_stream_started_in_the_middle_equals_the_whole_one(processor: ClocProcessor, num_workers: int) -> None:
    stream = examples(Numbered(11), Numbered(None, num_regions=1))
    whole = list(training_batches(stream, processor, batch_size=4, start=0, stop=5, num_workers=0))
    rest = list(training_batches(stream, processor, batch_size=4, start=3, stop=5, num_workers=num_workers))
    assert len(rest) == 2
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_rows_of_all_ranks_in_order_are_the_batch_of_one_process(processor: ClocProcessor, world_size: int) -> None:
    stream = examples(Numbered(11), Numbered(None, num_regions=1))
    whole = list(training_batches(stream, processor, batch_size=6, start=2, stop=4, num_workers=0))
    ranks = [
        list(
            training_batches(
                stream, processor, batch_size=6, start=2, stop=4, num_workers=0, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    for k, batch in enumerate(whole):
        parts = [rows[k] for rows in ranks]
        for name in ("pixel_values", "boxes", "valid", "text_hash", "kept"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


@given(num_patches=st.integers(1, 40), data=st.data())
def test_kept_patches_are_distinct_and_change_nothing_else(num_patches: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_patches))
    stream = examples(Numbered(11), keep_patches=(count, num_patches))
    whole = examples(Numbered(11), keep_patches=None)
    for position in range(3):
        example, same_but_whole = stream[position], whole[position]
        assert example.kept is not None
        assert same_but_whole.kept is None
        assert example.kept == sorted(set(example.kept))
        assert len(example.kept) == count
        assert set(example.kept) <= set(range(num_patches))
        assert example.texts == same_but_whole.texts
        assert np.array_equal(example.boxes, same_but_whole.boxes)


def test_every_image_keeps_patches_of_its_own() -> None:
    stream = examples(Numbered(1), keep_patches=(20, 40))
    assert len({tuple(stream[position].kept or ()) for position in range(5)}) == 5


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (0, 4, r"batch_size must be a multiple of the number of ranks \(4\), got 6"),
        (2, 2, r"rank must be in 0 \.\.\. 1, got 2"),
        (-1, 2, r"rank must be in 0 \.\.\. 1, got -1"),
    ],
)
def test_ranks_that_cannot_share_a_batch_are_refused(
    processor: ClocProcessor, rank: int, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        training_batches(
            examples(Numbered(3)),
            processor,
            batch_size=6,
            start=0,
            stop=1,
            num_workers=0,
            rank=rank,
            world_size=world_size,
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_made_in_parts_equals_the_whole_one(
    processor: ClocProcessor, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    stream = examples(Numbered(11))
    whole = list(training_batches(stream, processor, batch_size=8, start=0, stop=3, num_workers=0))
    monkeypatch.setattr(loader, "PART_ROWS", 3)
    parts = list(training_batches(stream, processor, batch_size=8, start=0, stop=3, num_workers=num_workers))
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_worker_that_is_killed_ends_the_run_with_an_error(processor: ClocProcessor) -> None:
    class Deadly(Numbered):
        def __getitem__(self, index: int) -> Sample:
            if index == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    stream = examples(Deadly(8))
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* (killed by signal|exited unexpectedly)"):
        list(training_batches(stream, processor, batch_size=4, start=0, stop=8, num_workers=2))


def test_replacements_come_from_the_same_source() -> None:
    stream = examples(Numbered(None), Numbered(40), weights=(1.0, 1.0))
    for position in range(50):
        which, _ = stream.locate(position)
        numbers = [stream.locate(position, attempt) for attempt in range(10)]
        assert {source for source, _ in numbers} == {which}
        assert len({number for _, number in numbers}) > 5


def test_the_fingerprint_changes_with_whatever_changes_the_order() -> None:
    streams = [
        examples(NumberedTars([3, 4])),
        examples(NumberedTars([4, 3])),
        examples(NumberedTars([3, 4]), seed=1),
        examples(NumberedTars([3, 4]), lanes=8),
        examples(Numbered(7)),
        examples(Numbered(8)),
        examples(Numbered(7), Numbered(7)),
        examples(Numbered(7), Numbered(7), weights=(1.0, 2.0)),
    ]
    assert len({stream.fingerprint for stream in streams}) == len(streams)
    assert examples(Numbered(7), weights=(5.0,)).fingerprint == examples(Numbered(7)).fingerprint


def test_too_many_unusable_samples_stop_the_run_naming_reasons_and_counts() -> None:
    skipped = Counter({"broken image": 60, "missing shard": 1})
    check_skipped(skipped, MIN_DRAWN, 0.1)
    check_skipped(Counter({"broken image": 500}), MIN_DRAWN - 501, 0.05)  # too early to say
    check_skipped(Counter(), 10**9, 0.0)
    with pytest.raises(
        RuntimeError, match=r"61 of 1,061 .* 5\.7% .* allows 5\.0% \(broken image: 60, missing shard: 1\)"
    ):
        check_skipped(skipped, MIN_DRAWN, 0.05)


def test_bad_samples_are_replaced_counted_and_disturb_nobody_else(processor: ClocProcessor) -> None:
    good, bad = examples(Numbered(20)), examples(Numbered(20, bad=frozenset({3, 4})))
    (a,) = training_batches(good, processor, batch_size=20, start=0, stop=1, num_workers=0)
    (b,) = training_batches(bad, processor, batch_size=20, start=0, stop=1, num_workers=0)
    numbers = [good.locate(p)[1] for rows in _Rows(20, 4, 0, 1, 0, 1) for p in rows]
    hit = torch.tensor([n in (3, 4) for n in numbers])
    assert b.skipped["broken image"] >= int(hit.sum()) > 0
    assert a.pixel_values is not None
    assert b.pixel_values is not None
    assert torch.equal(a.pixel_values[~hit], b.pixel_values[~hit])
    assert not a.skipped


def test_data_that_is_broken_throughout_stops_the_run_naming_the_last_sample() -> None:
    with pytest.raises(RuntimeError, match=r"unusable samples in a row, the last: sample \d+: broken image"):
        examples(Numbered(5, bad=frozenset(range(5))))[0]


@pytest.mark.parametrize("num_regions", [0, 1, 2, 5])
def test_regions_are_sampled_without_repetition_and_padded(processor: ClocProcessor, num_regions: int) -> None:
    stream = examples(Numbered(8, num_regions=num_regions), num_regions=2)
    (batch,) = training_batches(stream, processor, batch_size=8, start=0, stop=1, num_workers=0)
    assert (batch.valid.sum(1) == min(2, num_regions)).all()
    if num_regions >= 2:
        assert (batch.text_hash[:, 0] != batch.text_hash[:, 1]).all()
    assert (batch.boxes[~batch.valid] == torch.tensor([0.0, 0.0, 1.0, 1.0])).all()


def test_captions_fall_back_to_alt_text_then_region_texts() -> None:
    rng, image = random.Random(0), Image.new("RGB", (4, 4))
    box = np.array([[0, 0, 1, 1], [0, 0, 1, 0.5]], dtype=np.float32)
    assert choose_caption(Sample(key="a", image=image, captions=(" ",), alt_text="alt"), rng) == "alt"
    regions = Sample(key="a", image=image, boxes=box, texts=("dog", "dog"))
    assert choose_caption(regions, rng) == "dog"
    with pytest.raises(BadSample, match="no caption"):
        choose_caption(Sample(key="a", image=image), rng)


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 6), st.integers(0, 99))
def test_of_one_box_one_wording_is_drawn_at_a_time(boxes: list[int], count: int, seed: int) -> None:
    rows = np.array([[0, 0, 1 / (box + 1), 1] for box in boxes], dtype=np.float32)
    image = Image.new("RGB", (8, 8))
    sample = Sample(key="k", image=image, boxes=rows, texts=tuple(f"text {i}" for i in range(len(boxes))))
    chosen = choose_regions(sample, count, random.Random(seed))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, len(set(boxes))) == len({boxes[i] for i in chosen})
    if len(set(boxes)) == len(boxes) > count:  # the draw that there has always been
        assert chosen == sorted(random.Random(seed).sample(range(len(boxes)), count))


def test_every_wording_has_its_turn() -> None:
    rows = np.array([[0, 0, 0.5, 1]] * 3 + [[0.5, 0, 1, 1]], dtype=np.float32)
    sample = Sample(key="k", image=Image.new("RGB", (8, 8)), boxes=rows, texts=("a", "b", "c", "other"))
    draws = {tuple(choose_regions(sample, 2, random.Random(seed))) for seed in range(60)}
    assert draws == {(0, 3), (1, 3), (2, 3)}
