"""The front door: `import opencloc`, `load` and the Predictor that photos go through."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, PreTrainedTokenizerFast

import opencloc
from opencloc import Box, ClocConfig, ClocModel, ClocProcessor, Mask, Point, Predictor, Text
from opencloc.config import LossConfig
from opencloc.model import predictor as module
from opencloc.model.predictor import EncodedImage
from opencloc.presets import tiny
from opencloc.train import build

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8)
MakePredictor = Callable[..., Predictor]


@pytest.fixture
def make(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast) -> MakePredictor:
    def predictor(**options: Any) -> Predictor:
        torch.manual_seed(0)
        clip = tower_config("clip")
        return Predictor(ClocModel(ClocConfig(clip_config=clip, **options)), ClocProcessor.for_towers(clip, tokenizer))

    return predictor


@pytest.fixture
def predictor(make: MakePredictor) -> Predictor:
    return make()


@pytest.fixture
def photo(predictor: Predictor) -> EncodedImage:
    return predictor.encode(PIXELS)


# -- import opencloc -----------------------------------------------------------------------------------------------


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_opencloc_imports_neither_torch_nor_transformers() -> None:
    code = "import opencloc, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import opencloc; from transformers import AutoConfig",
        "from transformers import AutoConfig; import opencloc",
    ],
)
def test_importing_opencloc_registers_the_auto_classes(imports: str) -> None:
    assert python(f"{imports}; print(type(AutoConfig.for_model('cloc')).__name__)") == "ClocConfig"


def test_every_name_of_the_front_door_is_there() -> None:
    assert set(opencloc.__all__) <= set(dir(opencloc))
    for name in opencloc.__all__:
        assert getattr(opencloc, name) is not None
    assert callable(opencloc.train)  # the package of that name is the function too
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = opencloc.nothing  # pyright: ignore[reportAttributeAccessIssue]


# -- load ----------------------------------------------------------------------------------------------------------


def test_load_opens_what_training_saves(predictor: Predictor, tmp_path: Path) -> None:
    predictor.model.save_pretrained(tmp_path)
    predictor.processor.save_pretrained(tmp_path)
    loaded = opencloc.load(tmp_path)
    expected = predictor.encode(PIXELS).features.embedding
    torch.testing.assert_close(loaded.encode(PIXELS).features.embedding, expected)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        opencloc.load(tmp_path / "nothing")


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_load_pools_regions_with_the_tower_of_any_clip(
    tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, family: str
) -> None:
    AutoModel.from_config(tower_config(family)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    predictor = opencloc.load(tmp_path)
    square = predictor.encode(PIXELS[:, :40])
    mask = np.ones((40, 40), bool)
    regions = predictor.embed(square, [Box(0, 0, 40, 40), Mask(mask), Box(0, 0, 20, 20), Point(5, 5)])
    for whole in regions[:2]:
        torch.testing.assert_close(whole, square.features.embedding[0], atol=1e-5, rtol=1e-4)
    assert torch.pdist(regions[1:]).min() > 1e-4
    given = regions[[0, 2]]
    assert predictor.classify(square, [[0, 0, 20, 20]], ["a", "b"], text_embeddings=given)[0] == ["b"]
    towers = ClocProcessor.for_towers(tower_config(family), tokenizer)
    assert torch.equal(predictor.processor.tokenize(["a red dog", "snow"]), towers.tokenize(["a red dog", "snow"]))
    assert predictor.classify(square, [[0, 0, 20, 20]], ["a red dog"])[0] == ["a red dog"]
    for ask in (lambda: predictor.embed(square, texts=["a dog"]), lambda: predictor.ground(square, "a dog")):
        with pytest.raises(ValueError, match="use prompter='cross' or 'encoder'"):
            ask()


def test_a_model_without_trained_regions_says_what_to_do(make: MakePredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = make(regions_trained=False)
    photo = predictor.encode(PIXELS)
    for ask in (lambda: predictor.embed(photo, points_px=[[1, 1]]), lambda: predictor.ground(photo, "a dog")):
        with pytest.raises(ValueError, match=r"never trained.*opencloc export"):
            ask()
    monkeypatch.setattr(build, "texts_of", lambda _: ["a dog"])
    for weight in (0.0, 1.0):
        trained, _ = build.build_model(replace(tiny(), loss=LossConfig(region_weight=weight)))
        assert trained.config.regions_trained == (weight > 0)


# -- encode --------------------------------------------------------------------------------------------------------


def test_an_image_is_encoded_alike_in_every_form_alone_or_in_a_list(predictor: Predictor, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms = [Image.fromarray(PIXELS), tmp_path / "x.png", (tmp_path / "x.png").read_bytes(), PIXELS, tensor]
    together = predictor.encode(forms * 4)
    assert len(together) == 20
    for encoded in [*together, *map(predictor.encode, forms)]:
        torch.testing.assert_close(encoded.features.embedding, together[0].features.embedding)
        torch.testing.assert_close(encoded.features.tokens, together[0].features.tokens)
    assert predictor.encode([]) == []
    with pytest.raises(TypeError, match="an image is"):
        predictor.encode(None)


# -- embed ---------------------------------------------------------------------------------------------------------


def test_embeddings_are_the_models_own(predictor: Predictor, photo: EncodedImage) -> None:
    # the left half of an 80 x 40 image: in the square, x from 0 to 0.5, y from 0.25 to 0.75
    expected = predictor.model.encode_regions(photo.features, torch.tensor([[[0.0, 0.25, 0.5, 0.75]]]))[0]
    torch.testing.assert_close(predictor.embed(photo, boxes_px=[[0, 0, 40, 40]]), expected)


def test_prompts_of_all_kinds_keep_their_order_and_keywords_are_short_for_them(
    predictor: Predictor, photo: EncodedImage
) -> None:
    mask = np.zeros((40, 80), dtype=bool)
    mask[:, :40] = True
    dog = predictor.embed_texts("a red dog")[0]
    prompts = [Text("a red dog"), Box(0, 0, 40, 40), (Point(20, 20), Text("a red dog")), Mask(mask), Point(20, 20)]
    listed = predictor.embed(photo, prompts)
    assert listed.shape == (5, 24)
    for prompt, embedding in zip([Text(dog), *prompts[1:]], listed, strict=True):
        torch.testing.assert_close(predictor.embed(photo, [prompt])[0], embedding)
    short = predictor.embed(photo, boxes_px=[[0, 0, 40, 40]], points_px=[[20, 20]], masks=[mask], texts="a red dog")
    torch.testing.assert_close(short, listed[[1, 4, 3, 0]])


def bfloat16(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "form", [np.array, lambda m: Image.fromarray(np.array(m)), torch.tensor, bfloat16, np.float16, list]
)
def test_masks_may_be_arrays_tensors_images_or_lists(predictor: Predictor, photo: EncodedImage, form: Any) -> None:
    mask = [[x < 40 for x in range(80)] for _ in range(40)]
    expected = predictor.embed(photo, masks=[np.array(mask)])
    torch.testing.assert_close(predictor.embed(photo, masks=[form(mask)]), expected)


@pytest.mark.parametrize("form", [np.asarray, torch.tensor, bfloat16, list])
def test_boxes_may_be_arrays_tensors_or_lists(predictor: Predictor, photo: EncodedImage, form: Any) -> None:
    assert predictor.embed(photo, boxes_px=form([[0, 0, 40, 40], [5, 5, 60, 30]])).shape == (2, 24)


def test_nothing_gives_nothing_of_the_right_shape(predictor: Predictor, photo: EncodedImage) -> None:
    assert predictor.embed(photo).shape == (0, 24)
    assert predictor.embed_texts([]).shape == (0, 24)
    assert predictor.classify(photo, [], ["a", "b"])[1].shape == (0, 2)
    names, probabilities = predictor.classify(photo, [[0, 0, 9, 9]], [])
    assert (names, probabilities.shape) == ([], (1, 0))
    boxes, scores = predictor.ground(photo, [])
    assert (boxes.shape, scores.shape) == ((0, 4), (0,))


def test_a_box_a_little_outside_is_clipped(predictor: Predictor, photo: EncodedImage) -> None:
    inside = predictor.embed(photo, boxes_px=[[0, 0, 80, 40]])
    torch.testing.assert_close(predictor.embed(photo, boxes_px=[[-0.9, -0.3, 80.3, 41]]), inside)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0, 0, 90, 10], "reaches outside"),
        ([0, 0, float("nan"), 10], "not finite"),
        ([5, 5, 5, 9], "empty"),
        ([80.2, 5, 80.9, 9], "empty"),
        ([0.1, 0.2, 0.5, 1.0], "looks normalised"),
        ([1, 2, 3], "4 numbers"),
    ],
)
def test_bad_boxes_are_named(predictor: Predictor, photo: EncodedImage, box: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.embed(photo, boxes_px=[box])
    if len(box) == 4:
        with pytest.raises(ValueError, match=f"box 1 .*{message}"):
            predictor.embed(photo, boxes_px=[[1, 1, 9, 9], box])


def test_what_is_no_prompt_is_an_error_that_says_what_is_taken(predictor: Predictor, tmp_path: Path) -> None:
    predictor.model.save_pretrained(tmp_path)
    predictor.processor.save_pretrained(tmp_path)
    # in a process of its own: here the type checks of conftest would answer first
    done = subprocess.run([sys.executable, "-c", WRONG, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["all refused"]


WRONG = """
import sys, numpy, opencloc
from opencloc import Box, Mask, Point, Text

