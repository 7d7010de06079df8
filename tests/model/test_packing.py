"""Packed texts: nothing lost, no token sees another text, the embeddings of the plain way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.packing import PackedTexts, join, pack
from opencloc.model.processor import ClocProcessor

TEXTS = ["dog", "a photo of a pizza in the snow and a blue cat", "a red dog", "two trains", "cat", "snow", "a dog"]


@given(st.lists(st.lists(st.integers(3, 50), min_size=1, max_size=9), min_size=1, max_size=30))
def test_every_text_lies_whole_in_one_row_with_its_own_positions(sequences: list[list[int]]) -> None:
    packed = pack(sequences, max_length=9, pad_id=0)
    row_length = packed.input_ids.shape[1]
    assert row_length % 8 == 0
    assert len(packed) == len(sequences)
    taken = torch.zeros(packed.input_ids.numel(), dtype=torch.int)
    for end, ids in zip(packed.end.tolist(), sequences, strict=True):
        place = slice(end - len(ids) + 1, end + 1)
        assert packed.input_ids.flatten()[place].tolist() == ids
        assert packed.position_ids.flatten()[place].tolist() == list(range(len(ids)))
        assert place.start // row_length == end // row_length
        taken[place] += 1
    assert taken.max() == 1
    assert (packed.input_ids.flatten()[taken == 0] == 0).all()
    assert packed.select(torch.arange(len(sequences))).padded().shape == packed.padded().shape


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    packed = pack([[7] * n for n in lengths], max_length=9, pad_id=0)
    used = sorted((packed.input_ids == 7).sum(1).tolist())
    assert all(used[0] + more > packed.input_ids.shape[1] for more in used[1:])


def test_rows_have_one_length_whatever_the_texts() -> None:
    shapes = [tuple(pack([[7] * n] * 60, max_length=77, pad_id=0).input_ids.shape) for n in (4, 50, 77)]
    assert shapes == [(2, 160), (20, 160), (30, 160)]  # 40, 3 and 2 texts to a row


def test_joined_texts_are_those_of_both_in_order() -> None:
    first, second = [[5, 6, 1], [7, 1]], [[8, 1], [9, 9, 9, 1]]
    both = join(*(pack(texts, max_length=4, pad_id=0) for texts in (first, second)))
    assert len(both) == 4
    assert torch.equal(both.padded(), pack(first + second, max_length=4, pad_id=0).padded())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_a_token_sees_itself_and_what_comes_before_it_in_its_text(lengths: list[int]) -> None:
    packed = pack([[7] * n for n in lengths], max_length=8, pad_id=0)
    seen = packed.attention()[:, 0]
    assert torch.equal(seen.sum(-1), packed.position_ids + 1)
    for row, positions in zip(seen, packed.position_ids.tolist(), strict=True):
        for i, position in enumerate(positions):
            assert row[i, i - position : i + 1].all()


def test_texts_are_chosen_by_number() -> None:
    packed = pack([[5, 6, 1], [7, 1], [8, 1]], max_length=4, pad_id=0)
    chosen = packed.select(torch.tensor([2, 0, 2]))
    assert chosen.padded().tolist() == [[8, 1, 0], [5, 6, 1], [8, 1, 0]]


@pytest.mark.parametrize("sequences", [[], [[]], [[3, 1], [3, 3, 3, 3, 1]]])
def test_what_cannot_be_packed_is_refused(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="texts"):
        pack(sequences, max_length=4, pad_id=0)


@pytest.fixture
def make(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Any, Any]]:
    def make(family: str) -> tuple[ClocModel, ClocProcessor]:
        torch.manual_seed(0)
        clip = tower_config(family)
        return ClocModel(ClocConfig(clip_config=clip)), ClocProcessor.for_towers(clip, tokenizer)

    return make


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("eos_token_id", [1, 2])  # 2: CLIP's old configurations, where the highest id is the end
def test_packed_texts_get_the_embeddings_and_gradients_of_full_length_ones(
    make: Callable[..., Any], attention: str, eos_token_id: int
) -> None:
    model, processor = make("clip")
    model.clip.text_model.eos_token_id = eos_token_id
    model.set_attn_implementation(attention)
    model.double()
    packed = processor.pack(TEXTS)
    if eos_token_id == 2:
        ids = [[min(i, 280) for i in row[: row.index(1)]] for row in processor.tokenize(TEXTS).tolist()]
        packed = pack([[*row, len(processor.tokenizer) - 1] for row in ids], max_length=16, pad_id=0)
    assert isinstance(packed, PackedTexts)
    assert len(packed.input_ids) < len(TEXTS) / 2
    full = torch.nn.functional.pad(packed.padded(), (0, 16 - packed.padded().shape[1]))
    direction = torch.randn(len(TEXTS), 24, generator=torch.Generator().manual_seed(1))
    results = []
    for texts in (packed, full):
        model.zero_grad()
        embedding = model.encode_text(texts)
        (embedding * direction).sum().backward()
        results.append((embedding, {n: p.grad for n, p in model.clip.text_model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=0)  # normalised in float32
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=2e-6, rtol=1e-4, msg=name)


def test_siglip_reads_its_padding_and_is_not_packed(make: Callable[..., Any]) -> None:
    _, processor = make("siglip")
    assert torch.equal(processor.pack(TEXTS), processor.tokenize(TEXTS))


def test_a_text_that_spells_out_the_end_token_ends_there(make: Callable[..., Any]) -> None:
    model, processor = make("clip")
    strings = ["a dog <end> and a cat", "a dog"]
    ids = processor.tokenize(strings)
    with torch.no_grad():
        plain, packed, repacked = (model.encode_text(x) for x in (ids, processor.pack(strings), processor.pack(ids)))
    torch.testing.assert_close(packed, plain)
    torch.testing.assert_close(repacked, plain)
