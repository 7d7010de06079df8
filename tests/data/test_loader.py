"""The training stream: order, shares, resume, replacement of bad samples, collation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from opencloc.boxes import Letterbox
from opencloc.data.loader import (
    BLOCK,
    Batch,
    TrainingExamples,
    choose_caption,
    collate,
    text_identity,
    training_batches,
)
from opencloc.data.sample import BadSample, Sample
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


def examples(
    *sources: Numbered, weights: tuple[float, ...] = (), num_regions: int = 2, seed: int = 0
) -> TrainingExamples:
    return TrainingExamples(sources, weights, num_regions=num_regions, image_size=16, seed=seed)


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> ClocProcessor:
    return ClocProcessor(tokenizer, image_size=16, max_text_length=16)


@given(size=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_sample_comes_once_per_epoch(size: int, seed: int) -> None:
    stream = examples(Numbered(size), seed=seed)
    # positions of one source run through it in blocks: after BLOCK positions every epoch inside is complete
    numbers = [stream.locate(p)[1] for p in range(BLOCK)]
    counts = Counter(numbers)
    assert set(counts) == set(range(size))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_sources_are_drawn_in_exactly_their_shares() -> None:
    stream = examples(Numbered(None), Numbered(7), weights=(3.0, 1.0))
    which = Counter(stream.locate(p)[0] for p in range(2 * BLOCK))
    assert which == {0: 1500, 1: 500}
    endless = [n for w, n in map(stream.locate, range(2 * BLOCK)) if w == 0]
    assert sorted(endless) == list(range(1500))


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


def test_bad_samples_are_replaced_counted_and_disturb_nobody_else(processor: ClocProcessor) -> None:
    good, bad = examples(Numbered(20)), examples(Numbered(20, bad=frozenset({3, 4})))
    (a,) = training_batches(good, processor, batch_size=20, start=0, stop=1, num_workers=0)
    (b,) = training_batches(bad, processor, batch_size=20, start=0, stop=1, num_workers=0)
    numbers = [good.locate(p)[1] for p in range(20)]
    hit = torch.tensor([n in (3, 4) for n in numbers])
    assert b.skipped["broken image"] >= int(hit.sum()) > 0
    assert torch.equal(a.pixels[~hit], b.pixels[~hit])
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


def test_collation_keeps_each_region_with_its_text_and_its_box_in_the_square(processor: ClocProcessor) -> None:
    stream = examples(Numbered(6, num_regions=5), num_regions=3)
    batch = collate([stream[p] for p in range(6)], processor)
    assert len(batch.text_ids) <= 5
    letterbox = Letterbox(width_px=40, height_px=20)
    for b in range(6):
        for m in range(3):
            x = letterbox.to_image(batch.boxes[b, m])[0]
            text = f"thing {round(x.item() / 0.1)}"
            assert batch.text_hash[b, m] == text_identity(text)
            row = batch.text_ids[batch.text_index[b, m]]
            assert torch.equal(row, processor.tokenize([text])[0])


def test_micro_batches_hold_the_same_rows(processor: ClocProcessor) -> None:
    batch = collate([examples(Numbered(6))[p] for p in range(6)], processor)
    pieces = batch.split(2)
    assert torch.equal(torch.cat([p.pixels for p in pieces]), batch.pixels)
    assert torch.equal(torch.cat([p.text_ids[p.text_index] for p in pieces]), batch.text_ids[batch.text_index])


def test_text_identity_ignores_case_and_blanks_and_is_fixed_for_ever() -> None:
    assert text_identity(" Red Dog ") == text_identity("red dog") == -1037350074078119512
    assert text_identity("red dog") != text_identity("red dogs")


def test_captions_fall_back_to_alt_text_then_region_texts() -> None:
    rng, image = np.random.default_rng(0), Image.new("RGB", (4, 4))
    box = np.array([[0, 0, 1, 1], [0, 0, 1, 0.5]], dtype=np.float32)
    assert choose_caption(Sample(key="a", image=image, captions=(" ",), alt_text="alt"), rng) == "alt"
    regions = Sample(key="a", image=image, boxes=box, texts=("dog", "dog"))
    assert choose_caption(regions, rng) == "dog"
    with pytest.raises(BadSample, match="no caption"):
        choose_caption(Sample(key="a", image=image), rng)
