"""Tasks: what is a query, what is a hit, what is skipped, and that nothing is encoded twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opencloc.data.sample import Sample
from opencloc.errors import BadSample
from opencloc.eval.pictures import predict
from opencloc.eval.registry import SOURCE_TASKS, open_set
from opencloc.eval.report import Result, flat_metrics
from opencloc.eval.run import evaluate
from opencloc.eval.sets.item import RESIZED, EvalSet, Item, Unread, load
from opencloc.eval.sets.source import source_set
from tests.eval import sets_on_disk as disk
from tests.eval.oracle import Oracle


def result_of(task: str, place: str, oracle: Oracle, **options: Any) -> Result:
    (result,) = evaluate(oracle, open_set(task, place), [task], resamples=20, **options)
    return result


def values(result: Result, *keys: str) -> list[float]:
    return [result.scores[key].value for key in keys]


# -- public sets -------------------------------------------------------------------------------------------------------


def test_recognition_counts_boxes_classes_sizes_and_frequencies(tmp_path: Path) -> None:
    disk.write_lvis(tmp_path)
    can, mouse, zebra = "aerosol can", "mouse (computer equipment)", "zebra"
    left, right, whole = (0.038, 0.1, 0.287, 0.6), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
    oracle = Oracle({("red", left): can, ("red", right): can, ("green", whole): zebra})
    got = result_of("lvis-recognition", str(tmp_path), oracle)
    assert values(got, "top1", "macc") == pytest.approx([2 / 3, 2 / 3])
    assert values(got, "top1_rare", "top1_common", "top1_frequent") == [1, 1, 0]
    assert got.scores["top1_small"].count == 3  # 20 x 20 pixels is the largest
    assert got.scores["macc"].of == "3 classes present of 3"
    assert got.class_names == (can, mouse, zebra)
    assert oracle.encoded == {"red": 1, "green": 1, can: 1, mouse: 1, zebra: 1}  # each image and text once


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_classification_is_by_bare_names_and_by_the_mean_over_templates(tmp_path: Path, batch_size: int) -> None:
    disk.write_imagenet(tmp_path / "v2", {"0": "red", "1": "green", "2": "blue"})
    (tmp_path / "names.txt").write_text("n1 tench\nn2 goldfish\nn3 shark\n")
    place = f"{tmp_path}/v2?templates=7&names={tmp_path}/names.txt"
    # Each is one of the seven templates, and so nearer to its class than to any other; blue is a shark.
    by_template = {"red": "a origami tench.", "green": "a goldfish in a video game.", "blue": "art of the tench."}
    oracle = Oracle(by_template)
    got = result_of("imagenet-v2", place, oracle, batch_size=batch_size)
    assert values(got, "top1_templates", "top5_templates", "macc_templates") == pytest.approx([2 / 3, 1, 2 / 3])
    assert got.scores["top1_templates"].label == "top-1, 7 templates"
    assert got.scores["top1"].of == "3 images"
    assert oracle.encoded == dict.fromkeys(oracle.encoded, 1)  # 3 photos, 3 names, 21 texts, each once
    assert len(oracle.encoded) == 27
    bare = Oracle({"red": "tench", "green": "goldfish", "blue": "tench"})
    assert values(result_of("imagenet-v2", place, bare), "top1", "top5", "macc") == pytest.approx([2 / 3, 1, 2 / 3])


def test_retrieval_takes_any_caption_of_an_image_and_every_caption_as_a_query(tmp_path: Path) -> None:
    disk.write_karpathy(tmp_path, "flickr30k")
    oracle = Oracle({"red": "a red photo, said 3.", "green": "a red photo, said 4."})
    got = result_of("flickr30k-retrieval", str(tmp_path), oracle)
    assert values(got, "i2t_r1", "i2t_r10") == [0.5, 1.0]
    assert (got.scores["i2t_r1"].of, got.scores["t2i_r1"].of) == ("2 images among 10", "10 captions among 2")
    assert (got.images, got.of_images) == (2, 2)


def test_regions_with_equal_texts_are_all_hits(tmp_path: Path) -> None:
    disk.write_grit(tmp_path, parquet=True)
    dog, ball = (0.0, 0.0, 0.5, 1.0), (0.5, 0.25, 1.0, 0.75)
    knows = {(colour, box): text for colour in ("red", "green") for box, text in ((dog, "a dog"), (ball, "a red ball"))}
    got = result_of("grit-retrieval", str(tmp_path), Oracle(knows))
    assert values(got, "r2t_r1", "t2r_r1") == [1.0, 1.0]
    assert got.scores["t2r_r1"].of == "4 regions among 4"
    swapped = {key: {"a dog": "a red ball"}.get(text, "a dog") for key, text in knows.items()}
    assert values(result_of("grit-retrieval", str(tmp_path), Oracle(swapped)), "r2t_r1", "t2r_r1") == [0.0, 0.0]


def test_a_tie_with_a_hard_negative_is_wrong(tmp_path: Path) -> None:
    disk.write_fg_ovd(tmp_path)
    place = f"{tmp_path}?images={tmp_path}/coco"
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    brown, black = "a light brown dog.", "a black dog."
    got = result_of("fg-ovd", place, Oracle({("red", left): brown, ("red", right): brown}))
    assert values(got, "top1") == [0.5]
    assert got.scores["top1"].of == "2 boxes, each against 1 to 2 false texts"
    assert values(result_of("fg-ovd", place, Oracle({("red", left): brown, ("red", right): black})), "top1") == [1.0]
    flat = Oracle({("red", left): brown, ("red", right): brown})
    flat.vector = lambda text: torch.ones(256) / 16  # knows nothing
    assert values(result_of("fg-ovd", place, flat), "top1") == [0.0]


def test_grounding_is_plain_iou_of_one_half(tmp_path: Path) -> None:
    disk.write_refer(tmp_path)
    finds = {
        "left half": [0.0, 0.0, 0.5, 0.5],  # half of the truth: counts
        "the dark one": [0.0, 0.0, 0.5, 0.49],
        "right half": [1.0, 1.0, 0.5, 0.0],  # corners swapped: no box
    }
    got = result_of("refcoco", str(tmp_path), Oracle({}, finds))
    assert values(got, "acc50") == pytest.approx([1 / 3])
    assert values(got, "miou") == pytest.approx([(0.5 + 0.49 + 0) / 3])
    assert got.scores["acc50_small"].of == "3 texts"  # 20 x 20 pixels
    blind = result_of("refcoco", str(tmp_path), Oracle({}))
    assert (blind.scores, blind.images) == ({}, 0)
    assert blind.skipped["texts"] == {"asked of an encoder that cannot ground": 3}


def test_phrases_of_several_boxes_have_two_protocols(tmp_path: Path) -> None:
    disk.write_entities(tmp_path)
    left = [0.0, 0.0, 0.5, 1.0]
    finds = {"two young guys": left, "two men": [0.0, 0.0, 1.0, 1.0], "shaggy hair": left}
    got = result_of("flickr30k-entities", str(tmp_path), Oracle({}, finds))
    # the men's boxes are the left half and the lower right corner: all of the image is IoU 1/2 with the first
    assert values(got, "acc50_any", "acc50_merged") == pytest.approx([1.0, 1.0])
    finds["two men"] = [0.5, 0.0, 1.0, 1.0]
    got = result_of("flickr30k-entities", str(tmp_path), Oracle({}, finds))
    assert values(got, "acc50_any", "acc50_merged") == pytest.approx([2 / 3, 1.0])
    assert values(got, "miou_any", "miou_merged") == pytest.approx([(1 + 0.25 + 1) / 3, (0.5 + 0.5 + 1) / 3])


def test_missing_images_are_counted_and_too_many_end_the_run(tmp_path: Path) -> None:
    disk.write_karpathy(tmp_path, "flickr30k")
    (tmp_path / "flickr30k-images/1001.jpg").unlink()
    oracle = Oracle({"red": "a red photo, said 3."})
    got = result_of("flickr30k-retrieval", str(tmp_path), oracle, max_missing=0.5)
    assert got.skipped == {"images": {"missing image file": 1}}
    assert (got.images, got.of_images) == (1, 2)
    message = r"1 images could not be read, at most 0 may be missing \(--max-missing\); the last: .*1001\.jpg"
    with pytest.raises(ValueError, match=message):
        result_of("flickr30k-retrieval", str(tmp_path), oracle)


# -- sources -----------------------------------------------------------------------------------------------------------

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
BOXES = [(0.0, 0.0, 0.05, 0.05), (0.1, 0.1, 0.4, 0.4), (0.2, 0.2, 0.9, 0.9)]


class Samples:
    """A source of the samples given; a reason in place of one makes it unusable."""

    def __init__(self, samples: Sequence[Sample | str]) -> None:
        self.samples = samples

    @property
    def size(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        if isinstance(one := self.samples[index], str):
            raise BadSample(one, f"sample {index}")
        return one


def sample(colour: str, texts: Sequence[str] = (), captions: Sequence[str] = (), side_px: int = 200) -> Sample:
    return Sample(
        key=colour,
        image=Image.new("RGB", (side_px, side_px), COLOURS[colour]),
        captions=tuple(captions),
        boxes=np.array(BOXES[: len(texts)], dtype=np.float32).reshape(-1, 4),
        texts=tuple(texts),
    )


SAMPLES = [
    sample("red", ["dog", "cat", "Dog"], ["a dog and a cat", "two dogs"]),
    sample("green", ["cat", "red  house"], ["a cat"]),
    sample("blue", [], ["nothing to see"]),
    sample("black", ["bird"]),
]


def oracle_of(samples: Sequence[Sample], *, can_ground: bool = True, mistakes: Any = None) -> Oracle:
    """An oracle that knows the truth of samples of different colours, except for `mistakes`."""
    knows: dict[Any, str] = {one.key: one.captions[0] for one in samples if one.captions}
    finds: dict[str, Sequence[float]] = {}
    for one in samples:
        for text, box in zip(one.texts, BOXES, strict=False):
            knows[one.key, box] = text
            finds[text] = box
    return Oracle(knows | (mistakes or {}), finds if can_ground else None)


def on_source(oracle: Oracle, samples: Sequence[Any] = SAMPLES, **options: Any) -> dict[str, Result]:
    names, tasks = options.pop("class_names", None), options.pop("tasks", tuple(SOURCE_TASKS))
    data = source_set(Samples(samples), "samples", class_names=names)
    return dict(zip(tasks, evaluate(oracle, data, tasks, **dict[str, Any](resamples=20) | options), strict=True))


def test_an_encoder_that_is_right_scores_one_with_the_right_denominators() -> None:
    got = on_source(oracle_of(SAMPLES))
    recognition = got["region-recognition"]
    assert values(recognition, "top1", "macc") == [1.0, 1.0]
    assert (recognition.scores["top1"].of, recognition.scores["macc"].of) == ("6 boxes", "4 classes present of 4")
    assert recognition.class_names == ("dog", "cat", "red house", "bird")
    counts = [recognition.scores[f"top1_{size}"].count for size in ("small", "medium", "large")]
    assert counts == [3, 2, 1]  # 10, 60 and 140 of 200 pixels
    assert values(got["region-retrieval"], "r2t_r1", "t2r_r1") == [1.0, 1.0]
    assert got["region-retrieval"].scores["r2t_r1"].of == "6 regions among 6"
    assert got["image-retrieval"].scores["i2t_r1"].of == "3 images among 4"
    assert got["grounding"].scores["acc50"].count == 4
    assert flat_metrics(list(got.values())) == {
        "oracle": {
            "region_top1": 1.0,
            "region_macc": 1.0,
            "i2t_r1": 1.0,
            "t2i_r1": 3 / 4,  # "two dogs" is not what the first image embeds as
            "ground_acc50": 3 / 4,  # the oracle knows one place for each text, but there are two cats
            "ground_miou": pytest.approx(got["grounding"].scores["miou"].value),
        }
    }


def test_what_is_skipped_is_counted_by_unit() -> None:
    got = on_source(oracle_of(SAMPLES, can_ground=False), class_names=["dog", "cat", "cow"])
    without = {"without regions": 1}
    assert {task: result.skipped for task, result in got.items()} == {
        "region-recognition": {
            "images": without | {"of none of the classes": 1},
            "boxes": {"of none of the classes": 2},
        },
        "region-retrieval": {"images": without},
        "image-retrieval": {"images": {"without captions": 1}},
        "grounding": {
            "images": without,
            "texts": {"asked of an encoder that cannot ground": 4, "naming several regions of their image": 2},
        },
    }
    assert got["region-recognition"].scores["macc"].of == "2 classes present of 3"


@pytest.mark.parametrize("num_images", [1, 3, None])
def test_images_used_and_skipped_are_all_there_are(num_images: int | None) -> None:
    samples = [SAMPLES[0], "broken image", *SAMPLES[1:], sample("red", ["dog", "dog"])]
    for task, got in on_source(oracle_of(SAMPLES), samples, num_images=num_images, max_missing=1.0).items():
        assert got.of_images == 6
        assert got.images + sum(got.skipped.get("images", {}).values()) == 6, task


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_image_and_text_is_encoded_once_whatever_the_batch_size(batch_size: int) -> None:
    encoder = oracle_of(SAMPLES)
    got = on_source(encoder, batch_size=batch_size, class_names=["Cat", "dog", "cow"])
    assert set(encoder.encoded.values()) == {1}
    texts = {"dog", "cat", "cow", "red house", "bird", "a dog and a cat", "two dogs", "a cat", "nothing to see"}
    assert set(encoder.encoded) == {*COLOURS, *texts}
    assert repr(got) == repr(on_source(oracle_of(SAMPLES), class_names=["Cat", "dog", "cow"]))  # NaN differs from NaN


def test_a_mistake_costs_one_box() -> None:
    oracle = oracle_of(SAMPLES, mistakes={("red", BOXES[0]): "cat"})
    got = on_source(oracle)["region-recognition"]
    assert values(got, "top1", "macc") == pytest.approx([5 / 6, (0.5 + 1 + 1 + 1) / 4])


def test_a_source_with_categories_says_the_classes_and_the_sizes_as_annotated() -> None:
    source = Samples(SAMPLES)
    source.class_names = ("dog", "cat", "zebra", "red_house", "bird")  # pyright: ignore[reportAttributeAccessIssue]
    source.annotated_px = lambda index: (400, 400)  # pyright: ignore[reportAttributeAccessIssue]
    assert source_set(source, "x").class_names == ("dog", "cat", "zebra", "red_house", "bird")
    ((one, *_),) = load(source_set(source, "x"), None, 10, Unread(allowed=0))
    assert (one.image.size, one.annotated_px, one.noted) == ((200, 200), (400, 400), (RESIZED,))
    twice = source_set(source, "x", class_names=["Dog", "cat", "dog "])
    assert (twice.class_names, twice.rules) == (("dog", "cat"), "categories of one name are one class: 'dog'")
    with pytest.raises(ValueError, match="no class names"):
        source_set(source, "x", class_names=[])


def test_precision_is_that_of_the_encoder_only() -> None:
    encoder = oracle_of(SAMPLES)
    got = on_source(encoder, precision="bf16")
    assert encoder.computed_in == {torch.bfloat16}
    assert {result.precision for result in got.values()} == {"bf16"}
    assert flat_metrics(list(got.values())) == flat_metrics(list(on_source(oracle_of(SAMPLES)).values()))


def test_nothing_to_score_is_no_score() -> None:
    empty = [sample("red")]
    assert [result.scores for result in on_source(oracle_of(empty), empty).values()] == [{}] * 4


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (SAMPLES, {"tasks": ["naming"]}, "unknown task 'naming'; there are region-recognition, "),
        ([], {}, "samples: no image can be used"),
        (["broken image"], {"max_missing": 1.0}, r"no image can be used; skipped: images: broken image \(1\)"),
        (["broken image", *SAMPLES], {}, r"\(--max-missing\); the last: sample 0: broken image"),
    ],
)
def test_what_cannot_be_evaluated_is_said(samples: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_source(oracle_of(SAMPLES), samples, **options)


@pytest.mark.parametrize("what", ["image", "text"])
def test_embeddings_that_are_not_finite_end_the_run(what: str) -> None:
    oracle = oracle_of(SAMPLES)
    bad = "nothing to see" if what == "image" else "bird"
    vector = oracle.vector
    oracle.vector = lambda text: vector(text) * (float("nan") if text == bad else 1.0)
    with pytest.raises(ValueError, match=f"oracle: it gives {what} embeddings that are not finite"):
        on_source(oracle, tasks=["region-recognition"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
def test_a_bad_box_is_counted_in_every_set_and_never_asked(bad: float) -> None:
    boxes = np.array([BOXES[1], (bad, 0.1, 0.4, 0.4), (0.5, 0.5, 0.5, 0.9)], dtype=np.float32)
    item = Item(
        image=Image.new("RGB", (8, 8), "red"),
        boxes=boxes,
        texts=("cat", "dog", "bird"),
        queries=("cat", "dog", "bird"),
        truths=tuple(box[None] for box in boxes),
    )
    data = EvalSet(name="x", items=[item], num_items=1, class_names=("cat", "dog", "bird"))
    oracle = Oracle({("red", BOXES[1]): "cat"}, {"cat": BOXES[1]})
    recognised, grounded = evaluate(oracle, data, ["region-recognition", "grounding"])
    assert (recognised.scores["top1"].count, grounded.scores["acc50"].count) == (1, 1)
    assert recognised.skipped["boxes"] == {"bad box": 1, "empty box": 1}
    assert grounded.skipped["texts"] == {"bad box": 1, "empty box": 1}
    choices = replace(item, choices=(("cat", "dog"),) * 3, queries=(), truths=())
    (chosen,) = evaluate(oracle, replace(data, items=[choices]), ["fg-ovd"])
    assert chosen.scores["top1"].of == "1 boxes, each against 1 false texts"


def test_half_a_surrogate_pair_is_counted_and_never_encoded() -> None:
    broken = Item(
        image=Image.new("RGB", (8, 8), "red"),
        captions=("fine", "not \ud800"),
        boxes=np.array(BOXES[1:], dtype=np.float32),
        texts=("cat", "\udfff"),
        queries=("cat", "\udfff"),
        truths=tuple(np.array([box], dtype=np.float32) for box in BOXES[1:]),
    )
    data = EvalSet(name="x", items=[broken], num_items=1)
    oracle = Oracle({"red": "fine", ("red", BOXES[1]): "cat"}, {"cat": BOXES[1]})
    for got in evaluate(oracle, data, list(SOURCE_TASKS)):
        assert next(iter(got.scores.values())).value == 1.0
        assert got.skipped == {"boxes": {"text not valid Unicode": 1}, "texts": {"not valid Unicode": 2}}


def test_a_source_is_streamed() -> None:
    taken: Counter[int] = Counter()

    class Endless(Samples):
        size = None  # pyright: ignore[reportAssignmentType]

        def __getitem__(self, index: int) -> Sample:
            taken[index] += 1
            return SAMPLES[0]

    data = source_set(Endless([]), "endless")
    (got,) = evaluate(oracle_of(SAMPLES), data, ["image-retrieval"], num_images=5, batch_size=2, resamples=0)
    assert (got.images, got.of_images) == (5, None)
    assert taken == Counter(range(5))  # none too many


def test_predictions_say_what_is_right_and_where_things_were_found() -> None:
    names = ["dog", "cat", "red house"]
    (loaded,) = load(source_set(Samples(SAMPLES), "x"), None, 10, Unread(allowed=0))
    oracle = oracle_of(SAMPLES, mistakes={("red", BOXES[1]): "red house"})
    first, second, third, fourth = predict(oracle, loaded, names)
    assert (first.names, first.correct) == (("dog", "red house", "dog"), (True, False, True))
    assert [g.text for g in first.grounded] == ["cat"]
    assert [g.iou for g in second.grounded] == [pytest.approx(1.0)] * 2
    np.testing.assert_array_equal(second.grounded[1].box, np.array(BOXES[1], dtype=np.float32))
    assert second.correct == (True, True)
    assert (third.names, third.grounded) == ((), ())
    assert fourth.correct == (False,)  # no class is called "bird"
    assert predict(oracle_of(SAMPLES, can_ground=False), loaded, ["Cat", "cat "])[0].grounded == ()
    assert predict(oracle, [], names) == []
    with pytest.raises(ValueError, match=re.escape("no class names to choose from")):
        predict(oracle, loaded, [])
