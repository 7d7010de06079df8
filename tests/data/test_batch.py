"""Collation: every region keeps its text and box, parts join to what they'd be in one piece, pixels are normalised."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from opencloc.data.batch import Batch, Example, collate, join, text_identity
from opencloc.model.outputs import ImageFeatures
from opencloc.model.processor import ClocProcessor

CPU = torch.device("cpu")
WORDS = ("dog", "Dog ", "a red dog", "two trains in the snow", "cat")


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerFast) -> ClocProcessor:
    return ClocProcessor(tokenizer, image_size=16, max_text_length=16)


def example(seed: int, texts: list[str], caption: str = "a photo", skipped: tuple[str, ...] = ()) -> Example:
    return Example(
        square=(np.arange(16 * 16 * 3).reshape(16, 16, 3) * (seed + 7) % 251).astype(np.uint8),
        caption=caption,
        boxes=(np.arange(12).reshape(3, 4) * (seed + 1) % 13 / 13).astype(np.float32),
        texts=texts,
        skipped=list(skipped),
    )


arguments = st.lists(  # of `example`, which is called in the test: type checks draw random numbers
    st.tuples(
        st.integers(0, 99),
        st.lists(st.sampled_from(WORDS), max_size=3),
        st.sampled_from(WORDS),
        st.sampled_from([(), ("broken image",)]),
    ),
    min_size=1,
    max_size=7,
)


def same(a: Batch, b: Batch) -> bool:
    tensors = {name: value for name, value in vars(a).items() if isinstance(value, torch.Tensor)}
    return a.skipped == b.skipped and all(torch.equal(value, getattr(b, name)) for name, value in tensors.items())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(arguments, st.integers(1, 4))
def test_parts_join_to_what_one_collation_gives(processor: ClocProcessor, fields: list[tuple], size: int) -> None:
    rows = [example(*one) for one in fields]
    parts = [collate(rows[i : i + size], processor) for i in range(0, len(rows), size)]
    assert same(join(parts, processor, CPU), join([collate(rows, processor)], processor, CPU))


def test_every_region_keeps_its_text_and_its_box(processor: ClocProcessor) -> None:
    rows = [example(0, ["dog", "cat", "a red dog"]), example(1, ["cat"]), example(2, [])]
    batch = join([collate(rows, processor)], processor, CPU)
    assert len(batch.text_ids) == 3
    assert batch.valid.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    for b, row in enumerate(rows):
        assert torch.equal(batch.boxes[b], torch.from_numpy(row.boxes))
        for m, text in enumerate(row.texts):
            assert batch.text_hash[b, m] == text_identity(text)
            ids = batch.text_ids[batch.text_index[b, m]]
            alone = processor.tokenize([text])[0]
            assert torch.equal(ids[: len(alone)], alone)
            assert (ids[len(alone) :] == processor.tokenizer.pad_token_id).all()


def test_joining_counts_what_was_skipped_in_all_parts(processor: ClocProcessor) -> None:
    parts = [collate([example(i, ["dog"], skipped=("broken image",) * i)], processor) for i in range(3)]
    assert join(parts, processor, CPU).skipped == Counter({"broken image": 3})


def test_pixels_are_normalised_by_the_mean_and_deviation_of_the_processor(processor: ClocProcessor) -> None:
    rows = [example(i, []) for i in range(3)]
    batch = join([collate(rows, processor)], processor, CPU)
    assert batch.pixel_values is not None
    assert batch.pixel_values.is_contiguous()
    squares = np.stack([row.square for row in rows if row.square is not None])
    expected = (squares / 255 - processor.image_mean) / processor.image_std
    torch.testing.assert_close(batch.pixel_values, torch.from_numpy(expected.transpose(0, 3, 1, 2)).float())


def test_micro_batches_hold_the_same_rows(processor: ClocProcessor) -> None:
    batch = join([collate([example(i, ["dog", "cat"][: i % 3]) for i in range(6)], processor)], processor, CPU)
    pieces = batch.split(2)
    assert [len(piece) for piece in pieces] == [2, 2, 2]
    pixels = [p.pixel_values for p in pieces if p.pixel_values is not None]
    assert batch.pixel_values is not None
    assert torch.equal(torch.cat(pixels), batch.pixel_values)
    assert torch.equal(torch.cat([p.text_ids[p.text_index] for p in pieces]), batch.text_ids[batch.text_index])


def test_features_are_joined_and_split_as_pixels_are(processor: ClocProcessor) -> None:
    """Rows of float16 become float32; what the tower's pooling reads is carried where it is there."""

    def stored(seed: int) -> ImageFeatures:
        values = torch.arange(12.0).reshape(1, 4, 3).half() + seed
        return ImageFeatures(embedding=values[:, 0], tokens=values, grid=(2, 2), pool_input=-values)

    rows = [replace(example(i, ["dog"]), square=None, features=stored(i)) for i in range(5)]
    batch = join([collate(rows[:2], processor), collate(rows[2:], processor)], processor, CPU)
    assert batch.pixel_values is None
    pieces = batch.split(2)
    for number in range(5):
        whole, piece = batch.features, pieces[number // 2].features
        assert whole is not None
        assert piece is not None
        for found in (whole.map(lambda x, i=number: x[i : i + 1]), piece.map(lambda x, i=number % 2: x[i : i + 1])):
            expected = stored(number).map(torch.Tensor.float)
            assert all(
                torch.equal(getattr(found, n), getattr(expected, n)) for n in ("embedding", "tokens", "pool_input")
            )


def test_text_identity_ignores_case_and_blanks_and_is_fixed_for_ever() -> None:
    assert text_identity(" Red Dog ") == text_identity("red dog") == -1037350074078119512
    assert text_identity("red dog") != text_identity("red dogs")
