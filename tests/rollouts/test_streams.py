"""Random streams: reproducible, uniform, and different for every argument."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from steerlab.rollouts.streams import uniforms

KNOWN = [0.27854321463391285, 0.8934636050168892, 0.025014062361255474]


def grid(seed: int = 0, step: int = 0, problems: int = 40, samples: int = 8, positions: int = 64) -> np.ndarray:
    """(problem, sample, position)."""
    p, s = np.meshgrid(np.arange(problems), np.arange(samples), indexing="ij")
    return uniforms(seed, step, p.ravel(), s.ravel(), positions).reshape(problems, samples, positions)


def test_known_values() -> None:
    """Fixed for ever: another generator would make old runs unrepeatable."""
    first = uniforms(0, 0, [0], [0], 3)
    assert np.array_equal(first, uniforms(0, 0, [0], [0], 3))
    assert first.dtype == np.float64
    assert first[0].tolist() == KNOWN


def test_rows_and_positions_do_not_depend_on_company() -> None:
    whole = uniforms(5, 2, [7, 8, 9], [0, 3, 1], 50)
    assert np.array_equal(uniforms(5, 2, [8], [3], 20)[0], whole[1, :20])
    assert np.array_equal(uniforms(5, 2, [9, 7], [1, 0], 50), whole[[2, 0]])


def test_uniform() -> None:
    numbers = grid()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    for at in (0, 1, 63):  # along problems and samples too, not only along positions
        assert stats.kstest(numbers[:, :, at].ravel(), "uniform").pvalue > 0.001
    assert stats.kstest([uniforms(s, 0, [0], [0], 1)[0, 0] for s in range(500)], "uniform").pvalue > 0.001
    assert stats.kstest([uniforms(0, s, [0], [0], 1)[0, 0] for s in range(500)], "uniform").pvalue > 0.001


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["problem", "sample", "position"])
def test_neighbours_are_not_correlated(axis: int) -> None:
    numbers = grid()
    a, b = (np.delete(numbers, i, axis).ravel() for i in (0, -1))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))


@pytest.mark.parametrize("shift", [1, 2, 1000])
def test_neighbouring_seeds_and_steps_are_not_correlated(shift: int) -> None:
    here = grid().ravel()
    for there in (grid(seed=shift), grid(step=shift)):
        assert abs(np.corrcoef(here, there.ravel())[0, 1]) < 4 / np.sqrt(len(here))


def test_every_argument_matters_and_none_can_stand_for_another() -> None:
    small = range(4)
    keys = [(a, b, c, d) for a in small for b in small for c in small for d in small]
    rows = np.stack([uniforms(a, b, [c], [d], 4)[0] for a, b, c, d in keys])
    assert len(np.unique(rows)) == rows.size


def test_large_and_negative_names() -> None:
    rows = uniforms(2**40, 10**9, [-1, 0, 2**62], [0, 0, 0], 4)
    assert len(np.unique(rows)) == 12


def test_no_rows() -> None:
    assert uniforms(0, 0, [], [], 5).shape == (0, 5)
