"""RoIAlign against a slow loop."""

from __future__ import annotations

import math

import torch

from opencloc.model.prompter import SAMPLES_PER_BIN, roi_align


def slow_bilinear(channel: torch.Tensor, x: float, y: float) -> float:
    """Value at (x, y) in pixels, pixel centres at half-integers, the border repeated."""
    height, width = channel.shape
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    x0, y0 = math.floor(x), math.floor(y)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    fx, fy = x - x0, y - y0
    top = (1 - fx) * channel[y0, x0] + fx * channel[y0, x1]
    bottom = (1 - fx) * channel[y1, x0] + fx * channel[y1, x1]
    return float((1 - fy) * top + fy * bottom)


def test_roi_align_equals_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    boxes = torch.rand(2, 4, 4, generator=generator, dtype=torch.float64).sort(-1).values
    size = 3
    got = roi_align(feature_map, boxes, size)
    for b in range(2):
        for p in range(4):
            x0, y0, x1, y1 = boxes[b, p].tolist()
            for row in range(size):
                for column in range(size):
                    samples = [
                        slow_bilinear(
                            feature_map[b, 1],
                            7 * (x0 + (x1 - x0) * (column + (i + 0.5) / SAMPLES_PER_BIN) / size),
                            5 * (y0 + (y1 - y0) * (row + (j + 0.5) / SAMPLES_PER_BIN) / size),
                        )
                        for i in range(SAMPLES_PER_BIN)
                        for j in range(SAMPLES_PER_BIN)
                    ]
                    expected = sum(samples) / len(samples)
                    assert abs(got[b, p, 1, row, column].item() - expected) < 1e-9


def test_roi_align_of_a_linear_map_is_the_value_at_the_centre_of_each_bin() -> None:
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    got = roi_align((x + 10 * y)[None, None], torch.tensor([[[0.25, 0.25, 0.75, 0.5]]]), 1)
    torch.testing.assert_close(got.squeeze(), torch.tensor(4.0 + 10 * 3.0))
