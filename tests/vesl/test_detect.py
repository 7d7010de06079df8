"""Detectors: tiny random checkpoints through the real loading code, and the user's own by name."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

from opencloc.vesl.detect import Detections
from opencloc.vesl.detectors import load_detector
from opencloc.vesl.owl import PAD_GREY, OwlDetector, TextCache

sys.path.insert(0, str(Path(__file__).parent))  # tests are no packages; checkpoints.py lies beside this file
from checkpoints import save_grounding_dino, save_owl

PHRASES = [["a red cat", "dog"], ["tree"], [], ["the big car", "a man", "blue dog", "cat"]]


@pytest.fixture(scope="module")
def owl_path(tmp_path_factory) -> str:
    return str(save_owl(tmp_path_factory.mktemp("owlv2")))


@pytest.fixture(scope="module")
def dino_path(tmp_path_factory) -> str:
    return str(save_grounding_dino(tmp_path_factory.mktemp("dino")))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(60, 40), (30, 80), (50, 50), (123, 77)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def load(path: str, **changes) -> Any:
    return load_detector(
        path, **{"resolution": 96, "precision": "fp32", "device": "cpu", "score_threshold": 0.2, **changes}
    )


def assert_same(a: Detections, b: Detections, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(a.boxes, b.boxes, atol=tolerance)
    np.testing.assert_allclose(a.scores, b.scores, atol=tolerance)
    np.testing.assert_array_equal(a.phrase, b.phrase)


@pytest.mark.parametrize("kind", ["owl_path", "dino_path"])
def test_a_batch_gives_what_one_image_at_a_time_gives(kind: str, images, request) -> None:
    detector = load(request.getfixturevalue(kind), score_threshold=0.01)
    together = detector(images, PHRASES)
    alone = [detector([image], [own])[0] for image, own in zip(images, PHRASES, strict=True)]
    assert [len(found) > 0 for found in together] == [True, True, False, True]
    for a, b in zip(together, alone, strict=True):
        assert_same(a, b)


def test_owlv2_scores_follow_the_phrase_whatever_its_place_and_company(owl_path: str, images) -> None:
    detector = load(owl_path, score_threshold=0.0)
    one = detector(images[:1], [["dog", "a red cat"]])[0]
    other = detector(images[:1], [["tree", "a red cat", "man", "dog"]])[0]
    assert_same(one.take(one.phrase == 0), replace(other.take(other.phrase == 3), phrase=one.phrase[one.phrase == 0]))
    assert_same(one.take(one.phrase == 1), other.take(other.phrase == 1))


@pytest.mark.parametrize("resolution", [64, 96, 448])
def test_owlv2_equals_the_models_own_forward_at_any_resolution(owl_path: str, images, resolution: int) -> None:
    detector = load(owl_path, resolution=resolution, score_threshold=0.0)
    phrases = ["a red cat", "dog"]
    model = AutoModelForZeroShotObjectDetection.from_pretrained(owl_path).eval()
    tokens = AutoTokenizer.from_pretrained(owl_path)(
        phrases, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    pixels = detector._pixels(images[:1])
    with torch.inference_mode():
        output = model(**tokens, pixel_values=pixels, interpolate_pos_encoding=True)
    side = (resolution // 16) ** 2
    assert output.logits.shape == (1, side, 2)
    found = detector(images[:1], [phrases])[0]
    np.testing.assert_allclose(found.scores, output.logits[0].sigmoid().flatten(), atol=1e-5)
    np.testing.assert_array_equal(found.phrase, np.tile([0, 1], side))


def test_owlv2_box_prior_follows_the_grid_of_the_resolution(owl_path: str, images) -> None:
    """With a silent box head, box number i is the prior of its patch: one patch wide, at its patch's place."""
    detector = load(owl_path, resolution=160, score_threshold=0.0)
    for parameter in detector._model.box_head.dense2.parameters():
        parameter.data.zero_()
    boxes = detector(images[2:3], [["cat"]])[0].boxes.reshape(10, 10, 4)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    grid = np.arange(1, 11) / 10  # OWL's prior sits at the patch's far corner
    np.testing.assert_allclose(centres[..., 0], np.tile(grid, (10, 1)), atol=2e-3)
    np.testing.assert_allclose(centres[..., 1], np.tile(grid[:, None], 10), atol=2e-3)
    np.testing.assert_allclose(boxes[..., 2:] - boxes[..., :2], 0.1, atol=2e-3)


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 200), (90, 90)])
def test_owlv2_boxes_land_on_the_object_of_a_non_square_image(
    owl_path: str, width: int, height: int, monkeypatch
) -> None:
    """The shifted boxes of transformers #27205 and #30131: a bright square is found where it lies in the image.

    The model is replaced by one that scores a patch by its brightness, with the real box prior: whatever happens to
    the image before the model must be undone after it.
    """
    detector = load(owl_path, resolution=160, score_threshold=0.9)
    model = detector._model
    for parameter in model.box_head.dense2.parameters():
        parameter.data.zero_()

    def brightness(pixels: torch.Tensor, interpolate_pos_encoding: bool):
        return (torch.nn.functional.avg_pool2d(pixels, 16).mean(1)[..., None].expand(-1, -1, -1, 24), None)

    def bright_patches(features, queries, mask):
        return ((features.mean(-1, keepdim=True) > 1.5).float() * 20 - 10, None)

    monkeypatch.setattr(model, "image_embedder", brightness)
    monkeypatch.setattr(model, "class_predictor", bright_patches)
    image = Image.new("RGB", (width, height), (40, 40, 40))
    patch = max(width, height) // 10
    left, top = width - 3 * patch, height - 3 * patch  # away from the middle, where a shift would hide
    image.paste((255, 255, 255), (left, top, left + patch, top + patch))
    found = detector([image], [["square"]])[0]
    # The prior's centre is the patch's far corner (see the test above).
    expected = np.array([left + patch / 2, top + patch / 2, left + 1.5 * patch, top + 1.5 * patch])
    np.testing.assert_allclose(found.boxes * [width, height, width, height], [expected], atol=1.0)


