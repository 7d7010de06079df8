from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencloc.model.fingerprint import model_id
from opencloc.model.predictor import load
from opencloc.search.regions import SAME, WHOLE, encode_regions, grid_boxes, thinned
from tests.search.conftest import photo


def test_the_grid_has_a_few_hundred_sound_boxes_from_edge_to_edge_the_whole_photo_first() -> None:
    boxes = grid_boxes()
    assert 200 <= len(boxes) <= 600
    assert (boxes[0] == WHOLE[0]).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= 1).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    smaller = boxes[1:]
    assert smaller.min() == 0
    assert smaller.max() == 1
    assert len(np.unique(boxes.round(5), axis=0)) == len(boxes)


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1]))


@given(seed=st.integers(0, 1000), same=st.sampled_from([0.3, 0.6, 0.9]))
def test_what_is_thinned_equals_going_through_the_regions_one_by_one(seed: int, same: float) -> None:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.7, (20, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.05, 0.3, (20, 2))], axis=1).astype(np.float32)
    vectors = rng.normal(size=(20, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept: list[int] = []
    for row in range(20):
        near = [one for one in kept if overlap(boxes[one], boxes[row]) and vectors[one] @ vectors[row] >= same]
        if not near:
            kept.append(row)
    assert np.flatnonzero(thinned(boxes, vectors, same)).tolist() == kept


def test_regions_of_a_batch_equal_those_the_predictor_embeds_one_photo_at_a_time(model: str) -> None:
    predictor = load(model)
    images = [photo(1, 60, 40), photo(2, 30, 50)]
    found = encode_regions(predictor, images, [grid_boxes()] * 2, "grid")
    for image, regions in zip(images, found, strict=True):
        assert 1 < len(regions.boxes) <= len(grid_boxes())
        width, height = image.size
        boxes_px = regions.boxes * [width, height, width, height]
        expected = predictor.embed(predictor.encode(image), boxes_px=boxes_px).numpy()
        np.testing.assert_allclose(regions.vectors.astype(np.float32), expected, atol=2e-3)
        cosines = expected @ expected.T - np.eye(len(expected))
        apart = [overlap(a, b) and cosines[i, j] > SAME + 2e-3 for i, a in enumerate(regions.boxes) for j, b in enumerate(regions.boxes) if i != j]  # fmt: skip  # noqa: E501
        assert not any(apart)


def test_whole_photos_are_stored_as_the_image_tower_embeds_them(model: str) -> None:
    predictor = load(model)
    (found,) = encode_regions(predictor, [photo(3)], [WHOLE], "whole")
    expected = predictor.encode(photo(3)).features.embedding.numpy()
    np.testing.assert_allclose(found.vectors.astype(np.float32), expected, atol=2e-3)


def test_the_id_of_a_model_changes_with_a_weight_and_not_with_its_folder(
    make_model, model: str, tmp_path: Path
) -> None:
    same, other = make_model(tmp_path / "same"), make_model(tmp_path / "other", seed=1)
    assert model_id(load(same).model) == model_id(load(model).model) != model_id(load(other).model)
    changed = load(model).model
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    assert model_id(changed) != model_id(load(model).model)
