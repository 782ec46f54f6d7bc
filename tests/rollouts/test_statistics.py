"""avg@k, pass@k and the intervals: exact values, coverage, and what degenerate tables say."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
import pytest

from steerlab.errors import UsageError
from steerlab.rollouts import statistics


def _row_with(n_correct: int, n: int) -> np.ndarray:
    return np.arange(n)[None] < n_correct


def _completions(correct: np.ndarray, condition: str = "steered") -> pd.DataFrame:
    """A `completions` table from correct[seeds, problems, samples]."""
    return pd.DataFrame(
        [
            {
                "task": "sums",
                "split": "test",
                "condition": condition,
                "seed": seed,
                "problem": problem,
                "sample": sample,
            }
            | {"question": "1 + 1", "answer": "2", "text": "2", "extracted": "2", "reward": 1.0 if hit else -1.0}
            | {"correct": bool(hit), "n_tokens": 1, "finished": True}
            for (seed, problem, sample), hit in np.ndenumerate(correct)
        ]
    )


@pytest.mark.parametrize("n", [1, 5, 8])
def test_pass_at_k_equals_the_share_of_subsets_with_a_hit(n: int) -> None:
    for n_correct in range(n + 1):
        row = _row_with(n_correct, n)
        for k in range(1, n + 1):
            hits = [any(row[0, list(subset)]) for subset in combinations(range(n), k)]
            assert statistics.pass_at_k(row, k)[0] == pytest.approx(np.mean(hits), abs=1e-12)


def test_pass_at_k_is_exact_where_binomials_overflow_a_double() -> None:
    n, n_correct, k = 4096, 3, 1024
    expected = 1 - comb(n - n_correct, k) / comb(n, k)
    assert statistics.pass_at_k(_row_with(n_correct, n), k)[0] == pytest.approx(expected, rel=1e-12)
    assert statistics.pass_at_k(_row_with(1, 100_000), 1)[0] == pytest.approx(1e-5, rel=1e-10)


def test_pass_at_one_is_avg_and_pass_at_n_is_any() -> None:
    correct = np.random.default_rng(0).random((3, 20, 8)) < 0.3
    np.testing.assert_allclose(statistics.pass_at_k(correct, 1), statistics.avg_at_k(correct), atol=1e-12)
    np.testing.assert_array_equal(statistics.pass_at_k(correct, 8), correct.any(-1))
    np.testing.assert_array_equal(statistics.avg_at_k(correct, 2), correct[..., :2].mean(-1))


@pytest.mark.parametrize("measure", [statistics.avg_at_k, statistics.pass_at_k])
@pytest.mark.parametrize("k", [0, 9])
def test_k_outside_the_samples_is_refused(measure, k: int) -> None:
    with pytest.raises(UsageError, match=f"@{k} needs 1 ≤ k ≤ 8"):
        measure(np.ones((2, 8), dtype=bool), k)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = []
    for trial in range(300):
        scores = (generator.random((80, 8)) < generator.beta(1, 2, size=(80, 1))).mean(-1)
        interval = statistics.bootstrap_interval(scores, seed=trial, resamples=1000)
        covered.append(interval.low <= 1 / 3 <= interval.high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_interval_matches_the_normal_theory_and_is_seeded() -> None:
    scores = np.random.default_rng(2).random(400)
    interval = statistics.bootstrap_interval(scores, seed=3)
    half = 1.96 * scores.std() / np.sqrt(scores.size)
    assert interval.value == pytest.approx(scores.mean())
    assert (interval.low, interval.high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=2e-3)
    assert interval == statistics.bootstrap_interval(scores, seed=3)
    assert interval != statistics.bootstrap_interval(scores, seed=4)


def test_resamples_drawn_in_blocks_have_the_same_spread(monkeypatch) -> None:
    scores = np.random.default_rng(2).random(100)
    whole = statistics.bootstrap_interval(scores)
    monkeypatch.setattr(statistics, "_BLOCK_DRAWS", 3_700)
    assert statistics.bootstrap_interval(scores).low == pytest.approx(whole.low, abs=5e-3)


def test_seeds_that_disagree_widen_the_interval_and_equal_seeds_do_not() -> None:
    generator = np.random.default_rng(5)
    problems = generator.random(100)
    one = statistics.bootstrap_interval(problems)
    same = statistics.bootstrap_interval(np.stack([problems] * 5))
    shifted = statistics.bootstrap_interval(problems[None] * 0.5 + np.array([0.0, 0.1, 0.2, 0.3, 0.4])[:, None])
    assert same.high - same.low == pytest.approx(one.high - one.low, abs=5e-3)
    assert shifted.high - shifted.low > 1.5 * (one.high - one.low) * 0.5
    assert shifted.high - shifted.low > 0.1  # the seeds alone: sd 0.14 / sqrt(5)


def test_crossed_bootstrap_has_the_variance_of_two_independent_axes() -> None:
    seeds, problems = np.array([-0.2, -0.1, 0.0, 0.1, 0.2]), np.linspace(-0.3, 0.3, 50)
    interval = statistics.bootstrap_interval(0.5 + seeds[:, None] + problems[None], resamples=40_000)
    deviation = np.sqrt(seeds.var() / 5 + problems.var() / 50)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * deviation, rel=0.03)


@pytest.mark.parametrize("n", [1, 12, 100])
def test_all_correct_and_all_wrong_give_the_clopper_pearson_interval(n: int) -> None:
    interval = statistics.bootstrap_interval(np.ones(n))
    assert (interval.value, interval.low, interval.high) == (1.0, pytest.approx(0.025 ** (1 / n)), 1.0)
    interval = statistics.bootstrap_interval(np.zeros((3, n)))
    assert (interval.value, interval.low, interval.high) == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / n)))


def test_pairing_removes_what_makes_problems_hard() -> None:
    generator = np.random.default_rng(7)
    base = generator.random(100) * 0.8
    steered = base + 0.1 + 0.02 * generator.standard_normal(100)
    paired = statistics.paired_difference(steered, base)
    alone = statistics.bootstrap_interval(steered)
    assert paired.low < 0.1 < paired.high
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)
    opposite = statistics.paired_difference(base, steered)
    assert (opposite.value, opposite.low) == pytest.approx((-paired.value, -paired.high), abs=1e-3)


def test_no_difference_anywhere_still_has_a_width() -> None:
    scores = np.random.default_rng(0).random(100)
    interval = statistics.paired_difference(scores, scores)
    assert interval.low == pytest.approx(-interval.high)
    assert interval.high == pytest.approx(1 - 0.025 ** (1 / 100))


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [((3,), (4,), "problems cannot be paired"), ((2, 4), (3, 4), "seeds cannot be paired")],
)
def test_unlike_shapes_cannot_be_paired(ours, theirs, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        statistics.paired_difference(np.zeros(ours), np.zeros(theirs))


def test_empty_and_broken_scores_are_refused() -> None:
    with pytest.raises(UsageError, match="no scores"):
        statistics.bootstrap_interval(np.zeros(0))
    with pytest.raises(UsageError, match="not a finite number"):
        statistics.bootstrap_interval(np.array([0.5, np.nan]))


def test_summarise_agrees_with_its_parts_in_any_row_order() -> None:
    correct = np.random.default_rng(11).random((2, 30, 8)) < 0.4
    completions = pd.concat([_completions(correct), _completions(correct[:1, :, :1], "greedy")])
    shuffled = completions.sample(frac=1.0, random_state=0)
    heat = {"steered": 1.0, "greedy": 0.0}
    scores = statistics.summarise(completions, model="tiny", temperature=heat, metrics=("avg@k", "pass@k", "pass@1"))
    assert scores["metric"].tolist() == ["avg@8", "pass@8", "pass@1", "avg@1", "pass@1", "pass@1"]
    pd.testing.assert_frame_equal(
        statistics.summarise(shuffled, model="tiny", temperature=heat).sort_values(
            ["condition", "metric"], ignore_index=True
        ),
        statistics.summarise(completions, model="tiny", temperature=heat).sort_values(
            ["condition", "metric"], ignore_index=True
        ),
    )
    first = scores.iloc[0]
    interval = statistics.bootstrap_interval(correct.mean(-1))
    assert (first["value"], first["low"], first["high"]) == (interval.value, interval.low, interval.high)
    assert (first["n_seeds"], first["n_problems"], first["n_samples"], first["temperature"]) == (2, 30, 8, 1.0)
    assert scores.iloc[3]["temperature"] == 0.0


def test_summarise_refuses_holes_unknown_metrics_and_too_large_k() -> None:
    completions = _completions(np.ones((1, 4, 2), dtype=bool))
    with pytest.raises(UsageError, match=r"7 completions .* not 1 seeds × 4 problems × 2 samples"):
        statistics.summarise(completions.iloc[1:], model="tiny", temperature=1.0)
    with pytest.raises(UsageError, match="unknown metric 'accuracy'"):
        statistics.summarise(completions, model="tiny", temperature=1.0, metrics=("accuracy",))
    with pytest.raises(UsageError, match="pass@3 needs 1 ≤ k ≤ 2"):
        statistics.summarise(completions, model="tiny", temperature=1.0, metrics=("pass@3",))
    with pytest.raises(UsageError, match="no completions"):
        statistics.summarise(completions.iloc[:0], model="tiny", temperature=1.0)


def test_gain_pairs_conditions_by_problem() -> None:
    generator = np.random.default_rng(13)
    base, steered = generator.random((1, 40, 8)) < 0.2, generator.random((3, 40, 8)) < 0.6
    completions = pd.concat([_completions(base, "base"), _completions(steered)])
    interval = statistics.gain(completions)
    assert interval == statistics.paired_difference(steered.mean(-1), base.mean(-1))
    with pytest.raises(UsageError, match="no completions of condition 'greedy'"):
        statistics.gain(completions, baseline="greedy")
    shorter = pd.concat([_completions(base[..., :4], "base"), _completions(steered)])
    assert statistics.gain(shorter).value == pytest.approx(steered.mean() - base[..., :4].mean())
    with pytest.raises(UsageError, match="pass@8 and pass@4 cannot be compared"):
        statistics.gain(shorter, metric="pass@k")
    other = pd.concat(
        [_completions(base, "base").assign(problem=lambda frame: frame["problem"] + 1), _completions(steered)]
    )
    with pytest.raises(UsageError, match="different problems"):
        statistics.gain(other)
