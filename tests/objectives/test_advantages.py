"""Credit within a group against the formulas, and what every advantage must satisfy."""

from __future__ import annotations

import pytest
import torch

from steerlab.errors import UsageError
from steerlab.objectives import Advantage, GroupMean, GroupNormalised, LeaveOneOut

ALL = (LeaveOneOut(), GroupMean(), GroupNormalised())
REWARDS = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 0.25])


@pytest.mark.parametrize("advantage", ALL, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_sums_to_zero(advantage: Advantage, size: int) -> None:
    rewards = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    assert abs(float(advantage(rewards).sum())) < 1e-12


@pytest.mark.parametrize("advantage", ALL, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("reward", [-1.0, 0.0, 1.0, 0.1, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(advantage: Advantage, reward: float, size: int) -> None:
    """Rounding must not make a signal: rows of advantage zero are dropped, others divided by the deviation."""
    assert not advantage(torch.full((size,), reward)).any()


@pytest.mark.parametrize("advantage", ALL, ids=lambda a: type(a).__name__)
def test_shift_and_order_do_not_matter(advantage: Advantage) -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(advantage(REWARDS + 5), advantage(REWARDS), atol=1e-6)
    assert torch.allclose(advantage(REWARDS[order]), advantage(REWARDS)[order], atol=1e-6)


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    got = LeaveOneOut()(REWARDS)
    for i in range(7):
        others = torch.cat([REWARDS[:i], REWARDS[i + 1 :]])
        assert float(got[i]) == pytest.approx(float(REWARDS[i] - others.mean()), abs=1e-6)


@pytest.mark.parametrize("k", [2, 8, 16])
def test_leave_one_out_is_k_over_k_minus_one_times_centred(k: int) -> None:
    rewards = torch.randn(k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    assert torch.allclose(LeaveOneOut()(rewards), k / (k - 1) * GroupMean()(rewards), atol=1e-12)


def test_papers_factor() -> None:
    """core.md §2: 1.0667 at K = 16."""
    rewards = torch.tensor([1.0] + [-1.0] * 15)
    assert float(LeaveOneOut()(rewards)[0]) == pytest.approx(2.0)
    assert float(LeaveOneOut()(rewards)[0] / GroupMean()(rewards)[0]) == pytest.approx(1.0667, abs=1e-4)


def test_group_normalised() -> None:
    expected = (REWARDS - REWARDS.mean()) / (REWARDS.std(correction=1) + 1e-4)
    assert torch.allclose(GroupNormalised()(REWARDS), expected, atol=1e-6)


def test_one_sample_is_refused_where_it_has_no_meaning() -> None:
    for advantage in (LeaveOneOut(), GroupNormalised()):
        with pytest.raises(UsageError, match="at least 2"):
            advantage(torch.tensor([1.0]))
    assert GroupMean()(torch.tensor([1.0])).tolist() == [0.0]
