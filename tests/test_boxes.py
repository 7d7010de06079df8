"""Box algebra and letterbox: properties first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opencloc.boxes import Letterbox, box_problem, clipped_px, giou, iou, pairwise_iou, xywh_px_to_xyxy
from opencloc.images import letterbox_array

side = st.integers(1, 4000)
unit = st.floats(0, 1, width=32)


@st.composite
def boxes(draw: st.DrawFn) -> torch.Tensor:
    x0, x1 = sorted(draw(st.tuples(unit, unit)))
    y0, y1 = sorted(draw(st.tuples(unit, unit)))
    return torch.tensor([x0, y0, x1, y1])


@given(width=side, height=side, box=boxes())
def test_letterbox_inverse_gives_the_box_back(width: int, height: int, box: torch.Tensor) -> None:
    letterbox = Letterbox(width_px=width, height_px=height)
    square = letterbox.to_square(box.double())
    assert square.min() >= -1e-12
    assert square.max() <= 1 + 1e-12
    torch.testing.assert_close(letterbox.to_image(square), box.double(), atol=1e-9, rtol=0)


@given(width=side, height=side, box=boxes())
def test_letterbox_moves_numpy_and_torch_boxes_alike(width: int, height: int, box: torch.Tensor) -> None:
    letterbox = Letterbox(width_px=width, height_px=height)
    np.testing.assert_allclose(letterbox.to_square(box.numpy()), letterbox.to_square(box).numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(200, 100), (97, 31), (31, 97), (64, 64), (640, 427)])
def test_letterboxed_pixels_lie_where_to_square_says(size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    box_px = (width // 4, height // 4, width // 2, height // 2)
    pixels[box_px[1] : box_px[3], box_px[0] : box_px[2]] = 255
    square = letterbox_array(Image.fromarray(pixels), 256).astype(float).mean(-1)
    box = np.array(box_px) / np.array([width, height, width, height])
    x0, y0, x1, y1 = Letterbox(width_px=width, height_px=height).to_square(box) * 256
    ys, xs = np.mgrid[:256, :256] + 0.5
    inside = (xs > x0 + 2) & (xs < x1 - 2) & (ys > y0 + 2) & (ys < y1 - 2)
    outside = (xs < x0 - 4) | (xs > x1 + 4) | (ys < y0 - 4) | (ys > y1 + 4)
    assert square[inside].min() > 240
    assert square[outside].max() < 140  # black photo or grey bars


def test_letterbox_refuses_an_empty_image() -> None:
    with pytest.raises(ValueError, match="0 x 5 pixels is empty"):
        Letterbox(width_px=0, height_px=5)


@given(a=boxes(), b=boxes())
def test_iou_is_symmetric_and_giou_is_below_it(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(iou(a, b), iou(b, a))
    assert -1 - 1e-5 <= giou(a, b) <= iou(a, b) + 1e-5


def test_iou_known_values() -> None:
    a = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.2, 0.2]])
    b = torch.tensor([[0.25, 0.0, 0.75, 0.5], [0.8, 0.8, 1.0, 1.0]])
    torch.testing.assert_close(iou(a, b), torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(giou(a, b), torch.tensor([1 / 3, 0.08 - 1]))
    torch.testing.assert_close(pairwise_iou(a, b).diagonal(), iou(a, b))


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([0, 0, 1, 1], None),
        ([0, 0, 0.5, float("nan")], "not finite"),
        ([0, 0, 1.2, 1], "outside"),
        ([0.5, 0, 0.5, 1], "empty"),
        ([0, 0, 1], "4 numbers"),
    ],
)
def test_box_problem_names_what_is_wrong(box: list[float], problem: str | None) -> None:
    found = box_problem(np.array(box, dtype=np.float32))
    assert (found is None) if problem is None else (found is not None and problem in found)


@given(over=st.floats(0, 1))
def test_pixel_boxes_are_clipped_by_a_pixel_or_a_percent_and_no_more(over: float) -> None:
    width, height, box_px = 300, 20, np.array([2.0, 2.0, 9.0, 9.0])
    np.testing.assert_array_equal(clipped_px(box_px[None], width, height)[0], box_px)
    outside = np.array([-3 * over, -over, width + 3 * over, height + over])
    np.testing.assert_array_equal(clipped_px(outside[None], width, height)[0], [0, 0, width, height])
    for edge in range(4):
        far = np.array([0.0, 0.0, width, height])
        far[edge] += (-1 if edge < 2 else 1) * (3.1 if edge % 2 == 0 else 1.1)
        with pytest.raises(ValueError, match=r"box 1 is .* reaches outside"):
            clipped_px(np.stack([box_px, far]), width, height)


def test_coco_boxes_become_normalised_corners() -> None:
    np.testing.assert_allclose(xywh_px_to_xyxy(np.array([10, 20, 30, 40]), 100, 200), [0.1, 0.1, 0.4, 0.3])


def test_edges_too_large_for_a_float_are_clipped_without_a_warning() -> None:
    box_px = np.array([1.0, 2.0, 1.7e308, 1.7e308])
    assert xywh_px_to_xyxy(box_px, 4, 4).tolist() == [0.25, 0.5, 1.0, 1.0]
    box_px[0] = 1.7e308
    assert xywh_px_to_xyxy(box_px, 4, 4).tolist() == [1.0, 0.5, 1.0, 1.0]