predictor = opencloc.load(sys.argv[1])
photo = predictor.encode(numpy.zeros((40, 80, 3), numpy.uint8))
calls = [
    lambda prompt=prompt: predictor.embed(photo, [prompt])
    for prompt in (None, [1, 2, 3, 4], "dog", 1j, Box(None, 0, 1, 1), Point(1j, 2), Text(3), Text(None),
                   (Point(1, 1), 5), Mask("m"), Mask(None))
]
calls += [
    lambda name=name, value=value: predictor.embed(photo, **{name: value})
    for name in ("boxes_px", "points_px", "masks", "texts") for value in (None, 1j, [None], [[1j] * 4])
]
calls += [lambda image=image: predictor.ground(image, "dog") for image in (None, "dog.jpg", [photo])]
calls += [lambda names=names: predictor.classify(photo, [[0, 0, 9, 9]], names) for names in (None, 3, [3], [None])]
calls += [
    lambda prompts=prompts: predictor.model.encode_regions(photo.features, prompts)
    for prompts in (None, 3, [None], [[None]], [[Text("a")]], [[Mask(numpy.ones((3, 3)))]], [[[0, 0, 1, 1]]], [[()]])
]
for i, call in enumerate(calls):
    try:
        call()
    except (TypeError, ValueError) as error:
        assert any(word in str(error) for word in ("prompt", "number", "mask", "text", "image", "names")), error
    else:
        raise SystemExit(f"call {i} was answered")
