"""What counts as right: speakers who know everything, nothing or half, and known answers by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.boxes import Letterbox
from opencloc.eval.report import Result
from opencloc.eval.sets.item import EvalSet, Item
from opencloc.mllm.boxes_text import box_text
from opencloc.mllm.conversation import Conversation
from opencloc.mllm.evaluate import MllmEvalConfig, interview, run_mllm_eval
from opencloc.mllm.templates import CAPTION
from tests.mllm.speakers import CHATML, Parrot, tiny_model

NAMES = {"dog": 5, "hot dog": 1, "cat": 2, "zebra": 2, "traffic light": 3}
CONFIG: dict[str, Any] = {"model": ("m",), "data": ("d",), "resamples": 200}
BOXES = np.array([[0.1, 0.1, 0.5, 0.6], [0.6, 0.2, 0.9, 0.9]], dtype=np.float32)


def photo(seed: int = 0) -> Image.Image:
    """Twice as wide as high, so that image and square differ."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 40, 3), dtype=np.uint8))


def regions(seed: int = 0, texts: tuple[str, ...] = ("dog", "Cat"), **fields: Any) -> Item:
    truths = tuple(BOXES[i : i + 1] for i in range(len(texts)))
    return Item(image=photo(seed), boxes=BOXES[: len(texts)], texts=texts, queries=texts, truths=truths, **fields)


def ask(speaker: Parrot, task: str, items: list[Item], **settings: Any) -> tuple[Result, list[dict[str, Any]]]:
    data = EvalSet(name="set", items=items, num_items=len(items), readers=1)
    config = MllmEvalConfig(**CONFIG | settings, tasks=(task,))
    (result,), answers = interview(speaker, "parrot", data, [task], names=NAMES, config=config)
    return result, answers


def values(result: Result) -> dict[str, float]:
    return {key: score.value for key, score in result.scores.items()}


def name_at(conversation: Conversation) -> str:
    """The true name of the region that is asked about."""
    return {0.1: "dog", 0.6: "cat"}[round(conversation.prompts[0].x0, 1)]  # pyright: ignore[reportAttributeAccessIssue]


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_who_knows_the_names_is_always_right_and_who_names_both_never() -> None:
    items = [regions(seed) for seed in range(4)]

    def knows(conversation: Conversation) -> float:
        return float(conversation.turns[-1].text == name_at(conversation))

    result, answers = ask(Parrot(lambda c: f"It is a {name_at(c)}.", knows), "refer-choice", items)
    assert values(result) == {
        "choice_generated": 1,
        "choice_generated_both": 1,
        "choice_likelihood": 1,
        "choice_likelihood_both": 1,
        "named_both": 0,
        "unread": 0,
    }
    assert result.scores["choice_generated"].of == "16 questions"  # 4 images, 2 regions, 2 orders
    assert len(answers) == 16
    both, _ = ask(Parrot(lambda c: c.turns[0].text), "refer-choice", items)  # repeats the question
    assert values(both)["choice_generated"] == 0
    assert values(both)["named_both"] == 1
    assert values(both)["choice_likelihood"] == 0  # a tie counts against it
    silent, _ = ask(Parrot(lambda _: "hm"), "refer-choice", items)
    assert values(silent)["unread"] == 1


def test_who_always_says_the_first_option_is_right_in_half_and_never_in_both_orders() -> None:
    def first(conversation: Conversation) -> str:
        return re.search(r", (.*?) or ", conversation.turns[0].text)[1]  # pyright: ignore

    result, _ = ask(Parrot(first), "refer-choice", [regions(seed) for seed in range(3)])
    assert values(result)["choice_generated"] == 0.5
    assert values(result)["choice_generated_both"] == 0


def test_false_names_are_of_nothing_in_the_image_and_the_same_every_time() -> None:
    items = [regions(seed, captions=("zebras at a traffic light",)) for seed in range(3)]
    result, _ = ask(Parrot(lambda _: ""), "refer-choice", items)
    assert result.images == 0  # hot dog holds dog, the rest is spoken of
    assert result.skipped == {"images": {"without a name that is not in it": 3}}
    items = [regions(seed) for seed in range(3)]
    _, once = ask(Parrot(lambda _: ""), "refer-choice", items)
    _, again = ask(Parrot(lambda _: ""), "refer-choice", items, batch_size=2)
    assert once == again
    said = " ".join(row["question"] for row in once)
    assert "zebra" in said
    assert "hot dog" not in said


