"""Data sets as conversations: LLaVA's and Ferret's rows, records in tars, questions about regions."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.data.sample import Sample, encode_image
from opencloc.data.sources.spec import open_source
from opencloc.errors import BadSample
from opencloc.mllm import templates
from opencloc.mllm.conversation import Conversation, Turn, conversation_record, encode_rle
from opencloc.mllm.readers import Asked, open_conversations
from opencloc.mllm.templates import KINDS, Questions, names_of, with_article
from opencloc.model.prompts import Box, Mask, Point

GOOD: dict[str, Any] = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}],
}


def rows(folder: Path, *content: Any, kind: str = "llava") -> Any:
    """The source of a file with these rows beside one image."""
    Image.new("RGB", (40, 20), "red").save(folder / "a.png")
    (folder / "rows.json").write_text(json.dumps(list(content)))
    return open_conversations(f"{kind}:{folder}/rows.json?images={folder}")


def test_llava_rows_become_conversations(tmp_path: Path) -> None:
    text_only = {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]}
    source = rows(tmp_path, GOOD, text_only)
    assert source.size == 2
    assert source[0].turns == (Turn("user", "What is it?"), Turn("assistant", "A dog."))
    assert source[0].image.size == (40, 20)
    assert source[1].image is None


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("unknown role", {"conversations": [{"from": "system", "value": "<image>"}]}),
        ("image token missing", {"conversations": [{"from": "human", "value": "What?"}]}),
        ("several image tokens", {"conversations": [{"from": "human", "value": "<image> <image>"}]}),
        ("image missing", {"image": None}),
        ("missing image", {"image": "b.png"}),
        ("missing image", {"image": "../rows.json"}),
        ("missing image", {"image": "/etc/hostname"}),
        ("broken image", {"image": "rows.json"}),
        ("bad row", {"image": 3}),
        ("bad row", {"conversations": "hello"}),
        ("bad row", {"conversations": [{"from": "human"}]}),
        ("roles do not take turns", {"conversations": [{"from": "gpt", "value": "<image>"}]}),
        ("conversation without turns", {"conversations": [], "image": None}),
    ],
)
def test_unusable_rows_name_file_row_and_reason(reason: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = rows(tmp_path, GOOD, GOOD | changes)
    with pytest.raises(BadSample, match=r"rows\.json, row 1") as caught:
        source[1]
    assert caught.value.reason == reason


@pytest.mark.parametrize("content", ["{}", "[]", "no json"])
def test_files_that_are_no_list_of_rows_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json"):
        open_conversations(f"llava:{tmp_path}/rows.json?images={tmp_path}")


@pytest.mark.parametrize("spec", ["llava:rows.json", "llava:?images=x", "ferret:rows.json?images="])
def test_specs_without_file_or_images_say_how_they_are_written(spec: str) -> None:
    with pytest.raises(ValueError, match=r"FILE\?images=DIR"):
        open_conversations(spec)


def test_ferret_rows_point_in_questions_and_write_boxes_in_answers(tmp_path: Path) -> None:
    mask = np.zeros((20, 40), bool)
    mask[:10] = True
    row = GOOD | {
        "image_w": 40,
        "image_h": 20,
        "conversations": [
            {
                "from": "human",
                "value": "<image>\nWhat is <bbox_location0> <region_fea>, <bbox_location1>, <bbox_location2>?",
            },
            {"from": "gpt", "value": "A dog <bbox_location0>."},
        ],
        "box_x1y1x2y2": [[[0, 0, 20, 10], [30, 5], [0, 0, 40, 10]], [[0, 0, 40.2, 20]]],
        "masks": [[None, None, encode_rle(mask)], []],
    }
    made = rows(tmp_path, row, kind="ferret")[0]
    assert made.turns[0].text == "What is {region:0}, {region:1}, {region:2}?"
    assert made.turns[1].text == "A dog {box:3}."
    assert made.prompts[:2] == (Box(0.0, 0.0, 0.5, 0.5), Point(0.75, 0.25))
    assert isinstance(made.prompts[2], Mask)
    assert (made.prompts[2].mask == mask).all()
    assert made.prompts[3] == Box(0.0, 0.0, 1.0, 1.0)  # a pixel over the edge is clipped


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("placeholder without a prompt", {"box_x1y1x2y2": [[]]}),
        ("placeholder without a prompt", {"box_x1y1x2y2": None}),
        ("bad prompt", {"box_x1y1x2y2": [[[0, 0, 80, 10]]]}),
        ("bad prompt", {"box_x1y1x2y2": [[[0, 0, 8]]]}),
        ("bad mask", {"masks": [[{"size": [2, 2], "counts": [1]}]]}),
        ("bad row", {"image_w": 0}),
    ],
)
def test_unusable_ferret_rows_name_the_reason(reason: str, changes: dict[str, Any], tmp_path: Path) -> None:
    said = [{"from": "human", "value": "<image> What is <bbox_location0>?"}, {"from": "gpt", "value": "A dog."}]
    row = GOOD | {"image_w": 40, "image_h": 20, "box_x1y1x2y2": [[[0, 0, 8, 8]]], "conversations": said} | changes
    with pytest.raises(BadSample, match="row 0") as caught:
        rows(tmp_path, row, kind="ferret")[0]
    assert caught.value.reason == reason


def test_records_in_tars_are_read_and_others_are_asked_about(tmp_path: Path) -> None:
    import io
    import tarfile

    turns = (Turn("user", "What is {region:0}?"), Turn("assistant", "A dog."))
    photo = Image.new("RGB", (8, 8))
    whole = Conversation(image=photo, turns=turns, prompts=(Box(0.0, 0.0, 0.5, 0.5),))
    regions = {"regions": [{"box": [0, 0, 0.5, 0.5], "text": "cat"}]}
    broken = {"conversations": [{"role": "user", "text": "{region:3}"}]}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, record in (("a", conversation_record(whole)), ("b", regions), ("c", broken)):
            for name, data in (
                (f"{key}.png", encode_image(photo, "png")),
                (f"{key}.json", json.dumps(record).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = Asked(open_conversations(f"shards:{tmp_path}"), kinds=("refer",))
    rng = random.Random(0)
    assert source.conversation(0, rng).turns == turns
    assert source.conversation(1, rng).turns == (Turn("user", "What is {region:0}?"), Turn("assistant", "cat"))
    with pytest.raises(BadSample, match="c") as caught:
        source.conversation(2, rng)
    assert caught.value.reason == "placeholder without a prompt"


# -- questions ---------------------------------------------------------------------------------------------------------


def asked_about_scenes(kinds: Any, count: int = 200) -> list[tuple[Sample, Conversation]]:
    source: Any = open_source("scenes:rich?num_things=60", image_px=32)
    ask = Questions(names_of(source), kinds)
    return [(source[i], ask(source[i], random.Random(i))) for i in range(count)]


def test_every_answer_is_true_and_no_object_is_asked_about_twice() -> None:
    for sample, conversation in asked_about_scenes(KINDS):
        where = dict(zip(sample.texts, sample.boxes.tolist(), strict=True))
        spoken: list[str] = []
        turns = conversation.turns
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            kinds = {kind for kind in ("{region:", "{box:") if kind in question.text + answer.text}
            for number, prompt in enumerate(conversation.prompts):
                if f":{number}}}" not in question.text + answer.text:
                    continue
                (name,) = [n for n in where if n in question.text + answer.text and Box(*where[n]) == prompt]
                spoken.append(name)
            if not kinds and answer.text in (templates.YES, templates.NO):
                there = any(templates.exists(name) in question.text for name in where)
                assert there == (answer.text == templates.YES)
                spoken += [name for name in where if templates.exists(name) in question.text]
            elif not kinds:
                assert answer.text in sample.captions
        assert max(Counter(spoken).values(), default=1) == 1
        for name in spoken:  # nothing that was asked about stands in an earlier turn
            speaking = {i // 2 for i, turn in enumerate(turns) if re.search(rf"\b{re.escape(name)}\b", turn.text)}
            assert len(speaking) == 1


@pytest.mark.parametrize("kind", ["exists", "verify"])
def test_yes_and_no_come_equally_often_for_a_name_and_in_every_place(kind: Any) -> None:
    answers = Counter()
    after = Counter()
    for _, conversation in asked_about_scenes((kind,), 600):
        said = [turn.text.split(",")[0] for turn in conversation.turns[1::2]]
        answers.update(said)
        after.update(pairwise(said))
    assert set(answers) == {"Yes", "No"}
    assert 0.46 < answers["Yes"] / answers.total() < 0.54
    for before in ("Yes", "No"):  # the answer before tells nothing
        same = after[before, before] / (after[before, "Yes"] + after[before, "No"])
        assert 0.42 < same < 0.58


def test_kinds_that_cannot_be_asked_are_named() -> None:
    photo = Image.new("RGB", (8, 8))
    cases: list[tuple[Sample, Any]] = [
        (Sample(key="bare", image=photo), KINDS),
        (Sample(key="bare", image=photo, captions=("a dog",)), ("refer",)),
        (Sample(key="bare", image=photo, boxes=np.array([[0, 0, 1, 1]]), texts=("dog",)), ("exists",)),
    ]
    for sample, kinds in cases:
        with pytest.raises(BadSample, match="bare") as caught:
            Questions([], kinds)(sample, random.Random(0))
        assert caught.value.reason == "nothing to ask about"


def test_what_is_absent_is_spoken_of_nowhere() -> None:
    photo = Image.new("RGB", (8, 8))
    boxes = np.array([[0, 0, 1, 1]])
    sample = Sample(key="a", image=photo, boxes=boxes, texts=("black dogs",), captions=("a man beside a car",))
    ask = Questions(["dog", "white dog", "a man", "cars", "boat", "boat"])
    assert ask.absent(sample, random.Random(0), 3) == ["boat"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dog", "a dog"),
        ("apple", "an apple"),
        ("two dogs", "two dogs"),
        ("socks", "socks"),
        ("glass", "a glass"),
        ("bus", "a bus"),
        ("the man", "the man"),
        ("3 people", "3 people"),
    ],
)
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected


def test_names_of_a_generated_world_are_its_own() -> None:
    source: Any = open_source("scenes:easy", image_px=32)
    assert set(names_of(source)) == set(source.config.class_names())
