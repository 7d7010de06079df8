"""Conversations as tensors: chat templates are followed, answers alone are learned, prompts lie in the square."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opencloc.boxes import Letterbox
from opencloc.errors import BadSample
from opencloc.mllm.chat_format import chat_format
from opencloc.mllm.conversation import Conversation, Turn
from opencloc.mllm.model import IGNORED
from opencloc.mllm.processor import IMAGE, REGION, RegionLlavaProcessor
from opencloc.mllm.sampler import BOX, MASK, NONE, POINT
from opencloc.model.prompts import Box, Mask, Point
from tests.mllm.conftest import speech_tokenizer
from tests.mllm.families import TEMPLATES

FAMILIES = [*TEMPLATES, "plain"]
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
TURNS = (
    Turn("user", "What is {region:0}?"),
    Turn("assistant", "a red dog"),
    Turn("user", "Where is the cat?"),
    Turn("assistant", "A cat {box:1}."),
)
PROMPTS = (Box(0.0, 0.0, 0.5, 1.0), Box(0.5, 0.25, 1.0, 0.75))


def about(*turns: Turn, prompts: Any = PROMPTS, image: Any = PHOTO) -> Conversation:
    return Conversation(image=image, turns=turns, prompts=prompts)


def load(folder: Path) -> RegionLlavaProcessor:
    return RegionLlavaProcessor.from_pretrained(folder)


@pytest.mark.parametrize("family", TEMPLATES)
def test_format_is_what_the_chat_template_writes(family: str) -> None:
    tokenizer: Any = speech_tokenizer(family)
    form = chat_format(tokenizer)
    asked = [{"role": "user", "content": "One?"}]
    said = [*asked, {"role": "assistant", "content": "Two."}]
    options = {"tokenize": False, "enable_thinking": False}
    question = form.head + "One?" + form.ask
    assert question == tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(said, **options)
    assert whole.startswith(question + form.lead + "Two." + form.end)
    again = tokenizer.apply_chat_template([*said, {"role": "user", "content": "Three?"}], **options)
    if family != "qwen3":  # which takes the empty thoughts out of earlier turns
        assert again.startswith(question + form.lead + "Two." + form.end + form.between + "Three?")


def test_templates_that_cannot_be_followed_are_refused() -> None:
    tokenizer = speech_tokenizer("qwen2")
    for template, message in (
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "leave the texts"),
        ("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}", "no special token"),
        ("{{ raise_exception('never') }}", "takes no two questions"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            chat_format(tokenizer, "somewhere")


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_answers_tokenised_on_their_own(family: str, built: Callable[..., Path]) -> None:
    processor = load(built(family=family))
    row = processor.encode(about(*TURNS), for_training=True)
    ids = torch.tensor(row.input_ids)
    labels = torch.tensor(row.labels)
    learned = labels != IGNORED
    assert (labels[learned] == ids[learned]).all()
    edges = (torch.diff(learned.int(), prepend=torch.zeros(1, dtype=torch.int)) == 1).sum()
    assert edges == 2  # one stretch for each answer
    box = processor._coordinates(BOX, Letterbox(width_px=40, height_px=20).to_square(np.array([0.5, 0.25, 1.0, 0.75])))
    lead = processor.format.lead
    expected = [
        i
        for answer in ("a red dog", f"A cat {box}.")
        for i in [*processor.tokenizer(lead + answer, add_special_tokens=False)["input_ids"], *processor.end_ids]
    ]
    assert labels[learned].tolist() == expected
    assert row.num_supervised == len(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_the_beginning_of_what_was_trained_on(family: str, built: Callable[..., Path]) -> None:
    processor = load(built(family=family))
    trained = processor.encode(about(*TURNS), for_training=True)
    asked = processor.encode(about(*TURNS[:3]), for_training=False)
    assert trained.input_ids[: len(asked.input_ids)] == asked.input_ids
    assert trained.labels[len(asked.input_ids)] != IGNORED
    assert trained.labels[len(asked.input_ids) - 1] == IGNORED


@pytest.mark.parametrize(("refer", "tokens"), [("coords", 0), ("token", 1), ("both", 1)])
def test_region_is_pointed_at_by_coordinates_token_or_both(refer: str, tokens: int, built: Callable[..., Path]) -> None:
    processor = load(built(refer=refer))
    batch = processor(about(*TURNS[:1]))
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.count(IMAGE) == processor.num_image_tokens
    assert text.count(REGION) == tokens
    assert ("[0, 250, 500, 749]" in text) == (refer != "token")  # 40 x 20 pixels lie in the middle of the square
    assert ("region_boxes" in batch) == (tokens > 0)


def test_prompts_of_all_kinds_lie_in_the_square(built: Callable[..., Path]) -> None:
    processor = load(built())
    mask = np.zeros((20, 40), bool)
    mask[:10, :20] = True  # the top left quarter
    turns = Turn("user", "{region:0} {region:2} {region:1} {region:0}?")
    one = about(turns, prompts=(Box(0.0, 0.0, 1.0, 1.0), Point(0.5, 0.0), Mask(mask)))
    batch = processor([one, about(Turn("user", "What is this?"), prompts=())])
    assert batch["region_kinds"].tolist() == [[BOX, MASK, POINT, BOX], [NONE] * 4]
    whole, quarter = [0.0, 0.25, 1.0, 0.75], [0.0, 0.25, 0.5, 0.5]
    assert batch["region_boxes"][0].tolist() == [whole, quarter, [0.5, 0.25, 0.5, 0.25], whole]
    side = processor.image_size // 2
    expected = torch.zeros(side, side)
    expected[side // 4 : side // 2, : side // 2] = 1
    assert torch.equal(batch["region_masks"][0, 1], expected)


def test_mask_too_thin_for_the_square_keeps_its_best_pixel(built: Callable[..., Path]) -> None:
    processor = load(built())
    mask = np.zeros((400, 400), bool)
    mask[200, 200] = True
    batch = processor(about(Turn("user", "{region:0}?"), prompts=(Mask(mask),)))
    assert batch["region_masks"].sum() == 1


def test_prompts_are_padded_on_the_left_and_rows_to_learn_on_the_right(built: Callable[..., Path]) -> None:
    processor = load(built())
    short, long = about(Turn("user", "Hi?"), prompts=(), image=None), about(*TURNS[:1])
    asked = processor([short, long])
    assert asked["attention_mask"][0, 0] == 0
    assert asked["attention_mask"][:, -1].tolist() == [1, 1]
    assert asked["pixel_values"].shape[0] == 1  # the other one is about no image
    rows = [about(*short.turns, Turn("assistant", "Yes"), prompts=(), image=None), about(*TURNS)]
    learned = processor(rows, for_training=True)
    assert learned["attention_mask"][:, 0].tolist() == [1, 1]
    assert (learned["labels"][0][learned["attention_mask"][0] == 0] == IGNORED).all()


def test_processor_comes_back_as_it_was_saved(built: Callable[..., Path], tmp_path: Path) -> None:
    processor = load(built(refer="token", coordinate_steps=64, max_length=333))
    for name in ("first", "second"):
        processor.save_pretrained(tmp_path / name)
        processor = load(tmp_path / name)
    assert (processor.refer, processor.coordinate_steps, processor.max_length) == ("token", 64, 333)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


def test_conversations_that_do_not_fit_name_the_reason(built: Callable[..., Path]) -> None:
    processor = load(built(max_length=40))
    cases = {
        "too many tokens": (about(*TURNS), True),
        "no answer at the end": (about(*TURNS[:3]), True),
        "no question at the end": (about(*TURNS), False),
        "special token in a text": (about(Turn("user", f"an {IMAGE} too many")), False),
    }
    for reason, (conversation, for_training) in cases.items():
        with pytest.raises(BadSample, match="row 3") as caught:
            processor.encode(conversation, for_training=for_training, where="row 3")
        assert caught.value.reason == reason


def test_answers_end_at_the_end_token(built: Callable[..., Path]) -> None:
    processor = load(built())
    ids = processor.tokenizer("a red dog", add_special_tokens=False)["input_ids"]
    row = torch.tensor([[7, 8, *ids, *processor.end_ids, 9, 9]])
    assert processor.decode_answers(row, 2) == ["a red dog"]


def test_folders_without_a_processor_are_refused(tmp_path: Path, encoder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"processor_config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="processor"):
        load(encoder("cloc"))
