"""Tasks: what is a query, what is left out, and that nothing is encoded twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opencloc.data.sample import Sample
from opencloc.eval.encoders import EncodedImages
from opencloc.eval.tasks import TASKS, Evaluation, evaluate, flat_metrics, predict

BOXES = np.array([[0, 0, 0.05, 0.05], [0.1, 0.1, 0.4, 0.4], [0.2, 0.2, 0.9, 0.9]], dtype=np.float32)
WIDTH = 16


class Oracle:
    """Knows the truth of the samples by the number that each image carries in its one pixel's red channel.

    A region or an image embeds as its text's own random direction; boxes in `mistakes` embed as another text.
    """

    def __init__(self, samples: Sequence[Sample], *, can_ground: bool = True, mistakes: Any = None) -> None:
        self.name, self.device = "oracle", torch.device("cpu")
        self.samples, self.can_ground, self.mistakes = samples, can_ground, mistakes or {}
        self.encoded: Counter[Any] = Counter()
        self.dtypes: set[torch.dtype] = set()
        self.table: dict[str, Tensor] = {}

    def vector(self, text: str) -> Tensor:
        text = " ".join(text.lower().split())
        if text not in self.table:
            generator = torch.Generator().manual_seed(len(self.table))
            self.table[text] = F.normalize(torch.randn(WIDTH, generator=generator), dim=0)
        return self.table[text]

    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages:
        numbers = [int(np.asarray(image)[0, 0, 0]) for image in images]
        self.encoded.update(numbers)
        self.dtypes.add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        captions = [(*self.samples[n].captions, "nothing")[0] for n in numbers]
        return EncodedImages(embedding=torch.stack([self.vector(c) for c in captions]), state=numbers)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        self.encoded.update(texts)
        return torch.stack([self.vector(text) for text in texts])

    def encode_regions(self, encoded: EncodedImages, boxes: Sequence[np.ndarray]) -> list[Tensor]:
        regions = []
        for number, rows in zip(encoded.state, boxes, strict=True):
            sample = self.samples[number]
            np.testing.assert_array_equal(rows, sample.boxes)
            texts = [self.mistakes.get((number, row), text) for row, text in enumerate(sample.texts)]
            regions.append(torch.stack([self.vector(t) for t in texts]) if texts else torch.zeros(0, WIDTH))
        return regions

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> list[Tensor] | None:
        if not self.can_ground:
            return None
        found = []
        for number, asked in zip(encoded.state, texts, strict=True):
            sample = self.samples[number]
            rows = [next(i for i, t in enumerate(sample.texts) if torch.equal(self.vector(t), a)) for a in asked]
            found.append(torch.from_numpy(sample.boxes[rows]).reshape(-1, 4))
        return found


def sample(number: int, texts: Sequence[str] = (), captions: Sequence[str] = ()) -> Sample:
    return Sample(
        key=f"image {number}",
        image=Image.new("RGB", (1, 1), (number, 0, 0)),
        captions=tuple(captions),
        boxes=BOXES[: len(texts)],
        texts=tuple(texts),
    )


SAMPLES = [
    sample(0, ["dog", "cat", "Dog"], ["a dog and a cat", "two dogs"]),
    sample(1, ["cat", "red  house"], ["a cat"]),
    sample(2, [], ["nothing to see"]),
    sample(3, ["bird"]),
]


def run(encoder: Oracle, **options: Any) -> Evaluation:
    return evaluate(encoder, SAMPLES, progress=False, **options)


def test_an_encoder_that_is_right_scores_one_with_the_right_denominators() -> None:
    got = run(Oracle(SAMPLES))
    assert got.images == 4
    assert got.region_recognition is not None
    overall = got.region_recognition.overall
    assert (overall.top1, overall.macc, overall.boxes, overall.classes_present) == (1.0, 1.0, 6, 4)
    assert got.region_recognition.classes == 4  # dog, cat, red house, bird
    assert [got.region_recognition.by_size[s].boxes for s in ("small", "medium", "large")] == [3, 2, 1]
    assert got.region_retrieval is not None
    assert got.region_retrieval.to_text.r1 == got.region_retrieval.from_text.r1 == 1.0
    assert (got.region_retrieval.to_text.queries, got.region_retrieval.distinct_texts) == (6, 4)
    assert got.image_retrieval is not None
    assert (got.image_retrieval.to_text.queries, got.image_retrieval.to_text.gallery) == (3, 4)
    assert got.image_retrieval.to_text.r1 == 1.0
    assert got.grounding is not None
    assert (got.grounding.queries, got.grounding.mean_iou) == (4, 1.0)


def test_what_is_left_out_is_counted() -> None:
    got = run(Oracle(SAMPLES), class_names=["dog", "cat", "cow"])
    assert got.skipped == {
        "region_recognition": {"image without regions": 1, "region text is not among the class names": 2},
        "region_retrieval": {"image without regions": 1},
        "image_retrieval": {"image without captions": 1},
        "grounding": {"image without regions": 1, "text names several regions of its image": 2},
    }
    assert got.region_recognition is not None
    assert (got.region_recognition.classes, got.region_recognition.overall.boxes) == (3, 4)


def test_an_encoder_that_cannot_ground_has_no_grounding_score() -> None:
    got = run(Oracle(SAMPLES, can_ground=False))
    assert got.grounding is None
    assert got.skipped["grounding"]["this encoder cannot ground"] == 4
    assert set(flat_metrics(got)) == {"region_top1", "region_macc", "i2t_r1", "t2i_r1"}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_image_and_every_text_is_encoded_once_whatever_the_batch_size(batch_size: int) -> None:
    encoder = Oracle(SAMPLES)
    got = run(encoder, batch_size=batch_size, class_names=["Cat", "dog", "cow"])
    assert set(encoder.encoded.values()) == {1}
    texts = {"dog", "cat", "cow", "red house", "bird", "a dog and a cat", "two dogs", "a cat", "nothing to see"}
    assert set(encoder.encoded) == {0, 1, 2, 3} | texts
    assert got == run(Oracle(SAMPLES), class_names=["Cat", "dog", "cow"])


def test_a_mistake_costs_one_box() -> None:
    got = run(Oracle(SAMPLES, mistakes={(0, 0): "cat"}))
    assert got.region_recognition is not None
    assert got.region_recognition.overall.top1 == pytest.approx(5 / 6)
    assert got.region_recognition.overall.macc == pytest.approx((0.5 + 1 + 1 + 1) / 4)


@pytest.mark.parametrize("task", TASKS)
def test_only_the_tasks_asked_for_are_run(task: Any) -> None:
    got = run(Oracle(SAMPLES), tasks=[task])
    assert [t for t in TASKS if getattr(got, t) is not None] == [task]
    assert set(got.skipped) <= {task}


def test_flat_metrics_are_the_headline_scores() -> None:
    flat = flat_metrics(run(Oracle(SAMPLES)))
    assert flat == {
        "region_top1": 1.0,
        "region_macc": 1.0,
        "i2t_r1": 1.0,
        "t2i_r1": pytest.approx(3 / 4),  # "two dogs" is not what image 0 embeds as
        "ground_acc50": 1.0,
        "ground_miou": 1.0,
    }


def test_the_dtype_is_that_of_the_encoder_only() -> None:
    encoder = Oracle(SAMPLES)
    got = run(encoder, dtype="bfloat16")
    assert encoder.dtypes == {torch.bfloat16}
    assert got.dtype == "bfloat16"
    assert flat_metrics(got) == flat_metrics(run(Oracle(SAMPLES)))


def test_samples_without_regions_and_captions_have_no_scores() -> None:
    got = evaluate(Oracle([sample(0)]), [sample(0)], progress=False)
    assert [getattr(got, task) for task in TASKS] == [None] * 4
    assert flat_metrics(got) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["naming"]}, "unknown task 'naming'; there are region_recognition, "),
        ({"tasks": []}, "no task given"),
        ({"batch_size": 0}, "batch_size is 0, must be >= 1"),
        ({"dtype": "float16"}, "dtype is 'float16', must be one of float32, bfloat16"),
        ({"class_names": ["dog", " DOG"]}, r"class names appear twice \(case and spacing aside\): dog"),
        ({"class_names": []}, "no class names"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types are checked in tests only
    with pytest.raises(ValueError, match=message):
        run(Oracle(SAMPLES), **options)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        evaluate(Oracle([]), iter([]), progress=False)


def test_predictions_say_what_is_right_and_where_things_were_found() -> None:
    names = ["dog", "cat", "red house"]
    first, second, third, fourth = predict(Oracle(SAMPLES, mistakes={(0, 1): "red house"}), SAMPLES, names)
    assert (first.names, first.correct) == (("dog", "red house", "dog"), (True, False, True))
    assert [(g.text, g.iou) for g in first.grounded] == [("cat", pytest.approx(1.0))]
    np.testing.assert_array_equal(first.grounded[0].box, BOXES[1])
    assert second.correct == (True, True)
    assert (third.names, third.grounded) == ((), ())
    assert fourth.correct == (False,)  # no class is called "bird"
    assert predict(Oracle(SAMPLES, can_ground=False), SAMPLES[:1], names)[0].grounded == ()
    assert predict(Oracle(SAMPLES), [], names) == []
    assert predict(Oracle(SAMPLES), SAMPLES[1:2], ["Cat", "cat ", "red house"])[0].correct == (True, True)
    with pytest.raises(ValueError, match="no class names"):
        predict(Oracle(SAMPLES), SAMPLES, [])