def test_owlv2_pads_with_grey_at_the_bottom_and_on_the_right(owl_path: str) -> None:
    detector = load(owl_path, resolution=64)
    pixels = detector._pixels([Image.new("RGB", (80, 40), (255, 0, 0))])
    rgb = (pixels * detector._std + detector._mean)[0].permute(1, 2, 0).round()
    np.testing.assert_array_equal(rgb[:30].numpy(), np.broadcast_to((255, 0, 0), (30, 64, 3)))
    np.testing.assert_array_equal(rgb[34:].numpy(), np.broadcast_to(PAD_GREY, (30, 64, 3)))


def test_owlvit_images_are_squashed_and_boxes_need_no_correction(tmp_path: Path, images) -> None:
    detector = load(str(save_owl(tmp_path, kind="owlvit")), score_threshold=0.0)
    wide = images[0]
    squashed = wide.resize((96, 96), Image.Resampling.BILINEAR)
    one, other = detector([wide, squashed], [["cat"], ["cat"]])
    assert_same(one, other)


@pytest.mark.parametrize("kind", ["owl_path", "dino_path"])
def test_bf16_agrees_with_fp32_to_its_precision(kind: str, images, request) -> None:
    path = request.getfixturevalue(kind)
    exact = load(path, score_threshold=0.0)(images[:1], [["cat"]])[0]
    half = load(path, score_threshold=0.0, precision="bf16")(images[:1], [["cat"]])[0]
    assert len(half) == len(exact)
    assert np.median(np.abs(half.boxes - exact.boxes)) < 0.01
    assert np.median(np.abs(half.scores - exact.scores)) < 0.05


def test_only_detections_above_the_threshold_are_returned(owl_path: str, images) -> None:
    everything = load(owl_path, score_threshold=0.0)(images[:1], [["cat", "dog"]])[0]
    threshold = float(np.median(everything.scores))
    found = load(owl_path, score_threshold=threshold)(images[:1], [["cat", "dog"]])[0]
    assert_same(found, everything.take(everything.scores > threshold))


@pytest.mark.parametrize("kind", ["owl_path", "dino_path"])
def test_a_model_that_returns_nonsense_is_an_error(kind: str, images, request) -> None:
    detector = load(request.getfixturevalue(kind))
    for parameter in detector._model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        detector(images[:1], [["cat"]])


def test_a_phrase_longer_than_the_text_tower_is_cut_not_refused(owl_path: str, images) -> None:
    found = load(owl_path, score_threshold=0.0)(images[:1], [["a" * 100, "a" * 200]])[0]
    one, other = found.take(found.phrase == 0), found.take(found.phrase == 1)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)


def test_text_embeddings_are_computed_once_for_repeated_phrases(owl_path: str, images, monkeypatch) -> None:
    detector = load(owl_path)
    asked: list[str] = []
    embed = detector.text_cache._embed
    monkeypatch.setattr(detector.text_cache, "_embed", lambda phrases: asked.extend(phrases) or embed(phrases))
    for _ in range(3):
        detector(images, PHRASES)
    assert asked == [phrase for own in PHRASES for phrase in own]
    assert (detector.text_cache.hits, detector.text_cache.misses) == (14, 7)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_a_text_cache_of_any_size_returns_what_it_was_given(size: int) -> None:
    def embed(phrases):
        return torch.tensor([[float(len(phrase)), float(ord(phrase[0]))] for phrase in phrases])

    cache = TextCache(embed, size)
    rng = np.random.default_rng(size)
    words = [letter * count for letter in "abc" for count in (1, 2, 3)]
    for _ in range(50):
        asked = [words[i] for i in rng.integers(len(words), size=rng.integers(1, 5))]
        torch.testing.assert_close(cache(asked), embed(asked))


