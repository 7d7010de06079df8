"""The GPU that these tests need; without one they skip themselves.  `benchmarks/gpu.sh` runs them where one is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.train.conftest import config

__all__ = ["config"]  # the run of seconds that the tests of training use


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The first GPU, with float32 products that are float32's and not TF32's."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device("cuda", 0)
    torch.set_float32_matmul_precision(precision)
