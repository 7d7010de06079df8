"""Answers and their likelihood: batches, shared images and padding change nothing; each image is encoded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from opencloc.errors import BadSample
from opencloc.mllm.answers import Answerer
from opencloc.mllm.conversation import Conversation, Turn
from opencloc.mllm.model import IGNORED
from opencloc.model.prompts import Box, Mask, Point
from tests.mllm.speakers import CHATML, tiny_answerer


@pytest.fixture(scope="module", params=[("clip", "roi"), ("siglip", "points")], ids=lambda param: param[0])
def answerer(request: pytest.FixtureRequest) -> Answerer:
    family, sampler = request.param
    return tiny_answerer(family=family, sampler=sampler, template=CHATML)


def photo(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def questions() -> list[Conversation]:
    """Of several lengths, about two photos and about none, with every kind of region."""
    one, other = photo(0), photo(1, (30, 44))
    mask = np.zeros((30, 40), bool)
    mask[5:20, 10:30] = True
    return [
        Conversation(image=one, turns=(Turn("user", "What is {region:0}?"),), prompts=(Box(0.1, 0.2, 0.6, 0.9),)),
        Conversation(image=other, turns=(Turn("user", "a dog"),)),
        Conversation(
            image=one, turns=(Turn("user", "and {region:0} {region:1}"),), prompts=(Mask(mask), Point(0.5, 0.5))
        ),
        Conversation(image=None, turns=(Turn("user", "yes or no"),)),
        Conversation(
            image=other,
            turns=(Turn("user", "Where is it?"), Turn("assistant", "{box:0}"), Turn("user", "And {region:0}?")),
            prompts=(Box(0.0, 0.0, 0.5, 0.5),),
        ),
    ]


def answered(conversation: Conversation, answer: str) -> Conversation:
    turns = (*conversation.turns, Turn("assistant", answer))
    return Conversation(image=conversation.image, turns=turns, prompts=conversation.prompts)


def test_an_answer_is_the_same_alone_and_in_a_batch(answerer: Answerer) -> None:
    together = answerer.answer(questions(), 8)
    assert together == [answerer.answer([one], 8)[0] for one in questions()]
    assert len(set(together)) > 1  # the model tells them apart


def test_an_answer_is_what_generate_makes_of_the_processors_batch(answerer: Answerer) -> None:
    """The slow reference: pixels and all, one conversation at a time."""
    for conversation, answer in zip(questions(), answerer.answer(questions(), 8), strict=True):
        batch = answerer.processor([conversation])
        ids = answerer.model.generate(
            **batch, max_new_tokens=8, do_sample=False, eos_token_id=answerer.processor.end_ids[-1]
        )
        assert answerer.processor.decode_answers(ids, batch["input_ids"].shape[1]) == [answer]


def test_a_likelihood_is_the_sum_over_the_last_answer_of_what_the_model_gives_each_token(answerer: Answerer) -> None:
    asked = [answered(one, text) for one, text in zip(questions(), ["a dog", "cat", "yes", "no", "a cat"], strict=True)]
    for conversation, (value, greedy) in zip(asked, answerer.score(asked), strict=True):
        batch = answerer.processor([conversation], for_training=True)
        labels = batch.pop("labels")[0]
        logits = answerer.model(**batch).logits[0].detach().log_softmax(-1)
        last = int((labels == IGNORED).nonzero().max()) + 1
        slow = sum(float(logits[i - 1, labels[i]]) for i in range(last, len(labels)))
        assert value == pytest.approx(slow, abs=1e-4)
        assert greedy == all(int(logits[i - 1].argmax()) == labels[i] for i in range(last, len(labels)))


def test_each_image_is_encoded_once(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    tower = answerer.model.model.vision_tower
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda pixels, *a, **k: sizes.append(len(pixels)) or forward(pixels, *a, **k))
    answerer.answer([*questions(), *questions()[:1]], 4)
    # two photos, and two equal ones that are images of their own
    assert sum(sizes) == 3
    sizes.clear()
    features = answerer.encode(questions())
    asked = questions()
    features = answerer.encode(asked)
    assert sum(sizes) == 4
    sizes.clear()
    answerer.answer(asked, 4, features)
    assert sizes == []


def test_a_question_that_cannot_be_asked_is_named(answerer: Answerer) -> None:
    bad = Conversation(image=photo(0), turns=(Turn("user", "an <image> in a text"),))
    with pytest.raises(BadSample, match="conversation 1: special token"):
        answerer.answer([questions()[0], bad], 4)
    with pytest.raises(BadSample, match="no answer at the end"):
        answerer.log_likelihood(questions()[:1])


def test_half_precision_keeps_the_scores_near(answerer: Answerer) -> None:
    asked = [answered(one, "a dog") for one in questions()]
    half = Answerer(answerer.model, answerer.processor, precision="bf16")
    assert half.bf16
    np.testing.assert_allclose(half.log_likelihood(asked), answerer.log_likelihood(asked), rtol=0.05)
    assert torch.is_grad_enabled()