def test_a_text_cache_forgets_the_least_recently_used() -> None:
    asked: list[str] = []
    cache = TextCache(lambda phrases: asked.extend(phrases) or torch.zeros(len(phrases), 1), 2)
    for phrase in ("a", "b", "a", "c", "a", "b"):
        cache([phrase])
    assert asked == ["a", "b", "c", "b"]


def test_grounding_dino_maps_tokens_to_the_phrase_they_belong_to(dino_path: str) -> None:
    detector = load(dino_path)
    prompts = detector._prompts(0, ["a red cat", "...", "dog?"])
    token_ids, owners = detector._tokens(prompts)
    words = detector._tokenizer.convert_ids_to_tokens(token_ids[0])
    assert words == ["[CLS]", "a", "red", "cat", ".", "dog", ".", "[SEP]"]
    assert [prompts[0].phrases[owner] if owner >= 0 else -1 for owner in owners[0]] == [-1, 0, 0, 0, -1, 2, -1, -1]


def test_grounding_dino_equals_the_models_own_forward_on_one_image(dino_path: str, images) -> None:
    detector = load(dino_path, score_threshold=0.0)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(dino_path).eval()
    tokens = AutoTokenizer.from_pretrained(dino_path)("a red cat. dog.", return_tensors="pt")
    pixels, mask = detector._pixels(images[:1])
    with torch.inference_mode():
        output = model(pixel_values=pixels, pixel_mask=mask, **tokens)
    scores = output.logits[0].sigmoid()
    expected = torch.stack([scores[:, 1:4].mean(1), scores[:, 5]], dim=1)
    found = detector(images[:1], [["a red cat", "dog"]])[0]
    np.testing.assert_allclose(found.scores.reshape(-1, 2), expected, atol=1e-5)


def test_grounding_dino_phrases_that_do_not_fit_one_prompt_take_several(dino_path: str, images) -> None:
    detector = load(dino_path, score_threshold=0.0)
    phrases = ["a red cat"] * 20  # 80 tokens with separators, 30 fit
    assert [len(prompt.phrases) for prompt in detector._prompts(0, phrases)] == [7, 7, 6]
    found = detector(images[:2], [phrases, ["dog"]])
    assert set(found[0].phrase) == set(range(20))
    assert_same(found[1], detector(images[1:2], [["dog"]])[0])


def test_owl_refuses_a_resolution_that_does_not_fit_its_patches(owl_path: str) -> None:
    with pytest.raises(ValueError, match=r"multiple of .* patch size 16, got 100"):
        load(owl_path, resolution=100)


USER_MODULE = """
from opencloc.vesl.detect import no_detections

class Nothing:
    def __init__(self, model="default", level="0"):
        self.model_id = model + level
    def __call__(self, images, phrases):
        return [no_detections() for _ in images]

not_callable = 3

def broken():
    return "a string"
"""


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "my_detectors.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    return "my_detectors.py"


def test_a_users_factory_comes_from_a_file_or_an_installed_package_and_gets_its_arguments(
    user_file: str, tmp_path: Path, monkeypatch
) -> None:
    assert load_detector(f"{user_file}:Nothing").model_id == "default0"  # pyright: ignore
    assert load_detector(f"{tmp_path}/{user_file}:Nothing?level=2").model_id == "default2"  # pyright: ignore
    monkeypatch.syspath_prepend(tmp_path)  # as if installed
    assert load_detector("my_detectors:Nothing?model=/a%20b.onnx").model_id == "/a b.onnx0"  # pyright: ignore


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:factory", "no module 'no_such_module'"),
        ("nowhere/x.py:factory", "nowhere/x.py: no such file"),
        ("my_detectors.py:missing", "my_detectors.py has no callable 'missing'"),
        ("my_detectors.py:not_callable", "has no callable"),
        ("my_detectors.py:broken", "returned str, not a callable"),
        ("mistyped", "detector 'mistyped': mistyped: no such folder"),
        ("runs/mistyped/model", "no such folder"),
    ],
)
def test_a_detector_spec_that_leads_nowhere_is_named_without_asking_the_hub(
    user_file: str, spec: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_detector(spec)


def test_a_checkpoint_of_another_kind_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is of type 'clip'; supported: owlvit, owlv2, grounding-dino"):
        load_detector(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"cut short"),
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_broken_checkpoint_is_one_error_that_names_it(tmp_path: Path, name: str, content: bytes) -> None:
    folder = save_owl(tmp_path / "owl")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"detector '{folder}'"):
        load(str(folder))


def test_a_device_that_is_not_there_is_named(owl_path: str) -> None:
    with pytest.raises(ValueError, match="device 'cuda:99' is not there"):
        load(owl_path, device="cuda:99")


def test_the_owl_detector_names_its_checkpoint(owl_path: str) -> None:
    detector = load(owl_path)
    assert isinstance(detector, OwlDetector)
    assert detector.model_id == f"{owl_path}, 96 px, fp32"
