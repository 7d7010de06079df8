"""The orthogonalized steps: against the plain iteration, the singular values, torch's own Muon, and AdamW's length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from opencloc.train import muon
from opencloc.train.distributed import Ranks
from opencloc.train.muon import Muon, batches, orthogonalize, orthogonalize_shards, shares
from tests.train.runs import on_two_ranks

SIDES = st.integers(1, 24)
SEEDS = st.integers(0, 2**32 - 1)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make(*parameters: nn.Parameter, lr: float = 0.01, weight_decay: float = 0.0) -> Muon:
    vector = nn.Parameter(torch.ones(2))  # AdamW's
    groups = [
        {"params": [vector], "muon": False},
        {"params": list(parameters), "muon": True, "weight_decay": weight_decay},
    ]
    return Muon(groups, lr=lr)


@given(count=st.integers(1, 3), rows=SIDES, columns=SIDES, seed=SEEDS)
def test_orthogonalized_matrices_are_the_plain_iteration_whatever_their_scale(
    count: int, rows: int, columns: int, seed: int
) -> None:
    matrices = random(count, rows, columns, seed=seed)
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    torch.testing.assert_close(orthogonalize(matrices), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(orthogonalize(1000 * matrices), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(orthogonalize(matrices.mT), x.mT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [12, 64])
def test_orthogonalized_matrix_has_singular_values_near_one(dtype: torch.dtype, columns: int) -> None:
    left, right = torch.linalg.qr(random(12, 12))[0], torch.linalg.qr(random(columns, 12, seed=1))[0]
    matrix = left * torch.logspace(0, -1, 12, dtype=torch.float64) @ right.T
    values = torch.linalg.svdvals(orthogonalize(matrix[None].to(dtype)).double())
    assert 0.6 < values.min() <= values.max() < 1.3
    assert not orthogonalize(torch.zeros(1, 3, 4, dtype=dtype)).any()


@given(rows=st.integers(8, 48), columns=st.integers(8, 48), seed=SEEDS)
def test_a_step_has_the_root_mean_square_of_a_fifth_of_the_learning_rate(rows: int, columns: int, seed: int) -> None:
    """So that one learning rate serves Muon and AdamW (Liu et al. 2025), whatever the shape and the gradient's size."""
    weight = nn.Parameter(torch.zeros(rows, columns))
    weight.grad = 10.0 ** (seed % 7 - 3) * random(rows, columns, seed=seed, dtype=torch.float32)
    make(weight, lr=0.01).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)
    assert (weight * weight.grad).sum() < 0


def test_three_steps_are_those_of_torchs_own_muon() -> None:
    """Which rounds to bfloat16."""
    start = random(24, 64, dtype=torch.float32)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    optimizers = make(ours, lr=0.02, weight_decay=0.5), torchs
    for seed in range(3):
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = random(24, 64, seed=seed, dtype=torch.float32)
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    assert moved > 0.5


def test_what_is_not_marked_takes_the_steps_of_adamw_and_weights_without_gradient_stay() -> None:
    vector, still, matrix = (nn.Parameter(torch.ones(*shape)) for shape in ((3,), (4, 4), (4, 4)))
    expected = nn.Parameter(torch.ones(3))
    groups = [{"params": [vector], "muon": False}, {"params": [still, matrix], "muon": True, "weight_decay": 0.5}]
    for optimizer, one in ((Muon(groups, lr=0.1), vector), (torch.optim.AdamW([expected], lr=0.1), expected)):
        one.grad = torch.tensor([1.0, -2.0, 3.0])
        matrix.grad = torch.eye(4)
        optimizer.step()
    assert torch.equal(vector, expected)
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(matrix, torch.ones(4, 4))


def test_matrices_of_a_shape_are_worked_on_together_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [nn.Parameter(random(*shape, dtype=torch.float32)) for shape in [(4, 6), (6, 4), (4, 6), (4, 6), (2, 2)]]

    def stepped() -> Iterator[Tensor]:
        for number, weight in enumerate(weights):
            one = nn.Parameter(weight.detach().clone())
            one.grad = random(*one.shape, seed=number, dtype=torch.float32)
            yield one

    assert [len(batch) for batch in batches(weights)] == [3, 1, 1]
    whole = list(stepped())
    make(*whole).step()  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(muon, "AT_ONCE", 50)
    assert [len(batch) for batch in batches(weights)] == [2, 1, 1, 1]
    bounded = list(stepped())
    make(*bounded).step()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(bounded, whole)


@given(count=st.integers(0, 40), ranks=st.integers(1, 12))
def test_shares_are_those_of_chunk(count: int, ranks: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(count).chunk(ranks)] if count else []
    assert shares(count, ranks) == chunks + [0] * (ranks - len(chunks))


@pytest.mark.parametrize(("count", "rows"), [(4, 6), (3, 7), (1, 5), (5, 1)])
def test_sharded_matrices_are_orthogonalized_as_whole_ones(count: int, rows: int, tmp_path: Path) -> None:
    """Also where ranks have unequally many rows or matrices, or none."""
    matrices = random(count, rows, 9)
    expected = orthogonalize(matrices)

    def body(ranks: Ranks) -> None:
        assert ranks.group is not None
        own = shares(rows, 2)
        got = orthogonalize_shards(matrices.split(own, 1)[ranks.rank], rows, ranks.group)
        torch.testing.assert_close(got, expected.split(own, 1)[ranks.rank])

    on_two_ranks(body, tmp_path)