print("all refused")
"""


def test_embeddings_can_be_trained_on(predictor: Predictor, photo: EncodedImage) -> None:
    probe = torch.nn.Linear(24, 2)
    probe(torch.cat([predictor.embed(photo, points_px=[[1, 1]]), predictor.embed_texts("dog")])).sum().backward()
    assert probe.weight.grad is not None


# -- texts ---------------------------------------------------------------------------------------------------------


def test_a_string_is_one_name(predictor: Predictor, photo: EncodedImage) -> None:
    assert predictor.embed_texts("dog").shape == (1, 24)
    assert predictor.classify(photo, [[0, 0, 9, 9]], "dog")[1].shape == (1, 1)
    assert predictor.ground(photo, "dog")[0].shape == (1, 4)
    assert predictor.embed(photo, texts="dog").shape == (1, 24)


def test_white_space_case_and_underscores_do_not_count(predictor: Predictor, photo: EncodedImage) -> None:
    first, second = predictor.embed_texts([" A  red\ndog", "a red dog"])
    assert torch.equal(first, second)
    names, probabilities = predictor.classify(photo, [[0, 0, 9, 9]], ["red_dog", "red dog"])
    assert names[0] in ("red_dog", "red dog")
    np.testing.assert_allclose(probabilities, 0.5, atol=1e-6)


@pytest.mark.parametrize("text", [" ", "half a pair: \ud800"])
def test_bad_texts_are_named(predictor: Predictor, text: str) -> None:
    with pytest.raises(ValueError, match=r"text 1 is empty|valid Unicode"):
        predictor.embed_texts(["dog", text])


def test_names_are_encoded_in_chunks_and_once(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode_text = predictor.model.encode_text
    monkeypatch.setattr(predictor.model, "encode_text", lambda ids: sizes.append(len(ids)) or encode_text(ids))
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 3)
    names = ["a", "b", "c", "d", "a"]
    first = predictor.embed_texts(names)
    assert torch.equal(predictor.embed_texts(names[::-1]), first.flip(0))
    assert sizes == [3, 1]


# -- answers -------------------------------------------------------------------------------------------------------


def test_classify_names_boxes_with_probabilities(predictor: Predictor, photo: EncodedImage) -> None:
    classes = ["a dog", "a cat", "snow"]
    names, probabilities = predictor.classify(photo, [[0, 0, 40, 40], [10, 5, 70, 35]], classes)
    assert probabilities.shape == (2, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert names == [classes[i] for i in probabilities.argmax(1)]
    given = predictor.embed_texts(classes)
    again = predictor.classify(photo, [[0, 0, 40, 40], [10, 5, 70, 35]], classes, text_embeddings=given)
    np.testing.assert_array_equal(again[1], probabilities)
    with pytest.raises(ValueError, match="for 2 names"):
        predictor.classify(photo, [[0, 0, 9, 9]], ["a", "b"], text_embeddings=given)
    for ask in (
        lambda: predictor.classify(photo, [[0, 0, 9, 9]], classes, text_embeddings=given * torch.nan),
        lambda: predictor.embed(photo, [Text(given[0] * torch.nan)]),
    ):
        with pytest.raises(ValueError, match="not finite"):
            ask()


def test_probabilities_use_the_bounded_scale_of_training(predictor: Predictor, photo: EncodedImage) -> None:
    assert predictor.model.region_logit_scale is not None
    torch.nn.init.constant_(predictor.model.region_logit_scale, 9.0)
    cosines = predictor.embed(photo, boxes_px=[[0, 0, 80, 40]]) @ predictor.embed_texts(["a", "b"]).T
    probabilities = predictor.classify(photo, [[0, 0, 80, 40]], ["a", "b"])[1]
    np.testing.assert_allclose(probabilities, (100 * cosines).softmax(1), atol=1e-5)


def test_ground_gives_boxes_inside_the_image_and_scores(predictor: Predictor, photo: EncodedImage) -> None:
    boxes, scores = predictor.ground(photo, ["a dog", "snow", "a unicorn"])
    assert boxes.shape == (3, 4)
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= 80).all()
    assert (boxes[:, [1, 3]] <= 40).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    alone = predictor.ground(photo, "snow")
    np.testing.assert_allclose(boxes[1], alone[0][0], atol=1e-3)
    np.testing.assert_allclose(scores[1], alone[1][0], atol=1e-5)  # scores do not depend on what else is asked


def test_a_grounded_box_without_area_has_a_score_too(predictor: Predictor, photo: EncodedImage) -> None:
    corner = torch.ones(1, 4)
    assert torch.isfinite(predictor._presence(photo, predictor.embed_texts("dog"), corner)).all()


def test_draw_marks_the_boxes_on_a_copy(predictor: Predictor, photo: EncodedImage) -> None:
    for image in (photo, PIXELS):
        drawn = np.asarray(predictor.draw(image, [[10, 10, 30, 30], [50, 5, 79, 39]], ["a dog", "ein Hündchen"]))
        assert drawn.shape == PIXELS.shape
        assert (drawn[20, 10] == (0xC1, 0x27, 0x2D)).all()
        np.testing.assert_array_equal(np.asarray(photo.image), PIXELS)
    np.testing.assert_array_equal(np.asarray(predictor.draw(photo, [])), PIXELS)
    with pytest.raises(ValueError, match="1 labels for 2 boxes"):
        predictor.draw(photo, [[1, 1, 3, 3]] * 2, ["a"])


def test_detections_are_those_of_supervision(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        predictor.to_detections([[1, 2, 3, 4]])
    fake = types.SimpleNamespace(Detections=lambda **values: values)
    monkeypatch.setitem(sys.modules, "supervision", fake)
    found = predictor.to_detections([[1, 2, 3, 4]] * 3, ["dog", "cat", "dog"], [0.5, 0.25, 1.0])
    assert found["xyxy"].shape == (3, 4)
    assert found["class_id"].tolist() == [0, 1, 0]
    assert found["data"]["class_name"].tolist() == ["dog", "cat", "dog"]
    assert found["confidence"].tolist() == [0.5, 0.25, 1.0]
    assert predictor.to_detections([])["xyxy"].shape == (0, 4)


# -- the guide -----------------------------------------------------------------------------------------------------


def test_the_python_of_the_guide_runs(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs/quickstart/cloc/model"
    predictor.model.save_pretrained(folder)
    predictor.processor.save_pretrained(folder)
    guide = (Path(__file__).parents[2] / "docs/guides/regions.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=lambda **values: values))
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(code, names)
    assert names["scores"].shape == (2,)


def test_a_heat_map_has_the_shape_of_the_photo_and_peaks_where_the_text_is(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = predictor.encode(PIXELS)  # 40 x 80 pixels: rows 1 and 2 of the 4 x 4 patches are the photo
    patches = predictor.model.prompter.patch_embeddings(photo.features.tokens)[0]
    monkeypatch.setattr(predictor, "embed_texts", lambda texts: patches[[5, 11]])
    heat = predictor.heatmap(photo, ["second of the first row", "last of the second row"])
    assert heat.shape == (2, 16, 32)
    rows, columns = np.unravel_index(heat.reshape(2, -1).argmax(1), (16, 32))
    assert ((rows // 8, columns // 8) == np.array([[0, 1], [1, 3]])).all()
    assert (np.abs(heat) <= 1 + 1e-6).all()


def test_heat_maps_need_no_training_where_the_tower_pools(make: MakePredictor) -> None:
    predictor = make(prompter="pool")
    assert predictor.heatmap(predictor.encode(PIXELS), "a dog").shape == (1, 16, 32)
