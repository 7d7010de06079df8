"""Conversations: what is refused, and the way to disk and back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from opencloc.errors import BadSample
from opencloc.mllm.conversation import (
    Conversation,
    Turn,
    conversation_record,
    decode_rle,
    encode_rle,
    parse_conversation,
)
from opencloc.model.prompts import Box, Mask, Point

IMAGE = Image.new("RGB", (20, 10))
ASKED = Turn("user", "What is {region:0}?")
BOX = Box(0.1, 0.2, 0.5, 0.9)


@pytest.mark.parametrize(
    ("reason", "fields"),
    [
        ("conversation without turns", {"turns": ()}),
        ("unknown role", {"turns": (Turn("system", "Be kind."),)}),
        ("roles do not take turns", {"turns": (Turn("assistant", "Hello."),)}),
        ("roles do not take turns", {"turns": (Turn("user", "Hello?"), Turn("user", "Anybody?"))}),
        ("empty answer", {"turns": (Turn("user", "Hello?"), Turn("assistant", " "))}),
        ("placeholder without a prompt", {"turns": (ASKED,)}),
        ("placeholder without a prompt", {"turns": (Turn("user", "{box:7}"),), "prompts": (BOX,)}),
        ("region placeholder in an answer", {"turns": (ASKED, Turn("assistant", "{region:0}")), "prompts": (BOX,)}),
        ("prompts without an image", {"turns": (ASKED,), "prompts": (BOX,), "image": None}),
        ("bad prompt", {"turns": (ASKED,), "prompts": (Box(0.1, 0.2, 1.5, 0.9),)}),
        ("bad prompt", {"turns": (ASKED,), "prompts": (Box(0.5, 0.2, 0.1, 0.9),)}),
        ("bad prompt", {"turns": (ASKED,), "prompts": (Point(float("nan"), 0.5),)}),
        ("bad prompt", {"turns": (ASKED,), "prompts": (Mask(np.zeros((4, 4), bool)),)}),
        ("bad prompt", {"turns": (ASKED,), "prompts": (Mask(np.ones(4, bool)),)}),
        ("text is not valid Unicode", {"turns": (Turn("user", "\ud800"),)}),
    ],
)
def test_unsound_conversations_are_refused_by_name(reason: str, fields: dict[str, Any]) -> None:
    with pytest.raises(BadSample, match="row 7") as caught:
        Conversation(**{"image": IMAGE, "where": "row 7"} | fields)
    assert caught.value.reason == reason


def test_conversation_comes_back_from_its_record() -> None:
    mask = np.zeros((5, 7), bool)
    mask[1:3, 2:6] = True
    turns = (Turn("user", "{region:0} {region:1} {region:2}?"), Turn("assistant", "A dog {box:0}."))
    whole = Conversation(image=IMAGE, turns=turns, prompts=(BOX, Point(0.25, 0.5), Mask(mask)))
    record = json.loads(json.dumps(conversation_record(whole)))
    back = parse_conversation(record, IMAGE, "there")
    assert back.turns == whole.turns
    assert back.prompts[:2] == whole.prompts[:2]
    assert isinstance(back.prompts[2], Mask)
    assert (back.prompts[2].mask == mask).all()


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"conversations": "hello"},
        {"conversations": [{"role": "user"}]},
        {"conversations": [{"role": "user", "text": "a"}], "prompts": [{"box": [1, 2]}]},
        {"conversations": [{"role": "user", "text": "a"}], "prompts": [{"box": [0, 0, 1, True]}]},
        {"conversations": [{"role": "user", "text": "a"}], "prompts": [{"box": [0, 0, 1, 1], "point": [0, 0]}]},
        {"conversations": [{"role": "user", "text": "a"}], "prompts": [{"circle": [0, 0, 1]}]},
        {"conversations": [{"role": "user", "text": "a"}], "prompts": [{"mask": {"size": [2, 2], "counts": [3]}}]},
        {"conversations": [{"role": "user", "text": "a"}], "prompts": [{"mask": {"size": [2], "counts": "~"}}]},
    ],
)
def test_unsound_records_are_bad_samples(record: dict[str, Any]) -> None:
    with pytest.raises(BadSample, match="there"):
        parse_conversation(record, IMAGE, "there")


@given(mask=arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_run_lengths_come_back(mask: np.ndarray) -> None:
    assert (decode_rle(encode_rle(mask), "here") == mask).all()


def test_compressed_run_lengths_are_those_of_pycocotools() -> None:
    """Made by pycocotools' algorithm (rleToString), spelled out here for masks with long and short runs."""
    rng = np.random.default_rng(0)
    for shape in ((3, 4), (40, 30), (200, 300)):
        mask = rng.random(shape) < 0.3
        mask[shape[0] // 2 :] = True
        rle = encode_rle(mask)
        text = ""
        for i, count in enumerate(rle["counts"]):
            value = count - rle["counts"][i - 2] if i > 2 else count
            more = True
            while more:
                bits, value = value & 0x1F, value >> 5
                more = value != (-1 if bits & 0x10 else 0)
                text += chr((bits | (0x20 if more else 0)) + 48)
        assert (decode_rle({"size": rle["size"], "counts": text}, "here") == mask).all()