# -- naming and finding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("say", "top1", "macc"),
    [
        (lambda c: f"A {name_at(c)}.", 1, 1),
        (lambda _: "the DOG", 3 / 4, 1 / 2),  # of three dogs and a cat
        (lambda _: "a dog or a cat", 0, 0),
        (lambda _: "dogs", 0, 0),  # the exact name
    ],
)
def test_an_open_name_is_right_when_it_is_exact(say: Callable[[Conversation], str], top1: float, macc: float) -> None:
    items = [regions(0), regions(1, ("dog",)), regions(2, ("dog",))]
    result, _ = ask(Parrot(say), "refer-open", items)
    assert values(result) == {"top1": top1, "macc": macc}


def find(wanted: dict[str, list[float]]) -> Callable[[Conversation], str]:
    """Answers with boxes of the image, written for the square."""

    def say(conversation: Conversation) -> str:
        assert conversation.image is not None
        letterbox = Letterbox(width_px=conversation.image.width, height_px=conversation.image.height)
        name = conversation.turns[0].text.removeprefix("Where is the ").removesuffix("?")
        box = letterbox.to_square(np.array(wanted[name.lower()]))
        return f"there: {box_text(box.tolist())} or [0, 0, 999, 999]"

    return say


def test_the_first_box_counts_and_an_answer_without_one_is_wrong() -> None:
    items = [regions(0), regions(1)]
    result, _ = ask(Parrot(find({"dog": BOXES[0].tolist(), "cat": BOXES[1].tolist()})), "ground", items)
    assert values(result)["acc50"] == 1
    assert values(result)["miou"] == pytest.approx(1, abs=0.02)  # numbers of 999 round
    half, answers = ask(
        Parrot(lambda c: find({"dog": BOXES[0].tolist()})(c) if "dog" in c.turns[0].text else "[1, 2]"), "ground", items
    )
    assert values(half)["acc50"] == 0.5
    assert values(half)["unread"] == 0.5
    assert half.scores["acc50"].of == "4 texts"
    assert [row.get("unread") for row in answers if "Cat" in row["question"]] == [{"not four numbers": 1}] * 2


def test_of_several_boxes_any_counts_or_the_one_around_all() -> None:
    item = Item(image=photo(), queries=("dogs", "dogs"), truths=(BOXES, BOXES))
    hull = [0.1, 0.1, 0.9, 0.9]
    asked: list[str] = []

    def say(box: list[float]) -> Parrot:
        return Parrot(lambda c: asked.append(c.turns[0].text) or find({"dogs": box})(c))

    any_box, _ = ask(say(BOXES[1].tolist()), "ground", [item])
    assert (values(any_box)["acc50_any"], values(any_box)["acc50_merged"]) == (1, 0)
    assert len(asked) == 1  # one phrase, two places in the captions: asked once, counted twice
    assert any_box.scores["acc50_any"].count == 2
    merged, _ = ask(say(hull), "ground", [item])
    assert (values(merged)["acc50_any"], values(merged)["acc50_merged"]) == (0, 1)


# -- yes and no, captions ----------------------------------------------------------------------------------------------

QUESTIONS = ("Is there a dog?", "Is there a cat?", "Is there a zebra?", "Is there a bus?")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # truth: yes, yes, no, no
        (
            ("Yes", "Yes.", "No", "no, it is not"),
            {"acc": 1, "f1": 1, "precision": 1, "recall": 1, "yes": 0.5, "unread": 0},
        ),
        (("yes",) * 4, {"acc": 0.5, "f1": 2 / 3, "precision": 0.5, "recall": 1, "yes": 1, "unread": 0}),
        (("no",) * 4, {"acc": 0.5, "f1": 0, "recall": 0, "yes": 0, "unread": 0}),
        # an unread answer is wrong whatever is true: a miss where it is yes, a false claim where it is no
        (
            ("yes", "maybe", "yes and no", "no"),
            {"acc": 0.5, "f1": 0.5, "precision": 0.5, "recall": 0.5, "yes": 0.25, "unread": 0.5},
        ),
    ],
)
def test_pope_by_hand(said: tuple[str, ...], expected: dict[str, float]) -> None:
    item = Item(image=photo(), questions=QUESTIONS, answers=("yes", "yes", "no", "no"))
    replies: dict[str, str] = dict(zip(QUESTIONS, said, strict=True))
    result, _ = ask(Parrot(lambda c: replies[c.turns[0].text]), "pope", [item])
    found = {key: value for key, value in values(result).items() if not np.isnan(value)}
    assert found == pytest.approx(expected)


def test_presence_asks_for_as_much_that_is_there_as_is_not() -> None:
    result, answers = ask(Parrot(lambda _: "yes"), "exists", [regions(seed) for seed in range(5)])
    assert values(result)["acc"] == 0.5
    assert {row["truth"] for row in answers if "zebra" in row["question"]} == {"no"}
    assert result.scores["acc"].count == 20


def test_object_precision_and_recall_by_hand() -> None:
    captions = {0: "A dog and two zebras.", 1: "A dog, a cat; dogs!"}
    items = [regions(0), regions(1)]
    pictures = {items[i].image.tobytes(): text for i, text in captions.items()}  # pyright: ignore

    def say(conversation: Conversation) -> str:
        assert conversation.turns[0].text == CAPTION
        assert conversation.image is not None
        return pictures[conversation.image.tobytes()]

    result, _ = ask(Parrot(say), "caption", items)
    assert values(result) == pytest.approx({"object_precision": 3 / 4, "object_recall": 3 / 4})
    nothing, _ = ask(Parrot(lambda _: "nothing"), "caption", items)
    assert nothing.scores["object_recall"].value == 0
    assert nothing.scores["object_precision"].count == 0


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_the_verb_scores_models_side_by_side_and_keeps_every_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, sampler in (("a", "roi"), ("b", "points")):
        model, processor = tiny_model(template=CHATML, sampler=sampler)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    config = MllmEvalConfig(
        model=(f"A={tmp_path / 'a'}", str(tmp_path / "b")),
        data=("scenes:easy?seed=1&image_px=32",),
        num_images=3,
        out=str(tmp_path / "out"),
        resamples=50,
        caption_tokens=8,
        device="cpu",
    )
    results = run_mllm_eval(config)
    assert [(r.encoder, r.task) for r in results] == [
        (model, task) for model in ("A", "b") for task in ("refer-choice", "refer-open", "ground", "exists", "caption")
    ]
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'out'}\n| score in % | A | b | of |")
    assert "grounding" not in out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics) == {"A", "b"}
    assert {"refer-open top1", "ground acc50", "exists acc"} <= set(metrics["A"])
    answers = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert {row["model"] for row in answers} == {"A", "b"}
    for result in results:
        assert result.images == 3
    assert (tmp_path / "out/report.html").stat().st_size > 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ("nonsense",)}, "unknown task 'nonsense'"),
        ({"model": ()}, "at least one value"),
        ({"tasks": ("ferret-bench",)}, "needs a judge"),
        ({"judge": "localhost"}, "judge is the address of a server"),
        ({"judge": "http://u:PW@host/v1"}, "environment variable"),
        ({"num_images": 0}, "num_images"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MllmEvalConfig(**CONFIG | fields)


def test_categories_fix_the_denominators_whatever_the_first_images_show() -> None:
    """Names that the draw of false ones does not know are asked for and found all the same."""
    items = [regions(0), regions(1, ("zebra", "unicorn"))]
    data = EvalSet(name="set", items=items, num_items=2, readers=1, class_names=("cat", "dog", "zebra", "yak"))
    config = MllmEvalConfig(**CONFIG, tasks=("refer-open", "caption"))
    says = {"What is {region:0}?": "dog", CAPTION: "a zebra, a yak and a dog"}
    speaker = Parrot(lambda c: says[c.turns[0].text])
    (named, told), _ = interview(speaker, "p", data, ["refer-open", "caption"], names={"dog": 1}, config=config)
    assert named.scores["top1"].of == "3 boxes"
    assert named.scores["macc"].of == "3 classes present of 4"
    assert named.skipped["boxes"] == {"of none of the classes": 1}
    assert told.scores["object_precision"].of == "6 names in captions"
    assert told.scores["object_precision"].value == pytest.approx(2 / 6)
    assert told.scores["object_recall"].value == pytest.approx(2 / 4)
